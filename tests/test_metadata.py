"""The label vocabularies: the order is the models' output order, so not one entry may move."""

import hashlib

import pytest

import metadata


@pytest.mark.parametrize(
    ("labels", "count", "digest"),
    [
        (
            metadata.genre_labels,
            400,
            "42aacd08bc46fc7c0894d7007a78e2ac9b2c35ce1a267079d2616c09130f8a89",
        ),
        (
            metadata.mood_theme_classes,
            56,
            "9ac09e92d4d981a0a42c96b263c11c554d1bd80561d7bdfba4ecb3d5efe6264c",
        ),
        (
            metadata.instrument_classes,
            40,
            "d5929903886be0f270247527295905d8f59ba93fdc1cebfe6b35f48968c3006f",
        ),
    ],
    ids=["genres", "moods", "instruments"],
)
def test_labels_are_those_of_the_models(labels: list[str], count: int, digest: str) -> None:
    assert len(labels) == count
    assert len(set(labels)) == count
    assert hashlib.sha256("\n".join(labels).encode()).hexdigest() == digest
