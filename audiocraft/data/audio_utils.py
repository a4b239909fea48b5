"""Audio as tensors: sample rate, channels, level, loudness, PCM.

scipy, julius and soxr are imported where they are used, so that the model packages import without.
"""

import logging
import math
from typing import Final

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from audiocraft.errors import InputError

logger = logging.getLogger(__name__)

STRATEGIES: Final = ("loudness", "clip", "peak", "rms")

_STEREO: Final = 2

# julius holds one filter for each phase: 44.1 to 32 kHz takes 0.16 M taps, 44101 Hz would take
# 1.4 G (5.6 GB). No pair of customary rates comes near this limit.
_MAX_JULIUS_TAPS: Final = 1 << 22
_JULIUS_ZEROS: Final = 24  # zero crossings of its filter on either side, its default

# Order of channels in WAV, FLAC and whatever ffmpeg decodes: left, right, centre, low frequencies
# (-), back or side left and right (l, r), back centre (c).
_LAYOUTS: Final = {3: "LRC", 4: "LRlr", 5: "LRClr", 6: "LRC-lr", 7: "LRC-clr", 8: "LRC-lrlr"}
# Share of each in the left channel after ITU-R BS.775, which leaves the low frequencies out.
_LEFT_GAINS: Final = {
    "L": 1.0,
    "R": 0.0,
    "C": math.sqrt(0.5),
    "l": math.sqrt(0.5),
    "r": 0.0,
    "c": 0.5,
    "-": 0.0,
}
_MIRROR: Final = str.maketrans("LRlr", "RLrl")

# ITU-R BS.1770-4: weights of left, right, centre, left surround, right surround.
_LOUDNESS_WEIGHTS: Final = (1.0, 1.0, 1.0, 1.41, 1.41)
_LOUDNESS_OFFSET: Final = -0.691  # LKFS of a mean square of 1 after K-weighting
_ABSOLUTE_GATE: Final = 10 ** ((-70.0 - _LOUDNESS_OFFSET) / 10)  # -70 LKFS as a mean square
_RELATIVE_GATE: Final = 0.1  # -10 LU


def convert_audio(wav: Tensor, from_rate: float, to_rate: float, to_channels: int) -> Tensor:
    """Resample, then fix the number of channels.

    Args:
        wav: (*, C, T), floating point.
        from_rate: whole Hz of `wav`.
        to_rate: whole Hz of the result.
        to_channels: as for `convert_audio_channels`.

    Returns:
        (*, to_channels, T * to_rate // from_rate).

    Raises:
        InputError: a rate is not a positive whole number, or the channels don't convert.
    """
    return convert_audio_channels(_resample(wav, from_rate, to_rate), to_channels)


def convert_audio_channels(wav: Tensor, channels: int = 2) -> Tensor:
    """Mix down or replicate channels.

    To mono: the mean. From mono: copies. To stereo from 3 to 8 channels: the ITU-R BS.775 downmix
    for the customary layouts (3.0, quad, 5.0, 5.1, 6.1, 7.1 in WAV order), scaled so that it can't
    exceed full scale if its input doesn't; from more channels than that: the mean, on both sides.

    Args:
        wav: (*, C, T), floating point.
        channels: how many the result has.

    Returns:
        (*, channels, T); `wav` itself where nothing changes.

    Raises:
        InputError: no rule leads from C to `channels`, such as 2 to 6.
    """
    if wav.dim() <= 1:
        raise InputError(f"Audio has the shape {tuple(wav.shape)}; give it as (channels, samples).")
    present = wav.shape[-2]
    if present == channels:
        return wav
    if channels == 1 and present > 1:
        return wav.mean(dim=-2, keepdim=True)
    if channels > 1 and present == 1:
        return wav.repeat_interleave(channels, dim=-2)
    if channels == _STEREO and present > 1:
        return _stereo_downmix(present).to(wav) @ wav
    raise InputError(
        f"Audio of {present} channels cannot become {channels}; only mono can be copied, and only "
        "mono and stereo can be mixed to: convert it to mono first."
    )


def measure_loudness(wav: Tensor, sample_rate: int) -> float:
    """Integrated loudness after ITU-R BS.1770-4.

    Audio shorter than one block of 400 ms is measured as one shorter block.

    Args:
        wav: (T,) or (C, T) with C up to 5, floating point, full scale is 1.
        sample_rate: Hz.

    Returns:
        LKFS; NaN for silence, which is what no block reaches -70 LKFS in.

    Raises:
        InputError: more than 5 channels, for which there are no weights.
    """
    samples = np.atleast_2d(wav.detach().cpu().double().numpy())
    channels, length = samples.shape
    if channels > len(_LOUDNESS_WEIGHTS):
        raise InputError(
            f"Loudness is defined for up to {len(_LOUDNESS_WEIGHTS)} channels, not {channels}: "
            "convert the audio to stereo first."
        )
    if not length:
        return math.nan
    block = min(round(0.4 * sample_rate), length)
    hop = round(0.1 * sample_rate)
    blocks = sliding_window_view(_k_weighted(samples, sample_rate) ** 2, block, axis=-1)[:, ::hop]
    powers = np.array(_LOUDNESS_WEIGHTS[:channels]) @ blocks.mean(axis=-1)
    audible = powers[powers > _ABSOLUTE_GATE]
    if not audible.size:
        return math.nan
    loud = audible[audible > _RELATIVE_GATE * audible.mean()]
    return _LOUDNESS_OFFSET + 10 * math.log10(loud.mean())


