"""Ways of asking for music, each of which can be right where another is wrong."""

from typing import NamedTuple

import torch

from audiocraft.models import MusicGen
from tests.models.test_lm import whole_mix

COEFS = {"guided": (3.0, None), "unguided": (1.0, None), "double": (3.0, 2.0)}
BRANCHES = {"guided": 2, "unguided": 1, "double": 3}


class Cell(NamedTuple):
    """One of them, of a kind of golden release or of `tiny`."""

    kind: str
    guidance: str
    prompt: bool
    melody: bool

    def __str__(self):
        given = [name for name in ("prompt", "melody") if getattr(self, name)]
        return "-".join([self.kind, self.guidance, *given])


def cells(*kinds):
    """All of some kinds."""
    return [
        Cell(kind, guidance, prompt, melody)
        for kind in kinds
        for guidance in COEFS
        for prompt in (False, True)
        for melody in (False, True)
        if not melody or kind == "tiny" or "melody" in kind
    ]


def load_cell(cell, release, device):
    """The model that a cell is asked of."""
    if cell.kind == "tiny":
        return MusicGen.get_pretrained("tiny", device)
    model = MusicGen.get_pretrained(release(cell.kind), device)
    if "melody" in cell.kind:  # no separator is needed
        model.lm.condition_provider.conditioners["self_wav"]._get_stemmed_wav = whole_mix
    return model


def codes_of(model, cell, context, seconds):
    """Codes, in windows of `context` seconds."""
    coef, beta = COEFS[cell.guidance]
    model.max_duration = context
    model.set_generation_params(
        duration=seconds, seed=3, top_k=12, cfg_coef=coef, cfg_coef_beta=beta
    )
    samples = int(context * model.sample_rate)
    wav = torch.randn(1, model.audio_channels, samples, generator=torch.Generator().manual_seed(0))
    wav = wav.to(model.device)
    # What the public methods call, none of which takes a prompt together with a melody.
    _, codes = model._run(
        ["happy rock"],
        wav[..., : samples // 4] if cell.prompt else None,
        [wav] if cell.melody else None,
        progress=False,
        return_tokens=True,
    )
    return codes
