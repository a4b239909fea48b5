"""The one error family: every message names the input, the limit and the remedy in one sentence."""

from typing import Self


class AudiocraftError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(AudiocraftError, ValueError):
    """An argument or a request is outside what the model or the interface accepts."""


class TooLargeError(InputError):
    """What is asked for needs more memory than there is."""


class AudioFileError(InputError):
    """An audio file cannot be read, holds nothing usable, or cannot be written."""


class AudioEndError(AudioFileError):
    """A piece was asked for that begins where the file has ended.

    Args:
        message: for the user.
        duration: of the file, seconds.
    """

    def __init__(self, message: str, duration: float) -> None:
        super().__init__(message)
        self.duration = duration


class WeightsError(AudiocraftError):
    """A weights file is missing a part, has the wrong shape, or is not MusicGen at all."""


class AssetError(AudiocraftError):
    """Something that must be on disk is neither there nor to be had."""


class DownloadError(AssetError):
    """A file cannot be fetched.

    Attributes:
        reason: a clause for another message.
        status: what the server answered, where that is the reason.
    """

    def __init__(self, message: str, reason: str = "", status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status

    @classmethod
    def of(cls, what: str, reason: str, remedy: str, status: int | None = None) -> Self:
        """From what is fetched and clauses that say why it does not come, and what helps."""
        return cls(f"{what} could not be fetched: {reason}; {remedy}.", reason, status)


class UnreachableError(DownloadError):
    """There is no network, or no server at its other end."""


class TrainingError(AudiocraftError):
    """A training has failed, or one of its processes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is what torch, CUDA or its libraries say of memory, or Python of its own."""
    # By its name, for importing torch takes seconds.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    # CUDA's own modules, and cuBLAS and cuDNN, allocate beside torch; a CPU's allocator is named.
    words = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    return any(word in str(error) for word in words)
