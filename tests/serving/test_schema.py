"""The schema: what Cog's static generator reads, and a sentence for all that it would lose."""

import inspect
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from cog.input import FieldInfo

import predict
from audiocraft.serving.interface import Module, SchemaError, Signature
from audiocraft.serving.schema import (
    COG_VERSION,
    SCHEMA_PATH,
    build_schema,
    input_schema,
    write_schema,
)

ROOT = Path(__file__).parents[2]
IMPORTS = "from typing import List, Optional\nfrom cog import BaseModel, BaseRunner, Input, Path\n"


def prediction(*inputs: str, head: str = "", returns: str = "Path") -> Signature:
    source = f"{IMPORTS}{head}\nclass Predictor(BaseRunner):\n    def run(\n        self,\n"
    source += "".join(f"        {text},\n" for text in inputs)
    return Module("predict.py", f"{source}    ) -> {returns}:\n        ...\n").prediction()


def one_input(arguments: str, annotation: str = "str", head: str = "") -> dict[str, Any]:
    signature = prediction(f'a: {annotation} = Input(description="d", {arguments})', head=head)
    return {"required": "a" in signature.required, **signature.inputs["a"]}


# What is read


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        ("str", {"type": "string"}),
        ("int", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("Path", {"type": "string", "format": "uri"}),
        ("list[str]", {"type": "array", "items": {"type": "string"}}),
        ("List[Path]", {"type": "array", "items": {"type": "string", "format": "uri"}}),
    ],
)
def test_types(annotation: str, schema: dict[str, Any]) -> None:
    expected = {"x-order": 0, "title": "A", "description": "d", **schema}
    assert one_input("", annotation) == {**expected, "required": True}
    for optional in (f"{annotation} | None", f"None | {annotation}", f"Optional[{annotation}]"):
        assert one_input("", optional) == {**expected, "required": False, "nullable": True}


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("str", '"x"', "x"),
        ("str", "'it is'", "it is"),
        ("str", '"""three"""', "three"),
        ("str", 'r"raw"', "raw"),
        ("str", "NAME", "constant"),
        ("int", "-1", -1),
        ("float", "3", 3),
        ("float", "1e-3", 0.001),
        ("bool", "False", False),
        ("int | None", "None", None),
    ],
)
def test_defaults(annotation: str, text: str, value: object) -> None:
    read = one_input(f"default={text}", annotation, head='NAME: str = "constant"')
    assert read["default"] == value
    assert type(read["default"]) is type(value)
    assert not read["required"]


def test_bounds_and_hints() -> None:
    assert one_input("ge=-1, le=2.5, deprecated=True", "float").items() >= {
        ("minimum", -1),
        ("maximum", 2.5),
        ("deprecated", True),
    }
    read = one_input('min_length=1, max_length=9, regex="a+", accept="audio/*"')
    assert read.items() >= {
        ("minLength", 1),
        ("maxLength", 9),
        ("pattern", "a+"),
        ("x-cog-accept", "audio/*"),
    }


@pytest.mark.parametrize("text", ['["x", "y"]', '[\n"x",\n"y",\n]', "CHOICES"])
def test_choices_become_a_component(text: str) -> None:
    signature = prediction(
        f'a_b: str = Input(description="d", default="x", choices={text})',
        head='CHOICES = ["x", "y"]',
    )
    assert signature.inputs["a_b"] == {
        "x-order": 0,
        "description": "d",
        "allOf": [{"$ref": "#/components/schemas/a_b"}],
        "default": "x",
    }
    assert signature.enums == {
        "a_b": {
            "title": "a_b",
            "description": "An enumeration.",
            "enum": ["x", "y"],
            "type": "string",
        }
    }


def test_order_title_and_required() -> None:
    signature = prediction(
        'top_k: int = Input(description="d")', 'seed: int | None = Input(description="d")'
    )
    assert [prop["x-order"] for prop in signature.inputs.values()] == [0, 1]
    assert signature.inputs["top_k"]["title"] == "Top K"
    assert signature.required == ["top_k"]


