import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.models.finetunes import (
    FineTune,
    base_sha256,
    load_any,
    merged_state,
    save_finetune,
)
from audiocraft.models.loaders import Checkpoint, load_models
from audiocraft.models.versions import VERSIONS
from audiocraft.modules.conditioners import ConditioningAttributes
from audiocraft.modules.lora import (
    DEFAULT_TARGETS,
    LoraConfig,
    adapter_parameters,
    adapter_state,
    attach,
    detach,
    lora_config,
)
from audiocraft.solvers.optimizers import OptimizerSettings, build_optimizer, parameter_groups
from tests.models.test_lm import STATES, descriptions, lm
from tests.releases import stand_in
from tests.solvers.test_loss import loss_of

TEXT = "lm_tiny_text_mono"


def codes_for(model, rows=3, frames=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.card, (rows, model.num_codebooks, frames), generator=generator)


def config_of(rank):
    """An adapter whose scale is 2."""
    return LoraConfig(rank, 2.0 * rank, DEFAULT_TARGETS)


def attached(name=TEXT, rank=4, *, trained=True):
    """A model with adapters, at random values as if they had been trained, and its base's state."""
    model = lm(name)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    attach(model, config_of(rank), generator)
    if trained:
        for key, parameter in adapter_parameters(model).items():
            if key.endswith("lora_b"):
                parameter.data.normal_(0, 0.1, generator=generator)
    return model, base


def merged(name, model, base):
    """A model without adapters, into whose weights those of `attached` are added."""
    tuned = FineTune(Checkpoint("adapter", adapter_state(model)), lora=config_of(4))
    other = lm(name)
    other.load_state_dict(merged_state(base, tuned))
    return other


@torch.no_grad()
def logits_of(model, items):
    return model.compute_predictions(codes_for(model, len(items)), items).logits.nan_to_num()


@pytest.mark.parametrize("name", STATES.values())
def test_it_starts_as_the_base(name):
    items = descriptions(name)
    model, _ = attached(name, trained=False)
    assert torch.equal(logits_of(model, items), logits_of(lm(name), items))
    trained, _ = attached(name)
    assert (logits_of(trained, items) - logits_of(model, items)).abs().max() > 0.1


def test_the_start_is_the_papers():
    model, _ = attached(rank=16, trained=False)
    state = adapter_state(model)
    for key, value in state.items():
        if key.endswith("lora_b"):
            assert not value.any()
    wide = torch.cat([v.flatten() for k, v in state.items() if k.endswith("linear1.weight.lora_a")])
    assert wide.std().item() == pytest.approx(1 / 32**0.5, rel=0.15)
    again, _ = attached(rank=16, trained=False)
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(again).items())


@pytest.mark.parametrize("name", STATES.values())
def test_every_matrix_of_the_decoder_is_adapted(name):
    model, base = attached(name)
    expected = {key for key in base if key.startswith("transformer.") and base[key].dim() == 2}
    assert {key.rpartition(".")[0] for key in adapter_state(model)} == expected
    parts = {key.rpartition(".")[2] for key in adapter_state(model)}
    assert parts == {"lora_a", "lora_b"}


@pytest.mark.parametrize("name", STATES.values())
def test_it_computes_what_merging_gives(name):
    model, base = attached(name)
    other, items = merged(name, model, base), descriptions(name)
    torch.testing.assert_close(logits_of(model, items), logits_of(other, items), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_adapters_only(dtype):
    model, base = attached()
    model.train()
    items = descriptions(TEXT)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_of(model, codes_for(model), items).total
    loss.backward()
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapters), name
        if id(parameter) in adapters:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    detach(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


def test_gradients_are_those_of_the_merged_weights():
    """The chain rule through W + s B A, whose gradient is never computed as a whole."""
    model, base = attached()
    items, codes = descriptions(TEXT), codes_for(model)
    loss_of(model, codes, items).total.backward()
    other = merged(TEXT, model, base)
    loss_of(other, codes, items).total.backward()
    whole = {name: parameter.grad for name, parameter in other.named_parameters()}
    parameters = adapter_parameters(model)
    for key in {name.rpartition(".")[0] for name in parameters}:
        a, b = parameters[f"{key}.lora_a"], parameters[f"{key}.lora_b"]
        torch.testing.assert_close(a.grad, 2.0 * b.T @ whole[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, 2.0 * whole[key] @ a.T, rtol=1e-4, atol=1e-5)


def test_detaching_gives_the_base_back():
    model, base = attached()
    optimizer = build_optimizer(OptimizerSettings("adamw", 0.01), parameter_groups(model))
    items = descriptions(TEXT)
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, codes_for(model), items).total.backward()
        optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in adapter_state(model).items())
    detach(model)
    state = model.state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[key], base[key]) for key in base)
    assert not adapter_parameters(model)
    assert torch.equal(logits_of(model, items), logits_of(lm(TEXT), items))


def test_decoding_step_by_step_with_adapters():
    """Samples can be made in the middle of training."""
    model, base = attached()
    items = descriptions(TEXT)
    other = merged(TEXT, model, base)
    arguments = {"conditions": items, "max_gen_len": 12, "use_sampling": False}
    assert torch.equal(model.generate(**arguments), other.generate(**arguments))


@pytest.mark.parametrize(("rank", "limit"), [(0, "1 to 32"), (33, "1 to 32"), (-1, "1 to 32")])
def test_ranks_that_make_no_sense_are_refused(rank, limit):
    model = lm(TEXT)
    with pytest.raises(InputError, match=f"lora_rank is {rank}, .* {limit}"):
        attach(model, lora_config(rank))
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, lora_config(32))


def test_unknown_targets_are_refused():
    with pytest.raises(InputError, match="no weights named query"):
        attach(lm(TEXT), LoraConfig(2, 2.0, ("query",)))


def test_the_saved_adapter_is_what_was_trained(tmp_path, monkeypatch):
    """Trained, saved by `save_finetune`, loaded by `load_any`: the same logits."""
    version = "stereo-melody"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(tmp_path / "store"))
    stand_in(tmp_path / "store", version, seed=1)
    model, _ = load_models(VERSIONS[version].source, "cpu")
    items = [ConditioningAttributes(text={"description": text}) for text in ("a song", None)]
    base, base_hash = logits_of(model, items), base_sha256(model.state_dict())
    config = lora_config(4)
    attach(model, config, torch.Generator().manual_seed(0))
    optimizer = build_optimizer(OptimizerSettings("adamw", 0.01), parameter_groups(model))
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, codes_for(model, 2), items).total.backward()
        optimizer.step()
    path = tmp_path / "trained_model.safetensors"
    save_finetune(
        path,
        adapter_state(model),
        model.cfg,
        base=version,
        base_sha256=base_hash,
        license="cc-by-nc-4.0",
        lora=config,
    )
    tuned, _ = load_any(str(path), "cpu", "float32")
    ours, theirs = logits_of(model, items), logits_of(tuned, items)
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=5e-3)  # the file is in 16 bit
    for value in adapter_state(model).values():
        value.copy_(value.half())
    torch.testing.assert_close(theirs, logits_of(model, items), rtol=0, atol=1e-5)
    detach(model)
    assert torch.equal(logits_of(model, items), base)
