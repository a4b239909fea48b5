"""What `scripts/predict` and `scripts/train` run: `cog predict` and `cog train`, no container."""

import argparse
import contextlib
import json
import math
import os
import runpy
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import AudiocraftError, InputError
from audiocraft.serving import outputs
from audiocraft.serving.arguments import parse_environment, parse_inputs, parse_json
from audiocraft.serving.command import Parser, run, say, write_line
from audiocraft.serving.interface import Json
from audiocraft.serving.schema import input_schema, write_schema
from audiocraft.serving.server import (
    CogServer,
    absolute_weights,
    plain_message,
    with_absolute_paths,
)

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
        project: folder of `predict.py` and `train.py`.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"predict": _predict, "train": _train}

    def command() -> None:
        if not given or given[0] not in commands:
            raise InputError("The first argument must be the command: predict or train.")
        commands[given[0]](given[1:], project)

    return run(command)


def _predict(flags: Sequence[str], project: Path) -> None:
    schema = _schema(project, training=False)
    arguments = _prediction_parser(schema).parse_args(flags)
    environment = parse_environment(arguments.env)
    target = outputs.find_target(arguments.output, as_response=arguments.json is not None)
    inputs = _inputs(arguments, schema, target, folders=False)
    if inputs.get("replicate_weights"):  # a text, which may be a path without its @
        inputs["replicate_weights"] = absolute_weights(inputs["replicate_weights"])
    server = CogServer(
        project, log=say, setup_timeout=arguments.setup_timeout, environment=environment
    )
    with server:
        answer = server.ask(inputs)
    _deliver(answer, target)


def _train(flags: Sequence[str], project: Path) -> None:
    schema = _schema(project, training=True)
    arguments = _training_parser(schema).parse_args(flags)
    environment = parse_environment(arguments.env)
    target = outputs.find_target(
        arguments.output,
        as_response=arguments.json is not None,
        stem="trained_model",
        extensions=(outputs.WEIGHTS_EXTENSION,),
    )
    inputs = _inputs(arguments, schema, target, folders=True)
    if arguments.dry_run:
        _describe_training(project, inputs, schema, environment)
        return
    if arguments.fresh:
        environment["TRAIN_FRESH"] = "1"
    server = CogServer(
        project,
        training=True,
        log=say,
        setup_timeout=arguments.setup_timeout,
        environment={**environment, "WEIGHTS_BY_PATH": "1"},
    )
    with server:
        answer = server.ask(inputs)
    _deliver_weights(answer, target)


def _schema(project: Path, *, training: bool) -> Json:
    """The inputs, of a schema that lies where Cog's server reads it."""
    try:
        document = write_schema(project)
    except OSError as error:
        raise InputError(f"The schema of {project} cannot be written: {error}.") from error
    return input_schema(document, training=training)


def _inputs(
    arguments: argparse.Namespace, schema: Json, target: outputs.Target, *, folders: bool
) -> Json:
    """The request's input, by whichever flag it comes."""
    if not target.as_response:
        inputs = parse_inputs(arguments.input, schema, folders=folders)
        _choose_format(inputs, schema, target)
        return inputs
    inputs = parse_json(arguments.json, schema, folders=folders)
    if not target.has_json_name:
        say(f"Warning: -o {str(target.path)!r} will hold JSON, but does not end in .json.")
    return inputs


def _choose_format(inputs: Json, schema: Json, target: outputs.Target) -> None:
    """Has the name of `-o` choose the format where it ends in one and the inputs name none.

    Another ending stays as it is, as Cog has it, with a warning.

    Raises:
        InputError: they name another.
    """
    extension = target.path.suffix
    name = extension.removeprefix(".").lower()
    formats = schema["properties"].get("output_format", {}).get("enum", ())
    if name not in formats:
        if formats and extension:
            given = inputs.get("output_format", schema["properties"]["output_format"]["default"])
            say(
                f"Warning: -o {str(target.path)!r} will hold {given}, but does not end in .{given}."
            )
        return
    given = inputs.setdefault("output_format", name)
    if given != name:
        raise InputError(
            f"-o: {str(target.path)!r} ends in {extension}, but output_format is {given}; leave "
            "output_format out, or choose another name."
        )


