"""The one error family: every message names the input, the limit and the remedy in one sentence."""


class AudiocraftError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(AudiocraftError, ValueError):
    """An argument or a request is outside what the model or the interface accepts."""


class AudioFileError(InputError):
    """An audio file cannot be read, holds nothing usable, or cannot be written."""


class WeightsError(AudiocraftError):
    """A weights file is missing a part, has the wrong shape, or is not MusicGen at all."""


class AssetError(AudiocraftError):
    """Something that must be on disk is neither there nor to be had."""