def normalize_loudness(
    wav: Tensor,
    sample_rate: int,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    energy_floor: float = 2e-3,
) -> Tensor:
    """Bring audio to a loudness; the result may exceed full scale.

    Args:
        wav: (T,) or (C, T), floating point, full scale is 1.
        sample_rate: Hz.
        loudness_headroom_db: the loudness aimed at, in LU below 0 LKFS.
        loudness_compressor: bend peaks softly below full scale with tanh.
        energy_floor: RMS below which audio counts as silent and stays as it is.

    Returns:
        Shape, dtype and device of `wav`; `wav` itself where it is silent.

    Raises:
        InputError: more than 5 channels.
    """
    if not wav.numel() or _rms(wav) < energy_floor:
        return wav
    loudness = measure_loudness(wav, sample_rate)
    if math.isnan(loudness):  # energy, but below what is heard, such as a constant offset
        return wav
    output = wav * _amplitude(-loudness_headroom_db - loudness)
    return torch.tanh(output) if loudness_compressor else output


def normalize_audio(
    wav: Tensor,
    normalize: bool = True,
    strategy: str = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = False,
    sample_rate: int | None = None,
    stem_name: str | None = None,
) -> Tensor:
    """Set the level of audio. Golden test: `test_normalize_audio_matches_the_official_package`.

    Args:
        wav: (T,) or (C, T), floating point, full scale is 1.
        normalize: False only ever lowers the level, where it exceeds the strategy's target.
        strategy: what is brought to its target: `peak` the largest sample, `rms` the mean level of
            the channels' mean, `loudness` the ITU-R BS.1770 loudness; `clip` only cuts peaks off.
        peak_clip_headroom_db: target of `peak` and `clip`, in dB below full scale.
        rms_headroom_db: target of `rms`, in dB below full scale.
        loudness_headroom_db: target of `loudness`, in LU below 0 LKFS.
        loudness_compressor: with `loudness`, bend peaks softly below full scale.
        log_clipping: warn in the log where `rms` or `loudness` had to cut peaks off.
        sample_rate: Hz; needed by `loudness`.
        stem_name: what the warning calls the audio.

    Returns:
        Shape, dtype and device of `wav`, within [-1, 1] (`peak`, `clip`: within their target).
        Digital silence stays silent.

    Raises:
        InputError: unknown strategy, or `loudness` without a sample rate.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}.")
    if not wav.numel():
        return wav
    peak_target = _amplitude(-peak_clip_headroom_db)
    if strategy == "clip":
        return wav.clamp(-peak_target, peak_target)
    if strategy == "peak":
        return _to_level(wav, _peak(wav), peak_target, normalize=normalize)
    if strategy == "rms":
        mono = wav.mean(dim=-2) if wav.dim() > 1 else wav
        wav = _to_level(wav, _rms(mono), _amplitude(-rms_headroom_db), normalize=normalize)
    else:
        if sample_rate is None:
            raise InputError(
                "sample_rate is missing: the loudness strategy needs it; give it in Hz."
            )
        leveled = normalize_loudness(wav, sample_rate, loudness_headroom_db, loudness_compressor)
        if normalize or _peak(leveled) < _peak(wav):
            wav = leveled
    if log_clipping:
        _log_clipping(wav, stem_name)
    return wav.clamp(-1, 1)


def i16_pcm(wav: Tensor) -> Tensor:
    """16-bit PCM: steps of 2^-15, or of 1 / 32767 where full scale would not fit otherwise.

    Args:
        wav: any shape; floating point (beyond [-1, 1] is cut off) or already int16.

    Raises:
        InputError: neither floating point nor int16.
    """
    if wav.dtype == torch.int16:
        return wav
    if not wav.is_floating_point():
        raise InputError(f"Audio is {wav.dtype}; give it as floating point or int16.")
    wav = wav.float().clamp(-1, 1)
    steps = (wav * 2**15).round()
    if bool((steps >= 2**15).any()):
        steps = (wav * (2**15 - 1)).round()
    return steps.to(torch.int16)


def f32_pcm(wav: Tensor) -> Tensor:
    """Floating point in [-1, 1) from PCM.

    Args:
        wav: any shape; int16, int32, or floating point, which is returned as it is.

    Raises:
        InputError: another dtype.
    """
    if wav.is_floating_point():
        return wav
    if wav.dtype not in {torch.int16, torch.int32}:
        raise InputError(f"Audio is {wav.dtype}; give it as int16, int32 or floating point.")
    return wav.float() / (1 << (8 * wav.element_size() - 1))


def _resample(wav: Tensor, from_rate: float, to_rate: float) -> Tensor:
    """(*, T) at another rate; julius counts in float32, so beyond 2^24 samples a few may lack."""
    for rate in (from_rate, to_rate):
        if rate <= 0 or rate != int(rate):
            raise InputError(f"A sample rate is {rate} Hz; give a positive whole number.")
    source, target = int(from_rate), int(to_rate)
    if source == target or not wav.numel():
        return wav
    common = math.gcd(source, target)
    phases, stride = target // common, source // common
    width = 2 * _JULIUS_ZEROS * stride // min(phases, stride) + stride
    if phases * width > _MAX_JULIUS_TAPS:
        return _resample_odd_rates(wav, source, target)
    from julius.resample import resample_frac

    resampled: Tensor = resample_frac(wav, source, target)
    return resampled


def _resample_odd_rates(wav: Tensor, source: int, target: int) -> Tensor:
    """As `_resample`, by soxr, whose memory does not grow with the ratio's terms; no gradient."""
    import soxr

    length = wav.shape[-1] * target // source
    signals = wav.detach().cpu().float().reshape(-1, wav.shape[-1]).T.numpy()
    resampled = torch.from_numpy(soxr.resample(signals, source, target)[:length]).T
    resampled = F.pad(resampled, (0, length - resampled.shape[-1]))
    return resampled.reshape(*wav.shape[:-1], length).to(wav)


