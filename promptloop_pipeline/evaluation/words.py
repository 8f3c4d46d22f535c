"""What two texts have in common, word by word, without any model.

A word is compared by its form: NFKC, case folded, plural and possessive endings off, number words as digits, British spelling as
American. Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are compared character by character,
as ROUGE is for Chinese. Endings and stop words are known for English only; words of other languages are compared as they stand.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

PAIRS = 20_000  # of prompts that are compared at most

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_WEIGHT = re.compile(r":\s*[-+]?\d*\.?\d+\s*(?=[)\]])")  # of "(red:1.3)": it says how much, not what
_ENDING = re.compile(r"'(?:s|m|d|re|ve|ll)?$")
_AFTER_SIBILANT = re.compile(r"(?:[sxzo]|[cs]h)e$")

_STOP = frozenset(
    str.split(
        "a an and are as at be been being but by can could did do does for from had has have he her him his i if in into is it me my "
        "of on or our please she should so some than that the their them then there these they this those to us was we were what "
        "where which while who whose will with would you your \u7684 \u4e86 \u306e \u306f \u304c \u3092 \u306b \u3068"
    )
)
_NUMBERS = dict(
    pair.split(":")
    for pair in str.split(
        "zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10 eleven:11 twelve:12 thirteen:13 fourteen:14 "
        "fifteen:15 sixteen:16 seventeen:17 eighteen:18 nineteen:19 twenty:20 thirty:30 forty:40 fifty:50 sixty:60 seventy:70 "
        "eighty:80 ninety:90 hundred:100"
    )
)
_FORMS = dict(
    pair.split(":")
    for pair in str.split(
        "cannot:not children:child people:person feet:foot teeth:tooth mice:mouse geese:goose wolves:wolf leaves:leaf knives:knife "
        "shelves:shelf scarves:scarf loaves:loaf elves:elf halves:half calves:calf thieves:thief wives:wife cacti:cactus grey:gray "
        "colour:color colours:color coloured:colored colourful:colorful centre:center theatre:theater"
    )
)


def words(text: str) -> list[str]:
    """The forms of all words, in order; characters where words are not spaced. Punctuation is no word."""
    text = _WEIGHT.sub("", unicodedata.normalize("NFKC", text).replace("\u2019", "'")).casefold()
    kept = "".join(_letter(c) for c in text)
    return [form for word in _WORD.findall(kept) if (form := _form(word.strip("'")))]


def content_words(text: str) -> list[str]:
    """The forms of the words that say what is wanted: all but articles, pronouns, auxiliaries and the commonest prepositions (of, in,
    on). Numbers, negations and words of place (left, under, behind) say something of a picture, and count."""
    return [w for w in words(text) if w not in _STOP]


def lexical_recall(request: str, prompt: str) -> float | None:
    """The share of the request's content words that the prompt has too, 0 to 1; a word that is asked for twice has to come twice.

    None where the request has no content words. It sees no synonyms ("feline" for "cat" is a loss) and no order ("a dog on a cat" has
    all of "a cat on a dog"); whatever the prompt adds costs nothing. PromptLoop's own measure of drift is BERTScore's recall
    and one judged by a language model: `measures.token_recall` is the former on another encoder, this one is exact, needs no model
    and has an unmistakable unit, but is stricter.
    """
    wanted, there = Counter(content_words(request)), Counter(content_words(prompt))
    return sum((wanted & there).values()) / wanted.total() if wanted else None


def prompt_self_similarity(
    prompts: Sequence[str], requests: Sequence[str] | None = None, most: int = PAIRS
) -> dict[str, float | int | None]:
    """How much prompts for different requests are alike, 0 to 1: {"mean", "n"}, n being the pairs that were compared.

    The mean over pairs of the Jaccard index of their words and pairs of neighbouring words. A refiner that says the same whatever is
    asked nears 1. What is high depends on the requests: hold it against the same figure of the requests themselves.

    requests: pairs with the same request are left out, as pictures with several seeds give them. most: where there are more pairs,
    so many are drawn, with a fixed seed. The mean is None where there is no pair. Raises ValueError where the lengths differ.
    """
    if requests is not None and len(requests) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(requests)} requests; give one request for each prompt")
    n, asked = len(prompts), requests or range(len(prompts))
    if n * (n - 1) // 2 > most:
        rng = random.Random(0)
        drawn = ((rng.randrange(n), rng.randrange(n - 1)) for _ in range(most))
        pairs = [(i, j + (j >= i)) for i, j in drawn]  # never one with itself
    else:
        pairs = list(combinations(range(n), 2))
    pairs = [(i, j) for i, j in pairs if asked[i] != asked[j]]
    grams = [_grams(words(p)) for p in prompts]
    alike = [_jaccard(grams[i], grams[j]) for i, j in pairs]
    return {"mean": sum(alike) / len(alike) if alike else None, "n": len(alike)}


def _grams(forms: Sequence[str]) -> set[tuple[str, ...]]:
    return {(w,) for w in forms} | set(zip(forms, forms[1:]))


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


def _letter(c: str) -> str:
    kind = unicodedata.category(c)
    if kind == "Nd":
        return str(unicodedata.decimal(c))  # of any script
    return c if kind[0] in "LNM" or c == "'" else "" if kind == "Cf" else " "  # Cf: joiners and marks of direction


def _form(word: str) -> str:
    if word.endswith("n't"):
        return "not"
    word = _ENDING.sub("", word)
    word = _FORMS.get(word) or _NUMBERS.get(word) or word
    if word.isdecimal():
        return word.lstrip("0") or "0"
    if word.endswith("men"):  # women, firemen
        word = word[:-2] + "an"
    while len(word) > 3:
        shorter = word
        if word.endswith("s") and not word.endswith(("ss", "us", "is")):
            shorter = word[:-1]
        if shorter.endswith("ie") and len(shorter) > 3:
            shorter = shorter[:-2] + "y"
        elif len(shorter) > 3 and _AFTER_SIBILANT.search(shorter):
            shorter = shorter[:-1]
        if shorter == word:
            break
        word = shorter
    return word
