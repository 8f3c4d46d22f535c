"""The chat model: what a refiner that talks needs of a language model, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol

NEED_SIGHT = 'use a vision-language model, or a template for text such as "reprompt"'
Message = dict[str, Any]
"""{"role": "system" | "user", "content": [{"type": "text", "text": str} | {"type": "image", "image": PIL image}, ...]}"""
Conversation = list[Message] | str
"""Messages to be answered; a bare text is to be continued as it stands, without a chat template (GPT-2 style)."""


@dataclass(frozen=True)
class Sampling:
    """How to generate. temperature 0 is greedy; `seed` is for nothing but this, and row k of a batch has noise of its own.

    seeds: one for each conversation instead, so that its answer does not depend on what else is in the batch.
    max_new_tokens: the token budget of one answer. top_p: in (0, 1]. num_beams > 1: beam search, greedy only.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0
    seeds: tuple[int, ...] | None = None

    def seed_of(self, row: int) -> int:
        """Of conversation `row` of the batch."""
        return self.seed * 1_000_033 + row if self.seeds is None else self.seeds[row]

    def __post_init__(self) -> None:
        for name, kind in OPTIONS.items():
            if not isinstance(value := getattr(self, name), Integral if kind is int else Real):
                raise ValueError(f"{name} is {value!r}; use a {'whole ' if kind is int else ''}number")
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("num_beams", self.num_beams == 1 or self.temperature == 0, "1 where temperature is above 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {allowed}")


OPTIONS: dict[str, Any] = {
    f.name: type(f.default) for f in fields(Sampling) if f.name != "seeds"
}  # what users and templates may set


@dataclass(frozen=True)
class Completion:
    """What the model said. `token_ids` with the end token, if it came; `logprobs` of these tokens under the distribution that they
    were drawn from, in nats; `tokens` how many. error: why there is no answer, never with a secret in it."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    tokens: int | None = None
    error: str | None = None


class ChatModel(Protocol):
    """One completion for each conversation, in order. What goes wrong with one of them is a `Completion(error=...)`; an exception is
    a failure of all. `sees`: whether it takes pictures."""

    sees: bool

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Completion]: ...


class Talks:
    """For what asks a chat model, `self.chat`: a host stops that through it."""

    chat: ChatModel

    @property
    def on_token(self) -> Callable[[], None] | None:
        """Called after each token (or often, while a server works). What it raises stops the model at once and gets through."""
        return getattr(self.chat, "on_token", None)

    @on_token.setter
    def on_token(self, function: Callable[[], None] | None) -> None:
        self.chat.on_token = function  # type: ignore[attr-defined]
