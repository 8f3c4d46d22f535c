"""How much of a prompt a pipeline's text encoders can hold, by its own tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .families import signature_of

KEPT = 0.75  # share of what fits that a cut at a clause has to keep
_BOUNDARY = re.compile(r"[,.](?!\d)|[;!?\n\u3001\u3002\uff0c\uff1b]")  # a clause ends before one of these, not inside of f/1.8


def token_limits(pipe: Any, kwargs: dict[str, Any]) -> list[tuple[Any, int]]:
    """(tokenizer, most tokens that it passes on) of each text encoder that is there. CLIP has a window of its own; T5 and language
    models take the call's `max_sequence_length`."""
    default = signature_of(type(pipe).__call__).parameters.get("max_sequence_length")
    asked = kwargs.get("max_sequence_length") or (default.default if default is not None else None)
    found = []
    for suffix in ("", "_2", "_3", "_4"):
        tokenizer, encoder = (getattr(pipe, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        own = getattr(tokenizer, "model_max_length", None)
        limit = own if "CLIP" in type(encoder).__name__ else asked or own
        if isinstance(limit, int) and limit < 100_000:  # tokenizers without a limit say 1e30
            found.append((tokenizer, limit))
    return found


def fit_to(pipe: Any, kwargs: dict[str, Any]) -> Callable[[str], str]:
    """A function that cuts a prompt so that at least one of the encoders holds all of it: at the last clause boundary that fits, or,
    where that would give away more than a quarter of what fits, at the last word. Where a long encoder stands beside CLIP, as in
    FLUX, CLIP's part is a summary and may be cut."""
    limits = token_limits(pipe, kwargs)

    def fits(text: str) -> bool:
        return not limits or any(len(tokenizer(text, verbose=False).input_ids) <= limit for tokenizer, limit in limits)

    def last_fitting(prompt: str, ends: Sequence[int]) -> str:
        low, high = 0, len(ends)  # the first `low` ends fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(prompt[: ends[middle - 1]]) else (low, middle - 1)
        return prompt[: ends[low - 1]].rstrip() if low else ""

    def fit(prompt: str) -> str:
        if fits(prompt):
            return prompt
        words = last_fitting(prompt, [m.start() for m in re.finditer(r"\s", prompt)]) or last_fitting(
            prompt, range(len(prompt))
        )
        clauses = last_fitting(prompt, [m.start() for m in _BOUNDARY.finditer(prompt)])
        return (clauses if len(clauses) >= KEPT * len(words) else words) or prompt  # prompt: not even one character fits

    return fit
