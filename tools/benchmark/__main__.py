"""What `scripts/benchmark` runs."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

COMMANDS: Final = {
    "generate": "how fast music is made, by this package and by its peers",
    "start": "from the start of a process to a finished file",
    "request": "from a request to a file, in a process that has made music before",
    "mbd": "how fast codes are decoded with MultiBand Diffusion, by this package and audiocraft",
    "profile": "what the device does in one step",
    "todo": "the figures of a GPU that are still missing, also as --gpu-todo",
    "table": "the README's tables, from what benchmarks/ holds, and what is asked of it",
}
_USAGE: Final = "scripts/benchmark COMMAND [--help] [flags of the command...]"


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """
    given = ["todo" if argument == "--gpu-todo" else argument for argument in arguments]
    if "todo" in given:
        given.remove("todo")
        given.insert(0, "todo")
    for flag, value in zip(given, [*given[1:], ""], strict=True):
        # Behind all else: this project's audiocraft is not the one in there.
        if flag == "--packages":
            sys.path.append(value)
        elif flag.startswith("--packages="):
            sys.path.append(flag.partition("=")[2])
    from audiocraft.errors import InputError
    from audiocraft.serving.command import run

    def command() -> None:
        if not given or given[0] in {"-h", "--help"}:
            print(f"usage: {_USAGE}\n")
            print("\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items()))
        elif given[0] in COMMANDS:
            import_module(f"tools.benchmark.{given[0]}").main(given[1:])
        else:
            raise InputError(f"{given[0]} is no command; there are {', '.join(COMMANDS)}.")

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
