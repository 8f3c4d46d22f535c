"""Guards: what a refiner may do to a prompt. They stand around any refiner, and note whatever they do."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

from ..refiner import Around, Refinement, Refiner, View
from ..session import check_refiner

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Han: no spaces between words
_LETTER = rf"[^\W{_UNSPACED}]"  # of a word that ends where the letters end


class GuardedRefiner(Around):
    """refiner: any.

    prefix: keep the user's own words in front and let the refiner only add to them (PRIP's remedy for drift, ACL 2024).
    must_keep: terms that no refinement may lose; one that the request or the prompt in use has and the answer lacks is put back.
    max_change: the largest share of words that one turn may change, 0 to 1; an answer that changes more is not taken.
    """

    def __init__(
        self, refiner: Refiner, *, prefix: bool = False, must_keep: Sequence[str] = (), max_change: float | None = None
    ) -> None:
        if isinstance(must_keep, str):
            raise TypeError(f"must_keep is a list of terms, not the text {must_keep!r}; use [{must_keep!r}]")
        if empty := [t for t in must_keep if not t.strip()]:
            raise ValueError(f"must_keep has the empty term {empty[0]!r}; leave it out")
        if max_change is not None and not 0 <= max_change <= 1:
            raise ValueError(f"max_change is {max_change}; use a share from 0 (nothing may change) to 1 (everything may)")
        check_refiner(refiner)
        super().__init__(refiner)
        self.prefix, self.must_keep, self.max_change = prefix, tuple(must_keep), max_change

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        answers = self.refiner.refine(views)
        if not isinstance(answers, (list, tuple)) or len(answers) != len(views):
            return answers  # the session says what is wrong with it
        return [self._guard(v, a) for v, a in zip(views, answers, strict=True)]

    def _guard(self, view: View, answer: Refinement) -> Refinement:
        prompt = getattr(answer, "prompt", None)
        if not isinstance(prompt, str) or not all(hasattr(answer, f.name) for f in fields(Refinement)):
            return answer  # it keeps the prompt, or the session says what is wrong with it
        if answer.error or not prompt.strip():
            return answer
        answer = Refinement(**{f.name: getattr(answer, f.name) for f in fields(Refinement)})  # any object that has these
        notes = list(answer.notes)
        if self.prefix and not _begins_with(prompt, view.request):
            prompt = _join(view.request, prompt.lstrip(" ,;"))
            notes.append("the user's own words were put in front")
        for term in self.must_keep:
            if not has_term(prompt, term) and (has_term(view.request, term) or has_term(view.prompt, term)):
                prompt = _join(prompt, term)
                notes.append(f"put back: {term!r}")
        for term in self.must_keep if view.fit else ():  # what is too long is cut at its end
            if has_term(prompt, term) and not has_term(view.fit(prompt), term):  # type: ignore[misc]
                prompt = _join(term, prompt)
                notes.append(f"put in front, lest it be cut off: {term!r}")
        if self.max_change is not None and (share := change(view.prompt, prompt)) > self.max_change:
            notes.append(f"not taken: it changes {share:.0%} of the words, more than {self.max_change:.0%}: {prompt!r}")
            return replace(answer, prompt=None, notes=tuple(notes))
        return replace(answer, prompt=prompt, notes=tuple(notes))


def change(before: str, after: str) -> float:
    """The share of words that differ, 0 to 1: 1 minus the matching share of `difflib`. Where that would take long, for words that are
    repeated again and again, their order is not looked at."""
    a, b = _words(before), _words(after)
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    pairs = Counter(a), Counter(b)
    return 1 - (matcher.ratio() if sum(n * pairs[1][w] for w, n in pairs[0].items()) < 20_000 else matcher.quick_ratio())


def has_term(text: str, term: str) -> bool:
    """As whole words, whatever the case; anywhere where the term begins or ends with what is no letter, or in a script that puts no
    spaces between words."""
    return re.search(rf"{_start(term)}{re.escape(_normal(term))}{_end(term)}", _normal(text)) is not None


def _begins_with(text: str, words: str) -> bool:
    words = words.rstrip(" ,;.\n")
    return re.match(rf"{re.escape(_normal(words))}{_end(words)}", _normal(text)) is not None


def _start(term: str) -> str:
    return rf"(?<!{_LETTER})" if re.match(rf"\s*{_LETTER}", term) else ""


def _end(term: str) -> str:
    return rf"(?!{_LETTER})" if re.match(_LETTER, term.rstrip()[-1:]) else ""


def _words(text: str) -> list[str]:
    return re.findall(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+", text.casefold())


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _join(a: str, b: str) -> str:
    a, b = a.rstrip(), b.strip()
    return f"{a} {b}" if not a or a[-1] in ",;:.!?" else f"{a}, {b}"
