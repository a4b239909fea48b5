"""What the tests of audio files share."""

import math
import subprocess

import pytest
import soundfile
import torch

from audiocraft.errors import InputError

RATE = 48000
SECONDS = 2


def tones(rate=RATE, seconds=SECONDS, frequencies=(440.0, 660.0), amplitude=0.5):
    """(C, T), one sine for each channel, fading so that no two moments are alike."""
    times = torch.arange(round(seconds * rate)).double() / rate
    waves = [torch.sin(2 * math.pi * frequency * times) for frequency in frequencies]
    return (amplitude * torch.stack(waves) * (1 - times / (2 * seconds))).float()


def write_source(path, wav, rate=RATE):
    soundfile.write(path, wav.T.numpy(), rate, subtype="FLOAT", format="WAV")
    return path


def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-y", *arguments], check=True)


def convert(source, target, *arguments):
    ffmpeg("-i", source, *arguments, target)
    return target


def sentence(function, *arguments, **keywords):
    """The message of the error that the call must raise."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)
