"""The refiner: anything that looks at a running generation and says how its prompt should go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

    from .trajectory import Turn


@dataclass(frozen=True)
class View:
    """All that a refiner may look at, for one sample at one turn.

    request: the user's own words, never rewritten.
    prompt: the prompt in use until now.
    step, num_steps: the new prompt acts from `step` on, 0 <= step <= num_steps; at num_steps the image is finished.
    sigma: noise level of `image`'s x0-estimate; in [0, 1] for flow matching, noise over signal otherwise; None at the start.
    image: RGB preview of the x0-estimate; None at the start.
    source: the picture that an image-to-image run starts from, if there is one.
    fit: shortens a prompt to what the host's text encoders hold, as the host will do itself; None where no limit is known.
    turns: earlier turns of this sample, oldest first.
    """

    request: str
    prompt: str
    step: int
    num_steps: int
    sigma: float | None = None
    image: Image | None = None
    turns: tuple[Turn, ...] = ()
    source: Image | None = None
    fit: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Refinement:
    """What a refiner answers for one view. `prompt` None keeps the prompt in use.

    reasoning: why, in words; never part of the prompt. raw: the model's whole output.
    token_ids, logprobs: of the sampled output, in nats, for training; same length. tokens: how many there were, if known.
    format_ok: whether the output had the form that was asked for; None where no form was. For format rewards.
    notes: what a guard did to the answer, in words.
    error: what went wrong, if anything did; the prompt in use is then kept.
    """

    prompt: str | None = None
    reasoning: str = ""
    raw: str = ""
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    error: str | None = None
    tokens: int | None = None
    format_ok: bool | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Refiner(Protocol):
    """`refine` gets the views of a whole batch and returns one answer for each, in order.

    The same length out as in. Text, never tensors. Views are not to be changed. A failure of one sample is a
    `Refinement(error=...)`, not an exception; an exception counts as a failure of the whole batch. Either way the run goes
    on with the prompt it had, unless it is strict. Any object with this method will do; there is nothing to inherit.

    An object with an attribute `looks` that is False is shown no pictures, and none are decoded for it.
    """

    def refine(self, views: Sequence[View]) -> list[Refinement]: ...


class Around:
    """For a refiner that stands around another one: it looks if that one does, and a host stops that one through it."""

    def __init__(self, refiner: Refiner) -> None:
        self.refiner = refiner

    @property
    def looks(self) -> bool:
        return getattr(self.refiner, "looks", True)

    @property
    def on_token(self) -> Callable[[], None] | None:
        return getattr(self.refiner, "on_token", None)

    @on_token.setter
    def on_token(self, function: Callable[[], None] | None) -> None:
        self.refiner.on_token = function  # type: ignore[attr-defined]


def check_answers(answers: object, expected: int, refiner: Refiner) -> None:
    """A refiner that breaks its contract is a bug, not a failure of the run: it always raises."""
    name = type(refiner).__name__
    if not isinstance(answers, (list, tuple)) or len(answers) != expected:
        got = f"{len(answers)} answers" if isinstance(answers, (list, tuple)) else type(answers).__name__
        raise ValueError(
            f"{name}.refine returned {got} for {expected} views; it must return a list with one Refinement for each view"
        )
    for a in answers:
        if missing := [f.name for f in fields(Refinement) if not hasattr(a, f.name)]:
            what = f"{type(a).__name__} {a!r:.80} (without {', '.join(missing)})"
        elif not isinstance(a.prompt, str | None) or not isinstance(a.error, str | None):
            what = f"a Refinement whose prompt is {type(a.prompt).__name__} and whose error is {type(a.error).__name__}"
        else:
            continue
        raise TypeError(
            f"{name}.refine returned {what}; each answer must be a Refinement whose prompt is text, or None to keep it"
        )
