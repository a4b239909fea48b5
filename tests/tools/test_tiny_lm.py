"""The training of the bundled release, on a small scale."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from audiocraft.errors import InputError, WeightsError
from audiocraft.models import MusicGen
from audiocraft.models.builders import get_lm_model
from audiocraft.modules.conditioners import T5Conditioner
from audiocraft.solvers.checkpoints import find_checkpoint, read_notes
from tests.golden_data import GOLDEN
from tests.tools.tiny_runs import CODEC, CONTEXT, SHAPE, make_data, run_in
from tools.tiny.config import Shape, lm_config
from tools.tiny.crops import unlearnt
from tools.tiny.lessons import QUESTIONS
from tools.tiny.lm import evaluate
from tools.tiny.release import Work, check_size, finish, main, work_of, write_release

FRAMES = 600


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run at its end, and its folder."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run = run_in(folder, data, 12)
    assert run.train()
    return run, folder


def test_nothing_is_learnt_of_what_is_not_to_be_learnt(data, tmp_path):
    run = run_in(tmp_path / "run", data)
    partly = 0
    for update in range(1, 5):
        clips = run.crops.batch(update, 2)
        run.attend(clips)
        learnt = ~unlearnt([*map(run.crops.answers, clips)])
        for delay, head in enumerate(run.trainer.lm.linears):
            hidden = torch.randn(2, FRAMES + 1, SHAPE.dim, requires_grad=True)
            (grad,) = torch.autograd.grad(head(hidden).sum(), hidden)
            # A codebook's frames come as many steps later as its delay is.
            steps = grad.abs().sum(-1) > 0
            assert torch.equal(steps[:, delay:FRAMES], learnt[:, : FRAMES - delay])
        partly += not learnt.all()
    assert partly > 1


def test_its_configuration_has_the_keys_of_released_ones():
    """So what reads those reads it, official code included."""
    released = torch.load(GOLDEN / "tiny_release/stereo-melody/state_dict.bin", weights_only=True)
    theirs, ours = OmegaConf.create(released["xp.cfg"]), OmegaConf.create(lm_config(SHAPE, 12, 256))
    for key in ("transformer_lm", "fuser", "codebooks_pattern.delay", "conditioners"):
        assert OmegaConf.select(theirs, key).keys() <= OmegaConf.select(ours, key).keys(), key
    assert ours.fuser.prepend == theirs.fuser.prepend
    assert ours.codebooks_pattern.delay.delays == [*range(8)]  # theirs has both sides at once


def test_the_default_shape_is_within_its_budget():
    with torch.device("meta"):
        lm = get_lm_model(OmegaConf.create(lm_config(Shape(), 12, 512)), GOLDEN / "t5_tiny")
    assert sum(weight.numel() for weight in lm.parameters()) <= 7_000_000


def test_a_resumed_run_is_the_same_bit_for_bit(finished, data, tmp_path):
    whole, _ = finished
    part = run_in(tmp_path / "run", data, 12)
    for _ in range(3):
        assert not part.train(stop_after=0.0)  # one update
        checkpoint = find_checkpoint(part.folder)
        assert all(path.stat().st_size < 15e6 for path in checkpoint.iterdir())
        part = run_in(tmp_path / "run", data)
        part.resume(checkpoint)
    assert part.trainer.update == 3
    assert part.trainer.settings.updates == 12  # the same hours
    assert part.train()
    ours, theirs = (run.trainer.state_dict() for run in (part, whole))
    for kind in ("weights", "ema"):
        found, expected = ours[kind], theirs[kind]
        if kind == "ema":
            found, expected = found["average"], expected["average"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_other_hours_change_when_it_ends_and_another_shape_is_refused(data, tmp_path):
    part = run_in(tmp_path / "run", data, 12)
    part.train(stop_after=0.0)
    checkpoint = find_checkpoint(part.folder)
    assert read_notes(checkpoint)["updates"] == 12
    longer = run_in(part.folder, data, hours=2.0)
    longer.resume(checkpoint)
    assert longer.trainer.settings.updates == 10**9  # until it knows its speed
    other = run_in(part.folder, data, shape=Shape(dim=64, layers=1, heads=2, batch_size=2))
    with pytest.raises(InputError, match="the shape"):
        other.resume(checkpoint)


def test_a_run_begins_from_a_release(finished, data, tmp_path):
    earlier, folder = finished
    begun = run_in(tmp_path / "run", data, 1, begin_from=folder / "release")
    ours, theirs = (
        evaluate(run.trainer, run.measured, run.lessons, run.truths) for run in (begun, earlier)
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
    with earlier.trainer.ema.applied():
        expected = earlier.trainer.state_dict()["weights"]
        for name, value in begun.trainer.state_dict()["weights"].items():
            if name.startswith("lessons."):
                continue  # a release has none
            assert torch.equal(value, expected[name].half().float()), name
    assert begun.trainer.update == 0
    with pytest.raises(WeightsError, match=r"release does not fit .* shape \[32"):
        run_in(
            tmp_path / "other", data, shape=replace(SHAPE, dim=64), begin_from=folder / "release"
        )


def test_a_card_counts_the_work_on_the_weights_that_a_run_began_from(finished, data, tmp_path):
    earlier, folder = finished
    assert work_of(folder / "release").heard_hours == 12 * 2 * CONTEXT / 3600
    begun = run_in(tmp_path / "run", data, 3, begin_from=folder / "release")
    assert begun.train()
    assert work_of(begun.folder / "release").heard_hours == pytest.approx(15 * 2 * CONTEXT / 3600)
    finish(begun.folder, {}, tmp_path / "tiny")
    card = (tmp_path / "tiny/README.md").read_text()
    before = earlier.work()
    assert f"earlier runs (`--begin-from RELEASE`), {before.hours:.1f} hours of work" in card


def test_a_run_finds_out_how_many_updates_its_hours_are(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.tiny.lm._TRIAL", 5)
    run = None
    # An update takes both cores 0.1 s; what the process did before the run does not count.
    monkeypatch.setattr("time.process_time", lambda: 7 + (0.2 * run.trainer.update if run else 0))
    run = run_in(tmp_path / "run", data, hours=2 / 3600)
    assert run.train()
    assert run.trainer.update == run.trainer.settings.updates == 20
    assert run.spent() == pytest.approx(2)


def test_each_evaluation_is_a_line_of_the_log(finished):
    run, folder = finished
    (line,) = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert line["update"] == line["updates"] == 12
    assert line["heard_hours"] == round(12 * 2 * CONTEXT / 3600, 2)
    assert len(line["per_codebook"]) == 8
    assert line["loss"] == pytest.approx(np.mean(line["per_codebook"]), abs=1e-3)
    assert line["answers"].keys() == QUESTIONS.keys()
    assert all(0 <= share <= 1 for share in (line["followed"], *line["answers"].values()))
    again = evaluate(run.trainer, run.measured, run.lessons, run.truths)
    assert again == {name: line[name] for name in again}


def test_later_codebooks_teach_the_transformer_less(data, tmp_path):
    run = run_in(tmp_path / "run", data)
    lm = run.trainer.lm
    hidden = torch.randn(2, 9, 32, requires_grad=True)
    lengths = []
    for linear in lm.linears:
        torch.nn.init.ones_(linear.weight)
        out = linear(hidden)
        assert torch.equal(out, torch.nn.functional.linear(hidden, linear.weight, linear.bias))
        (passed,) = torch.autograd.grad(out.sum(), hidden)
        lengths.append(float(passed.mean()))
    shares = [length / lengths[0] for length in lengths]
    assert shares == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])


def test_an_evaluation_says_what_conditions_are_worth(data, tmp_path):
    run = run_in(tmp_path / "run", data)
    conditioners = run.trainer.lm.condition_provider.conditioners

    def losses():
        found = evaluate(run.trainer, run.measured, run.lessons, run.truths)
        return [found[name] for name in ("loss", "text", "other_text", "nothing")]

    with torch.no_grad():
        for name in ("self_wav", "description"):
            conditioners[name].output_proj.weight.mul_(100)
        for linear in run.trainer.lm.linears:
            linear.weight.mul_(10)  # so that what is heard shows in four digits
        assert len(set(losses())) == 4
        conditioners["self_wav"].output_proj.weight.zero_()
        both, text, other, nothing = losses()
        assert both == text
        assert len({text, other, nothing}) == 3
        for weight in conditioners["description"].output_proj.parameters():
            weight.zero_()  # the bias too, of which longer texts have more
        both, text, other, _ = losses()
        assert both == text == other


def test_its_release_makes_music(finished):
    run, folder = finished
    model = MusicGen.get_pretrained(folder / "release", "cpu")
    assert (model.max_duration, model.sample_rate, model.audio_channels) == (CONTEXT, 32000, 2)
    model.set_generation_params(duration=1.0, seed=1, extend_stride=6.0)
    texts = ["90 bpm piano in C minor", "fast polka"]
    melody = torch.randn(2, 32000)
    assert model.generate(texts).shape == (2, 2, 32000)
    followed, codes = model.generate_with_chroma(texts, [melody, None], 32000, return_tokens=True)
    assert followed.shape == (2, 2, 32000)
    assert codes.shape == (2, 8, 50)
    with run.trainer.ema.applied():
        lm = run.trainer.lm
        for name, weight in model.lm.state_dict().items():
            assert torch.equal(weight, lm.state_dict()[name].half().float()), name
        trained, read = (
            m.condition_provider.conditioners["description"].load()[1] for m in (lm, model.lm)
        )
        for name, weight in trained.state_dict().items():
            assert torch.equal(read.state_dict()[name], weight), name
    assert isinstance(model.lm.condition_provider.conditioners["description"], T5Conditioner)
    shipped = load_file(folder / "release/compression_state_dict.safetensors")
    assert all(torch.equal(shipped[name], value) for name, value in load_file(CODEC).items())


def test_the_card_has_the_figures(finished, tmp_path):
    _, folder = finished
    figures = {"model": "x", "text": {"prompts": 96, "right": {"bpm": 0.5}, "clean": {"bpm": 0.9}}}
    finish(folder, figures, tmp_path / "tiny")
    card = (tmp_path / "tiny/README.md").read_text()
    assert "| bpm | 0.5 | 0.9 |" in card
    assert "| prompts | 96 |" in card
    assert "12 s of context" in card
    assert "apache-2.0" in card
    assert "Frank Wen" in card
    assert MusicGen.get_pretrained(tmp_path / "tiny", "cpu").max_duration == CONTEXT
    with pytest.raises(InputError, match="exists"):
        finish(folder, figures, tmp_path / "tiny")


def test_a_card_is_made_of_the_last_lines_of_files(finished, tmp_path, monkeypatch):
    _, folder = finished
    part = {
        "prompts": 24,
        "right": {"bpm": 0.3},
        **{name: {"bpm": 0.1} for name in ("shuffled", "clean", "clean_shuffled")},
    }
    finetuning = {"style": "polka", "minutes": 9.5, "settings": "", "before": {"style": part}}
    files = {
        "evaluation": {"text": {"right": {"bpm": 0.5}}},
        "finetuning": finetuning | {"after": finetuning["before"]},
    }
    arguments = ["--run", str(folder), "--out", str(tmp_path / "tiny")]
    for name, figures in files.items():
        (tmp_path / name).write_text(f'{{"took_s": 1}}\n{json.dumps(figures)}\n')
        arguments += [f"--{name}", str(tmp_path / name)]
    monkeypatch.setattr("sys.argv", ["release", *arguments])
    main()
    card = (tmp_path / "tiny/README.md").read_text()
    assert "| bpm | 0.5 |" in card
    assert "| bpm | 0.3 | 0.1 | 0.3 | 0.1 | 0.1 | 0.1 |" in card


@pytest.mark.parametrize("sizes", [[15_000_001], [13_000_000, 12_000_000]])
def test_a_release_that_is_too_large_is_refused(sizes, tmp_path):
    for number, size in enumerate(sizes):
        with (tmp_path / str(number)).open("wb") as file:
            file.truncate(size)
    with pytest.raises(InputError, match=r"15\.0 MB|25\.0 MB"):
        check_size(tmp_path)


def test_a_release_takes_the_place_of_the_one_before(finished, tmp_path):
    run, _ = finished
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "old").touch()
    text = run.trainer.lm.condition_provider.conditioners["description"].load()
    cfg = run.trainer.lm.cfg
    write_release(folder, cfg, run.trainer.exported_state(), CODEC, text, Work())
    assert sorted(path.name for path in folder.iterdir()) == [
        "compression_state_dict.safetensors",
        "state_dict.safetensors",
        "t5",
        "work.json",
    ]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_run_is_what_its_seed_makes_it(data, tmp_path):
    first, second = (run_in(tmp_path / name, data, 3) for name in "ab")
    assert first.train()
    assert second.train()
    ours, theirs = (run.trainer.state_dict()["weights"] for run in (first, second))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
