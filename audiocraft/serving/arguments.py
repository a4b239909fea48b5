"""Inputs from the command line: `name=value` texts to the JSON values that the schema asks for."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from audiocraft.errors import InputError
from audiocraft.serving.interface import Json

_INT64: Final = (-(2**63), 2**63 - 1)
_URL: Final = re.compile(r"(https?://|data:)", re.IGNORECASE)
_TYPE_WORDS: Final = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
}


def parse_inputs(pairs: Sequence[str], schema: Json) -> Json:
    """Reads `name=value` pairs, checks them against the schema and returns the request's input.

    A value `@path` stands for a file and becomes its absolute path; one pair of double quotes
    around a value is dropped; a name that takes a list may come several times.

    Args:
        pairs: as given after each `-i`.
        schema: from `audiocraft.serving.schema.input_schema`.

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
            problems.append(f"{name} is given more than once; give it once.")
        else:
            try:
                value = _coerce(name, text, prop)
            except InputError as error:
                problems.append(str(error))
            else:
                inputs[name] = [*inputs.get(name, []), *value] if is_list else value
    # Names whose value could not be read must not be reported as missing on top.
    if not problems:
        problems = check_inputs(inputs, schema)
    if problems:
        raise InputError("\n".join(problems))
    return inputs


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


def _coerce(name: str, text: str, prop: Json) -> Any:
    """A value of the type that the schema asks for; text that is none stays text."""
    if len(text) > 1 and text.startswith('"') and text.endswith('"'):
        text = text[1:-1]
    kind = prop.get("type")
    if kind == "array":
        return _json_list(text) or [_coerce(name, text, prop["items"])]
    if text.startswith("@"):
        return _file(name, text[1:])
    if prop.get("format") == "uri" and not _URL.match(text):
        raise InputError(
            f"{name} must be a URL, or @ and the path of a file, as in {name}=@{text or 'file'}."
        )
    if kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return _number(text, kind) if kind in ("integer", "number") else text


def _json_list(text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return value if isinstance(value, list) else []


def _number(text: str, kind: str) -> int | float | str:
    """Digits become an int even for a float input: 64 bits must arrive exactly."""
    if re.fullmatch(r"[-+]?\d+(\.0+)?", text):
        return int(text.partition(".")[0])
    try:
        number = float(text)
    except ValueError:
        return text
    return number if kind == "number" and math.isfinite(number) else text


def _file(name: str, text: str) -> str:
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        raise InputError(f"{name} must be a file, but {text!r} is a folder.")
    if not path.is_file():
        raise InputError(f"{name} must be a file, but there is no {text!r}.")
    return str(path)


def _check_value(name: str, value: Any, prop: Json) -> list[str]:
    kind = prop["type"]
    wanted = None
    if "enum" in prop:
        if value not in prop["enum"]:
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
        bounds = _INT64 if kind == "integer" else (-math.inf, math.inf)
        if value < prop.get("minimum", bounds[0]):
            wanted = f"at least {prop.get('minimum', bounds[0])}"
        elif value > prop.get("maximum", bounds[1]):
            wanted = f"at most {prop.get('maximum', bounds[1])}"
    return [] if wanted is None else [f"{name} must be {wanted}, not {value!r}."]


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    types = {"integer": int, "number": int, "string": str, "array": list}
    return kind in types and isinstance(value, types[kind])
