"""Music longer than the context."""

import pytest
import torch

from audiocraft.errors import InputError
from audiocraft.generation.windows import (
    DecodingBehind,
    Window,
    generate_windows,
    loop_window,
    plan_windows,
)
from audiocraft.models import MusicGen
from audiocraft.models.builders import get_debug_compression_model
from audiocraft.modules import seanet


def test_short_music_is_one_window():
    assert plan_windows(50, 100, 60, 0) == [Window(0, 50, 0)]
    assert plan_windows(100, 100, 60, 35) == [Window(0, 100, 35)]


def test_windows_go_on_from_the_end_of_the_one_before():
    assert plan_windows(229, 100, 60, 0) == [
        Window(0, 100, 0),
        Window(60, 100, 40),
        Window(120, 100, 40),
        Window(180, 49, 40),
    ]


def test_a_prompt_of_the_whole_context_slides_first():
    assert plan_windows(130, 100, 60, 100) == [Window(60, 70, 40)]


@pytest.mark.parametrize("total", range(1, 400, 7))
@pytest.mark.parametrize("prompt_len", [0, 35, 99, 100])
def test_every_frame_is_made_once(total, prompt_len):
    if prompt_len >= total:
        return
    truth = torch.arange(total)[None, None]
    made = torch.zeros(total, dtype=torch.long)
    made[:prompt_len] = 1

    def generate(known, window):
        span = slice(window.offset, window.offset + window.length)
        assert window.prompt_len < window.length <= 100
        assert torch.equal(known, truth[..., span][..., : window.prompt_len])
        made[window.offset + window.prompt_len : window.offset + window.length] += 1
        return truth[..., span]

    windows, finished = plan_windows(total, 100, 60, prompt_len), []
    codes = generate_windows(generate, windows, truth[..., :prompt_len], finished.append)
    assert torch.equal(codes, truth)
    assert torch.equal(torch.cat(finished, dim=-1), truth)
    assert len(finished) == 1 + len(windows)
    assert (made == 1).all()


def test_a_melody_begins_again_where_it_ends():
    wav = torch.arange(5)[None]
    assert loop_window(wav, 3, 9).tolist() == [[3, 4, 0, 1, 2, 3, 4, 0, 1]]


@pytest.mark.parametrize(
    "lengths", [[0, 1300], [1000, 1], [0, 499, 2, 499], [120, 380], [1, 999, 500]]
)
@torch.no_grad()
def test_decoding_behind_is_decoding_of_the_whole(lengths):
    """Bit for bit: the audio of a clip does not depend on the windows that made it."""
    codec = get_debug_compression_model()
    codes = torch.randint(400, (1, 4, sum(lengths)))
    with DecodingBehind(codec.stream(), torch.device("cpu")) as decoding:
        for piece in codes.split(lengths, dim=-1):
            decoding.push(piece)
        assert torch.equal(decoding.finish(), codec.decode(codes))


@pytest.fixture
def long_tiny(monkeypatch):
    """A model with several windows, whose codec decodes blocks of 30 frames."""
    for module in ("modules.seanet", "models.encodec", "generation.windows"):
        monkeypatch.setattr(f"audiocraft.{module}.BLOCK_FRAMES", 30)
    monkeypatch.setattr(seanet, "_PIECE_FRAMES", 20)
    model = MusicGen.get_pretrained("tiny")
    model.max_duration = 2
    model.set_generation_params(duration=4.5, extend_stride=1.2, seed=3)
    return model


@pytest.mark.parametrize("seconds", [0, 1.3, 2])
def test_windows_decoded_one_by_one_sound_the_same(long_tiny, monkeypatch, seconds):
    """And with `return_tokens`, and behind a prompt."""

    def generate():
        if not seconds:
            return long_tiny.generate(["a", "b"], return_tokens=True)
        prompt = torch.zeros(2, 2, int(seconds * 32000))
        return long_tiny.generate_continuation(prompt, 32000, return_tokens=True)

    monkeypatch.setattr(MusicGen, "_decodes_behind", lambda _: False)
    audio, codes = generate()
    monkeypatch.setattr(MusicGen, "_decodes_behind", lambda _: True)
    monkeypatch.setattr(MusicGen, "generate_audio", None)
    behind, same_codes = generate()
    assert torch.equal(codes, same_codes)
    assert torch.equal(audio, behind)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_several_windows_on_a_gpu_are_decoded_behind(long_tiny, device):
    long_tiny.device = torch.device(device)
    assert long_tiny._decodes_behind() == (device == "cuda")
    long_tiny.duration = 2
    assert not long_tiny._decodes_behind()


@pytest.mark.gpu
def test_a_gpu_decodes_on_a_stream_of_its_own(long_tiny):
    """The audio is that of decoding afterwards, and it is there when the result is used."""
    for _ in range(3):
        audio, codes = long_tiny.generate(["a"], return_tokens=True)
        assert torch.equal(audio, long_tiny.generate_audio(codes))


@pytest.mark.gpu
def test_a_cancelled_generation_leaves_no_decoding(long_tiny, monkeypatch):
    streams = []
    create = torch.cuda.Stream

    def created(*arguments, **settings):
        stream = create(*arguments, **settings)
        if "stream_id" not in settings:  # torch describes the current stream by one as well
            streams.append(stream)
        return stream

    monkeypatch.setattr(torch.cuda, "Stream", created)

    def cancel(done, _):
        if done > 200:
            raise InputError("cancelled")

    long_tiny.set_custom_progress_callback(cancel)
    with pytest.raises(InputError, match="cancelled"):
        long_tiny.generate(["a"])
    assert streams
    assert all(stream.query() for stream in streams)
    long_tiny.set_custom_progress_callback(None)
    long_tiny.generate(["a"])
