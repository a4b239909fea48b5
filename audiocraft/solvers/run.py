"""A training from its dataset to its file of weights, as a chain of processes.

This one stays light: it checks, plans, fetches what is missing, and starts the others one after the
other. Models are built in those alone.
"""

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from audiocraft.assets.parts import file_sha256, is_leftover, read_json, wait_lock, write_json
from audiocraft.assets.remote import show_size
from audiocraft.data.archive import SIDE, split_name, unwanted
from audiocraft.data.chunks import header_duration
from audiocraft.data.dataset import DatasetSettings, disk_need, load_prepared, remove_intermediates
from audiocraft.data.files import find
from audiocraft.data.labels import check_label_models
from audiocraft.data.report import write_report
from audiocraft.errors import AssetError, InputError, TrainingError
from audiocraft.models.versions import VERSIONS
from audiocraft.solvers.checkpoints import (
    clear,
    disk_of,
    find_checkpoint,
    job_key,
    work_folder,
)
from audiocraft.solvers.devices import Device, find_devices
from audiocraft.solvers.job import JOB_FILE, Place, TrainingJob, write_job
from audiocraft.solvers.launch import launch
from audiocraft.solvers.memory import estimate_seconds, plan_memory
from audiocraft.solvers.needs import (
    check_disk,
    check_result_folder,
    check_writable,
    fetch_base,
    training_need,
)
from audiocraft.solvers.plan import Plan
from audiocraft.solvers.prepare import DATASET_FILE
from audiocraft.solvers.result import WEIGHTS_FILE, describe_training, read_metadata
from audiocraft.solvers.state import (
    RunState,
    check_resumable,
    describe_passes,
    read_state,
    remove_weights,
    show_time,
)

REPORT_FILE: Final = "report.json"
"""In the work folder: the fate of each file, labels, settings, losses and times."""

_DATA, _UNPACKED = "data", "unpacked"  # beside the work folders, shared by all jobs
_RESULT, _TIMES = "result.json", "times.json"  # in the work folder
_TAKES_LESS: Final = "lora_rank=16 or a smaller model_version takes less"
_BY_HAND: Final = "make one with the command below"  # a training that has ended makes no samples

Log = Callable[[str], None]
"""Takes a line for the user."""


def run_job(
    job: TrainingJob,
    dataset: Path,
    *,
    runs: Path,
    weights: Path,
    processes: int | None = None,
    fresh: bool = False,
    allow_cpu: bool = False,
    log: Log,
) -> Path:
    """Fine-tune a model on a dataset; the same job on the same dataset goes on where it was.

    Args:
        job: what to train, and how.
        dataset: an archive, a folder or a file of music; it is only read.
        runs: where the work folders lie.
        weights: folder where the result goes; that of another training is renamed there.
        processes: that train where there is no GPU, 1 if not given; else there is one per GPU.
        fresh: discard what an earlier start of the job has left.
        allow_cpu: let a CPU train all weights of a released version.
        log: takes the lines that say how it goes.

    Returns:
        The file of weights.

    Raises:
        InputError: the job cannot be done with these settings, this music or this machine.
        AssetError: something is missing on disk, or room.
        TrainingError: a process failed, the loss is not finite, or the disk has got full.
    """
    # Before an archive is unpacked, where it is certain that there is nothing to go on from.
    where = None
    if not _may_go_on(job, runs):
        where = _check(job, runs, processes, allow_cpu=allow_cpu, log=log)
        _check_disk(job, runs, weights)
    found = find(dataset, runs / _UNPACKED)
    work = runs / job_key(found.key, asdict(job))
    log(f"Work folder: {work}")
    with disk_of(work, "the report of this training"), work_folder(work):
        finished = None if fresh else _finished(work, weights)
        if finished is not None:
            log("This training has ended before: here is its result, nothing is trained again.")
            _show_result(finished, str(read_json(work / _RESULT)["sha256"]), log)
            remove_weights(work)
            return finished
        state = None if fresh else read_state(work)
        if state is None and not fresh:
            _show_other_batches(job, found.key, runs, log)
        if where is None or state is not None:  # it may have begun meanwhile
            where = _check(job, runs, processes, state, allow_cpu=allow_cpu, log=log)
        has_ended = state is not None and state.has_ended
        is_prepared = not fresh and (work / DATASET_FILE).is_file()
        settings = DatasetSettings(job.one_same_description, job.vocabularies, job.stems)
        needed = 0 if is_prepared else disk_need(found, runs / _DATA, job.version, settings)
        written = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        if has_ended:  # and writes nothing but its result
            written = training_need(job)
        _check_disk(job, runs, weights, work=work, written=written, dataset=needed)
        check_result_folder(weights)
        if not has_ended and not is_prepared:
            # Before what may take hours; after it the training itself says it exactly.
            seconds = [header_duration(file.path) for file in found.files]
            _show_passes(job, _count_chunks(seconds, VERSIONS[job.version].context), log)
        if not has_ended:
            fetch_base(job)
        if fresh:  # when nothing is refused any more
            clear(work)
        place = Place(
            dataset=str(dataset.absolute()),
            data=str((runs / _DATA).absolute()),
            unpacked=str((runs / _UNPACKED).absolute()),
            weights=str(weights.absolute()),
            device="cuda" if where.devices else "cpu",
            processes=where.processes,
            plan=where.plan,
        )
        write_job(work, job, place)
        if not has_ended:
            _prepare(work, job, log)
            with _timed(work, "train"):
                launch(
                    "audiocraft.solvers.rounds",
                    [str(work)],
                    where.processes,
                    log,
                    memory_remedy=_TAKES_LESS,
                )
        return _finish(work, job, place, log)


