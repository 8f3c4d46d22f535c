"""Rows of a batch that are equal to the bit are computed once.

The trajectories of a group start from the same noise and the same prompt: until their first differing turn, all of their rows
are equal, and stay so for as long as a refiner keeps their prompts. Equality is read off the tensors, so nothing has to know
why rows are equal, and results are the module's own, on a batch of the rows that differ.

Which tensors have one row for each of the batch is known by their names alone: a first side that equals the batch may be there
by chance (positions, a scale for each layer). A call with anything else in it is computed as it stands.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

MODULES = ("unet", "transformer", "controlnet", "text_encoder", "text_encoder_2", "text_encoder_3")
MAIN = ("sample", "hidden_states", "input_ids", "x", "z")  # what a module calls the batch that it works on
ROWS = frozenset(
    (
        *MAIN, "attention_mask", "timestep", "timestep_cond", "class_labels", "guidance", "encoder_hidden_states",
        "encoder_hidden_states_2", "encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_mask",
        "pooled_projections", "text_embeds", "time_ids", "image_embeds", "ip_adapter_image_embeds", "controlnet_cond",
        "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
        "controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states", "latent_embeds",
    )
)  # fmt: skip
POSITIONS = frozenset(("txt_ids", "img_ids"))  # the same for all rows
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class _Unclear(Exception):
    """Something of which it is not known whether it has a row for each of the batch."""


@contextmanager
def equal_rows_once(pipe: Any) -> Iterator[dict[str, list[int]]]:
    """While it is open, the pipeline's denoisers, text encoders and VAE decoder compute equal rows once. Yields {module: [rows
    asked, computed]}. Modules in training mode, whose dropout draws for each row, are left alone."""
    counts: dict[str, list[int]] = {}
    with ExitStack() as stack:
        modules = {name: getattr(pipe, name, None) for name in MODULES} | {
            "vae": getattr(getattr(pipe, "vae", None), "decoder", None)
        }
        for name, module in modules.items():
            if isinstance(module, nn.Module):
                counts[name] = [0, 0]
                stack.enter_context(_shared(module, counts[name]))
        yield counts


@contextmanager
def _shared(module: nn.Module, count: list[int]) -> Iterator[None]:
    forward, previous = module.forward, vars(module).get("forward")  # a host's hook may have put one on the instance
    names = list(inspect.signature(forward).parameters)
    here = True

    @functools.wraps(forward)  # pipelines read the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args)) | kwargs
        size = next((len(named[n]) for n in MAIN if isinstance(named.get(n), Tensor) and named[n].dim() > 1), 1)
        first = list(range(size))
        if here and size > 1 and len(args) <= len(names) and not module.training:
            with suppress(_Unclear):
                first = _first_of_each(named, size)
        kept = sorted(set(first))
        out = None
        if len(kept) < size:
            try:
                place = {row: k for k, row in enumerate(kept)}
                some = forward(**_map(named, lambda t, name: t[kept] if name in ROWS and t.dim() and t.shape[0] == size else t))
                out = _map(some, lambda t, name: _expanded(t, [place[row] for row in first], len(kept)))
            except _Unclear:
                kept = list(range(size))
        if here:
            count[0] += size
            count[1] += len(kept)
        return forward(*args, **kwargs) if out is None else out

    module.forward = once
    try:
        yield
    finally:
        here = False  # somebody may have hooked it meanwhile, and hold on to it
        if vars(module).get("forward") is once:
            if previous is None:
                del module.forward  # the class's own is there again
            else:
                module.forward = previous


def _first_of_each(named: dict[str, Any], size: int) -> list[int]:
    """For each row the first one that is equal to it in all tensors. Raises _Unclear."""
    rows = [b""] * size

    def read(t: Tensor, name: str) -> Tensor:
        if t.dim() == 0 or t.shape[0] == 1 or name in POSITIONS:
            return t
        if name not in ROWS or t.shape[0] != size:
            raise _Unclear
        data = t.detach().reshape(size, -1).contiguous().view(torch.uint8).cpu().numpy()
        rows[:] = [key + hashlib.blake2b(row.tobytes(), digest_size=16).digest() for key, row in zip(rows, data, strict=True)]
        return t

    _map(named, read)
    seen: dict[bytes, int] = {}
    return [seen.setdefault(key, i) for i, key in enumerate(rows)]


def _expanded(t: Tensor, place: list[int], size: int) -> Tensor:
    if t.dim() == 0 or t.shape[0] != size:
        raise _Unclear
    return t[place]


def _map(value: Any, function: Any, name: str = "") -> Any:
    """The same structure with function(tensor, its name) for each tensor. Raises _Unclear for what it cannot look into."""
    if isinstance(value, Tensor):
        return function(value, name)
    if isinstance(value, dict):
        items = {key: _map(item, function, str(key)) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)  # a ModelOutput
    if isinstance(value, (list, tuple)):
        parts = [_map(item, function, name) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, _PLAIN):
        return value
    raise _Unclear
