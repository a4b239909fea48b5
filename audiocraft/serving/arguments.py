"""Inputs from the command line: texts to the JSON values that the schema asks for."""

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from audiocraft.errors import InputError
from audiocraft.serving.interface import Json

_INT64: Final = (-(2**63), 2**63 - 1)
_FLOAT: Final = (-sys.float_info.max, sys.float_info.max)
_URL: Final = re.compile(r"(https?://|data:)", re.IGNORECASE)
_NO_UTF8: Final = re.compile(r"[\ud800-\udfff]")  # as Python has a byte that is none
_TYPE_WORDS: Final = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
}


def parse_inputs(pairs: Sequence[str], schema: Json, *, folders: bool = False) -> Json:
    """Reads `name=value` pairs, checks them against the schema and returns the request's input.

    A value `@path` stands for a file and becomes its absolute path; one pair of double quotes
    around a value is dropped; a name that takes a list may come several times.

    Args:
        pairs: as given after each `-i`.
        schema: from `audiocraft.serving.schema.input_schema`.
        folders: whether a folder does where a file is asked for; it needs no `@`.

    Raises:
        InputError: one sentence for each thing that is wrong.
    """
    properties = schema["properties"]
    inputs: Json = {}
    problems: list[str] = []
    for pair in pairs:
        name, equals, text = pair.partition("=")
        prop = properties.get(name, {})
        is_list = prop.get("type") == "array"
        if not equals:
            problems.append(f"-i takes name=value, but {pair!r} has no '='.")
        elif name in inputs and not is_list:
            problems.append(_twice(name))
        else:
            try:
                value = _coerce(name, text, prop, folders=folders)
            except InputError as error:
                problems.append(str(error))
            else:
                inputs[name] = [*inputs.get(name, []), *value] if is_list else value
    return _checked(inputs, schema, problems)


def parse_json(source: str, schema: Json, *, folders: bool = False) -> Json:
    """Reads inputs from a JSON object, checks them and returns the request's input.

    A text `@path` stands for a file and becomes its absolute path, in lists too.

    Args:
        source: as given after `--json`: the object itself, `@` and the path of a file that holds
            it, or `-` or `@-` for standard input.
        schema: from `audiocraft.serving.schema.input_schema`.
        folders: see `parse_inputs`.

    Raises:
        InputError: one sentence for each thing that is wrong.
    """
    inputs: Json = {}
    problems: list[str] = []
    for name, value in _json_pairs(source):
        prop = schema["properties"].get(name, {})
        if name in inputs:
            problems.append(_twice(name))
        try:
            inputs[name] = _resolve(name, value, prop, folders=folders)
        except InputError as error:
            problems.append(str(error))
    return _checked(inputs, schema, problems)


def parse_environment(pairs: Sequence[str]) -> dict[str, str]:
    """Reads `NAME=value` pairs as given after each `-e`; of a name given twice the last counts.

    Raises:
        InputError: a pair is none, or names what cannot be chosen.
    """
    environment = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"-e takes NAME=value, but {pair!r} is none.")
        if name == "PORT":
            raise InputError(
                "-e cannot set PORT, because the server gets a port that is free; leave it out."
            )
        environment[name] = value
    return environment


def check_inputs(inputs: Json, schema: Json) -> list[str]:
    """Compares JSON values with the schema as the server will.

    Returns:
        One sentence for each thing that is wrong: the input, the limit, and what is accepted.
    """
    properties = schema["properties"]
    problems = []
    for name, value in inputs.items():
        if name in properties:
            problems += _check_value(name, value, properties[name])
        else:
            close = difflib.get_close_matches(name, properties, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(properties)}."
            problems.append(f"{name} is not an input of this model; {hint}")
    problems += [
        f"{name} is required; give it with -i {name}=..."
        for name in schema["required"]
        if name not in inputs
    ]
    return problems


def _checked(inputs: Json, schema: Json, problems: list[str]) -> Json:
    # Names whose value could not be read must not be reported as missing on top.
    problems = problems or check_inputs(inputs, schema)
    if problems:
        raise InputError("\n".join(problems))
    return inputs


def _twice(name: str) -> str:
    return f"{name} is given more than once; give it once."


def _coerce(name: str, text: str, prop: Json, *, folders: bool) -> Any:
    """A value of the type that the schema asks for; text that is none stays text."""
    if len(text) > 1 and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    kind = prop.get("type")
    if kind == "array":
        items = _json_list(text)
        if items is None:
            return [_coerce(name, text, prop["items"], folders=folders)]
        return _resolve(name, items, prop, folders=folders)
    if kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if kind in ("integer", "number"):
        return _number(text, kind)
    return _resolve(name, text, prop, folders=folders)


