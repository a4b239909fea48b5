"""What each of two processes does for `test_sharded.py`; prints how far they are from one alone."""

import copy
import json
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from audiocraft.errors import InputError
from audiocraft.solvers.ema import Ema
from audiocraft.solvers.optimizers import OptimizerSettings, build_optimizer
from audiocraft.solvers.rank import end
from audiocraft.solvers.schedules import lr_factor, set_lr

UPDATES = 60
WHOLE = StateDictOptions(full_state_dict=True)


def new_model():
    """Its rows do not divide by two, and its bias starts at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(33, 8), nn.Linear(8, 7))
    nn.init.zeros_(model[1].bias)
    return model


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(name, lr, *, sharded):
    """Final weights, their averages and the optimizer's whole state; halfway it is resumed."""
    model = new_model()
    if sharded:
        fully_shard(model)

    def optimizer_of():
        groups = [[p] for p in model.parameters()]
        return build_optimizer(OptimizerSettings(name, lr), groups)

    optimizer, ema = optimizer_of(), Ema(dict(model.named_parameters()), every=5)
    inputs = torch.arange(64) % 33
    targets = (inputs * 3 + 1) % 7
    rows = slice(dist.get_rank(), None, 2) if sharded else slice(None)
    for update in range(1, UPDATES + 1):
        if update == UPDATES // 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_of()
            optimizer.load_state_dict(state)
        set_lr(optimizer, lr * lr_factor("cosine", update, 4, UPDATES))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
        loss.backward()  # FSDP2 averages over the processes
        optimizer.step()
        ema.after(update)
    with ema.applied():
        averages = {key: full(p).detach().clone() for key, p in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    weights = {key: full(p).detach() for key, p in model.named_parameters()}
    return weights, averages, state


def distance(ours, theirs, scale=1.0):
    return max((ours[key] - theirs[key]).abs().max().item() / scale for key in theirs)


def relative(ours, theirs):
    """States differ by orders of magnitude."""
    return max(
        distance({0: ours[key]}, {0: theirs[key]}, theirs[key].abs().max().item() or 1.0)
        for key in theirs
    )


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {}
    for name, lr in {"adamw": 1e-2, "dadam": 1.0, "prodigy": 1.0}.items():
        ours, theirs = train(name, lr, sharded=True), train(name, lr, sharded=False)
        if dist.get_rank() == 0:
            states = [
                {
                    f"{key}.{part}": value.expand(theirs[0][key].numel()).flatten()
                    if value.dim() == 0
                    else value.flatten()
                    for key, parts in state["state"].items()
                    for part, value in parts.items()
                    if isinstance(value, torch.Tensor) and part != "step"
                }
                for *_, state in (ours, theirs)
            ]
            start = dict(new_model().named_parameters())
            result[name] = {
                "moved": distance(theirs[0], start),
                "weights": distance(ours[0], theirs[0]),
                "averages": distance(ours[1], theirs[1]),
                "state": relative(*states),
                "states": len(states[0]),
            }
    model = new_model()
    fully_shard(model[1])
    try:
        build_optimizer(OptimizerSettings(), [list(model.parameters())])
    except InputError as error:
        result["mixed"] = str(error)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(result) + "\n")
    end(0)


if __name__ == "__main__":
    main()
