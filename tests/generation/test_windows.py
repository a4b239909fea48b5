import pytest
import torch

from audiocraft.generation.windows import Window, generate_windows, loop_window, plan_windows


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

    windows = plan_windows(total, 100, 60, prompt_len)
    codes = generate_windows(generate, windows, truth[..., :prompt_len])
    assert torch.equal(codes, truth)
    assert (made == 1).all()


def test_a_melody_begins_again_where_it_ends():
    wav = torch.arange(5)[None]
    assert loop_window(wav, 3, 9).tolist() == [[3, 4, 0, 1, 2, 3, 4, 0, 1]]