@dataclass(frozen=True)
class _Where:
    """What a job runs on."""

    devices: Sequence[Device]
    processes: int
    plan: Plan


def _check(
    job: TrainingJob,
    runs: Path,
    processes: int | None,
    state: RunState | None = None,
    *,
    allow_cpu: bool,
    log: Log,
) -> _Where:
    """Refuse what does not fit itself or this machine, and say what it takes.

    Args:
        job: see `run_job`.
        runs: see `run_job`.
        processes: see `run_job`.
        state: of a training that goes on; one that has ended is refused nothing.
        allow_cpu: see `run_job`.
        log: see `run_job`.

    Raises:
        InputError: the job does not fit itself or the machine.
        AssetError: models that label music are missing.
    """
    devices = find_devices()
    number = len(devices) or processes or 1
    if state is not None and state.has_ended:
        return _Where(devices, number, Plan())
    if job.batch_size % number:
        raise InputError(
            f"batch_size is {job.batch_size}, it must be a multiple of the {number} processes."
        )
    is_released = VERSIONS[job.version].source.startswith("facebook/")
    if not devices and not allow_cpu and not job.lora_rank and is_released:
        raise InputError(
            f"All weights of {job.version} would be trained without a GPU, which takes days: set "
            "ALLOW_CPU=1 to do that, or give lora_rank=16 or model_version=tiny."
        )
    sharded = None if state is None else state.sharded
    if state is not None:
        check_resumable(state, number, sharded=state.sharded and len(devices) > 1)
    plan, lines = plan_memory(job, devices, number, sharded=sharded)
    for line in lines:
        log(line)
    need = show_size(training_need(job))
    log(f"Disk: up to {need} in {runs.absolute()} for checkpoints and weights, besides the music.")
    if job.vocabularies is not None:
        check_label_models()
    return _Where(devices, number, plan)


def _check_disk(
    job: TrainingJob,
    runs: Path,
    weights: Path,
    *,
    work: Path | None = None,
    written: int = 0,
    dataset: int = 0,
) -> None:
    """As `check_disk` does, and say where there is something to remove.

    A folder that may not be written to is refused as well.
    """
    check_writable("This training", work or runs)
    check_writable("The result of this training", weights)
    try:
        check_disk(job, work or runs, weights, written=written, dataset=dataset)
    except AssetError as error:
        if not runs.is_dir():
            raise
        text = str(error).removesuffix(".")
        raise AssetError(
            f"{text}: earlier trainings and unpacked archives lie in {runs.absolute()}."
        ) from error


def _may_go_on(job: TrainingJob, runs: Path) -> bool:
    """Whether a training with these settings has a checkpoint; of this music or not."""
    own = _settings(job)
    return any(settings == own and find_checkpoint(work) for work, settings in _known(runs))


