"""The Cog interface as Cog's schema generator reads it: from source, never importing it.

The generator silently drops what it cannot read: a default that is an expression makes its input
required, a bound that is a name vanishes, a comment inside a list of choices breaks the list. This
reader accepts a part of what the generator accepts, never more, and all else is an error that
names the input: what passes here means the same to Cog.
"""

import ast
import io
import math
import re
import tokenize
from dataclasses import dataclass
from typing import Any, Final

from audiocraft.errors import AudiocraftError

Json = dict[str, Any]

_SCALARS: Final[dict[str, Json]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
_PYTHON_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
# Keyword of Input(...): its name in the schema, the types of its value, the inputs it may stand at.
_KEYWORDS: Final[dict[str, tuple[str, tuple[type, ...], tuple[str, ...]]]] = {
    "ge": ("minimum", (int, float), ("integer", "number")),
    "le": ("maximum", (int, float), ("integer", "number")),
    "min_length": ("minLength", (int,), ("string",)),
    "max_length": ("maxLength", (int,), ("string",)),
    "regex": ("pattern", (str,), ("string",)),
    "deprecated": ("deprecated", (bool,), ("string", "integer", "number", "boolean", "array")),
    "accept": ("x-cog-accept", (str,), ("string", "array")),
}
_IMPORTED_FROM: Final = {
    "Input": "cog",
    "Path": "cog",
    "BaseModel": "cog",
    "Optional": "typing",
    "List": "typing",
}
# Cog reads numbers with Go's parsers: no underscores, no complex numbers, no other bases.
_NUMBER: Final = re.compile(r"\d+|(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?")


class SchemaError(AudiocraftError):
    """The source of the interface holds something that Cog would misread, drop or refuse."""


@dataclass(frozen=True)
class Signature:
    """What one function of the interface takes and gives."""

    inputs: dict[str, Json]
    required: list[str]
    enums: dict[str, Json]
    output: Json


class Module:
    """One source file, read as Cog reads it: syntax, imports and module-level constants only."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self._source = source
        try:
            self._tree = ast.parse(source)
        except SyntaxError as error:
            raise SchemaError(f"{name}, line {error.lineno}: {error.msg}.") from error
        self._imports: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        for statement in self._tree.body:
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if alias.asname is None:
                        self._imports[alias.name] = statement.module or ""
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._add_constant(statement.targets[0], statement)
            elif isinstance(statement, ast.AnnAssign):
                self._add_constant(statement.target, statement)

    def _add_constant(self, target: ast.expr, statement: ast.stmt) -> None:
        if not isinstance(target, ast.Name):
            return
        stores = [
            node
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.id == target.id
        ]
        if len(stores) == 1:  # else Python and Cog might take different assignments
            self._constants[target.id] = self._text(statement).partition("=")[2].strip()

    def prediction(self) -> Signature:
        """The signature of `Predictor.run`."""
        predictor = self._class("Predictor")
        if predictor is None:
            raise self._error("the class Predictor", "is missing")
        methods = {
            node.name: node
            for node in predictor.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        if "run" not in methods or "predict" in methods:
            raise self._error("Predictor", "must define run(), and not predict() as well")
        return self._signature(methods["run"])

    def training(self) -> Signature:
        """The signature of the function `train`."""
        for node in self._tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "train":
                return self._signature(node)
        raise self._error("the function train()", "is missing")

    def _class(self, name: str) -> ast.ClassDef | None:
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        return None

    def _text(self, node: ast.AST) -> str:
        segment = ast.get_source_segment(self._source, node)
        assert segment is not None
        return segment

    def _error(self, subject: str, problem: str) -> SchemaError:
        return SchemaError(f"{self._name}: {subject} {problem}.")

    def _imported(self, node: ast.expr | None, name: str) -> bool:
        """Whether an expression is this name, imported from where Cog expects it."""
        return (
            isinstance(node, ast.Name)
            and node.id == name
            and self._imports.get(name) == _IMPORTED_FROM[name]
        )

    def _value(self, text: str, subject: str, *, constants: bool) -> Any:
        """The value of a literal, or of a name of a module-level literal.

        Args:
            text: source of the expression.
            subject: what the errors are about.
            constants: whether Cog looks up names here.
        """
        if constants and text in self._constants:
            text = self._constants[text]
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except (tokenize.TokenError, IndentationError):
            tokens = []
        hint = "must be one plain literal"
        if constants:
            hint += ", or the name of a module-level constant that is one and is assigned once"
        previous = None
        for token in tokens:
            readable = {
                tokenize.STRING: previous is None or previous.type != tokenize.STRING,
                tokenize.NUMBER: _NUMBER.fullmatch(token.string) is not None,
                tokenize.NAME: token.string in ("True", "False", "None"),
                tokenize.OP: token.string in ("[", "]", ",", "-"),
                tokenize.NL: True,
                tokenize.NEWLINE: True,
                tokenize.ENDMARKER: True,
            }.get(token.type, False)
            # "- 1" is a number to Python and nothing to Cog.
            glued = previous is None or previous.string != "-" or previous.end == token.start
            if not readable or not glued:
                raise self._error(subject, f"{hint}, not {text!r}")
            if token.type == tokenize.STRING:
                self._check_string(token.string, subject)
            if token.type != tokenize.NL:
                previous = token
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise self._error(subject, f"{hint}, not {text!r}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(subject, "must be finite")
        return value

    def _check_string(self, token: str, subject: str) -> None:
        """Compares what Python and Cog read: Cog takes the characters between the quotes as is."""
        if token.startswith(('"""', "'''")):
            read: str | None = token[3:-3]
        elif token.startswith(('"', "'")):
            read = token[1:-1]
        elif token.startswith(('r"', "r'")):
            read = token[2:-1]
        else:
            read = None
        if read is None or read != ast.literal_eval(token):
            raise self._error(
                subject, f"must hold plain characters, no escapes or prefixes, not {token}"
            )

    def _type(self, node: ast.expr | None, subject: str) -> tuple[Json, bool]:
        """A type annotation as JSON schema, and whether it allows None."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [node.left, node.right]
            inner = [side for side in sides if not _is_none(side)]
            if len(inner) == 1:
                return self._plain_type(inner[0], subject), True
        if isinstance(node, ast.Subscript) and self._imported(node.value, "Optional"):
            return self._plain_type(node.slice, subject), True
        return self._plain_type(node, subject), False

    def _plain_type(self, node: ast.expr | None, subject: str) -> Json:
        if isinstance(node, ast.Subscript) and (
            (isinstance(node.value, ast.Name) and node.value.id == "list")
            or self._imported(node.value, "List")
        ):
            return {"type": "array", "items": self._scalar(node.slice, subject)}
        return self._scalar(node, subject)

    def _scalar(self, node: ast.expr | None, subject: str) -> Json:
        if (
            not isinstance(node, ast.Name)
            or node.id not in _SCALARS
            or (node.id == "Path" and not self._imported(node, "Path"))
        ):
            written = "nothing" if node is None else self._text(node)
            raise self._error(
                subject,
                "must have the type str, int, float, bool or cog.Path (imported by name), a list "
                f"of one of them, or one of these with `| None`, not {written}",
            )
        return dict(_SCALARS[node.id])

    def _signature(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
        """The inputs and the output of `run` or `train`, in the order of the signature."""
        signature = function.args
        if signature.vararg or signature.kwarg or signature.kwonlyargs or signature.posonlyargs:
            raise self._error(
                f"{function.name}()", "must take plain parameters only, without *, ** and /"
            )
        for decorator in function.decorator_list:
            if re.search(r"\b(streaming|concurrent)\b", self._text(decorator)):
                raise self._error(f"{function.name}()", "must not be streaming or concurrent")
        parameters = [argument for argument in signature.args if argument.arg != "self"]
        missing = len(parameters) - len(signature.defaults)
        values: list[ast.expr | None] = [*[None] * missing, *signature.defaults]
        inputs: dict[str, Json] = {}
        required: list[str] = []
        enums: dict[str, Json] = {}
        for order, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            name = parameter.arg
            prop, choices, is_required = self._input(name, parameter.annotation, value)
            inputs[name] = {"x-order": order, **prop}
            if choices is not None:
                enums[name] = choices
            if is_required:
                required.append(name)
        return Signature(inputs, required, enums, self._output(function))

    def _input(
        self, name: str, annotation: ast.expr | None, value: ast.expr | None
    ) -> tuple[Json, Json | None, bool]:
        """One input: its property, the component of its choices, and whether it is required."""
        type_schema, nullable = self._type(annotation, f"input {name}")
        if not (isinstance(value, ast.Call) and self._imported(value.func, "Input")):
            raise self._error(f"input {name}", "must be declared by Input(...) of cog")
        if value.args:
            raise self._error(f"input {name}", "must name the arguments of Input(...)")
        given: Json = {}
        for keyword in value.keywords:
            key = keyword.arg or "**"
            subject = f"{key} of input {name}"
            if key not in {"description", "default", "choices", *_KEYWORDS}:
                raise self._error(subject, "is not known to Cog's static schema")
            text = self._text(keyword).partition("=")[2].strip()
            looks_up = key in {"description", "default", "choices"}
            given[key] = self._value(text, subject, constants=looks_up)

        description = given.get("description")
        if not isinstance(description, str) or not description.strip():
            raise self._error(f"input {name}", "needs a description, the label on the web form")
        prop: Json = {"description": description}
        for key, (target, types, served) in _KEYWORDS.items():
            if key in given:
                if type(given[key]) not in types or type_schema["type"] not in served:
                    raise self._error(f"{key} of input {name}", "does not fit the input's type")
                prop[target] = given[key]
        enum = None
        if "choices" in given:
            enum = self._choices(name, type_schema, given)
            prop["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            prop |= {"title": title_case(name), **type_schema}
        if "default" in given:
            self._check_default(name, type_schema, given, nullable=nullable)
            prop["default"] = given["default"]
        if nullable:
            prop["nullable"] = True
        return prop, enum, not nullable and "default" not in given

    def _choices(self, name: str, type_schema: Json, given: Json) -> Json:
        choices = given["choices"]
        types = _PYTHON_TYPES.get(type_schema["type"], ())
        if type_schema not in (_SCALARS["str"], _SCALARS["int"]) or not (
            isinstance(choices, list)
            and len(choices) > 1
            and all(type(choice) in types for choice in choices)
        ):
            raise self._error(
                f"choices of input {name}", "must be two or more strings, or integers, as its type"
            )
        if not given.keys().isdisjoint({"ge", "le", "min_length", "max_length"}):
            raise self._error(f"choices of input {name}", "exclude bounds")
        return {
            "title": name,
            "description": "An enumeration.",
            "enum": choices,
            "type": type_schema["type"],
        }

    def _check_default(self, name: str, type_schema: Json, given: Json, *, nullable: bool) -> None:
        default, subject = given["default"], f"default of input {name}"
        if default is None:
            if not nullable:
                raise self._error(
                    subject, "is None, which makes the input required unless its type is `| None`"
                )
            return
        if type(default) not in _PYTHON_TYPES.get(type_schema["type"], ()) or (
            "format" in type_schema
        ):
            raise self._error(subject, "does not fit the input's type")
        if "choices" in given and default not in given["choices"]:
            raise self._error(subject, "is not among the choices")
        if not given.get("ge", default) <= default <= given.get("le", default):
            raise self._error(subject, "is outside the bounds")

    def _output(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Json:
        returns = function.returns
        subject = f"the result of {function.name}()"
        model = self._class(returns.id) if isinstance(returns, ast.Name) else None
        if model is None or not any(self._imported(base, "BaseModel") for base in model.bases):
            schema, nullable = self._type(returns, subject)
            if nullable:
                raise self._error(subject, "must not be optional")
            return {**schema, "title": "Output"}
        fields: dict[str, Json] = {}
        required = []
        for statement in model.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(
                statement.target, ast.Name
            ):
                continue
            field = statement.target.id
            schema, nullable = self._type(statement.annotation, f"field {field} of {subject}")
            fields[field] = {**schema, "title": title_case(field)}
            if nullable:
                fields[field]["nullable"] = True
            elif statement.value is None:
                required.append(field)
        output: Json = {"type": "object", "properties": fields, "title": "Output"}
        return output | ({"required": required} if required else {})


def title_case(name: str) -> str:
    """The title that Cog makes of a name: `top_k` becomes `Top K`."""
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
