"""Audio files, and music as a training prepares it."""

from importlib import import_module


def __getattr__(name: str) -> object:
    """`audiocraft.data.audio`, as officially, without an import of its own."""
    if name != "audio":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("audiocraft.data.audio")
