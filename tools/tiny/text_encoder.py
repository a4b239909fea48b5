"""The text encoder of the bundled `tiny` release: a small T5 with a tokenizer of its own.

The tokenizer has a list of words rather than one that it was trained to find: those of the
synthetic music's descriptions, the usual words for music, numbers, and letters to spell the rest.
What has no letter here is spelled by its bytes, so any text has tokens. Equal code makes equal
files.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from metadata import genre_labels, instrument_classes, mood_theme_classes
from tools.synthetic_music.pieces import SHORTEST, TEMPI, Piece, plan
from tools.synthetic_music.words import descriptions
from tools.tiny.lessons import OF_PIECE, answers_of

SEED: Final = 2036

_SPACE: Final = "\u2581"  # what sentencepiece writes for a space
_SPECIAL: Final = ("<pad>", "</s>", "<unk>")
_NUMBERS: Final = range(40, 221)
"""Beats a minute that are one token; of other numbers each digit is one."""

_FAR: Final = 1.1
"""How many times as slow or fast as all tempi a number is to be read as another octave's."""

_SAID: Final = 240  # pieces whose descriptions have all words that there are

_WORDS: Final = """
    about ambient and at bar bars bass beat beats bpm bright by calm chord chords cinematic
    classical clean contrasting dark deep distorted dreamy driving drum drums energetic epic fast
    feel flat for from genre gentle groove guitar happy harmony heavy hook in instrument
    instrumental instruments intro is jazz key keys laid-back lead light line live lo-fi loop loud
    low major march medium mellow melody minor modern mood music no of on orchestral part peaceful
    percussion piece played playful pop quiet relaxed rhythm riff sad sharp simple sings slow
    smooth soft solo song sound soundtrack steady strings strong style sweet swing synth tempo that
    the theme then tight time to tone track tune upbeat vocals voice walking warm waltz wide with
    without
"""
_KEYS: Final = tuple(f"{note}{sign}" for note in "abcdefg" for sign in "#b")
_ENDINGS: Final = (
    *("al", "bpm", "ed", "er", "es", "est", "ful", "ic", "ing", "ish", "ist", "ive", "less", "ly"),
    *("ment", "ness", "or", "s", "tion", "y"),
)
_PUNCTUATION: Final = tuple("-.,:;!?'\"()/&#+")
# Logarithms of likelihoods. A text is cut where their sum is highest: into as few pieces as can
# be, of two ways with the same number into the one with the word rather than an ending.
_WORD, _ENDING, _LETTER = -8.0, -9.0, -10.0

_DIM, _LAYERS, _HEADS, _HIDDEN = 128, 2, 4, 256
_STEPS, _TEXTS, _LR, _WARM_UP, _LAST = 2000, 64, 2e-3, 100, 100  # of what it is taught alone
_WAVES: Final = (0.25, 8.0)  # lowest and highest of a number's features, in cycles an octave


