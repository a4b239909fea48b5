"""Clients of the older models: their requests stay valid, but for what is different on purpose.

`snapshots/` holds the older interfaces as they were published, one file each, for prediction
(`*_predict.json`) or training (`*_train.json`): type, format, default, choices and bounds of every
input. `nullable` there means that the input may stay without a value.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from audiocraft.errors import InputError
from audiocraft.serving.arguments import check_inputs
from audiocraft.serving.prediction import PredictionRequest, PredictionService
from audiocraft.serving.schema import build_schema, input_schema
from audiocraft.serving.training import TrainingRequest

ROOT = Path(__file__).parents[2]
SNAPSHOTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted(Path(__file__).with_name("snapshots").glob("*.json"))
}
ASPECTS = ("type", "format", "default", "choices", "minimum", "maximum", "nullable")


@dataclass(frozen=True)
class Difference:
    """Something that is different on purpose.

    Attributes:
        name: of the input, or `output`.
        aspect: what is different about it.
        old: as the snapshots have it.
        new: as it is here; None where there is none.
        snapshots: those that it is a difference from.
    """

    name: str
    aspect: str
    old: object
    new: object
    snapshots: tuple[str, ...]


META, SAKEMIN = "meta_musicgen_predict", "sakemin_fine_tuner_predict"
TRAINING = "sakemin_fine_tuner_train"
DIFFERENCES = (
    # 2.5 can be asked for; an integer is a number.
    Difference("classifier_free_guidance", "type", "integer", "number", (META, SAKEMIN)),
    # The version that fine-tunes are made from by default, and half the memory.
    Difference("model_version", "default", "stereo-melody-large", "stereo-melody", (META,)),
    # -1 is the end of the recording, as the old description promised and the old bound refused.
    Difference("continuation_end", "minimum", 0, None, (META, SAKEMIN)),
    # Every result has a name of its own, so that uploads do not overwrite each other.
    Difference("output", "file_name", "out", None, (META, SAKEMIN)),
    # The published README's defaults, not those of the form.
    Difference("epochs", "default", 3, 10, (TRAINING,)),
    Difference("batch_size", "default", 16, 3, (TRAINING,)),
    # A format that runs no code when it is read.
    Difference("output", "file_name", "trained_model.tar", None, (TRAINING,)),
)


def interface(*, training: bool) -> dict[str, Any]:
    """The inputs and the output of this project, in the form of the snapshots."""
    document = build_schema(ROOT)
    schema = input_schema(document, training=training)
    inputs = {
        name: {aspect: prop.get("enum" if aspect == "choices" else aspect) for aspect in ASPECTS}
        for name, prop in schema["properties"].items()
    }
    output = document["components"]["schemas"]["TrainingOutput" if training else "Output"]
    return {"inputs": inputs, "required": schema["required"], "output": output}


def incompatible(old: dict[str, Any], new: dict[str, Any]) -> set[tuple[str, str]]:
    """Input and aspect of everything that an old client could stumble over."""
    found = {(name, "required") for name in new["required"] if name not in old["required"]}
    for name, was in old["inputs"].items():
        if name not in new["inputs"]:
            found.add((name, "name"))
            continue
        now = new["inputs"][name]
        found |= {
            (name, aspect)
            for aspect in ("type", "format", "default")
            if was.get(aspect) != now[aspect]
        }
        if now["choices"] and not set(now["choices"]) >= set(was.get("choices") or [None]):
            found.add((name, "choices"))
        for bound, sign in (("minimum", 1), ("maximum", -1)):
            before, limit = was.get(bound), now[bound]
            if limit is not None and (before is None or sign * limit > sign * before):
                found.add((name, bound))
        if was.get("nullable") and not now["nullable"]:
            found.add((name, "nullable"))
    if output_types(old["output"]) != output_types(new["output"]):
        found.add(("output", "type"))
    return found


def output_types(output: dict[str, Any]) -> dict[str, Any]:
    """Type and format of an output, and of each of its fields, where it has some."""
    fields = output.get("properties", {})
    return {name: (one.get("type"), one.get("format")) for name, one in fields.items()} | {
        "": (output["type"], output.get("format"))
    }


def intended(snapshot: str) -> set[tuple[str, str]]:
    return {(one.name, one.aspect) for one in DIFFERENCES if snapshot in one.snapshots}


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_changes_are_additive_but_for_the_differences(snapshot: str) -> None:
    new = interface(training=snapshot.endswith("_train"))
    assert incompatible(SNAPSHOTS[snapshot], new) <= intended(snapshot)


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_old_values_are_still_valid(snapshot: str) -> None:
    schema = input_schema(build_schema(ROOT), training=snapshot.endswith("_train"))
    inputs = SNAPSHOTS[snapshot]["inputs"]
    for name, was in inputs.items():
        values = [*was.get("choices", []), was.get("minimum"), was["default"]]
        for value in values:
            required = {"properties": schema["properties"], "required": []}
            assert value is None or check_inputs({name: value}, required) == [], (name, value)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda one: f"{one.name} {one.aspect}")
def test_each_difference_is_one(difference: Difference) -> None:
    """So that the table cannot go stale."""
    assert difference.old != difference.new
    for snapshot in difference.snapshots:
        old = SNAPSHOTS[snapshot]
        was = old["output"] if difference.name == "output" else old["inputs"][difference.name]
        assert was[difference.aspect] == difference.old
        if difference.aspect != "file_name":  # in no schema
            new = interface(training=snapshot.endswith("_train"))
            assert new["inputs"][difference.name][difference.aspect] == difference.new


def test_every_result_has_a_name_of_its_own() -> None:
    service = PredictionService()
    request = PredictionRequest(prompt="piano", model_version="tiny", duration=1)
    names = {service.predict(request).path.stem for _ in range(2)}
    assert len(names) == 2
    assert "out" not in names


def test_minus_one_is_the_end_of_the_recording() -> None:
    schema = input_schema(build_schema(ROOT))
    assert check_inputs({"continuation_end": -1}, schema) == []
    PredictionRequest(prompt="piano", continuation_end=-1).check()


def test_the_readme_lists_the_differences() -> None:
    text = (ROOT / "README.md").read_text()
    section = re.search(
        r"^(#+) Coming from the older models$(.*?)(?=^#{1,6} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert section is not None
    for difference in DIFFERENCES:
        name = difference.name
        if difference.aspect == "file_name":
            name = str(difference.old)
            name += "" if "." in name else ".wav"
        assert f"`{name}`" in section[2], name


# The comparison itself


def change(name: str, aspect: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda new: new["inputs"][name].update({aspect: value})


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda new: new["inputs"].pop("seed"), ("seed", "name")),
        (lambda new: new["required"].append("prompt"), ("prompt", "required")),
        (lambda new: new["output"].update(type="array"), ("output", "type")),
        (lambda new: new["output"].pop("format"), ("output", "type")),
        (change("seed", "type", "string"), ("seed", "type")),
        (change("input_audio", "format", None), ("input_audio", "format")),
        (change("top_k", "default", 0), ("top_k", "default")),
        (change("output_format", "choices", ["wav", "flac"]), ("output_format", "choices")),
        (change("top_k", "choices", [0, 250]), ("top_k", "choices")),
        (change("duration", "minimum", 1), ("duration", "minimum")),
        (change("continuation_start", "minimum", 1), ("continuation_start", "minimum")),
        (change("duration", "maximum", 600), ("duration", "maximum")),
        (change("seed", "nullable", None), ("seed", "nullable")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_harm_is_noticed(harm: Callable[[dict[str, Any]], None], found: tuple[str, str]) -> None:
    old, new = SNAPSHOTS[META], copy.deepcopy(interface(training=False))
    before = incompatible(old, new)
    harm(new)
    assert incompatible(old, new) - before == {found}


@pytest.mark.parametrize("field", ["type", "format"])
def test_harm_to_a_result_with_fields_is_noticed(field: str) -> None:
    old, new = SNAPSHOTS[TRAINING], copy.deepcopy(interface(training=True))
    new["output"]["properties"]["weights"].pop(field)
    assert incompatible(old, new) - intended(TRAINING) == {("output", "type")}


# cog-safe-push.yaml

# Every key that cog-safe-push knows is checked by it, and an unknown one ends it.
SAFE_PUSH_KEYS = {
    "model",
    "test_model",
    "test_hardware",
    "parallel",
    "ignore_schema_compatibility",
    "predict",
    "train",
}


def safe_push() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())
    return config


def test_the_configuration_of_cog_safe_push_has_its_keys() -> None:
    config = safe_push()
    assert config.keys() == SAFE_PUSH_KEYS
    assert "<owner>" in config["model"]
    assert "<owner>" in config["test_model"]
    assert "<owner>" in config["train"]["destination"]
    shared = {"test_cases", "fuzz"}
    assert config["predict"].keys() == {"compare_outputs", "predict_timeout", *shared}
    own = {"destination", "destination_hardware", "train_timeout"}
    assert config["train"].keys() == own | shared
    for mode in (config["predict"], config["train"]):
        assert mode["fuzz"].keys() == {"fixed_inputs", "disabled_inputs", "iterations", "prompt"}
        for case in mode["test_cases"]:
            assert "inputs" in case
            assert len(case.keys() - {"inputs"}) == 1
            assert case.keys() <= {"inputs", "match_prompt", "error_contains"}


@pytest.mark.parametrize(
    ("mode", "request_of"), [("predict", PredictionRequest), ("train", TrainingRequest)]
)
def test_what_cog_safe_push_asks_for_is_valid(
    mode: str, request_of: Callable[..., PredictionRequest | TrainingRequest]
) -> None:
    schema = input_schema(build_schema(ROOT), training=mode == "train")
    asked = safe_push()[mode]
    for case in asked["test_cases"]:
        assert check_inputs(case["inputs"], schema) == []
        request = request_of(**case["inputs"])
        if "error_contains" in case:
            with pytest.raises(InputError, match=re.escape(case["error_contains"])):
                request.check()
        else:
            request.check()
    fuzz = asked["fuzz"]
    assert check_inputs(fuzz["fixed_inputs"], schema) == []
    assert set(fuzz["disabled_inputs"]) <= schema["properties"].keys()
    assert not set(fuzz["disabled_inputs"]) & fuzz["fixed_inputs"].keys()
