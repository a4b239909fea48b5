"""Whether a model learns music: chunks of it, coded by a codec whose codebooks fit them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.cluster.vq import kmeans2

from audiocraft.data.audio import audio_read
from audiocraft.data.audio_utils import convert_audio
from audiocraft.models.builders import get_lm_model
from audiocraft.models.encodec import EncodecModel
from audiocraft.models.finetunes import base_sha256, merged_state, read_finetune, save_finetune
from audiocraft.models.loaders import build_lm_model, read_checkpoint
from audiocraft.modules.lora import attach, lora_config
from audiocraft.modules.seanet import SEANetConfig
from audiocraft.quantization.vq import ResidualVectorQuantizer
from audiocraft.solvers.conditions import ConditionSettings
from audiocraft.solvers.musicgen import Clip, Trainer, TrainSettings
from audiocraft.solvers.optimizers import OptimizerSettings
from tests.golden_data import GOLDEN
from tools import render_music
from tools.synthetic_music import midi

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(midi.missing() is not None, reason=f"{midi.missing()} is missing"),
]

CODEBOOKS, CARD = 4, 64
RATE, SECONDS, FRAMES = 32000, 2, 100
UPDATES = 150
RATES = {"adamw": 2e-3, "dadam": 1.0, "prodigy": 1.0}
SETTINGS = TrainSettings(
    updates=UPDATES,
    batch_size=4,
    micro_batch=4,
    seed=1,
    conditions=ConditionSettings(cfg_p=0.1, word_p=0.1),
)
LORA_LR, LORA_RANK = 1e-2, 8
TUNING_UPDATES = 300
TEXT_ENCODER = GOLDEN / "t5_tiny"


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Ten chunks of two pieces, and ten of two others."""
    folder = tmp_path_factory.mktemp("music")
    pieces = render_music.render_set(folder, seed=12, count=4, seconds=5 * SECONDS + 4)
    waves = []
    for piece in pieces:
        wave, rate = audio_read(folder / f"{piece.name}.wav")
        wave = convert_audio(wave[None], rate, RATE, 1)[0, :, 4 * RATE :]  # after the entry
        waves += list(wave[:, : 5 * SECONDS * RATE].split(SECONDS * RATE, dim=1))
    texts = [f"{piece.style} in {piece.key}, {piece.bpm} bpm" for piece in pieces for _ in range(5)]
    codes = encode(torch.stack(waves))
    clips = [
        Clip(f"{index}", code, FRAMES, text)
        for index, (code, text) in enumerate(zip(codes, texts, strict=True))
    ]
    return clips[:10], clips[10:]


@torch.no_grad()
def encode(waves):
    """Codes (B, K, T) of music by a codec whose encoder is random, and its codebooks k-means'."""
    torch.manual_seed(0)
    config = SEANetConfig(n_filters=8, dimension=32, ratios=(8, 5, 4, 4))
    codec = EncodecModel(config, ResidualVectorQuantizer(32, CODEBOOKS, CARD), RATE).eval()
    latents = codec.encoder(waves).transpose(1, 2).flatten(0, 1)
    for codebook in codec.quantizer.codebooks:
        rows = latents.double().numpy()
        centres, _ = kmeans2(rows, CARD, minit="++", rng=np.random.default_rng(0))
        codebook.embed.copy_(torch.from_numpy(centres))
        latents = latents - codebook.decode(codebook.encode(latents))
    codes, _ = codec.encode(waves)
    assert codes.shape == (len(waves), CODEBOOKS, FRAMES)
    return codes.short()


def entropy(clips):
    """Of the codes of each codebook, in nats: what a model can know that hears nothing."""
    joined = torch.cat([clip.codes for clip in clips], dim=1).long()
    shares = torch.stack([row.bincount(minlength=CARD) for row in joined]) / joined.shape[1]
    return torch.special.entr(shares.double()).sum(dim=1)


def shuffled(clips, seed):
    """The codes of all clips in an order without sense, of each codebook in another."""
    generator = torch.Generator().manual_seed(seed)
    joined = torch.cat([clip.codes for clip in clips], dim=1)
    rows = [row[torch.randperm(len(row), generator=generator)] for row in joined]
    parts = torch.stack(rows).split(FRAMES, dim=1)
    return [replace(clip, codes=part) for clip, part in zip(clips, parts, strict=True)]