def test_results() -> None:
    assert prediction().output == {"type": "string", "format": "uri", "title": "Output"}
    assert prediction(returns="list[Path]").output["items"] == {"type": "string", "format": "uri"}
    model = "class Result(BaseModel):\n    weights: Path\n    note: str | None = None\n"
    assert prediction(head=model, returns="Result").output == {
        "title": "Output",
        "type": "object",
        "properties": {
            "weights": {"type": "string", "format": "uri", "title": "Weights"},
            "note": {"type": "string", "title": "Note", "nullable": True},
        },
        "required": ["weights"],
    }


# What is refused: Cog would drop or misread it without a word, or refuse it as well


@pytest.mark.parametrize(
    ("annotation", "arguments"),
    [
        ("str", "default=None"),  # would be required
        ("int", "default=1 + 2"),  # likewise, and so on
        ("int", "default=3-1"),
        ("int", "default=- 1"),
        ("int", "default=1_000"),
        ("int", "default=0x10"),
        ("float", 'default=float("inf")'),
        ("float", "default=1e999"),
        ("int", "default=(1)"),
        ("int", "default=UNKNOWN"),
        ("int", "default=TWICE"),
        ("int", "default=True"),
        ("int", "default=1.5"),
        ("str", "default=1"),
        ("Path", 'default="x.wav"'),
        ("list[str]", 'default=["x"]'),
        ("int", "default=5, ge=6"),
        ("int", "default=5, le=4"),
        ("str", 'default="z", choices=["x", "y"]'),
        ("str", "default_factory=str"),
        ("str", "hidden=True"),
        ("str", "**EXTRA"),
        ("int", "ge=LOW"),  # would not be checked at all
        ("int", 'ge="1"'),
        ("str", "ge=1"),
        ("str", "regex=LOW"),
        ("int", "max_length=3"),
        ("str", "choices=list(CHOICES)"),
        ("str", "choices=CHOICES + CHOICES"),
        ("str", 'choices=("x", "y")'),
        ("str", 'choices=["x",  # the first\n"y"]'),  # a comment breaks Cog's list
        ("str", 'choices=["x", NAME]'),
        ("str", 'choices=["x"]'),
        ("str", 'choices=["x", 1]'),
        ("float", "choices=[1.0, 2.0]"),
        ("int", "choices=[1, 2], ge=1"),
        ("Literal['x', 'y']", ""),
        ("int | str", ""),
        ("int | str | None", ""),
        ("dict", ""),
        ("list", ""),
        ("list[list[str]]", ""),
        ("list[str | None]", ""),
        ("typing.Optional[str]", ""),
        ("'str | None'", ""),
        ("Enumeration", ""),
    ],
)
def test_refused_inputs_are_named(annotation: str, arguments: str) -> None:
    head = 'LOW = 1\nNAME = "n"\nTWICE = 1\nTWICE = 2\nCHOICES = ["x", "y"]\nEXTRA = {}\n'
    with pytest.raises(SchemaError, match=r"^predict\.py: .*\binput a\b.*\.$"):
        one_input(arguments, annotation, head=head)


@pytest.mark.parametrize(
    "text",
    [
        '"one " "two"',
        '("one " "two")',
        '"one" + "two"',
        'f"one"',
        'u"one"',
        'b"one"',
        'r"""one"""',
        r'"a \"quote\""',
        r'"line\nbreak"',
        "UNKNOWN",
        '""',
        '" "',
        "None",
        "1",
    ],
)
def test_refused_descriptions(text: str) -> None:
    with pytest.raises(SchemaError, match=r"input a\b"):
        prediction(f"a: str = Input(description={text})")


