import inspect
import logging
import math

import julius
import pytest
import torch

from audiocraft.data import audio_utils
from audiocraft.data.audio_utils import (
    convert_audio,
    convert_audio_channels,
    f32_pcm,
    i16_pcm,
    measure_loudness,
    normalize_audio,
    normalize_loudness,
)
from audiocraft.errors import InputError
from tests.golden_data import load, meta

RATE = 32000  # of the golden signals
SIGNALS = ("mono_quiet", "mono_loud", "stereo", "silent")
CASES = {
    "peak": {"strategy": "peak"},
    "peak.nonorm": {"strategy": "peak", "normalize": False},
    "clip": {"strategy": "clip"},
    "rms": {"strategy": "rms"},
    "rms.nonorm": {"strategy": "rms", "normalize": False},
    "loudness": {"strategy": "loudness"},
    "loudness_compressor": {"strategy": "loudness", "loudness_compressor": True},
    "loudness_headroom16": {"strategy": "loudness", "loudness_headroom_db": 16},
}
CONVERT = load("convert_audio/data")
PCM = load("normalize_audio/pcm")


def sine(frequency, seconds, rate, amplitude=1.0):
    return amplitude * torch.sin(
        2 * math.pi * frequency * torch.arange(round(seconds * rate)).double() / rate
    )


@pytest.mark.parametrize("signal", SIGNALS)
def test_normalize_audio_matches_the_official_package(signal):
    golden = load(f"normalize_audio/{signal}")
    wav = golden.pop(f"{signal}.in")
    assert set(golden) == {f"{signal}.{case}" for case in CASES}
    for case, arguments in CASES.items():
        ours = normalize_audio(wav, sample_rate=RATE, **arguments)
        torch.testing.assert_close(ours, golden[f"{signal}.{case}"], rtol=0, atol=1e-5, msg=case)


@pytest.mark.parametrize("signal", SIGNALS)
def test_loudness_matches_the_official_package(signal):
    expected = meta("normalize_audio")["loudness_lkfs"][signal]
    wav = load(f"normalize_audio/{signal}")[f"{signal}.in"]
    assert measure_loudness(wav, RATE) == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("key", sorted(key for key in CONVERT if key[0].isdigit()))
def test_convert_audio_matches_the_official_package(key):
    from_rate, to_rate, channels = map(int, key.split("_"))
    ours = convert_audio(CONVERT["in"], from_rate, to_rate, channels)
    torch.testing.assert_close(ours, CONVERT[key], rtol=0, atol=1e-5)


def test_mono_is_copied_to_stereo():
    stereo = convert_audio_channels(CONVERT["in"][:1])
    torch.testing.assert_close(stereo, CONVERT["mono_to_stereo"], rtol=0, atol=0)
    stereo[0].zero_()  # the channels do not share memory
    assert stereo[1].any()


def test_i16_pcm_matches_the_official_package():
    assert torch.equal(i16_pcm(PCM["pcm.in"]), PCM["pcm.i16"])
    assert torch.equal(i16_pcm(PCM["pcm.i16_clip_in"]), PCM["pcm.i16_clip"])


def test_pcm_never_wraps():
    assert i16_pcm(torch.tensor([1.7, -1.7])).tolist() == [32767, -32767]


def test_pcm_round_trip():
    steps = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    assert torch.equal(i16_pcm(f32_pcm(steps)), steps)
    assert f32_pcm(torch.tensor([-(2**31), 2**30], dtype=torch.int32)).tolist() == [-1, 0.5]
    with pytest.raises(InputError, match=r"Audio is torch\.int64; give it as int16, int32 or flo"):
        f32_pcm(torch.tensor([1]))


@pytest.mark.parametrize("shape", [(2, 1000), (3, 2, 1000), (1, 1), (2, 0)])
def test_converted_length(shape):
    wav = torch.zeros(shape)
    assert convert_audio(wav, 48000, 32000, 1).shape == (*shape[:-2], 1, shape[-1] * 2 // 3)


def test_customary_rates_are_resampled_by_julius(monkeypatch):
    rates = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000, 176400)
    monkeypatch.setattr(julius.resample, "resample_frac", lambda wav, *_: wav)
    monkeypatch.delattr(audio_utils, "_resample_odd_rates")
    for source in (*rates, 192000):
        for target in (16000, 32000, 44100, 48000):
            convert_audio(torch.zeros(1, 10), source, target, 1)


