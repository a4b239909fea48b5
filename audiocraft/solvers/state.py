"""What is known of a training besides its tensors: how far it is, its losses, its best weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from audiocraft.errors import InputError
from audiocraft.solvers.checkpoints import find_checkpoint, read_notes

_MANY_PASSES: Final = 20


@dataclass(frozen=True)
class Measured:
    """A loss, in nats per code.

    Attributes:
        update: after which it was measured; one in training is the mean since the one before.
        loss: mean over the codebooks.
        per_codebook: of each.
        lr: in use then; None in a validation, as all below.
        grad_norm: before clipping.
    """

    update: int
    loss: float
    per_codebook: tuple[float, ...]
    lr: float | None = None
    grad_norm: float | None = None


@dataclass
class RunState:
    """How far a training is; the notes of its checkpoints.

    Attributes:
        updates: of the whole training.
        updates_per_epoch: of each epoch.
        clips: that it is trained on.
        songs: of these.
        held_out: songs that are not, to measure it with.
        held_out_clips: of those songs.
        ranks: processes that trained last.
        sharded: whether each of them has its own part of the weights.
        base_sha256: of the weights that it began from.
        update: that is finished.
        seconds: that it has trained, over all its starts.
        best: update with the lowest validation loss; None before there is one.
        exported: last update whose weights were exported; the best one, where there is one.
        recent: losses of each codebook in the updates since the last of `losses`.
        losses: in training.
        validation: of the averaged weights, on the held-out songs.
    """

    updates: int
    updates_per_epoch: int
    clips: int
    songs: int
    held_out: int
    held_out_clips: int
    ranks: int
    sharded: bool
    base_sha256: str
    update: int = 0
    seconds: float = 0.0
    best: int | None = None
    exported: int | None = None
    recent: list[tuple[float, ...]] = field(default_factory=list)
    losses: list[Measured] = field(default_factory=list)
    validation: list[Measured] = field(default_factory=list)

    @property
    def best_loss(self) -> float | None:
        """The lowest validation loss."""
        return next((value.loss for value in self.validation if value.update == self.best), None)

    @property
    def chosen(self) -> int | None:
        """Update whose weights are the result as far as it is; None before any were exported."""
        return self.exported if self.best is None else self.best

    @property
    def has_ended(self) -> bool:
        """Whether all updates are made."""
        return self.update == self.updates

    def notes(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> Self:
        """From `notes`, in JSON or not."""
        values = dict(notes)
        values["recent"] = [tuple(losses) for losses in notes["recent"]]
        for name in ("losses", "validation"):
            values[name] = [
                Measured(**value | {"per_codebook": tuple(value["per_codebook"])})
                for value in notes[name]
            ]
        return cls(**values)


def read_state(work: Path) -> RunState | None:
    """How far the training in a work folder is; None where it has no checkpoint.

    Raises:
        TrainingError: the checkpoint is broken.
    """
    checkpoint = find_checkpoint(work)
    return None if checkpoint is None else RunState.of(read_notes(checkpoint))


def weights_file(work: Path, update: int) -> Path:
    """The averaged weights after an update, as a fine-tune that can be used by itself."""
    return work / f"weights-{update}.safetensors"


def remove_weights(work: Path) -> None:
    """Remove exported weights, but for those that the checkpoint names.

    Args:
        work: the folder of the training.

    Raises:
        TrainingError: the checkpoint is broken.
    """
    state = read_state(work)
    update = state.chosen if state else None
    named = None if update is None else weights_file(work, update)
    for path in work.glob("weights-*.safetensors"):
        if path != named:
            path.unlink()


def check_resumable(state: RunState, ranks: int, *, sharded: bool) -> None:
    """Whether a training can go on with some processes.

    Args:
        state: of its checkpoint.
        ranks: how many there are now.
        sharded: whether each of them would have its own part of the weights.

    Raises:
        InputError: it cannot.
    """
    if not state.sharded and not sharded:
        return
    if state.sharded != sharded or state.ranks != ranks:
        was, now = (
            f"{'sharded over' if parted else 'in'} {number} process{'es' * (number > 1)}"
            for parted, number in ((state.sharded, state.ranks), (sharded, ranks))
        )
        raise InputError(
            f"This training was {was} and would now be {now}: give it as many GPUs as before, or "
            "begin again with --fresh."
        )


def describe_passes(updates: int, batch_size: int, clips: int, what: str) -> list[str]:
    """How often a training goes through its music, with a warning where that is too often.

    Args:
        updates: of the whole training.
        batch_size: clips of each of them.
        clips: that there are, >= 1.
        what: they are, such as `the 4 clips of 4 songs`.
    """
    passes = updates * batch_size / clips
    lines = [f"{updates} updates x batch {batch_size} = {round(passes, 1):.9g} passes over {what}."]
    if passes > _MANY_PASSES:
        lines.append(
            f"More than {_MANY_PASSES} passes: the model may repeat the music rather than learn "
            "its style; lower epochs or updates_per_epoch, or give more music."
        )
    return lines


def show_time(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 100:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004