def _resolve(name: str, value: Any, prop: Json, *, folders: bool) -> Any:
    """A JSON value with every `@path` in it replaced by an absolute path.

    Raises:
        InputError: there is no such file, or a text stands for a file and is neither path nor URL.
    """
    if isinstance(value, list):
        items = prop.get("items", {})
        return [
            _resolve(f"{name} (item {number})", item, items, folders=folders)
            for number, item in enumerate(value, start=1)
        ]
    if not isinstance(value, str):
        return value
    if prop.get("format") != "uri":
        return _file(name, value[1:]) if value.startswith("@") else value
    if value.startswith("@"):
        return _file(name, value[1:], folders=folders)
    if _URL.match(value):
        return value
    if folders and value and _is_folder(value):
        return _file(name, value, folders=True)
    raise InputError(
        f"{name} must be a URL, or @ and the path of {_kinds(folders=folders)}, as in "
        f"{name.partition(' ')[0]}=@{value or 'file'}."
    )


def _is_folder(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError):
        return False


def _kinds(*, folders: bool) -> str:
    return "a file or a folder" if folders else "a file"


def _json_list(text: str) -> list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _json_pairs(source: str) -> list[tuple[str, Any]]:
    """The members of the JSON object that a source gives, in their order, repeated ones too."""
    text: str | bytes = source
    label = "--json"
    if source in ("-", "@-"):
        label = "--json: standard input"
        text = _standard_input()
    elif source.startswith("@"):
        path = Path(_file("--json", source[1:]))
        label = f"--json: {source[1:]!r}"
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{label} cannot be read ({error.strerror}); check the path."
            ) from error
    members: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> Json:
        members[:] = pairs  # objects end from the inside out: the last to end is the whole
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=keep, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{label} is not valid JSON ({error}); give an object, as in "
            f'--json \'{{"prompt": "piano"}}\', @ and the path of a file that holds one, or -.'
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{label} must be a JSON object, with the names of inputs as its keys.")
    return members


def _standard_input() -> bytes:
    try:
        if sys.stdin is not None:  # as it is where it was closed
            return sys.stdin.buffer.read()
        reason = "it is closed"
    except OSError as error:
        reason = str(error.strerror)
    raise InputError(
        f"--json - reads standard input, which is not possible ({reason}); give @ and the path of "
        "a file."
    )


def _refuse_constant(text: str) -> NoReturn:
    """Python would take NaN and Infinity, which no JSON has."""
    raise ValueError(f"{text} is no number")


def _number(text: str, kind: str) -> int | float | str:
    """Digits become an int even for a float input: 64 bits must arrive exactly."""
    try:
        if re.fullmatch(r"[-+]?\d+(\.0+)?", text):
            return int(text.partition(".")[0])
        number = float(text)
    except ValueError:  # more digits than Python reads are no number either
        return text
    return number if kind == "number" and math.isfinite(number) else text


def _file(name: str, text: str, *, folders: bool = False) -> str:
    """The absolute path of a file that can be read, or of a folder."""
    kinds, remedy = _kinds(folders=folders), "check the path"
    try:
        path = Path(text).expanduser().absolute()
        if not text:
            raise InputError(f"{name} must be {kinds}, but there is no path after the @; add one.")
        if path.is_file() or (folders and path.is_dir()):
            if not os.access(path, os.R_OK):
                raise InputError(
                    f"{name} must be {kinds}, but {text!r} must not be read; check its permissions."
                )
            return str(path)
        if path.is_dir():
            problem = f"{text!r} is a folder"
        elif path.exists():  # a pipe, such as the shell's <(...)
            problem, remedy = f"{text!r} is none that stays on disk", "save it first"
        else:
            problem = f"there is no {text!r}"
    except OSError as error:  # too long, or in a folder that is closed to us
        problem = f"{text!r} cannot be looked up ({error.strerror})"
    except RuntimeError:  # no such user's home
        problem = f"{text!r} cannot be looked up"
    raise InputError(f"{name} must be {kinds}, but {problem}; {remedy}.")


def _check_value(name: str, value: Any, prop: Json) -> list[str]:
    kind = prop["type"]
    wanted = None
    if value is None:
        return [f"{name} must not be null; leave it out instead."]
    if isinstance(value, str) and _NO_UTF8.search(value):
        return [f"{name} holds bytes that are not UTF-8; rename the file, or type the text anew."]
    if "enum" in prop:
        if not _has_type(value, kind) or value not in prop["enum"]:
            wanted = f"one of {', '.join(map(str, prop['enum']))}"
    elif not _has_type(value, kind):
        wanted = _TYPE_WORDS[kind]
    elif kind == "array":
        return [
            problem
            for number, item in enumerate(value, start=1)
            for problem in _check_value(f"{name} (item {number})", item, prop["items"])
        ]
    elif kind in ("integer", "number"):
        bounds = _INT64 if kind == "integer" else _FLOAT
        if value < prop.get("minimum", bounds[0]):
            wanted = f"at least {prop.get('minimum', bounds[0])}"
        elif value > prop.get("maximum", bounds[1]):
            wanted = f"at most {prop.get('maximum', bounds[1])}"
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    return [] if wanted is None else [f"{name} must be {wanted}, not {shown}."]


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float):
        return math.isfinite(value) and (
            kind == "number" or (kind == "integer" and value.is_integer())
        )
    types = {"integer": int, "number": int, "string": str, "array": list}
    return kind in types and isinstance(value, types[kind])
