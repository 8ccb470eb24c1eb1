"""The demo's task: is an English word positive or negative?

The words and their ratings are those of the VADER sentiment lexicon (Hutto & Gilbert, ICWSM 2014), which the
PyPI package `vaderSentiment` carries: lines of `token<TAB>mean valence<TAB>...`, valence from -4 to 4.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Word:
    """A word and the sign of its mean valence."""

    text: str
    positive: bool


def parse_lexicon(lexicon: str) -> list[Word]:
    """The plain words of a lexicon in VADER's format; emoticons, phrases and neutral tokens are left out."""
    valences: dict[str, float] = {}  # a later line replaces an earlier one, as in VADER itself
    for line in lexicon.splitlines():
        token, valence = line.split("\t")[:2]
        valences[token] = float(valence)
    return [
        Word(token, positive=valence > 0)
        for token, valence in valences.items()
        if token.isascii() and token.isalpha() and valence != 0
    ]


def load_words() -> list[Word]:
    """Every plain word of the VADER lexicon, in the lexicon's order."""
    return parse_lexicon(files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8"))


def split_words(words: Sequence[Word], seed: int, test_share: float = 0.25) -> tuple[list[Word], list[Word]]:
    """Shuffle and split into (train, test); the same seed gives the same split."""
    shuffled = random.Random(seed).sample(words, len(words))
    test_size = round(test_share * len(words))
    return shuffled[test_size:], shuffled[:test_size]


def majority_share(words: Sequence[Word]) -> float:
    """The accuracy of always answering with the more frequent class."""
    positive = sum(word.positive for word in words)
    return max(positive, len(words) - positive) / len(words)


def shuffled_batches(words: Sequence[Word], batch_size: int, seed: int) -> Iterator[list[Word]]:
    """Batches without end, every pass over the words in a new order; words that fill no batch miss that pass.

    Raises:
        ValueError: batch_size is not in 1..len(words).
    """
    if not 0 < batch_size <= len(words):
        raise ValueError(f"batch_size must be in 1..{len(words)}, the number of words, got {batch_size}")
    order = random.Random(seed)
    while True:
        shuffled = order.sample(words, len(words))
        for start in range(0, len(words) - batch_size + 1, batch_size):
            yield shuffled[start : start + batch_size]
