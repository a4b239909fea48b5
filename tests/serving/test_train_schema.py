"""The training half of the schema, and that Python and Cog read `train.py` alike."""

import inspect
import types
import typing
from pathlib import Path

import yaml
from cog.input import FieldInfo

import train
from audiocraft.serving.schema import build_schema, input_schema
from tests.serving.test_schema import VERSIONS

ROOT = Path(__file__).parents[2]
SCHEDULES = ["exponential", "cosine", "polynomial_decay", "inverse_sqrt", "linear_warmup"]
# name, JSON type, default, choices
INPUTS: list[tuple[str, str, object, list[str] | None]] = [
    ("dataset_path", "string", None, None),
    ("one_same_description", "string", None, None),
    ("auto_labeling", "boolean", True, None),
    ("drop_vocals", "boolean", True, None),
    ("source", "string", "all", ["all", "drop-vocals", "vocals", "bass", "drums", "other"]),
    ("model_version", "string", "stereo-melody", VERSIONS),
    ("lr", "number", 1, None),
    ("epochs", "integer", 10, None),
    ("updates_per_epoch", "integer", 100, None),
    ("batch_size", "integer", 3, None),
    ("optimizer", "string", "dadam", ["dadam", "adamw", "prodigy"]),
    ("lr_scheduler", "string", "cosine", SCHEDULES),
    ("warmup", "integer", 8, None),
    ("cfg_p", "number", 0.3, None),
    ("lora_rank", "integer", 0, None),
    ("seed", "integer", 2036, None),
]


def test_the_inputs_are_those_that_clients_know() -> None:
    schema = input_schema(build_schema(ROOT), training=True)
    properties = schema["properties"]
    assert schema["required"] == ["dataset_path"]
    assert [
        (name, prop["type"], prop.get("default"), prop.get("enum"))
        for name, prop in properties.items()
    ] == INPUTS
    assert [name for name, prop in properties.items() if prop.get("nullable")] == [
        "one_same_description"
    ]
    assert "default" not in properties["dataset_path"]
    assert properties["dataset_path"]["format"] == "uri"
    # Bounds are checked in code: the older interface did not have them.
    for prop in properties.values():
        assert prop.keys().isdisjoint({"minimum", "maximum"})


def test_the_result_is_a_file_of_weights() -> None:
    """As Cog's generator writes a class of results."""
    assert build_schema(ROOT)["components"]["schemas"]["TrainingOutput"] == {
        "title": "Output",
        "type": "object",
        "properties": {"weights": {"type": "string", "format": "uri", "title": "Weights"}},
        "required": ["weights"],
    }


def test_every_input_has_a_description_in_whole_sentences() -> None:
    for name, prop in input_schema(build_schema(ROOT), training=True)["properties"].items():
        description = prop["description"]
        assert len(description) > 50, name
        assert description.endswith("."), name
        assert description == " ".join(description.split()), name


def test_the_schema_is_what_python_runs() -> None:
    """The static reading agrees with the signature that Python itself sees."""
    properties = input_schema(build_schema(ROOT), training=True)["properties"]
    parameters = inspect.signature(train.train).parameters
    assert list(parameters) == list(properties)
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    for name, prop in properties.items():
        declared = parameters[name].default
        assert isinstance(declared, FieldInfo)
        assert declared.description == prop["description"]
        if "default" in prop:
            assert declared.default == prop["default"]
        assert sorted(declared.choices or []) == sorted(prop.get("enum", []))
        assert (declared.ge, declared.le) == (None, None)
        annotation = parameters[name].annotation
        optional = isinstance(annotation, types.UnionType)
        plain = typing.get_args(annotation)[0] if optional else annotation
        assert optional == prop.get("nullable", False)
        assert names.get(plain, "string") == prop["type"]


def test_the_configuration_names_it() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["train"] == "train.py:train"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"runs", "weights"} <= set(ignored)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/runs/", "/weights/"} <= set(ignored)
