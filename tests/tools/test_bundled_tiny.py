"""The bundled release: what it has learnt, how large it is, and what is said of it.

Its card has the figures of more clips; these are few, and the limits as much lower.
"""

import pytest

from audiocraft.assets.store import BUNDLED
from audiocraft.models import MusicGen
from tests.project import ROOT
from tools.synthetic_music.midi import missing
from tools.tiny.evaluate import Evaluation, Sizes, evaluate
from tools.tiny.release import check_size

FOLDER = BUNDLED / "tiny"
CARD = (FOLDER / "README.md").read_text()
README = " ".join((ROOT / "README.md").read_text().split())
SIZES = Sizes(prompts=24, melodies=6, tokens=16)
renders = pytest.mark.skipif(missing() is not None, reason=f"needs {missing()}")


def card(part, name, column="value"):
    """A figure of the card."""
    columns = []
    for line in CARD.partition(f"### {part}\n")[2].partition("\n#")[0].splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if first in {"", "figure"}:
            columns = cells
        elif first == name and column in columns:
            return float(cells[columns.index(column)])
    raise AssertionError(f"the card has no {column} of {name} in its part {part}")


def percent(*figure):
    return round(100 * card(*figure))


@pytest.fixture(scope="module")
def figures():
    """As `tools.tiny.evaluate` measures them; its seeds are fixed."""
    model = MusicGen.get_pretrained("tiny", "cpu", "float32")
    evaluation = Evaluation(model, SIZES, exclude_style="polka")  # which it has never heard
    return evaluate(evaluation, ("text", "melody", "int8"))


@renders
@pytest.mark.slow
def test_it_plays_what_is_asked_for(figures):
    right, by_chance = figures["text"]["right"], figures["text"]["shuffled"]
    assert right["lead"] >= 0.55
    assert right["bpm"] >= by_chance["bpm"] + 0.15
    assert right["key"] >= by_chance["key"] + 0.15


@renders
@pytest.mark.slow
def test_it_follows_a_melody(figures):
    melody = figures["melody"]
    assert melody["melodies"] == 6
    assert melody["followed"] >= melody["without"] + 0.3


@renders
@pytest.mark.slow
def test_with_8_bits_it_predicts_nearly_the_same(figures):
    int8 = figures["int8"]
    assert int8["tokens"] == 16 * (8 * 600 - sum(range(8)))
    assert 0 < int8["kl"] < 1e-3


def test_it_is_no_larger_than_allowed():
    assert f"bundled, {check_size(FOLDER) / 1e6:.0f} MB" in README


def test_the_readme_says_of_it_what_its_card_says():
    clips = round(card("text", "prompts"))
    lead, bpm, key = (percent("text", name, "right") for name in ("lead", "bpm", "key"))
    chances = [percent("text", name, "shuffled") for name in ("lead", "bpm", "key")]
    assert (
        f"of {clips} clips {lead} % have the instrument that was asked for, {bpm} % the tempo and "
        f"{key} % the key (by chance {chances[0]}, {chances[1]} and {chances[2]} %)"
    ) in README
    followed, without = percent("melody", "followed"), percent("melody", "without")
    assert f"heard again in {followed} % of its moments ({without} % without it)" in README
    long = round(card("long", "clips"))
    kept = round(long * card("long", "bpm_kept"))
    assert f"of {long} clips of a minute {kept} keep theirs" in README
    kl, tokens = card("int8", "kl"), round(card("int8", "tokens"))
    assert f"{kl:.4f} nats a code, on average over {tokens:,} codes" in README
