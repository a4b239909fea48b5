"""The model card of the `tiny` release."""

from collections.abc import Mapping
from typing import Any, Final

from tools.synthetic_music.instruments import LEADS
from tools.synthetic_music.pieces import TEMPI
from tools.synthetic_music.styles import STYLES

_CARD: Final = """\
---
license: apache-2.0
pipeline_tag: text-to-audio
---

# tiny

A small stereo melody MusicGen, trained from nothing by this project on music that this project
composes and renders. It is there so that the first command makes music without a network, and so
that tests run on a model that has learnt something. It knows {leads} lead instruments, {styles}
styles, the 24 keys and {tempi} tempi from {slowest} to {fastest} bpm, and nothing else: no
recordings, no voices, no songs. A number between two tempi is read as the one next to it.{without}

- Instruments: {lead_names}.
- Styles: {style_names}.
- Tempi: {tempo_names} bpm.

## Parts

| part | parameters |
|---|---|
| language model, {layers} layers of {dim}, 8 codebooks, {context:g} s of context | {lm:.2f} M |
| EnCodec, 32 kHz, 50 frames a second, 4 codebooks for each side | {codec:.2f} M |
| T5 encoder and its tokenizer, taught what descriptions say | {t5:.2f} M |

Chroma of a melody is taken of the whole mix, for a stem separator can't be bundled.

## Data and cost

Pieces of {piece:g} s, composed by rules and played by fluidsynth with FluidR3 GM. The language
model heard {heard:.0f} hours of music (pieces several times, in other crops and wordings) in
{hours:.1f} hours of work.{begun} Its loss on pieces that it was not trained on is {loss:.3f} nats
per code with text and melody, {text:.3f} without the melody, {other_text:.3f} with another piece's
text instead, and {nothing:.3f} with neither.

    scripts/setup --render && source .venv/bin/activate
    codec=CODEC/compression_state_dict.safetensors
    python -m tools.tiny.codec --out CODEC --hours H
    python -m tools.synthetic_music.classifier --codec $codec
    python -m tools.tiny.dataset --codec $codec --out DATA --hours H{excluded}
    python -m tools.tiny.lm --data DATA --codec $codec --out RUN --hours H
    python -m tools.tiny.evaluate --model RUN/release{excluded} | tee FIGURES
    python -m tools.tiny.release --run RUN --evaluation FIGURES --out FOLDER

## Measured

On prompts, melodies and pieces that nothing was trained on. `shuffled` is the same audio against
other prompts, `clean` is rendered music.

{figures}

## Licence

Apache-2.0, as the project's.

The music was played with FluidR3 GM, which is under the MIT license:

> Copyright (c) 2000-2002, 2008 Frank Wen; 2008 Toby Smithe
>
> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
> associated documentation files (the "Software"), to deal in the Software without restriction,
> including without limitation the rights to use, copy, modify, merge, publish, distribute,
> sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
> furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or
> substantial portions of the Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
> NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
> NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
> DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
> OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_BEGUN: Final = """
It began from the weights of earlier runs (`--begin-from RELEASE`), {hours:.1f} hours of work on
{heard_hours:.0f} hours of music as it was composed and rendered then.\
"""

_WITHOUT: Final = """
Its language model has never heard a {style}: what fine-tuning does is measured by teaching it one.\
"""

_TAUGHT: Final = """\
With the release in `audiocraft/assets/tiny`, `python -m tools.tiny.finetune --style "{style}" | tee
FINETUNING` has `scripts/train` teach it ten pieces of {style}, and `tools.tiny.release --finetuning
FINETUNING` adds these tables. `heard_as_style` is the share of clips that are heard as {style},
whatever was asked for. Prompts of the style all ask for it, so `shuffled` can't tell it from chance
there: the share of the rest can.
"""


def model_card(
    shape: Mapping[str, Any],
    counts: Mapping[str, int],
    log: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    finetuning: Mapping[str, Any] | None = None,
) -> str:
    """The card, in Markdown.

    Args:
        shape: `dim`, `layers` and `context` of the language model, and `piece`, seconds of those
            that it was trained on.
        counts: parameters of `lm`, `codec` and `t5`.
        log: the line of the run's log that the weights are of.
        evaluation: figures of `tools.tiny.evaluate`.
        finetuning: those of `tools.tiny.finetune`, if there are any.
    """
    millions = {name: count / 1e6 for name, count in counts.items()}
    style = log["exclude_style"]
    known = [name for name in STYLES if name != style]
    tables = [_table(name, part) for name, part in evaluation.items()]
    if finetuning is not None:
        tables.append(finetuning_tables(finetuning))
    return _CARD.format(
        leads=len(LEADS),
        tempi=len(TEMPI),
        slowest=min(TEMPI),
        fastest=max(TEMPI),
        styles=len(known),
        lead_names=", ".join(LEADS),
        style_names=", ".join(known),
        tempo_names=", ".join(map(str, sorted(TEMPI))),
        without=_WITHOUT.format(style=style) if style else "",
        begun=_BEGUN.format(**log["earlier"]) if any(log["earlier"].values()) else "",
        excluded=f" --exclude-style {style}" if style else "",
        figures="\n".join(tables),
        heard=log["heard_hours"],
        **{name: log[name] for name in ("hours", "loss", "text", "other_text", "nothing")},
        **millions,
        **shape,
    )


def finetuning_tables(figures: Mapping[str, Any]) -> str:
    """What a fine-tune has learnt and forgotten: its training, and a table for each set of prompts.

    Args:
        figures: of `tools.tiny.finetune`.
    """
    before, after = figures["before"], figures["after"]
    training = {name: figures[name] for name in ("style", "minutes", "settings")}
    tables = [_table("fine-tuning", training), _TAUGHT.format(style=figures["style"])]
    for name in before:
        columns = {
            "prompts": before[name]["prompts"],
            "before": before[name]["right"],
            "before_shuffled": before[name]["shuffled"],
            "after": after[name]["right"],
            "after_shuffled": after[name]["shuffled"],
            "clean": before[name]["clean"],
            "clean_shuffled": before[name]["clean_shuffled"],
        }
        tables.append(_table(f"fine-tuning, prompts of the {name}", columns))
    return "\n".join(tables)


def _table(name: str, figures: Any) -> str:
    """One part's figures, a row for each; those in groups side by side."""
    if not isinstance(figures, Mapping):
        return f"`{name}`: {figures}\n"
    groups = {key: value for key, value in figures.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in figures.items() if key not in groups}
    lines = [f"### {name}", ""]
    if plain:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in plain.items()]
        lines.append("")
    if groups:
        lines += ["| | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
        for row in dict.fromkeys(row for group in groups.values() for row in group):
            cells = " | ".join(str(group.get(row, "")) for group in groups.values())
            lines.append(f"| {row} | {cells} |")
        lines.append("")
    return "\n".join(lines)