def build_tokenizer() -> Tokenizer:
    """The tokenizer: lower case, a token that ends each text, and no unknown characters."""
    pieces = dict.fromkeys(_SPECIAL, 0.0) | {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    said = [text for piece in plan(SEED, _SAID, SHORTEST) for text in descriptions(piece)]
    labels = [*genre_labels, *mood_theme_classes, *instrument_classes]
    words = {*_words([_WORDS, *labels, *said]), *_KEYS, *map(str, _NUMBERS)}
    spelled = [*"abcdefghijklmnopqrstuvwxyz0123456789", *_PUNCTUATION]
    for word in sorted(words - set(spelled)):
        pieces[_SPACE + word] = _WORD
    for ending in _ENDINGS:
        pieces[ending] = _ENDING
    for letter in [_SPACE, *spelled]:
        pieces[letter] = _LETTER
    for letter in spelled:  # a letter or a digit that stands by itself is a word
        pieces[_SPACE + letter] = _WORD
    tokenizer = Tokenizer(models.Unigram([*pieces.items()], _SPECIAL.index("<unk>"), True))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[\s_]+"), " "),
        normalizers.Strip(),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def _words(texts: Iterable[str]) -> set[str]:
    """The words in texts, in lower case, without what stands around them."""
    return {
        word
        for text in texts
        for word in re.findall(r"[a-z]+(?:[-'&][a-z]+)*", text.lower())
        if len(word) > 1
    }


def make_text_encoder(folder: Path) -> None:
    """Write the tokenizer and a random encoder, as transformers does."""
    tokenizer = build_tokenizer()
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=_DIM,
        d_kv=_DIM // _HEADS,
        d_ff=_HIDDEN,
        num_layers=_LAYERS,
        num_heads=_HEADS,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        encoder: Any = T5EncoderModel(config)
        for number in _NUMBERS:
            encoder.shared.weight[tokenizer.token_to_id(f"{_SPACE}{number}")] = _features(number)
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    save_text_encoder(folder, fast, encoder)


def teach_text_encoder(folder: Path, pieces: Sequence[Piece]) -> float:
    """Train the encoder to tell from each token what all of its text says of a piece.

    What only the token of a key says, the language model has to find among all of them before it
    can learn what a key is.

    Args:
        folder: with both, as `make_text_encoder` writes them; the encoder is replaced.
        pieces: whose descriptions are learnt.

    Returns:
        The mean loss of the last steps, in nats per answer; a text does not say everything.
    """
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>"
    )
    encoder: Any = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    truths = torch.tensor([answers_of(piece) for piece in pieces])
    texts = [descriptions(piece) for piece in pieces]
    random = np.random.default_rng(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        heads = nn.Linear(_DIM, sum(OF_PIECE.values()))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], weight_decay=0.0)
    recent = 0.0
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, step / _WARM_UP, 2 * (1 - step / _STEPS))
        rows = random.integers(len(pieces), size=_TEXTS)
        said = [str(random.choice(texts[row])) for row in rows]
        tokens = fast(said, return_tensors="pt", padding=True)
        mask = tokens["attention_mask"]
        hidden = encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        losses = [
            F.cross_entropy(part, truth)
            for part, truth in zip(
                heads(hidden[mask.bool()]).split([*OF_PIECE.values()], -1),
                truths[rows].repeat_interleave(mask.sum(1), 0).unbind(1),
                strict=True,
            )
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step >= _STEPS - _LAST:
            recent += float(loss.detach()) / _LAST
    _round_tempi(fast, encoder)
    save_text_encoder(folder, fast, encoder)
    return recent


def _round_tempi(tokenizer: Any, encoder: Any) -> None:
    """Read a tempo that no piece has as the one that is nearest.

    What is learnt of a tempo does not hold for the numbers beside it. One that is far from all is
    read as one that is half or twice as fast.
    """
    near = {float(tempo): tempo for tempo in TEMPI}
    slowest, fastest = min(TEMPI) / _FAR, max(TEMPI) * _FAR
    for tempo, by in product(TEMPI, (0.5, 2.0)):
        if not slowest < tempo * by < fastest:
            near[tempo * by] = tempo
    with torch.no_grad():
        for number in _NUMBERS:
            nearest = min(near, key=lambda tempo: abs(math.log(number / tempo)))
            texts = f"{_SPACE}{number}", f"{_SPACE}{near[nearest]}"
            rows = tokenizer.convert_tokens_to_ids(texts)
            encoder.shared.weight[rows[0]] = encoder.shared.weight[rows[1]]


def save_text_encoder(folder: Path, tokenizer: Any, encoder: Any) -> None:
    """Write both as transformers does.

    Args:
        folder: made if missing.
        tokenizer: its `PreTrainedTokenizerFast`.
        encoder: its `T5EncoderModel`; in float32, as it is used.
    """
    tokenizer.save_pretrained(folder)
    encoder.save_pretrained(folder)


def _features(number: int) -> Tensor:
    """Where the embedding of a number begins, (dim,): like those of numbers that are nearly it.

    Most tempi are rare in what is trained on. So they start as waves over the logarithm of the
    tempo, of random phases and of the same size as other tokens' random numbers, and what is learnt
    of one holds for its neighbours.
    """
    generator = torch.Generator().manual_seed(SEED)
    low, high = _WAVES
    frequencies = low + (high - low) * torch.rand(_DIM, generator=generator)
    phases = torch.rand(_DIM, generator=generator)
    angles = frequencies * math.log2(number) + phases
    return math.sqrt(2) * torch.cos(2 * math.pi * angles)
