"""The command line: what `scripts/predict` runs, as `cog predict` without a container."""

import argparse
import json
import math
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving import outputs
from audiocraft.serving.arguments import parse_environment, parse_inputs, parse_json
from audiocraft.serving.command import Parser, run, say, write_line
from audiocraft.serving.device import DeviceCheck
from audiocraft.serving.interface import Json
from audiocraft.serving.schema import input_schema, write_schema
from audiocraft.serving.server import CogServer, plain_message

PROJECT: Final = Path(__file__).resolve().parents[2]
_TYPE_NAMES: Final = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "array": "list",
}


def main(arguments: Sequence[str] | None = None, *, project: Path = PROJECT) -> int:
    """Runs one command.

    Args:
        arguments: command and its flags; those of the process by default.
        project: folder of `predict.py`.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def command() -> None:
        if not given or given[0] != "predict":
            raise InputError("The first argument must be the command: predict.")
        _predict(given[1:], project)

    return run(command)


def _predict(flags: Sequence[str], project: Path) -> None:
    try:
        document = write_schema(project)
    except OSError as error:
        raise InputError(f"The schema of {project} cannot be written: {error}.") from error
    schema = input_schema(document)
    arguments = _parser("scripts/predict", schema).parse_args(flags)
    environment = parse_environment(arguments.env)
    as_response = arguments.json is not None
    target = outputs.find_target(arguments.output, as_response=as_response)
    inputs = (
        parse_json(arguments.json, schema) if as_response else parse_inputs(arguments.input, schema)
    )
    if as_response and not target.has_json_name:
        say(f"Warning: -o {str(target.path)!r} will hold JSON, but does not end in .json.")
    with (
        DeviceCheck() as device,
        CogServer(
            project,
            log=say,
            setup_timeout=arguments.setup_timeout,
            environment=environment,
        ) as server,
    ):
        warning = device.warning()
        if warning is not None:
            say(warning)
        answer = server.predict(inputs)
    _deliver(answer, target)


def _parser(program: str, schema: Json) -> Parser:
    parser = Parser(
        prog=program,
        description="Makes music on Cog's own server, without a container.",
        epilog=_describe(schema),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input, as listed below; NAME=@PATH for a file; may be given many times",
    )
    inputs.add_argument(
        "--json",
        metavar="JSON",
        help="all inputs as one JSON object: the object itself, @PATH of a file that holds it, or "
        '- for standard input; "@PATH" in it is a file; the whole response then comes as JSON, to '
        "standard output or -o, with the path of the file that was made, which lies beside it",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="where the result goes: a file, with or without its extension, or a folder "
        "(default: output with the extension of the format, here)",
    )
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable of the server, such as COG_WEIGHTS=PATH; may be given many "
        "times",
    )
    parser.add_argument(
        "--setup-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="how long the model may take to get ready (default: 300)",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number of seconds above 0, not {text!r}")
    return seconds


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


def _deliver(answer: Json, target: outputs.Target) -> None:
    """Files are written, text goes out as it is, anything else as JSON.

    Raises:
        AudiocraftError: the prediction failed, or its result cannot be written.
    """
    succeeded = answer["status"] == "succeeded"
    output = answer.get("output") if succeeded else None
    is_list = isinstance(output, list)
    files = outputs.write_files(outputs.files_of(output), target, number=is_list)
    for path in files:
        say(f"Written output to: {path}")
    if succeeded and output is None:
        say("Warning: no output was generated.")
    if target.as_response:
        if files:
            paths = [str(path) for path in files]
            answer = answer | {"output": paths if is_list else paths[0]}
        _put(json.dumps(answer, indent=2), target)
    elif output is not None and not files:
        _put(output if isinstance(output, str) else json.dumps(output, indent=2), target)
    if not succeeded:
        raise AudiocraftError(_failure(answer))


def _put(text: str, target: outputs.Target) -> None:
    """Writes text to where `-o` says, else to standard output."""
    if target.named:
        outputs.write_file(target.path, f"{text}\n".encode())
        say(f"Written output to: {target.path}")
        return
    if sys.stdout is None:  # as it is where it was closed
        raise InputError("Standard output is closed; name a file with -o.")
    try:
        write_line(sys.stdout, text)
    except OSError as error:
        raise InputError(f"Standard output cannot be written: {error}.") from error


if __name__ == "__main__":
    exit_status = main()
    for interrupt in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(interrupt, signal.SIG_IGN)  # nothing is left to stop
    sys.exit(exit_status)