def _show_other_batches(job: TrainingJob, key: str, runs: Path, log: Log) -> None:
    """Say where the same has begun, and not ended, with another batch_size.

    That may be another because the number of GPUs is, to a multiple of which it is rounded.

    Args:
        job: that begins.
        key: of its dataset.
        runs: see `run_job`.
        log: see `run_job`.
    """
    own = _settings(job)
    for work, settings in _known(runs):
        is_same = settings | {"batch_size": job.batch_size} == own
        is_same = is_same and work.name == job_key(key, settings)
        if is_same and find_checkpoint(work) and not (work / _RESULT).is_file():
            size = settings["batch_size"]
            log(
                f"A training that differs in batch_size={size} alone has begun in {work}: give "
                f"batch_size={size}, and processes whose number divides it, to go on with that one."
            )


def _known(runs: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Work folders and their settings."""
    return [(path.parent, read_json(path).get("job", {})) for path in runs.glob(f"*/{JOB_FILE}")]


def _settings(job: TrainingJob) -> dict[str, Any]:
    """Those of a job, as they are read from its file."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(job)))
    return settings


def _prepare(work: Path, job: TrainingJob, log: Log) -> None:
    """Have the music ready, and report what became of each file."""
    launch("audiocraft.solvers.prepare", [str(work)], 1, log)
    prepared = load_prepared(work / DATASET_FILE)
    for stage, seconds in prepared.seconds.items():
        _add_time(work, stage, seconds)
    report = prepared.report
    write_report(report, work / REPORT_FILE, {"settings": asdict(job)})
    log(
        f"Music: {len(report.used)} files in {len(prepared.examples)} clips; "
        f"{len(report.left_out)} files left out, see {work / REPORT_FILE}."
    )


def _finish(work: Path, job: TrainingJob, place: Place, log: Log) -> Path:
    """From exported weights to the result, its samples and the report.

    What is stopped on the way is made again by the next start.
    """
    path = Path(place.weights) / WEIGHTS_FILE
    with _alone(path.parent, log):
        with _timed(work, "result"):
            launch("audiocraft.solvers.result", [str(work)], 1, log)
        try:
            with _timed(work, "samples"):
                launch(
                    "audiocraft.solvers.samples",
                    [str(work)],
                    1,
                    log,
                    remedy=_BY_HAND,
                    memory_remedy=_BY_HAND,
                )
        except TrainingError as error:
            log(f"The weights are whole, but the two samples could not be made: {error}")
        prepared, state = load_prepared(work / DATASET_FILE), read_state(work)
        assert state is not None, "the training has ended"
        remove_intermediates(Path(place.data), prepared)
        result = {"path": str(path), "sha256": file_sha256(path)}
        update = json.loads(read_metadata(path)["training"])["update"]
        more = {
            "settings": asdict(job),
            "training": describe_training(job, state, update),
            "history": state.notes(),
            "seconds": {**read_json(work / _TIMES)},
            "result": result,
        }
        write_report(prepared.report, work / REPORT_FILE, more)
        write_json(work / _RESULT, result)
        remove_weights(work)
        _show_result(path, result["sha256"], log)
    return path


@contextmanager
def _alone(weights: Path, log: Log) -> Iterator[None]:
    """The folder of weights, for this training until the block ends."""
    weights.mkdir(parents=True, exist_ok=True)
    text = "Another training is writing its result; waiting for it."
    with wait_lock(weights / ".lock", lambda: log(text)):
        for path in weights.iterdir():
            if path.name.startswith(".") and is_leftover(path.name):
                path.unlink()
        yield


def _finished(work: Path, weights: Path) -> Path | None:
    """The result of a work folder, if it is still there and whole."""
    result = read_json(work / _RESULT)
    path = weights / WEIGHTS_FILE
    is_same = path.is_file() and read_metadata(path).get("run") == work.name
    return path if is_same and file_sha256(path) == result.get("sha256") else None


def _show_result(path: Path, sha256: str, log: Log) -> None:
    """What it is, and how to use it."""
    prompts: list[str] = json.loads(read_metadata(path)["prompts"])
    log(f"Weights: {path} ({show_size(path.stat().st_size)}, SHA-256 {sha256})")
    prompt = prompts[0] if prompts else "90 bpm piano in C minor"
    inputs = (f"replicate_weights=@{path}", f"prompt={prompt}", "duration=8")
    arguments = " ".join(f"-i {shlex.quote(value)}" for value in inputs)
    log(f"To hear it: scripts/predict {arguments}")
    if prompts:
        log("Descriptions that it was trained on, to be used as prompts:")
        for prompt in prompts:
            log(f"  {prompt}")
    else:
        log("The music has no descriptions: prompts say nothing to what it has learnt.")


@contextmanager
def _timed(work: Path, stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        with suppress(OSError):  # what ended it, maybe a full disk, says more than its time
            _add_time(work, stage, time.perf_counter() - begin)


def _add_time(work: Path, stage: str, seconds: float) -> None:
    """Take note of how long a stage took, over all starts of the job."""
    times = read_json(work / _TIMES)
    write_json(work / _TIMES, times | {stage: round(times.get(stage, 0.0) + seconds, 2)})


# What would be done


def describe_run(
    job: TrainingJob,
    dataset: Path,
    *,
    runs: Path,
    weights: Path,
    processes: int | None = None,
    allow_cpu: bool = False,
    log: Log,
) -> None:
    """Say what `run_job` would do and how long that takes; nothing is fetched or written.

    What would go on is described as if it began: all of the music is read to find its state.

    Args:
        job: what to train, and how.
        dataset: an archive, a folder or a file of music.
        runs: see `run_job`.
        weights: see `run_job`.
        processes: see `run_job`.
        allow_cpu: see `run_job`.
        log: takes the lines.

    Raises:
        AudiocraftError: `run_job` would refuse it at its start.
    """
    unlabelled = replace(job, vocabularies=None)
    where = _check(unlabelled, runs, processes, allow_cpu=allow_cpu, log=log)
    _check_disk(job, runs, weights)
    chunks = _look_at(dataset, VERSIONS[job.version].context, log)
    _show_passes(job, chunks, log)
    log(f"{where.processes} process{'es' * (where.processes > 1)} would train.")
    if job.updates_per_epoch == 0 and chunks is None:
        log("How long it takes depends on the music: updates_per_epoch=0 goes once through it.")
    else:
        seconds = estimate_seconds(job, where.devices, where.processes, chunks, where.plan)
        log(f"The training itself would take about {show_time(seconds)}.")
    if job.vocabularies is not None:  # last: who has yet to fetch models learns all else first
        check_label_models()


def _look_at(dataset: Path, context: float, log: Log) -> int | None:
    """Say what can be known of a dataset from names and headers.

    Returns:
        About how many chunks it has; None where that cannot be told.
    """
    if dataset.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(dataset) for name in names]
        paths = [path for path in files if _may_be_music(str(path.relative_to(dataset)))]
    else:
        paths = [dataset]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    seconds = [header_duration(path) for path in paths]
    known = [value for value in seconds if value is not None]
    text = f"Dataset: {len(paths)} file{'s' * (len(paths) != 1)}, {show_size(size)}"
    if not known:
        log(f"{text}.")
        return None
    more = "" if len(known) == len(seconds) else f" and {len(seconds) - len(known)} not looked into"
    log(f"{text}, {show_time(sum(known))} of music{more}.")
    return _count_chunks(seconds, context)


def _count_chunks(seconds: Sequence[float | None], context: float) -> int | None:
    """About how many chunks files of such lengths make; None where one of these is not known."""
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        return None
    return sum(-(-round(value) // round(context)) for value in known)


def _show_passes(job: TrainingJob, chunks: int | None, log: Log) -> None:
    """Say how often a training would go through music of about so many chunks, if that is known."""
    if not chunks:
        return
    updates = job.epochs * (job.updates_per_epoch or -(-chunks // job.batch_size))
    what = f"some {chunks} clips, by the headers of the files"
    for line in describe_passes(updates, job.batch_size, chunks, what):
        log(line)


def _may_be_music(name: str) -> bool:
    return unwanted(name) is None and split_name(name)[1] not in SIDE
