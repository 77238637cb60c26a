"""The quickstart's preference task: do what the request says, and not its opposite.

A request names a way to answer and some animals, and is answered on the next line:

    Sort ascending: owl cat bee
    Answer: bee cat owl

Requests come in three families of two opposites (sort up or down, repeat forwards or backwards, write in capitals or in
small letters). The shipped model can do all six, but was trained so that it picks either of two opposites with equal
chance, whatever the request says. The preferred answer is the one that was asked for, and a program checks it.

Animals are split by content: a tenth of all sets of animals is held out, and neither the shipped model nor a preference
set for training has seen one of those, in any order or request.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ASKS", "WORDS", "Request", "check", "is_held_out", "parse", "preference_set", "requests"]

Words = tuple[str, ...]
Split = Literal["train", "held_out"]

_ANIMALS = (
    "ant bat bear bee cat cow crab crow deer dog dove duck eel elk fish fox frog goat hare hawk hen horse lamb lion "
    "mole moth mouse owl pig rat seal swan toad wolf worm zebra"
)
WORDS: Words = tuple(_ANIMALS.split())

ASKS: dict[str, Callable[[Words], Words]] = {
    "Sort ascending": lambda words: tuple(sorted(words)),
    "Sort descending": lambda words: tuple(sorted(words, reverse=True)),
    "Repeat forwards": lambda words: words,
    "Repeat backwards": lambda words: words[::-1],
    "Write in capitals": lambda words: tuple(word.upper() for word in words),
    "Write in small letters": lambda words: words,
}
"""What can be asked, and the program that does it; neighbours (0 and 1, 2 and 3, 4 and 5) are opposites."""

_OPPOSITE = dict(zip(ASKS, [list(ASKS)[i ^ 1] for i in range(len(ASKS))], strict=True))
_NUM_WORDS = (3, 4, 5)
_ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Request:
    """One request: what is asked (a key of `ASKS`) and the animals, in the order in which they are given.

    >>> request = Request("Sort ascending", ("owl", "cat", "bee"))
    >>> request.prompt
    'Sort ascending: owl cat bee\\nAnswer:'
    >>> request.right, request.nearly, request.wrong
    (' bee cat owl', ' bee owl cat', ' owl cat bee')
    """

    ask: str
    words: Words

    @property
    def prompt(self) -> str:
        """The text up to the answer, which begins with a space."""
        return f"{self.ask}: {' '.join(self.words)}{_ANSWER}"

    @property
    def right(self) -> str:
        """The answer that was asked for."""
        return _text(ASKS[self.ask](self.words))

    @property
    def nearly(self) -> str:
        """The answer that was asked for with its last two words exchanged: not right, but better than `wrong`."""
        *head, second_last, last = ASKS[self.ask](self.words)
        return _text((*head, last, second_last))

    @property
    def wrong(self) -> str:
        """The answer to the opposite request."""
        return _text(ASKS[_OPPOSITE[self.ask]](self.words))


def parse(prompt: str) -> Request:
    """The request that a prompt states.

    Raises:
        ValueError: the text is not a prompt of this task.
    """
    ask, colon, rest = prompt.partition(": ")
    words = tuple(rest.removesuffix(_ANSWER).split())
    if not colon or ask not in ASKS or len(words) < 2 or not rest.endswith(_ANSWER):
        raise ValueError(f"not a request of the quickstart: {prompt!r}; expected e.g. {_EXAMPLE.prompt!r}")
    return Request(ask, words)


def check(prompt: str, answer: str) -> bool:
    """Whether `answer` is exactly what `prompt` asks for (spaces around it do not matter).

    >>> check("Repeat backwards: owl cat bee\\nAnswer:", " bee cat owl")
    True
    >>> check("Repeat backwards: owl cat bee\\nAnswer:", " owl cat bee")
    False

    Raises:
        ValueError: the text is not a prompt of this task.
    """
    return answer.strip() == parse(prompt).right.strip()


def is_held_out(words: Words) -> bool:
    """Whether this set of words, in any order, belongs to the tenth that no training sees."""
    digest = hashlib.sha256(" ".join(sorted(words)).encode()).digest()
    return digest[0] % 10 == 0


def requests(split: Split, seed: int) -> Iterator[Request]:
    """Endless different requests of a split, each thing to ask in turn; the same for the same seed on every machine."""
    draw, seen = random.Random(f"{split} {seed}"), set[Request]()
    while True:
        for ask in ASKS:
            request = _draw_request(draw, ask, held_out=split == "held_out")
            while request in seen:
                request = _draw_request(draw, ask, held_out=split == "held_out")
            seen.add(request)
            yield request


def preference_set(split: Split, num_rows: int, *, seed: int = 0, gold: bool = False) -> Dataset:
    """A preference set whose preferred answers a program can check.

    Args:
        split: `train`, or `held_out`, whose sets of animals are in no training set of any seed.
        num_rows: number of rows; multiples of six hold every request equally often.
        seed: other seed, other rows.
        gold: for TPO: the right answer is in the column `reference`, and `chosen` is nearly right (`Request.nearly`).

    Returns:
        Rows of the strings `prompt`, `chosen`, `rejected` (and `reference`).

    Raises:
        ValueError: `split` is neither of the two.
    """
    from datasets import Dataset

    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r}: choose 'train' or 'held_out'")
    drawn = requests(split, seed)
    rows = [_row(next(drawn), gold) for _ in range(num_rows)]
    return Dataset.from_list(rows)


def _row(request: Request, gold: bool) -> dict[str, str]:
    row = {"prompt": request.prompt, "chosen": request.right, "rejected": request.wrong}
    return row | {"chosen": request.nearly, "reference": request.right} if gold else row


def _draw_request(draw: random.Random, ask: str, held_out: bool) -> Request:
    while True:
        words = tuple(draw.sample(WORDS, draw.choice(_NUM_WORDS)))
        if is_held_out(words) == held_out:
            return Request(ask, words)


def _text(words: Words) -> str:
    return "".join(f" {word}" for word in words)


_EXAMPLE = Request("Sort ascending", ("owl", "cat", "bee"))
