"""`predict.py` itself: what Cog hands over becomes a request with the right types."""

import dataclasses
from pathlib import Path
from typing import Any

import cog
import pytest

import predict
from audiocraft.data.audio import FORMATS
from audiocraft.data.audio_utils import STRATEGIES
from audiocraft.models.versions import VERSIONS
from audiocraft.serving.prediction import PredictionRequest, PredictionResult
from audiocraft.serving.schema import build_schema, input_schema

ROOT = Path(predict.__file__).parent


class FakeService:
    """Keeps what it is given."""

    def __init__(self, weights: str | None) -> None:
        self.weights = weights
        self.requests: list[PredictionRequest] = []

    def predict(self, request: PredictionRequest) -> PredictionResult:
        self.requests.append(request)
        return PredictionResult(Path("/tmp/x.wav"), {"seed": 3})  # noqa: S108 - never opened


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> predict.Predictor:
    monkeypatch.setattr(predict, "PredictionService", FakeService)
    predictor = predict.Predictor()
    predictor.setup()
    return predictor


INPUTS: dict[str, Any] = {
    "prompt": "",
    "input_audio": "/tmp/song.wav",  # noqa: S108 - Cog passes a plain path as text
    "duration": 8.0,
    "continuation": True,
    "continuation_start": 1.0,
    "continuation_end": -1.0,
    "multi_band_diffusion": False,
    "normalization_strategy": "peak",
    "top_k": 0.0,
    "top_p": 1,
    "temperature": 0,
    "classifier_free_guidance": 3,
    "output_format": "mp3",
    "seed": 9007199254740993,
    "replicate_weights": "https://example.org/a.safetensors",
    "model_version": "tiny",
}


def test_numbers_and_paths_get_their_types(predictor: predict.Predictor) -> None:
    result = predictor.run(**INPUTS)
    assert type(result) is cog.Path
    (request,) = predictor.service.requests
    for field in dataclasses.fields(request):
        value, given = getattr(request, field.name), INPUTS[field.name]
        if field.name == "input_audio":
            assert isinstance(value, Path)
            assert str(value) == given
        else:
            assert value == given
            assert type(value).__name__ in str(field.type)
    assert {field.name for field in dataclasses.fields(request)} == INPUTS.keys()


def test_what_is_left_out_stays_none(predictor: predict.Predictor) -> None:
    names = ["prompt", "input_audio", "continuation_end", "seed", "replicate_weights"]
    predictor.run(**INPUTS | dict.fromkeys(names))
    (request,) = predictor.service.requests
    assert [getattr(request, name) for name in names] == [None] * 5


@pytest.mark.parametrize(
    ("given", "weights"), [(None, None), ("", None), ("https://a/b?c", "https://a/b?c")]
)
def test_weights_stay_text(
    given: str | None, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "PredictionService", FakeService)
    predictor = predict.Predictor()
    predictor.setup(given)
    assert predictor.service.weights == weights


def test_metrics_are_recorded(
    predictor: predict.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: dict[str, object] = {}
    monkeypatch.setattr(predictor, "record_metric", metrics.__setitem__)
    predictor.run(**INPUTS)
    assert metrics == {"seed": 3}


def test_every_choice_is_known_inside() -> None:
    """The lists of choices are literals, for Cog's sake; they must not drift from the package."""
    properties = input_schema(build_schema(ROOT))["properties"]
    assert set(properties["model_version"]["enum"]) == set(VERSIONS)
    assert set(properties["normalization_strategy"]["enum"]) == set(STRATEGIES)
    assert set(properties["output_format"]["enum"]) == set(FORMATS)
    assert list(properties) == [field.name for field in dataclasses.fields(PredictionRequest)]