def _describe_training(
    project: Path, inputs: Json, schema: Json, environment: Mapping[str, str]
) -> None:
    """Says what the server would do with these inputs, after the same checks."""
    if not Path(inputs["dataset_path"]).is_absolute():
        raise InputError(
            "--dry-run looks into the dataset, so it must be on this machine: give its path "
            "instead of a URL."
        )
    # First: some are read when what works with them is imported.
    os.environ.update(with_absolute_paths({**os.environ, "ALLOW_LOCAL_FILES": "1", **environment}))
    from audiocraft.serving.training import TrainingRequest, describe, vocabularies_of

    types = {"integer": int, "number": float}  # as `train.py` has them
    given: dict[str, Any] = {
        name: types.get(schema["properties"][name]["type"], type(value))(value)
        for name, value in inputs.items()
    }
    request = TrainingRequest(**given | {"dataset_path": Path(inputs["dataset_path"])})
    with contextlib.chdir(project):
        describe(request, vocabularies_of(runpy.run_path("metadata.py")))


def _prediction_parser(schema: Json) -> Parser:
    return _parser(
        "scripts/predict",
        "Makes music on Cog's own server, without a container.",
        schema,
        file="a file",
        output="where the result goes: a file, with or without its extension, which chooses "
        "output_format where that is not given, or a folder (default: output with the extension of "
        "the format, here)",
        variable="COG_WEIGHTS=PATH",
    )


def _training_parser(schema: Json) -> Parser:
    parser = _parser(
        "scripts/train",
        "Fine-tunes a model on Cog's own server, without a container.",
        schema,
        file="a file or a folder",
        output="where the weights go: a file, with or without its extension, or a folder (default: "
        "they stay in weights/ of this project, and their path is printed)",
        variable="TRAIN_PROCESSES=2",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, memory and what names and headers tell of the dataset, say what "
        "would be done and how long the training itself takes, and stop",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin again, where the same inputs would go on with a training that was stopped",
    )
    return parser


def _parser(
    program: str, description: str, schema: Json, *, file: str, output: str, variable: str
) -> Parser:
    """The flags that both commands have.

    Args:
        program: its name.
        description: what it does.
        schema: the inputs.
        file: what may be given by its path.
        output: help on `-o`.
        variable: an example for `-e`.
    """
    parser = Parser(
        prog=program,
        description=description,
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
        help=f"an input, as listed below; NAME=@PATH for {file}; may be given many times",
    )
    inputs.add_argument(
        "--json",
        metavar="JSON",
        help="all inputs as one JSON object: the object itself, @PATH of a file that holds it, or "
        f'- for standard input; "@PATH" in it is {file}; the whole response then comes as JSON, to '
        "standard output or -o, with the path of the file that was made, which lies beside it",
    )
    parser.add_argument("-o", "--output", metavar="PATH", help=output)
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"an environment variable of the server, such as {variable}; may be given many times",
    )
    parser.add_argument(
        "--setup-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="how long the server may take to get ready (default: 300)",
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


def _check_success(answer: Json, takes_less: str) -> None:
    """Raises AudiocraftError with the reason of a failure, the model's own where it has one.

    Args:
        answer: of the server.
        takes_less: inputs that take less memory.
    """
    status = answer["status"]
    if status == "succeeded":
        return
    if status != "failed":
        raise AudiocraftError(f"The server's work ended with status {status!r}; try again.")
    text = str(
        answer.get("error")
        or "The server's work failed without a reason; see its log above, and try again."
    )
    if text == "Worker crashed":
        text = (
            "The model's process was killed while it worked, most likely for lack of memory: take "
            f"{takes_less}."
        )
    raise AudiocraftError(plain_message(text))


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
    _check_success(answer, "a smaller model_version or a shorter duration")


def _deliver_weights(answer: Json, target: outputs.Target) -> None:
    """The file of weights goes to where `-o` says, else its path to standard output.

    Raises:
        AudiocraftError: the training failed, or its result cannot be put there.
    """
    if answer["status"] == "succeeded":
        weights = Path(answer["output"]["weights"])
        if target.named:
            file = target.file(outputs.WEIGHTS_EXTENSION).absolute()
            try:
                outputs.put_file(file, weights)
            except InputError as error:
                text = str(error).removesuffix(".")
                raise InputError(f"{text}, or take the weights from {weights}.") from error
            say(f"Written output to: {file}")
            answer = answer | {"output": {"weights": str(file)}}
        elif not target.as_response:
            _put(str(weights), target)
    if target.as_response:
        _put(json.dumps(answer, indent=2), target)
    _check_success(answer, "lora_rank=16 or a smaller model_version")


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
