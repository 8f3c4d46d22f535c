"""One question to a refiner, outside of any sampling. Nothing here needs ComfyUI."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from promptloop_pipeline.chat import OPTIONS, Sampling
from promptloop_pipeline.refiner import Refinement, View
from promptloop_pipeline.refiners.guards import GuardedRefiner
from promptloop_pipeline.refiners.parsing import parse_answer
from promptloop_pipeline.refiners.scripted import FunctionRefiner
from promptloop_pipeline.refiners.template import Template
from promptloop_pipeline.session import Session
from promptloop_pipeline.trajectory import Trajectory, Turn

EMPTY = 'the prompt is empty; say what you want to see, for example "a red cube left of a blue ball"'


def adjusted(refiner: Any, seed: int | None, template: Template | None = None) -> Any:
    """A copy of a refiner, and of what it stands around, with another seed and told something else. The model itself is shared, and the
    refiner that was given stays as it is.

    Raises ValueError for a template where there is no model that could be told, or one that shows pictures to a model that is blind.
    """
    made = copy.copy(refiner)
    if hasattr(made, "sampling"):
        if template is not None:
            made.template, made.sampling = template, _sampling(refiner, template)
        if seed is not None and isinstance(made.sampling, dict):
            made.sampling = made.sampling | {"seed": seed}
        elif seed is not None:
            made.sampling = replace(made.sampling, seed=seed)
    elif getattr(made, "refiner", None) is not None:
        made.refiner = adjusted(made.refiner, seed, template)
    elif template is not None:
        raise ValueError(f"{type(refiner).__name__} is no model, and cannot be told {template.name!r}; choose 'as loaded'")
    return made


def _sampling(refiner: Any, template: Template) -> Any:
    """What was chosen for the model stays; what its old template wanted gives way to what the new one wants. A dict holds only what was
    chosen."""
    from promptloop_pipeline.chat.endpoint import EndpointChat

    now = refiner.sampling
    if isinstance(now, dict):
        Sampling(**(template.sampling | now))
        return now
    if template.shows and not refiner.chat.sees:
        raise ValueError(f"the template {template.name!r} shows pictures, and {refiner.chat!r} takes text only; choose another")
    before = Sampling(**refiner.template.sampling)
    chosen = {name: getattr(now, name) for name in OPTIONS if getattr(now, name) != getattr(before, name)}
    if isinstance(refiner.chat, EndpointChat):
        chosen["num_beams"] = 1  # servers have no beam search
    return Sampling(**(template.sampling | chosen))


def rewrite(
    refiner: Any,
    prompt: str,
    append: bool,
    picture: Any = None,
    cancel: Any = (),
    interrupted: Callable[[], bool] = lambda: False,
) -> Trajectory:
    """Asks once: before a run, or with a finished picture to look at, which is then also what an edit starts from.

    append: the user's words stay in front. cancel, interrupted: as in `Session`. A failure keeps the prompt and is recorded.
    Raises ValueError for an empty prompt, TypeError for what is no refiner.
    """
    if not prompt.strip():
        raise ValueError(EMPTY)
    asked = GuardedRefiner(refiner, prefix=True) if append else refiner
    session = Session(
        [prompt], asked, "start" if picture is None else "end", cancel=cancel, sources=[picture], interrupted=interrupted
    )
    session.start(1)
    session.observe(*((0, None, None) if picture is None else (1, 0.0, lambda: [picture])))
    (trajectory,) = session.finish(None)
    if picture is not None:  # the next one is made with it
        trajectory.turns = [replace(turn, applied=0) for turn in trajectory.turns]
    return trajectory


def parsed(text: str, prompt: str, append: bool, thinking: str = "") -> Trajectory:
    """As `rewrite`, with what some model wrote already. thinking: what it thought, where that comes apart from it."""

    def answer(view: View) -> Refinement:
        found = parse_answer(text)
        why = "\n".join(part for part in (thinking.strip(), found.reasoning) if part)
        return Refinement(found.prompt, why, text, error=found.error)

    return rewrite(FunctionRefiner(answer), prompt, append)


def warning(turn: Turn) -> str:
    """Why the user's words are used as they were, in one line; empty where they are not."""
    if turn.error:
        return f"WARNING: your prompt is kept, since this failed: {turn.error}"
    if turn.changed:
        return ""
    return "; ".join(turn.notes) or "Your prompt is kept, as the refiner wants it."


def why(turn: Turn) -> str:
    return "\n".join(part for part in (turn.reasoning, warning(turn)) if part)


def shown(turn: Turn) -> str:
    """For the node: the prompt, and whether something went wrong."""
    return "\n\n".join(part for part in (turn.after, warning(turn)) if part)
