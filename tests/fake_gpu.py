"""Tensors without numbers that claim to be on a GPU, and what else torch has of one."""

from contextlib import contextmanager

import pytest
import torch
from julius import bands, resample
from torch._subclasses import fake_tensor
from torch.utils._pytree import tree_leaves

from audiocraft.modules import chroma

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PLACES = ["cpu", "cuda"]
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Stream:
    """A queue of a GPU's work, which notes the queues that it waits for."""

    def __init__(self, device=CUDA):
        self.device = torch.device(device)
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Event:
    """A place in a queue."""

    def record(self, stream):
        assert isinstance(stream, Stream)

    def synchronize(self):
        pass


class Generator(torch.Generator):
    """One of the CPU, which says that it is where it was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


class Gpu(fake_tensor.FakeTensorMode):
    """Tensors without numbers on a CPU and a GPU.

    Some operations of torch's own do not look where their arguments are, such as convolutions: here
    all have to. What the host asks a tensor for is made up: numbers rise from 0.5 towards 1, a
    choice is true, an index is 0.

    Attributes:
        found: how many elements the next calls of `nonzero` find; all where it is not said.
        stream: the current one.
        waits: how often the host has waited for the GPU.
    """

    avoid_device_init = True

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.found = []
        self.stream = Stream()
        self.waits = 0
        self._asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        self._check(packet, args, kwargs)
        if packet is aten._local_scalar_dense and getattr(args[0], "constant", None) is None:
            return self._number(args[0].dtype)
        if packet is aten.nonzero:
            with self:
                found = self.found.pop(0) if self.found else args[0].numel()
                return torch.zeros(found, args[0].dim(), dtype=torch.long, device=args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)

    @staticmethod
    def _check(packet, args, kwargs):
        given = [*args, *kwargs.values()]
        given += [each for several in given if isinstance(several, list) for each in several]
        tensors = [each for each in given if isinstance(each, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}
        if packet in INDEXED and tensors[0].device.type == "cuda":
            devices.discard("cpu")  # indices; torch itself looks at the values
        if len(devices) > 1 and packet not in COPIES:
            raise RuntimeError(f"{packet} was given tensors on {' and '.join(sorted(devices))}")

    def _number(self, dtype):
        if dtype == torch.bool:
            return True
        if not dtype.is_floating_point:
            return 0
        self._asked += 1
        return 1 - 1 / (self._asked + 1)

    @contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def synchronize(self, device):
        assert torch.device(device).type == "cuda"
        self.waits += 1


def moved(module, place, move=torch.nn.Module.to):
    """The module where it shall be; torch cannot move fake weights that others refer to."""
    place = torch.device(getattr(place, "device", place))
    there = {weight.device.type for weight in (*module.parameters(), *module.buffers())}
    return module if there == {place.type} else move(module, place)


def drawn(tensor, *_, generator=None):
    if generator is not None and generator.device.type != tensor.device.type:
        raise RuntimeError(f"a generator of {generator.device} draws for {tensor.device}")
    return tensor


def pin_memory(tensor):
    if tensor.device.type != "cpu":
        raise RuntimeError("only memory of the host can be pinned")
    return tensor


def record_stream(tensor, stream):
    assert tensor.device.type == "cuda"
    assert isinstance(stream, Stream)


def typed(tensor, kind=None, convert=torch.Tensor.type):
    """`Tensor.type`, which looks for a driver where a name says `cuda`."""
    return tensor if kind == convert(tensor) else convert(tensor, kind)


def istft(spectrum, *_, window, length, **_more):
    """Of the shape of the real one, which looks at numbers."""
    return (spectrum.real.sum(dim=(1, 2)) * window.sum())[:, None].repeat(1, length)


def lstm(x, state, weights, _biases, _layers, _dropout, _training, both_ways, _batch_first):
    """Of the shape of the real one, which takes every frame by itself here."""
    if len({(tensor.device, tensor.dtype) for tensor in (x, *state, *weights)}) > 1:
        raise RuntimeError("an LSTM was given tensors on several devices or of several types")
    width = state[0].shape[-1] * (2 if both_ways else 1)
    return sum(tensor.sum() for tensor in (x, *weights)).expand(*x.shape[:-1], width), *state


def backward(loss):
    """Gradients of zeros for all that a loss depends on: torch has no thread for a GPU here."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        weight = getattr(node, "variable", None)
        if weight is not None:
            gradient = torch.zeros_like(weight)
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


def with_numbers(function):
    """Computes on the CPU what a fake tensor cannot hold."""

    def computed(*args, **kwargs):
        with fake_tensor.unset_fake_temporarily():
            return function(*args, **kwargs)

    return computed


@contextmanager
def on_gpu(*models):
    """As if there were a GPU, with models moved to it.

    The models are to be loaded before: inside there are no numbers.
    """
    gpu = Gpu()
    cuda = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Event,
        "stream": gpu.on_stream,
        "current_stream": lambda *_: gpu.stream,
        "synchronize": gpu.synchronize,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        for method in (pin_memory, record_stream, backward):
            patch.setattr(torch.Tensor, method.__name__, method)
        for name in ("exponential_", "normal_"):
            patch.setattr(torch.Tensor, name, drawn)
        patch.setattr(torch.Tensor, "type", typed)
        patch.setattr(torch.nn.Module, "to", moved)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.autograd, "backward", lambda roots, _: [*map(backward, roots)])
        patch.setattr(torch.autograd, "grad", lambda _, roots: [*map(torch.zeros_like, roots)])
        patch.setattr(torch, "istft", istft)
        patch.setattr(torch.nn.modules.rnn._VF, "lstm", lstm)
        patch.setattr(torch.backends.cudnn, "enabled", False)  # which looks for a driver
        patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
        patch.setattr(chroma, "_filter_bank", with_numbers(chroma._filter_bank))
        patch.setattr(bands, "SplitBands", with_numbers(bands.SplitBands))
        patch.setattr(resample, "ResampleFrac", with_numbers(resample.ResampleFrac))
        patch.setattr("audiocraft.generation.engine.fused_decoder", lambda *_: None)
        with gpu:
            for each in models:
                each.to("cuda")
            yield gpu


def places(tensors):
    return {tensor.device for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor)}


def silence(*shape, place="cuda"):
    return torch.zeros(*shape, device=place)