@pytest.mark.parametrize(
    "text",
    [
        "a: str",
        'a: str = "x"',
        'a = Input(description="d")',
        'a: str = Input("x", description="d")',
        'a: str = cog.Input(description="d")',
        "a: str = Input()",
        "a: str = DECLARED",
    ],
)
def test_inputs_must_be_declared(text: str) -> None:
    with pytest.raises(SchemaError, match=r"input a\b"):
        prediction(text, head='DECLARED = Input(description="d")')


@pytest.mark.parametrize("text", ["*a: str", "**a: str", '*, a: str = Input(description="d")'])
def test_only_plain_parameters(text: str) -> None:
    with pytest.raises(SchemaError, match=r"run\(\) must take plain parameters"):
        prediction(text)


@pytest.mark.parametrize("returns", ["Path | None", "dict", "Unknown", "Iterator[Path]"])
def test_refused_results(returns: str) -> None:
    with pytest.raises(SchemaError, match=r"the result of run\(\)"):
        prediction(returns=returns)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "class Predictor is missing"),
        ("class Predictor:\n    pass\n", "must define run"),
        ("class Predictor:\n    def run(self): ...\n    def predict(self): ...\n", "not predict"),
        ("class Predictor:\n    def run(self): ...\n", r"the result of run\(\)"),
        ("class Predictor:\n    @cog.streaming\n    def run(self): ...\n", "must not be streaming"),
        ("class Predictor(:\n", "predict.py, line 1"),
    ],
)
def test_refused_modules(source: str, problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        Module("predict.py", source).prediction()


def test_names_must_be_imported_from_cog() -> None:
    source = (
        "from cog import *\nclass Predictor:\n    def run(self, a: str = Input()) -> str: ...\n"
    )
    with pytest.raises(SchemaError, match="input a must be declared by Input"):
        Module("predict.py", source).prediction()
    with pytest.raises(SchemaError, match="imported by name"):
        prediction("a: Path = Input()", head="from pathlib import Path")


# The document


def write_project(folder: Path, predict_input: str, train_input: str | None = None) -> Path:
    head = "from cog import BaseModel, BaseRunner, Input, Path\n"
    (folder / "predict.py").write_text(
        f"{head}class Predictor(BaseRunner):\n    def run(self, {predict_input}) -> Path: ...\n"
    )
    if train_input is not None:
        (folder / "train.py").write_text(f"{head}def train({train_input}) -> Path: ...\n")
    return folder


def test_training_is_merged(tmp_path: Path) -> None:
    project = write_project(
        tmp_path,
        'kind: str = Input(description="d", choices=["x", "y"])',
        'kind: str = Input(description="t", choices=["y", "x"]), a: int = Input(description="d")',
    )
    document = build_schema(project)
    schemas = document["components"]["schemas"]
    assert {"Input", "Output", "TrainingInput", "TrainingOutput", "kind"} <= schemas.keys()
    assert {"PredictionRequest", "TrainingRequest", "Status", "ValidationError"} <= schemas.keys()
    assert {"/predictions", "/trainings"} <= document["paths"].keys()
    assert input_schema(document)["properties"]["kind"]["enum"] == ["x", "y"]
    assert input_schema(document, training=True)["required"] == ["kind", "a"]


def test_choices_of_one_name_must_agree(tmp_path: Path) -> None:
    project = write_project(
        tmp_path,
        'kind: str = Input(description="d", choices=["x", "y"])',
        'kind: str = Input(description="d", choices=["x", "z"])',
    )
    with pytest.raises(SchemaError, match=r"train\.py: choices of input kind"):
        build_schema(project)


def test_the_file_is_written_where_the_server_looks(tmp_path: Path) -> None:
    write_project(tmp_path, 'a: str = Input(description="d")')
    document = write_schema(tmp_path)
    path = tmp_path / SCHEMA_PATH
    assert json.loads(path.read_text()) == document
    write_project(tmp_path, 'b: str = Input(description="d")')
    write_schema(tmp_path)
    assert '"b"' in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"predict\.py cannot be read"):
        build_schema(tmp_path)


