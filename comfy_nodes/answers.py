"""Questions to the artist: asked in the thread that samples, answered from the server's. Nothing here needs ComfyUI.

What became of a suggestion stands in the notes of its turn, in words, and `asked` reads it back. So recorded runs can teach a refiner
what this artist wants: a turn's request, prompt and picture are what was seen, `Asked.suggestion` what a model said, and the turn's
`after` what the artist made of it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import uuid4

from promptloop_pipeline.refiner import Around, Refinement, Refiner, View, check_answers
from promptloop_pipeline.trajectory import Turn

ACTIONS = ("accept", "edit", "skip")
LONGEST = 10_000  # characters of a prompt
TICK = 0.1  # seconds between two looks at whether somebody has answered
GRACE = 20.0  # seconds in which a browser may load its page again
_DONE = {"accept": "accepted", "edit": "edited", "skip": "skipped"}


@dataclass
class Question:
    """data: what the browser shows, JSON values. client: the browser that is asked. until: `time.monotonic()` of its end."""

    data: dict[str, Any]
    client: str | None = None
    until: float = float("inf")
    id: str = field(default_factory=lambda: uuid4().hex)
    action: str | None = None
    prompt: str | None = None
    answered: threading.Event = field(default_factory=threading.Event)

    def shown(self) -> dict[str, Any]:
        return {"id": self.id, **self.data, "seconds": max(round(self.until - time.monotonic()), 0)}


_open: dict[str, Question] = {}
_lock = threading.Lock()


def open_questions(client: str | None) -> list[dict[str, Any]]:
    """Those that a browser has yet to answer, for one whose page was loaded again."""
    with _lock:
        return [q.shown() for q in _open.values() if q.client == client]


def answer(body: Any) -> tuple[int, str]:
    """Takes {"id", "action": "accept" | "edit" | "skip", "prompt" (for edit)}; returns an HTTP status and one line."""
    if not isinstance(body, dict) or not isinstance(body.get("id"), str):
        return 400, 'send {"id": ..., "action": "accept", "edit" or "skip", "prompt": the text, for edit}'
    action, prompt = body.get("action"), body.get("prompt")
    if action not in ACTIONS:
        return 400, f"the action is {action!r:.80}; use accept, edit or skip"
    if action == "edit":
        if not isinstance(prompt, str) or not prompt.strip():
            return 400, "an edited prompt must be text, and not empty; to keep the prompt send skip"
        if len(prompt) > LONGEST:
            return 400, f"the prompt is {len(prompt)} characters long; use {LONGEST} at most"
    with _lock:
        question = _open.get(body["id"])
        if question is None:
            return 404, "no such question is open: it was answered, its time is over, or the run has ended"
        if action == "accept" and question.data.get("suggestion") is None:
            return 400, "there is no suggestion to accept; send edit or skip"
        del _open[question.id]
        question.action, question.prompt = action, prompt if action == "edit" else None
        question.answered.set()
    return 200, "thank you"


class Host(Protocol):
    """Where the artist is."""

    def present(self) -> tuple[str, Any] | None:
        """(the browser that queued this run, its connection); None where there is none."""

    def send(self, event: str, data: dict[str, Any]) -> None: ...
    def where(self) -> dict[str, Any]:
        """What tells the browser which node asks."""

    def interrupted(self) -> bool: ...
    def is_cancel(self, error: Exception) -> bool: ...
    def picture(self, image: Any) -> str: ...


class AskMe(Around):
    """A refiner that asks the artist, one picture after the other, and shows what another refiner suggests.

    refiner: None: no suggestions. seconds: to wait for each answer. accept: whether a suggestion is taken that nobody answered.
    """

    looks = True  # the artist does, whoever suggests

    def __init__(self, refiner: Refiner | None, host: Host, seconds: float, accept: bool) -> None:
        super().__init__(refiner)  # type: ignore[arg-type]
        self.host, self.seconds, self.accept = host, seconds, accept
        self._on_token: Callable[[], None] | None = None

    @property
    def on_token(self) -> Callable[[], None] | None:
        return self.refiner.on_token if hasattr(self.refiner, "on_token") else self._on_token

    @on_token.setter
    def on_token(self, function: Callable[[], None] | None) -> None:
        self._on_token = function
        if hasattr(self.refiner, "on_token"):
            self.refiner.on_token = function

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        found: list[Refinement] = []
        away = None  # why the rest of the batch is not asked any more
        for k, (view, suggestion) in enumerate(zip(views, self._suggestions(views), strict=True)):
            text = _text(view, suggestion) if self.refiner is not None else None
            question = Question(self._data(k, view, text, suggestion))
            away = away or self._wait(question)
            found.append(self._answer(view, text, suggestion, question, away))
        return found

    def _suggestions(self, views: Sequence[View]) -> list[Refinement]:
        if self.refiner is None:
            return [Refinement()] * len(views)
        try:
            found = self.refiner.refine(views)
        except Exception as e:
            if self.host.is_cancel(e):
                raise
            return [Refinement(error=f"{type(e).__name__}: {e}")] * len(views)
        check_answers(found, len(views), self.refiner)
        return list(found)

    def _data(self, sample: int, view: View, text: str | None, suggestion: Refinement) -> dict[str, Any]:
        image = None if view.image is None else self.host.picture(view.image)
        return {
            **self.host.where(), "sample": sample, "request": view.request, "before": view.prompt, "suggestion": text,
            "reasoning": suggestion.reasoning or suggestion.error or "", "step": view.step, "num_steps": view.num_steps, "image": image,
        }  # fmt: skip

    def _wait(self, question: Question) -> str | None:
        """Until it is answered: None; else why it was not, in words."""
        there = self.host.present()
        if there is None:
            return "nobody was there to be asked"
        if self.host.interrupted():
            return "nobody was asked, since the run was interrupted"
        question.client, connection = there
        question.until, seen = time.monotonic() + self.seconds, time.monotonic()
        outcome, why = "interrupted", None
        with _lock:
            _open[question.id] = question
        try:
            self.host.send("ask", question.shown())
            while why is None and not question.answered.wait(TICK):
                if self._on_token is not None:
                    self._on_token()  # raises where nobody wants the answer any more
                now, there = time.monotonic(), self.host.present()
                if there is not None and there[1] is not connection:
                    connection = there[1]
                    self.host.send("ask", question.shown())  # its page was loaded again
                seen = now if there is not None else seen
                if self.host.interrupted():
                    why = "nobody answered before the run was interrupted"
                elif now > seen + GRACE:
                    outcome, why = "gone", "the browser has gone"
                elif now > question.until:
                    outcome, why = "timeout", f"nobody answered within {self.seconds:g} s"
        finally:
            with _lock:
                _open.pop(question.id, None)
            self.host.send("asked", {"id": question.id, "outcome": question.action or outcome})
        return None if question.action else why  # an answer may have come in the last moment

    def _answer(self, view: View, text: str | None, said: Refinement, question: Question, away: str | None) -> Refinement:
        who = "the artist" if away is None else f"{away}:"
        taken = self.accept and text is not None and not self.host.interrupted()
        action = question.action if away is None else "accept" if taken else "skip"
        if action == "edit" and text is not None and question.prompt == text:
            action = "accept"
        prompt = {"accept": text, "edit": question.prompt, "skip": None}[str(action)]
        if text is not None:
            note = f"{who} {_DONE[str(action)]} the suggestion {json.dumps(text, ensure_ascii=False)}"
        else:
            note = f"{who} {'wrote' if action == 'edit' else 'kept'} the prompt, without a suggestion"
        notes = (*said.notes, *([f"there was no suggestion: {said.error}"] if said.error else []), note)
        if action != "accept":  # what the model wrote is not what was used
            said = replace(said, token_ids=None, logprobs=None)
        return replace(said, prompt=prompt, notes=notes, error=said.error if away is not None else None)


def _text(view: View, suggestion: Refinement) -> str | None:
    """A refiner that keeps the prompt suggests just that."""
    if suggestion.error:
        return None
    return suggestion.prompt if suggestion.prompt and suggestion.prompt.strip() else view.prompt


@dataclass(frozen=True)
class Asked:
    """by: "artist", or "nobody" where a default decided. action: one of ACTIONS. suggestion: None where there was none."""

    by: str
    action: str
    suggestion: str | None


def asked(turn: Turn) -> Asked | None:
    """What became of the question that a turn was; None for a turn that was none."""
    for note in reversed(turn.notes):
        if m := re.fullmatch(r"(the artist|[^\"]*:) (accepted|edited|skipped) the suggestion (\".*\")", note, re.S):
            action = next(a for a, done in _DONE.items() if done == m[2])
            return Asked("artist" if m[1] == "the artist" else "nobody", action, json.loads(m[3]))
        if m := re.fullmatch(r"(the artist|[^\"]*:) (wrote|kept) the prompt, without a suggestion", note):
            return Asked("artist" if m[1] == "the artist" else "nobody", "edit" if m[2] == "wrote" else "skip", None)
    return None
