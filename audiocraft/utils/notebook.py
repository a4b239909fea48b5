"""Audio in a notebook."""

from torch import Tensor


def display_audio(samples: Tensor, sample_rate: int) -> None:
    """Show a player for each clip.

    Args:
        samples: [B, C, T] or [C, T].
        sample_rate: Hz.
    """
    from IPython.display import Audio, display

    clips = samples.detach().cpu()
    for clip in clips if clips.dim() == 3 else clips[None]:  # noqa: PLR2004 - [B, C, T]
        display(Audio(clip.numpy(), rate=sample_rate))
