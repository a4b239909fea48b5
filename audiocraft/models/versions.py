"""The released versions of MusicGen, in one table."""

from dataclasses import dataclass

from audiocraft.assets.store import BUNDLED, RELEASES


@dataclass(frozen=True)
class Version:
    """A released checkpoint.

    Attributes:
        name: as users give it.
        source: hub id, or the folder of a bundled version.
        melody: whether it follows a melody.
        stereo: whether it makes stereo.
        context: most seconds that it hears at once.
        license: of its weights, and of what is made from them.
        own_codec: whether its codec is not the one that the released versions share.
    """

    name: str
    source: str
    melody: bool
    stereo: bool
    context: float = 30.0
    license: str = "cc-by-nc-4.0"
    own_codec: bool = False


def _release(name: str) -> Version:
    return Version(name, f"facebook/musicgen-{name}", "melody" in name, "stereo" in name)


VERSIONS: dict[str, Version] = {name: _release(name) for name in RELEASES} | {
    "tiny": Version(
        "tiny",
        str(BUNDLED / "tiny"),
        melody=True,
        stereo=True,
        context=12.0,
        license="apache-2.0",
        own_codec=True,
    )
}
"""Every version by its short name."""


def resolve_source(name: str) -> str:
    """Hub id or folder for a short name; anything else is taken as it is."""
    return VERSIONS[name].source if name in VERSIONS else name
