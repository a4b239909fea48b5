"""Arguments of the official package: their names, order and defaults. Ours may follow them.

Those of `audio_write` and `normalize_audio` are golden data, see `tests/data`.
"""

import inspect

import pytest

from audiocraft.data.audio import audio_info, audio_read
from audiocraft.data.audio_utils import convert_audio
from audiocraft.models import CompressionModel, LMModel, MultiBandDiffusion, MusicGen
from audiocraft.models.encodec import InterleaveStereoCompressionModel
from audiocraft.modules.chroma import ChromaExtractor
from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
from audiocraft.modules.conditioners import WavCondition

SHOWN = "progress=False, return_tokens=False"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (MusicGen, "name, compression_model, lm, max_duration=None"),
        (MusicGen.get_pretrained, "name='facebook/musicgen-melody', device=None"),
        (
            MusicGen.set_generation_params,
            (
                "self, use_sampling=True, top_k=250, top_p=0.0, temperature=1.0, duration=30.0, "
                # None is its 18 of the released versions' 30 s, as a share of any context.
                "cfg_coef=3.0, cfg_coef_beta=None, two_step_cfg=False, extend_stride=None"
            ),
        ),
        (MusicGen.set_custom_progress_callback, "self, progress_callback=None"),
        (MusicGen.generate, f"self, descriptions, {SHOWN}"),
        (MusicGen.generate_unconditional, f"self, num_samples, {SHOWN}"),
        (
            MusicGen.generate_with_chroma,
            f"self, descriptions, melody_wavs, melody_sample_rate, {SHOWN}",
        ),
        (
            MusicGen.generate_continuation,
            f"self, prompt, prompt_sample_rate, descriptions=None, {SHOWN}",
        ),
        (MusicGen.generate_audio, "self, gen_tokens"),
        (MultiBandDiffusion, "DPs, codec_model"),
        (MultiBandDiffusion.get_mbd_musicgen, "device=None"),
        (MultiBandDiffusion.regenerate, "self, wav, sample_rate"),
        (MultiBandDiffusion.tokens_to_wav, "self, tokens, n_bands=32"),
        (MultiBandDiffusion.re_eq, "self, wav, ref, n_bands=32, strictness=1.0"),
        (MultiBandDiffusion.generate, "self, emb, size=None, step_list=None"),
        (LMModel.compute_predictions, "self, codes, conditions, condition_tensors=None"),
        (CompressionModel.encode, "self, x"),
        (CompressionModel.decode, "self, codes, scale=None"),
        (InterleaveStereoCompressionModel, "model, per_timestep=False"),
        (InterleaveStereoCompressionModel.get_left_right_codes, "self, codes"),
        (
            ChromaExtractor,
            (
                "sample_rate, n_chroma=12, radix2_exp=12, nfft=None, winlen=None, winhop=None, "
                "argmax=False, norm=inf"
            ),
        ),
        (DelayedPatternProvider, "n_q, delays=None, flatten_first=0, empty_initial=0"),
        (WavCondition, "wav, length, sample_rate, path=[], seek_time=[]"),
        (audio_read, "filepath, seek_time=0.0, duration=-1.0, pad=False"),
        (audio_info, "filepath"),
        (convert_audio, "wav, from_rate, to_rate, to_channels"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_arguments(function, expected):
    arguments = [
        str(argument.replace(annotation=argument.empty))
        for argument in inspect.signature(function).parameters.values()
    ]
    asked = expected.split(", ")
    assert arguments[: len(asked)] == asked
    # What follows must be left out by official programs.
    for argument in arguments[len(asked) :]:
        assert "=" in argument
