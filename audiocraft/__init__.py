"""MusicGen: music from descriptions, melodies and recordings, and fine-tuning on one's own."""

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The rooms that the official package imports with itself, when they are first asked for."""
    if name not in {"data", "models", "modules"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("audiocraft.models")  # which brings the layers
    return import_module(f"audiocraft.{name}")
