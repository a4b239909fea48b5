"""What is measured of teaching the bundled release a style, and that the real command does it."""

import json
from pathlib import Path

import pytest

from audiocraft.models import MusicGen
from tests.project import copy_project
from tests.tools.test_tiny_evaluate import Perfect, renders
from tools.tiny import dataset, evaluate, finetune
from tools.tiny.card import model_card
from tools.tiny.evaluate import Evaluation

STYLE = "polka"
PROMPTS = 4
SHORT = (
    *("-i", "auto_labeling=false", "-i", "drop_vocals=false", "-i", "epochs=1"),
    *("-i", "updates_per_epoch=2", "-i", "batch_size=2", "-i", "warmup=0"),
    *("-i", "optimizer=adamw", "-i", "lr=0.01"),  # so that few updates show
)
# Says what it was given, and makes a file of weights that is its name.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" >"$0.arguments"
printf tuned >"${@: -1}"
"""


class Forgetful(Perfect):
    """Of a fine-tune that plays its style, whatever it is asked for."""

    def _generate(self, prompts, *_, **__):
        taught = Evaluation(self.model, self.sizes, STYLE)
        return taught._clean(taught._pieces(len(prompts)))


@pytest.fixture
def few_prompts(monkeypatch):
    for name in ("STYLE_PROMPTS", "REST_PROMPTS"):
        monkeypatch.setattr(finetune, name, PROMPTS)


def test_nothing_is_taught_that_is_asked_for_or_was_trained_on():
    """Those that train and those that prompts are of have other seeds."""
    assert finetune.SEED not in {evaluate.SEED, dataset.HELD_OUT_SEED}
    assert finetune.SEED < dataset.SEED  # those that are trained on have this one and greater ones


@renders
@pytest.mark.usefixtures("few_prompts")
@pytest.mark.parametrize("kind", [Perfect, Forgetful])
def test_what_is_heard_as_the_style(kind, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "Evaluation", kind)
    figures = finetune.measure(None, STYLE, "after")
    style, rest = figures["style"], figures["rest"]
    assert style["prompts"] == rest["prompts"] == PROMPTS
    # Rendered music is what was asked for, whatever the model makes.
    for prompts, heard in ((style, style["clean"]["style"]), (rest, 0)):
        assert prompts["clean"]["style"] >= 0.75
        assert prompts["clean"]["heard_as_style"] == pytest.approx(heard, abs=0.25)
    assert style["right"]["heard_as_style"] == style["right"]["style"] >= 0.75
    if kind is Perfect:
        assert rest["right"] == rest["clean"]
    else:
        assert rest["right"]["heard_as_style"] >= 0.75
        assert rest["right"]["style"] <= 0.25
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"after, style": style}, {"after, rest": rest}]


def test_which_prompts_there_are(monkeypatch):
    """All of the one set ask for the style, none of the other, as with tools.tiny.evaluate."""
    asked = []

    class Listed(Evaluation):
        def text(self):
            asked.append({piece.style for piece in self._pieces(self.sizes.prompts)})
            return {"right": {}, "clean": {}}

        def heard_as(self, _):
            return {"right": 0.0, "clean": 0.0}

    monkeypatch.setattr(finetune, "Evaluation", Listed)
    finetune.measure(None, STYLE, "before")
    style, rest = asked
    assert style == {STYLE}
    assert len(rest) > 8
    assert STYLE not in rest
    assert (finetune.STYLE_PROMPTS, finetune.REST_PROMPTS) == (24, 48)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs it with a stand-in for `scripts/train`; models are their names, and so are figures."""
    train = tmp_path / "train"
    train.write_text(STAND_IN)
    train.chmod(0o755)

    def load(name, *_):
        return Path(name).read_text() if Path(name).is_file() else name

    monkeypatch.setattr(finetune, "TRAIN", train)
    monkeypatch.setattr(finetune, "write_dataset", lambda folder, *_, **__: folder.mkdir())
    monkeypatch.setattr(MusicGen, "get_pretrained", load)
    monkeypatch.setattr(finetune, "measure", lambda model, style, when: [model, style, when])

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["finetune", *arguments])
        finetune.main()
        return Path(f"{train}.arguments").read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "style", "settings"),
    [
        ([], "polka", list(finetune.SETTINGS)),
        (["--style", "folk", "--", "-i", "lr=1"], "folk", ["-i", "lr=1"]),
    ],
)
def test_the_last_line_has_all_figures(arguments, style, settings, command, capsys):
    given = command(*arguments)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= figures.pop("minutes") < 1
    assert figures == {
        "style": style,
        "settings": " ".join(settings),
        "before": ["tiny", style, "before"],
        "after": ["tuned", style, "after"],
    }
    assert given[0] == "--fresh"  # a training that has ended takes no minutes
    assert "model_version=tiny" in given
    assert [word for word in given if word in settings and word != "-i"] == [
        word for word in settings if word != "-i"
    ]


