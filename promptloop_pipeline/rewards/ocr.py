"""ocr: can the text that was asked for be read in the picture? Flow-GRPO's reward (arXiv 2505.05470), for any number of texts.

    1 - edits / letters

Flow-GRPO compares the text between the first pair of double quotes with everything that was read, joined, without spaces and in
lower case: no edits where it is a part of it, else the edit distance, at most its own letters. Here every quoted text is wanted:
those that are read as they stand are taken out, and the others, joined in the order that fits best, are compared with the rest. For
a request with one text that is Flow-GRPO's rule; `first_only=True` is its rule for all.

Under that rule one wrong letter costs everything in a picture with much other text. With `anywhere=True` each text is compared with
the run of words that fits it best, wherever it stands. That forgives other text, gibberish too: ten words of it score .2 by chance.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from typing import Any

from PIL import Image

from ..reward import Judgement
from .images import as_rgb

logger = logging.getLogger("promptloop")
Recognise = Callable[[Image.Image], Sequence[str]]  # an RGB picture -> the texts in it, in reading order
_QUOTED = re.compile(r'(?<!\d)"([^"]*)"')  # straight after a digit it is an inch mark; within a text nothing is
_DOUBLE = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u201f\uff02", '"'))  # curly, low, reversed, full width
_SINGLE = str.maketrans(dict.fromkeys("\u2018\u2019\u201a\u201b\u00b4\u0060", "'"))
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


def quoted(request: str) -> list[str]:
    """The texts in double quotes, straight or curly, in order; empty ones are left out. Single quotes are apostrophes."""
    return [t.strip() for t in _QUOTED.findall(request.translate(_DOUBLE)) if plain_text(t)]


def plain_text(text: str) -> str:
    """What counts of a text: Unicode's compatible form (NFKC) without case and white space, with plain quotes and dashes."""
    return "".join(unicodedata.normalize("NFKC", text.translate(_DOUBLE | _SINGLE | _DASHES)).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest letters to insert, delete or replace."""
    row = list(range(len(a) + 1))
    for letter in b:
        row = _next(row, a, letter)
    return row[-1]


def fit(wanted: str, words: Iterable[str]) -> int:
    """The smallest edit distance from `wanted` to any run of consecutive words, joined; to nothing at all, it is its length."""
    row, best = list(range(len(wanted) + 1)), len(wanted)
    for word in words:
        row = [min(cost, k) for k, cost in enumerate(row)]  # a run may start at any word
        for letter in word:
            row = _next(row, wanted, letter)
        best = min(best, row[-1])
    return best


def _next(row: list[int], wanted: str, letter: str) -> list[int]:
    """row: the distances of each beginning of `wanted` to what was read so far -> to that and one letter more."""
    new = [row[0] + 1]
    for k, w in enumerate(wanted):
        new.append(min(row[k] + (w != letter), row[k + 1] + 1, new[k] + 1))
    return new


def edits(wanted: Sequence[str], words: Sequence[str], anywhere: bool = False) -> int:
    """How many letters are wrong in the words that were read, from 0 to all of the texts `wanted`; both as `plain_text` has them."""
    rest = "".join(words)
    if anywhere:
        return sum(0 if text in rest else fit(text, words) for text in wanted)
    left = list(wanted)
    for text in sorted(wanted, key=len, reverse=True):
        if text in rest:
            rest = rest.replace(text, "", 1)
            left.remove(text)
    orders = permutations(left) if len(left) < 5 else [left]
    return min(sum(map(len, left)), *(edit_distance("".join(order), rest) for order in orders))


class Ocr:
    """How well the texts in double quotes in the request can be read in the picture: from 0 to 1, 1 is without a fault.

    None where there is no picture or nothing stands in double quotes. A prompt is read to its end. `judge` says what was wanted,
    what was read, and how many of how many letters are wrong.

    recognise: an RGB picture -> the texts in it, in reading order, by whatever reader one has; default: RapidOCR on the CPU
    (Apache-2.0, as are its weights, PP-OCRv6, which come with the package), for Latin, Chinese and Japanese letters. Figures of
    different readers do not compare: Flow-GRPO's were made with PaddleOCR. first_only, anywhere: see the module.

    A reader that fails costs a picture its score, and the details say why. Raises ImportError when RapidOCR is not installed.
    """

    def __init__(
        self, recognise: Recognise | None = None, *, first_only: bool = False, anywhere: bool = False, name: str = "ocr"
    ) -> None:
        self.recognise, self.first_only, self.anywhere, self.name = recognise or rapidocr(), first_only, anywhere, name

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return [judgement.score for judgement in self.judge(images, prompts)]

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(
                f"{self.name}: {len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        found = [self._judge(image, prompt) for image, prompt in zip(images, prompts)]
        lost = [j.details["error"] for j in found if j.score is None and "wanted" in j.details]
        if lost:
            logger.warning("%s: %d of %d pictures could not be read, such as: %s", self.name, len(lost), len(found), lost[0])
        return found

    def _judge(self, image: Any, prompt: str) -> Judgement:
        wanted = quoted(prompt)[: 1 if self.first_only else None]
        if image is None or not wanted:
            return Judgement(
                None, {"skipped": "there is no picture" if image is None else "nothing in double quotes was asked for"}
            )
        picture = as_rgb(image)
        try:
            read = [str(text) for text in self.recognise(picture)]
        except Exception as e:  # a reader may fail in any way
            why = f"{type(e).__name__}: {e}".splitlines()[0]
            return Judgement(None, {"error": f"the text could not be read: {why}", "wanted": wanted})
        texts, words = list(map(plain_text, wanted)), [plain_text(word) for text in read for word in text.split()]
        wrong, letters = edits(texts, words, self.anywhere), sum(map(len, texts))
        return Judgement((letters - wrong) / letters, {"wanted": wanted, "read": read, "edits": wrong, "letters": letters})


def rapidocr() -> Recognise:
    """RapidOCR on the CPU with the weights in its package; nothing is downloaded. Raises ImportError saying what to install."""
    try:
        from rapidocr import RapidOCR

        engine: Any = RapidOCR(params={"Global.log_level": "error"})
    except ImportError as e:
        raise ImportError(
            f'the reward ocr reads with RapidOCR, which is not there ({e}): pip install "promptloop[ocr]", or give recognise=, a '
            "function from a picture to the texts in it"
        ) from e
    return lambda picture: list(engine(picture).txts or ())