def test_odd_rates_take_no_gigabytes():
    wav = sine(440, 1, 44101, 0.5).float().expand(2, 1, -1)
    resampled = convert_audio(wav, 44101, 32000, 1)
    assert resampled.shape == (2, 1, RATE)
    expected = sine(440, 1, RATE, 0.5).float()
    torch.testing.assert_close(resampled[1, 0, 500:-500], expected[500:-500], rtol=0, atol=2e-5)


@pytest.mark.parametrize("rate", [0, -44100, 44100.5])
def test_rates_are_positive_whole_numbers(rate):
    with pytest.raises(InputError, match="give a positive whole number"):
        convert_audio(torch.zeros(1, 10), rate, 32000, 1)


@pytest.mark.parametrize("channels", [2, 3, 4, 6, 8, 16])
def test_mono_is_the_mean(channels):
    wav = torch.rand(channels, 5)
    torch.testing.assert_close(convert_audio(wav, 8000, 8000, 1), wav.mean(0, keepdim=True))


def test_downmix_of_5_1():
    root = math.sqrt(0.5)
    # left, right, centre, low frequencies, back left, back right: one at a time
    left, right = convert_audio_channels(torch.eye(6), 2)
    torch.testing.assert_close(left * (1 + 2 * root), torch.tensor([1, 0, root, 0, root, 0]))
    torch.testing.assert_close(right * (1 + 2 * root), torch.tensor([0, 1, root, 0, 0, root]))


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 7, 8, 9, 16])
def test_downmix_to_stereo_is_symmetric_and_within_full_scale(channels):
    left, right = convert_audio_channels(torch.eye(channels), 2)
    assert left.sum() == pytest.approx(1)
    assert sorted(left.tolist()) == sorted(right.tolist())
    assert left.min() >= 0


@pytest.mark.parametrize(("present", "wanted"), [(2, 6), (6, 3), (2, 0), (0, 1)])
def test_other_channel_counts_are_refused(present, wanted):
    with pytest.raises(InputError) as caught:
        convert_audio_channels(torch.zeros(present, 10), wanted)
    assert str(caught.value) == (
        f"Audio of {present} channels cannot become {wanted}; only mono can be copied, and only "
        "mono and stereo can be mixed to: convert it to mono first."
    )


def test_audio_without_a_channel_axis_is_refused():
    with pytest.raises(InputError, match=r"has the shape \(10,\); give it as \(channels, samples"):
        convert_audio(torch.zeros(10), 8000, 8000, 1)


@pytest.mark.parametrize("rate", [16000, 22050, 32000, 44100, 48000])
def test_loudness_of_the_standards_sine(rate):
    """BS.1770: 997 Hz at full scale in one channel is -3.01 LKFS (K-weighting differs by 0.1)."""
    wav = torch.stack([sine(997, 2, rate, 0.5), torch.zeros(2 * rate)])
    assert measure_loudness(wav, rate) == pytest.approx(-3.01 - 6.02, abs=0.1)
    assert measure_loudness(wav[0], rate) == measure_loudness(wav, rate)  # (T,) is mono


def test_surround_channels_count_more():
    wav = torch.zeros(5, 2 * RATE)
    wav[4] = sine(997, 2, RATE, 0.5)
    surround = measure_loudness(wav, RATE) - measure_loudness(wav.flip(0), RATE)
    assert surround == pytest.approx(10 * math.log10(1.41))
    with pytest.raises(InputError, match=r"up to 5 channels, not 6: convert the audio to stereo"):
        measure_loudness(torch.zeros(6, RATE), RATE)


