"""Rows of a batch that are equal to the bit are computed once.

The trajectories of a group start from the same noise and the same prompt: until their first differing turn, all of their rows
are equal, and stay so for as long as a refiner keeps their prompts. Equality is read off the tensors, so nothing has to know
why rows are equal, and results are the module's own, on a batch of the rows that differ.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MODULES = ("unet", "transformer", "controlnet", "text_encoder", "text_encoder_2", "text_encoder_3")
_NOT_ROWS = ("txt_ids", "img_ids")  # positions; their first side is no batch


@contextmanager
def equal_rows_once(pipe: Any) -> Iterator[dict[str, list[int]]]:
    """While it is open, the pipeline's denoisers and text encoders compute equal rows once. Yields {module: [rows asked,
    computed]}."""
    counts: dict[str, list[int]] = {}
    with ExitStack() as stack:
        for name in MODULES:
            if isinstance(module := getattr(pipe, name, None), nn.Module):
                counts[name] = [0, 0]
                stack.enter_context(_shared(module, counts[name]))
        if isinstance(decoder := getattr(getattr(pipe, "vae", None), "decoder", None), nn.Module):
            counts["vae"] = [0, 0]
            stack.enter_context(_shared(decoder, counts["vae"]))
        yield counts


@contextmanager
def _shared(module: nn.Module, count: list[int]) -> Iterator[None]:
    forward, previous = module.forward, vars(module).get("forward")  # a host's hook may have put one on the instance

    @functools.wraps(forward)  # pipelines read the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        size = _batch(args, kwargs)
        first = _first_of_each(args, kwargs, size) if size > 1 else []
        kept = sorted(set(first))
        count[0] += max(size, 1)
        count[1] += len(kept) or max(size, 1)
        if not kept or len(kept) == size:
            return forward(*args, **kwargs)
        rows = torch.tensor(kept)
        out = forward(*_rows(args, rows, size), **_rows(kwargs, rows, size))
        place = {row: k for k, row in enumerate(kept)}
        return _rows(out, torch.tensor([place[row] for row in first]), len(kept))

    module.forward = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        if previous is None:
            del module.forward  # the class's own is there again
        else:
            module.forward = previous  # type: ignore[method-assign]


def _batch(args: Any, kwargs: Any) -> int:
    """The first side of the first tensor that has sides: the sample, hidden states or token ids; 0 where there is none."""
    return next((t.shape[0] for _, t in _tensors([*args, *kwargs.values()]) if t.dim() > 1), 0)


def _first_of_each(args: Any, kwargs: Any, size: int) -> list[int]:
    """For each row the first one that is equal to it in all tensors."""
    columns = [t for name, t in _tensors((list(args), kwargs)) if t.dim() and t.shape[0] == size and name not in _NOT_ROWS]
    rows = [b""] * size
    for t in columns:
        data = t.detach().reshape(size, -1).contiguous().view(torch.uint8).cpu().numpy()
        rows = [key + hashed(row) for key, row in zip(rows, data, strict=True)]
    seen: dict[bytes, int] = {}
    return [seen.setdefault(key, i) for i, key in enumerate(rows)]


def hashed(row: Any) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, name)


def _rows(value: Any, rows: Tensor, size: int, name: str = "") -> Any:
    """The same structure with those rows of each tensor that has one for each of the batch."""
    if isinstance(value, Tensor):
        if not value.dim() or value.shape[0] != size or name in _NOT_ROWS:
            return value
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, dict):
        items = {key: _rows(item, rows, size, str(key)) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)  # a ModelOutput
    if isinstance(value, (list, tuple)):
        parts = [_rows(item, rows, size, name) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