def test_every_reference_leads_somewhere() -> None:
    document = build_schema(ROOT)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= document["components"]["schemas"].keys()


def test_one_version_of_cog() -> None:
    requirements = (ROOT / "requirements.txt").read_text()
    assert re.search(r"^cog==(\S+)", requirements, re.MULTILINE)[1] == COG_VERSION
    assert re.search(r"^coglet==(\S+)", requirements, re.MULTILINE)[1] == COG_VERSION
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["build"]["sdk_version"] == COG_VERSION
    assert config["run"] == "predict.py:Predictor"


# predict.py

VERSIONS = [
    "small",
    "medium",
    "large",
    "melody",
    "melody-large",
    "stereo-small",
    "stereo-medium",
    "stereo-large",
    "stereo-melody",
    "stereo-melody-large",
    "tiny",
]
# name, JSON type, default, choices
INPUTS: list[tuple[str, str, object, list[str] | None]] = [
    ("prompt", "string", None, None),
    ("input_audio", "string", None, None),
    ("duration", "integer", 8, None),
    ("continuation", "boolean", False, None),
    ("continuation_start", "integer", 0, None),
    ("continuation_end", "integer", None, None),
    ("multi_band_diffusion", "boolean", False, None),
    ("normalization_strategy", "string", "loudness", ["loudness", "clip", "peak", "rms"]),
    ("top_k", "integer", 250, None),
    ("top_p", "number", 0.0, None),
    ("temperature", "number", 1.0, None),
    ("classifier_free_guidance", "number", 3, None),
    ("output_format", "string", "wav", ["wav", "mp3", "flac", "ogg"]),
    ("seed", "integer", None, None),
    ("replicate_weights", "string", None, None),
    ("model_version", "string", "stereo-melody", VERSIONS),
]


def test_the_inputs_are_those_that_clients_know() -> None:
    schema = input_schema(build_schema(ROOT))
    properties = schema["properties"]
    assert schema["required"] == []
    assert [
        (name, prop["type"], prop["default"], prop.get("enum")) for name, prop in properties.items()
    ] == INPUTS
    nullable = {name for name, prop in properties.items() if prop.get("nullable")}
    assert nullable == {name for name, _, default, _ in INPUTS if default is None}
    # Other bounds are checked in code: older interfaces did not have them.
    bounded = {
        name: (prop.get("minimum"), prop.get("maximum"))
        for name, prop in properties.items()
        if not prop.keys().isdisjoint({"minimum", "maximum"})
    }
    assert bounded == {"continuation_start": (0, None)}
    assert properties["input_audio"]["format"] == "uri"


def test_every_input_has_a_description_in_whole_sentences() -> None:
    for name, prop in input_schema(build_schema(ROOT))["properties"].items():
        description = prop["description"]
        assert len(description) > 50, name
        assert description.endswith("."), name
        assert description == " ".join(description.split()), name


def test_the_schema_is_what_python_runs() -> None:
    """The static reading agrees with the signature that Python itself sees."""
    properties = input_schema(build_schema(ROOT))["properties"]
    parameters = inspect.signature(predict.Predictor.run).parameters
    assert list(parameters)[1:] == list(properties)
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    for name, prop in properties.items():
        declared = parameters[name].default
        assert isinstance(declared, FieldInfo)
        assert declared.default == prop["default"]
        assert declared.description == prop["description"]
        assert declared.choices == prop.get("enum")
        assert (declared.ge, declared.le) == (prop.get("minimum"), prop.get("maximum"))
        annotation = parameters[name].annotation
        optional = isinstance(annotation, types.UnionType)
        plain = typing.get_args(annotation)[0] if optional else annotation
        assert optional == prop.get("nullable", False)
        assert names.get(plain, "string") == prop["type"]
