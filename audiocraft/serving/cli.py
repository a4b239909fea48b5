"""The command line: what `scripts/predict` runs, as `cog predict` without a container."""

import argparse
import json
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving import outputs
from audiocraft.serving.arguments import parse_inputs
from audiocraft.serving.device import DeviceCheck
from audiocraft.serving.interface import Json
from audiocraft.serving.schema import input_schema, write_schema
from audiocraft.serving.server import CogServer, plain_message

PROJECT: Final = Path(__file__).resolve().parents[2]
_INTERRUPTED: Final = 130  # what a shell reports after Ctrl-C
_TYPE_NAMES: Final = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "array": "list",
}


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of leaving with argparse's own exit status."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help shows what there is.")


def main(arguments: Sequence[str] | None = None, *, project: Path = PROJECT) -> int:
    """Runs one command.

    Args:
        arguments: command and its flags; those of the process by default.
        project: folder of `predict.py`.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # every way out stops the server
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, signal.default_int_handler)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if not given or given[0] != "predict":
            raise InputError("The first argument must be the command: predict.")
        _predict(given[1:], project)
    except AudiocraftError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("Stopped.")
        return _INTERRUPTED
    return 0


def _predict(flags: Sequence[str], project: Path) -> None:
    document = write_schema(project)
    schema = input_schema(document)
    arguments = _parser("scripts/predict", schema).parse_args(flags)
    inputs = parse_inputs(arguments.input, schema)
    target = outputs.check_target(arguments.output)
    with (
        DeviceCheck() as device,
        CogServer(project, log=_say, setup_timeout=arguments.setup_timeout) as server,
    ):
        warning = device.warning()
        if warning is not None:
            _say(warning)
        answer = server.predict(inputs)
    if answer["status"] != "succeeded":
        raise AudiocraftError(_failure(answer))
    _deliver(answer.get("output"), target)


def _parser(program: str, schema: Json) -> _Parser:
    parser = _Parser(
        prog=program,
        description="Makes music on Cog's own server, without a container.",
        epilog=_describe(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input, as listed below; NAME=@PATH for a file; may be given many times",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=lambda text: Path(text.removeprefix("@")).expanduser(),
        metavar="PATH",
        help="where the result goes: a file, with or without its extension, or a folder "
        "(default: output with the extension of the format, here)",
    )
    parser.add_argument(
        "--setup-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long the model may take to get ready (default: 300)",
    )
    return parser


def _describe(schema: Json) -> str:
    """The inputs and what they do, for --help."""
    lines = ["inputs:"]
    for name, prop in schema["properties"].items():
        kind = ", ".join(map(str, prop["enum"])) if "enum" in prop else _TYPE_NAMES[prop["type"]]
        kind = "file" if prop.get("format") == "uri" else kind
        default = prop.get("default")
        if default is not None:
            kind += f"; default {default if isinstance(default, str) else json.dumps(default)}"
        if name in schema["required"]:
            kind += "; required"
        lines += textwrap.wrap(
            f"{name} ({kind})", 96, initial_indent="  ", subsequent_indent="    "
        )
        lines += textwrap.wrap(
            prop["description"], 96, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)


def _failure(answer: Json) -> str:
    """Why a prediction failed: the model's own sentence where it is one."""
    if answer["status"] != "failed":
        return f"The prediction ended with status {answer['status']!r}."
    text = str(answer.get("error") or "The prediction failed without a reason.")
    if text == "Worker crashed":
        return "The model's process was killed while it worked, most likely for lack of memory."
    return plain_message(text)


def _deliver(output: object, target: Path) -> None:
    """Files are written, text is printed, anything else is printed as JSON."""
    urls = outputs.files_of(output)
    if output is None:
        _say("Warning: no output was generated.")
    elif urls:
        for path in outputs.write_files(urls, target, number=isinstance(output, list)):
            _say(f"Written output to: {path}")
    else:
        text = output if isinstance(output, str) else json.dumps(output, indent=2)
        sys.stdout.write(f"{text}\n")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