def test_a_training_that_fails_is_told(command, capsys):
    finetune.TRAIN.write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(SystemExit):
        command()
    captured = capsys.readouterr()
    assert "scripts/train failed" in captured.err
    assert captured.out == ""


@pytest.mark.slow
@renders
def test_the_real_command_learns_ten_described_pieces_of_the_style(tmp_path, monkeypatch, capsys):
    project = copy_project(tmp_path / "project")
    monkeypatch.setattr(finetune, "TRAIN", project / "scripts/train")
    monkeypatch.setattr(finetune, "_SECONDS", 10.0)
    monkeypatch.setattr(
        finetune,
        "measure",
        lambda model, *_: {"weight": float(model.lm.linears[0].weight.double().square().sum())},
    )
    monkeypatch.setattr("sys.argv", ["finetune", "--", *SHORT])
    finetune.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["before"] != figures["after"]
    assert 0 < figures["minutes"] < 10
    (report,) = (project / "runs").glob("*/report.json")
    used = json.loads(report.read_text())["dataset"]["used"]
    assert len(used) == 10
    assert len({file["description"] for file in used}) == 10
    assert all(STYLE in chunk["genre"] for file in used for chunk in file["labels"])
    assert all(file["key"] and file["bpm"] for file in used)


def card(finetuning=None):
    shape = {"dim": 256, "layers": 6, "context": 12, "piece": 20}
    counts = {"lm": 1, "codec": 1, "t5": 1}
    log = dict.fromkeys(("heard_hours", "hours", "loss", "text", "other_text", "nothing"), 1.0)
    log |= {"exclude_style": STYLE, "earlier": {"hours": 0, "heard_hours": 0}}
    return model_card(shape, counts, log, {"text": {"prompts": 96}}, finetuning)


def test_the_card_has_a_table_before_and_after():
    def part(prompts, *shares):
        names = ("right", "shuffled", "clean", "clean_shuffled")
        figures = {name: {"bpm": share} for name, share in zip(names, shares, strict=True)}
        figures["right"]["heard_as_style"] = shares[0] / 2
        figures["clean"]["heard_as_style"] = shares[2] / 2
        return {"prompts": prompts, **figures}

    finetuning = {
        "style": STYLE,
        "minutes": 9.5,
        "settings": "-i lr=1",
        "before": {"style": part(24, 0.2, 0.1, 0.98, 0.12), "rest": part(48, 0.6, 0.1, 1.0, 0.14)},
        "after": {"style": part(24, 0.4, 0.16, 0.98, 0.12), "rest": part(48, 0.5, 0.18, 1.0, 0.14)},
    }
    text = card(finetuning)
    assert "| minutes | 9.5 |" in text
    assert "| settings | -i lr=1 |" in text
    _, style, rest = text.split("### fine-tuning")[1:]
    assert "| prompts | 24 |" in style
    columns = "before | before_shuffled | after | after_shuffled | clean | clean_shuffled"
    assert f"| | {columns} |" in style
    assert "| bpm | 0.2 | 0.1 | 0.4 | 0.16 | 0.98 | 0.12 |" in style
    assert "| heard_as_style | 0.1 |  | 0.2 |  | 0.49 |  |" in style
    assert "| prompts | 48 |" in rest
    assert "| bpm | 0.6 | 0.1 | 0.5 | 0.18 | 1.0 | 0.14 |" in rest
    assert text.index("### text") < text.index("### fine-tuning") < text.index("## Licence")
    assert "fine-tuning, prompts" not in card()