def _stereo_downmix(channels: int) -> Tensor:
    """(2, channels) matrix whose rows sum to 1."""
    layout = _LAYOUTS.get(channels, "C" * channels)
    sides = (layout, layout.translate(_MIRROR))
    gains = torch.tensor([[_LEFT_GAINS[position] for position in side] for side in sides])
    return gains / gains.sum(dim=1, keepdim=True)


def _k_weighted(samples: NDArray[np.float64], sample_rate: int) -> NDArray[np.float64]:
    """The two filters of BS.1770, (C, T), after the RBJ audio EQ cookbook.

    Two quirks of the official package's numbers (torchaudio's) are kept: coefficients rounded
    to float32 (3e-4 LU on the fixtures) and each filter's output cut at full scale (1 LU).
    Golden test: `test_loudness_matches_the_official_package`.
    """
    from scipy.signal import lfilter

    for numerator, denominator in (_high_shelf(sample_rate), _high_pass(sample_rate)):
        coefficients = np.array([numerator, denominator], dtype=np.float32)
        samples = lfilter(*(coefficients / coefficients[1, 0]), samples).clip(-1, 1)
    return samples


def _high_shelf(sample_rate: int) -> tuple[list[float], list[float]]:
    """Biquad of +4 dB from 1500 Hz, Q of a Butterworth filter: the head's effect."""
    amplitude = 10 ** (4.0 / 40)
    omega = 2 * math.pi * 1500 / sample_rate
    slope = math.sqrt(amplitude) * math.sin(omega) / math.sqrt(0.5)
    above, below = amplitude + 1, amplitude - 1
    cosine = math.cos(omega)
    return (
        [
            amplitude * (above + below * cosine + slope),
            -2 * amplitude * (below + above * cosine),
            amplitude * (above + below * cosine - slope),
        ],
        [
            above - below * cosine + slope,
            2 * (below - above * cosine),
            above - below * cosine - slope,
        ],
    )


def _high_pass(sample_rate: int) -> tuple[list[float], list[float]]:
    """Biquad from 38 Hz, Q 0.5: low frequencies count less."""
    omega = 2 * math.pi * 38 / sample_rate
    cosine, alpha = math.cos(omega), math.sin(omega)  # alpha = sin / (2 Q)
    return (
        [(1 + cosine) / 2, -(1 + cosine), (1 + cosine) / 2],
        [1 + alpha, -2 * cosine, 1 - alpha],
    )


def _amplitude(decibels: float) -> float:
    return 10 ** (decibels / 20)


def _peak(wav: Tensor) -> float:
    return float(wav.abs().max())


def _rms(wav: Tensor) -> float:
    # In float32 at least: squares of half precision vanish below -72 dB.
    return float(wav.float().square().mean().sqrt())


def _to_level(wav: Tensor, level: float, target: float, *, normalize: bool) -> Tensor:
    if level == 0 or (level <= target and not normalize):
        return wav
    return wav / level * target


def _log_clipping(wav: Tensor, stem_name: str | None) -> None:
    peak = _peak(wav)
    if peak > 1:
        logger.warning(
            "%s: %.3f %% of the samples exceed full scale, by up to %.1f dB, and are cut off.",
            stem_name or "audio",
            100 * float((wav.abs() > 1).float().mean()),
            20 * math.log10(peak),
        )