def test_loudness_leaves_silence_and_quiet_passages_out():
    tone = sine(997, 4, RATE, 0.5)
    loud = measure_loudness(tone, RATE)
    # blocks that touch the tone stay, so a few are half silent
    silence = torch.zeros(20 * RATE)
    assert measure_loudness(torch.cat([tone, silence]), RATE) == pytest.approx(loud, abs=0.3)
    quiet = sine(997, 20, RATE, 0.005)
    assert measure_loudness(torch.cat([tone, quiet]), RATE) == pytest.approx(loud, abs=0.3)


def test_loudness_of_less_than_a_block():
    tone = sine(997, 0.1, RATE, 0.5)
    assert measure_loudness(tone, RATE) == pytest.approx(-9.03, abs=0.2)
    assert math.isnan(measure_loudness(tone[:0], RATE))


def test_what_cannot_be_heard_is_not_made_loud():
    slow = sine(0.05, 20, RATE, 0.01).float()  # above the energy floor, below the loudness gate
    assert math.isnan(measure_loudness(slow, RATE))
    assert normalize_loudness(slow, RATE) is slow


def test_energy_floor():
    wav = sine(997, 1, RATE, 2e-3 * math.sqrt(2)).float()
    assert normalize_loudness(wav * 0.99, RATE).abs().max() < 0.003
    assert normalize_loudness(wav * 1.01, RATE).abs().max() > 0.2
    assert normalize_loudness(wav * 1.01, RATE, energy_floor=1).abs().max() < 0.003


@pytest.mark.parametrize("strategy", ["clip", "loudness", "peak", "rms"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_strategy_keeps_shape_dtype_and_full_scale(strategy, dtype):
    for shape in ((8000,), (1, 8000), (2, 8000)):
        wav = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 4 - 2).to(dtype)
        ours = normalize_audio(wav, strategy=strategy, sample_rate=8000, loudness_headroom_db=1)
        assert (ours.shape, ours.dtype) == (wav.shape, dtype)
        assert 0.1 < ours.abs().max() <= 1


@pytest.mark.parametrize("strategy", ["clip", "loudness", "peak", "rms"])
@pytest.mark.parametrize("normalize", [True, False])
def test_silence_and_nothing_stay(strategy, normalize):
    for wav in (torch.zeros(2, 32000), torch.zeros(2, 0)):
        ours = normalize_audio(wav, normalize, strategy, sample_rate=RATE)
        assert torch.equal(ours, wav)


def test_opposite_channels_have_no_mean_level():
    wav = torch.tensor([[0.5], [-0.5]]).expand(2, 1000)
    assert torch.equal(normalize_audio(wav, strategy="rms"), wav)


def test_without_normalize_the_level_is_only_lowered():
    quiet = sine(997, 1, RATE, 0.01).float()
    loud = quiet * 99
    for strategy in ("loudness", "peak", "rms"):
        arguments = {"normalize": False, "strategy": strategy, "sample_rate": RATE}
        assert torch.equal(normalize_audio(quiet, **arguments), quiet)
        assert normalize_audio(loud, **arguments).max() < 0.9


def test_clipping_is_logged_on_request(caplog):
    wav = torch.cat([torch.full((999,), 0.01), torch.tensor([100.0])])[None]
    with caplog.at_level(logging.WARNING):
        normalize_audio(wav, strategy="rms", rms_headroom_db=10)
        assert not caplog.messages
        normalize_audio(
            wav, strategy="rms", rms_headroom_db=10, log_clipping=True, stem_name="take"
        )
    assert caplog.messages == [
        "take: 0.100 % of the samples exceed full scale, by up to 20.0 dB, and are cut off."
    ]


def test_unusable_arguments():
    with pytest.raises(InputError) as caught:
        normalize_audio(torch.zeros(1, 10), strategy="louder")
    assert str(caught.value) == "strategy must be one of loudness, clip, peak, rms, not 'louder'."
    with pytest.raises(InputError, match="sample_rate is missing: the loudness strategy needs it"):
        normalize_audio(torch.zeros(1, 10), strategy="loudness")


def test_signature_of_the_official_package():
    expected = meta("normalize_audio")["defaults"]
    parameters = inspect.signature(normalize_audio).parameters
    assert list(parameters) == list(expected)
    assert {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in parameters.items()
    } == expected
