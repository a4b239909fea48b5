import pytest
import torch

from audiocraft.generation.engine import _Progress

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Steps that a GPU has finished: those before the last event that was waited for."""

    class Gpu:
        queued = done = 0

    class Event:
        def record(self, _stream):
            self.step = Gpu.queued

        def synchronize(self):
            Gpu.done = max(Gpu.done, self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return Gpu


@pytest.mark.parametrize("total", [1, 7, 8, 9, 16, 41, 48])
def test_a_gpu_is_at_most_16_steps_behind(gpu, total):
    reports = []

    def callback(done, steps):
        assert done <= gpu.done, "reported before it was done"
        reports.append((done, steps))

    progress = _Progress(CUDA, total, callback)
    for step in range(1, total + 1):
        assert step - gpu.done <= 16
        gpu.queued = step
        progress.queued(step)
    assert reports == sorted(set(reports))
    assert reports[-1] == (total, total)
    assert len(reports) == -(-total // 8)


def test_a_gpu_waits_without_a_callback_too(gpu):
    progress = _Progress(CUDA, 100, None)
    for step in range(1, 101):
        gpu.queued = step
        progress.queued(step)
    assert gpu.done == 100


def test_a_cpu_reports_each_step():
    reports = []
    progress = _Progress(torch.device("cpu"), 3, lambda *step: reports.append(step))
    for step in range(1, 4):
        progress.queued(step)
    assert reports == [(1, 3), (2, 3), (3, 3)]
