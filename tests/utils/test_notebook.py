import io

import IPython.display
import soundfile
import torch

from audiocraft.utils.notebook import display_audio


def test_every_clip_gets_a_player(monkeypatch):
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    wav = torch.rand(3, 2, 16000) - 0.5
    display_audio(wav, 32000)
    display_audio(wav[0], 32000)
    assert [type(player) for player in shown] == [IPython.display.Audio] * 4
    decoded, sample_rate = soundfile.read(io.BytesIO(shown[0].data), always_2d=True)
    assert sample_rate == 32000
    assert decoded.shape == (16000, 2)
    assert shown[0].data == shown[3].data