def config():
    cfg = read_checkpoint(GOLDEN / "tiny_release/mono/state_dict.bin").cfg.copy()
    shape = {"dim": 128, "num_heads": 4, "num_layers": 4, "card": CARD, "n_q": CODEBOOKS}
    return OmegaConf.merge(cfg, {"transformer_lm": shape})


def new_model(state=None):
    """From nothing, or from a state."""
    torch.manual_seed(3)
    lm = get_lm_model(config(), TEXT_ENCODER)
    if state is not None:
        lm.load_state_dict(state)
    return lm


def train(model, optimizer, clips, *, lr=None, updates=UPDATES, each=None):
    """A trainer after its updates; `each` gives the clips of an update."""
    optimizer = OptimizerSettings(optimizer, lr or RATES[optimizer])
    trainer = Trainer(model, replace(SETTINGS, optimizer=optimizer, updates=updates))
    for update in range(1, updates + 1):
        trainer.train(each(update) if each else clips, lambda _: None, update)
    return trainer


def ratios(trainer, clips):
    """Loss of the averaged weights over the entropy, of each codebook."""
    return trainer.evaluate(clips).per_codebook / entropy(clips)


def show(capsys, *what):
    with capsys.disabled():
        print("\n", *what)


def test_the_codes_are_worth_learning(music, capsys):
    shares = entropy(music[0]) / math.log(CARD)
    show(capsys, "entropy of each codebook over ln(card):", shares.tolist())
    assert (shares > 0.5).all()


@pytest.mark.parametrize("name", RATES)
def test_music_is_learnt_and_noise_is_not(name, music, capsys):
    own, _ = music
    learnt = ratios(train(new_model(), name, own), own)
    noise = train(new_model(), name, own, each=lambda update: shuffled(own, update))
    guessed = ratios(noise, shuffled(own, 0))
    show(capsys, f"{name}, lr {RATES[name]}: {learnt.tolist()}, shuffled {guessed.tolist()}")
    assert (learnt <= 0.75).all()
    assert (guessed > 0.95).all()


@pytest.fixture(scope="module")
def tuned(music):
    """A base that has learnt other pieces, and what full fine-tuning and LoRA make of it."""
    own, other = music
    base = train(new_model(), "adamw", other).exported_state()
    before = Trainer(new_model(base), SETTINGS).evaluate(own, averaged=False)
    full = train(new_model(base), "adamw", own, updates=TUNING_UPDATES)
    adapted = new_model(base)
    attach(adapted, lora_config(LORA_RANK), torch.Generator().manual_seed(0))
    lora = train(adapted, "adamw", own, lr=LORA_LR, updates=TUNING_UPDATES)
    return base, float(before.total), full, lora


def test_an_adapter_closes_at_least_half_of_full_fine_tunings_drop(tuned, music, capsys):
    _, before, full, adapted = tuned
    after, with_adapter = (float(trainer.evaluate(music[0]).total) for trainer in (full, adapted))
    closed = (before - with_adapter) / (before - after)
    show(capsys, f"base {before:.3f}, full {after:.3f}, LoRA {with_adapter:.3f}: {closed:.3f}")
    assert after < 0.75 * before
    assert closed >= 0.5


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_file_evaluates_as_the_trainer_says(kind, tuned, music, tmp_path, capsys):
    """Written, read, merged with its base and built anew, with nothing dropped."""
    base, _, full, adapted = tuned
    trainer = full if kind == "full" else adapted
    path = tmp_path / "trained_model.safetensors"
    save_finetune(
        path,
        trainer.exported_state(),
        trainer.lm.cfg,
        base="small",
        base_sha256=base_sha256(base),
        license="unknown",
        lora=lora_config(LORA_RANK) if kind == "lora" else None,
    )
    read = read_finetune(path)
    checkpoint = read.checkpoint
    if kind == "lora":
        whole = merged_state({name: value.float() for name, value in base.items()}, read)
        checkpoint = replace(checkpoint, state=whole)
    lm = build_lm_model(checkpoint, TEXT_ENCODER, "cpu")
    ours = Trainer(lm, SETTINGS).evaluate(music[0], averaged=False)
    theirs = trainer.evaluate(music[0])
    show(capsys, f"{kind}: file {float(ours.total):.6f}, trainer {float(theirs.total):.6f}")
    assert float(ours.total) == pytest.approx(float(theirs.total), rel=0, abs=1e-4)
