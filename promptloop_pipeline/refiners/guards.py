"""Guards: what a refiner may do to a prompt. They stand around any refiner, and note whatever they do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

from ..refiner import Refinement, Refiner, View


class GuardedRefiner:
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
        if max_change is not None and not 0 <= max_change <= 1:
            raise ValueError(f"max_change is {max_change}; use a share from 0 (nothing may change) to 1 (everything may)")
        self.refiner, self.prefix, self.must_keep, self.max_change = refiner, prefix, tuple(must_keep), max_change

    @property
    def looks(self) -> bool:
        return getattr(self.refiner, "looks", True)

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        answers = self.refiner.refine(views)
        if not isinstance(answers, (list, tuple)) or len(answers) != len(views):
            return answers  # the session says what is wrong with it
        return [self._guard(v, a) for v, a in zip(views, answers, strict=True)]

    def _guard(self, view: View, answer: Refinement) -> Refinement:
        if answer.error or answer.prompt is None or not answer.prompt.strip():
            return answer
        prompt, notes = answer.prompt, list(answer.notes)
        if self.prefix and not _normal(prompt).startswith(_normal(view.request)):
            prompt = _join(view.request, prompt)
            notes.append("the user's own words were put in front")
        for term in self.must_keep:
            if not has_term(prompt, term) and (has_term(view.request, term) or has_term(view.prompt, term)):
                prompt = _join(prompt, term)
                notes.append(f"put back: {term!r}")
        if self.max_change is not None and (share := change(view.prompt, prompt)) > self.max_change:
            notes.append(f"not taken: it changes {share:.0%} of the words, more than {self.max_change:.0%}: {prompt!r}")
            return replace(answer, prompt=None, notes=tuple(notes))
        return replace(answer, prompt=prompt, notes=tuple(notes))


def change(before: str, after: str) -> float:
    """The share of words that differ, 0 to 1: 1 minus the matching share of `difflib`."""
    return 1 - difflib.SequenceMatcher(None, before.casefold().split(), after.casefold().split(), autojunk=False).ratio()


def has_term(text: str, term: str) -> bool:
    """As whole words, whatever the case; within the text where the term does not begin and end with word characters."""
    pattern = re.escape(" ".join(term.casefold().split()))
    return re.search(rf"(?<!\w){pattern}(?!\w)", _normal(text)) is not None


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _join(a: str, b: str) -> str:
    return f"{a.rstrip(' ,;.')}, {b.lstrip(' ,;.')}"
