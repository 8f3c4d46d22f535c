"""The swap: a module of the pipeline is fed other conditioning than the pipeline passes to it.

Replaced are the very tensors that the pipeline passed in its first step, wherever they come again, and only the rows of samples whose
prompt changed. Tensors that a user's callback has put in their place, or written into, are left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

# What denoisers and control nets call what they are fed of the prompt. Bound by name, since some pipelines pass by position.
NAMES = (
    "encoder_hidden_states",  # the main one
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "encoder_hidden_states_2",
    "encoder_attention_mask_2",
    "pooled_projections",
    "txt_ids",
    "added_cond_kwargs",
)
Path = tuple[str, ...]
Slots = dict[Path, Tensor]  # path into a module's keyword arguments -> what is passed there


def slots_of(named: dict[str, Any]) -> Slots:
    """The conditioning among a module's arguments, flattened: {("added_cond_kwargs", "text_embeds"): tensor, ...}"""
    slots: Slots = {}
    for name in NAMES:
        value = named.get(name)
        if isinstance(value, dict):
            slots |= {(name, key): v for key, v in value.items() if isinstance(v, Tensor)}
        elif isinstance(value, Tensor):
            slots[name,] = value
    return slots


class Conditioning:
    """What one module is fed of the prompts of one run."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.original = slots_of(named)
        self._versions = {path: _version(tensor) for path, tensor in self.original.items()}
        self._current: Slots | None = None
        self._previous: Slots | None = None
        self._identical: set[Path] = set()  # found as the very object in this step

    @property
    def has_prompt(self) -> bool:
        return (NAMES[0],) in self.original

    def begin_turn(self) -> None:
        self._previous = self._current

    def update(self, new: Slots, samples: int, changed: Collection[int]) -> None:
        """Takes the rows of the changed samples from `new`. Rows are (groups x samples): [negative..., positive...].

        Raises ValueError where lengths differ and not all samples can be taken from `new`.
        """
        current = dict(self._current or self.original)
        for path, tensor in new.items():
            if path in current:
                current[path] = _rows(current[path], tensor, samples, changed)
        self._current = current

    def take_back(self) -> None:
        """The last turn did not come to anything."""
        self._current = self._previous

    def begin_step(self) -> None:
        self._identical = set()

    def swap(self, named: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The arguments to go on with, and whether the swap is felt. Where the main one is not the pipeline's own, as in a call for
        the negative prompt alone, nothing is replaced: embeddings of two prompts are never mixed."""
        if self._current is None:
            return named, True
        out = dict(named)
        for path, original in self.original.items():
            owner = out.get(path[0]) if len(path) > 1 else out
            given = owner.get(path[-1]) if isinstance(owner, dict) else None
            replacement = self._counterpart(path, given, original) if isinstance(given, Tensor) else None
            if replacement is not None:
                out[path[0]] = replacement if len(path) == 1 else dict(out[path[0]]) | {path[-1]: replacement}
            elif path[0] == NAMES[0]:
                return named, False
        return out, True

    def _counterpart(self, path: Path, given: Tensor, original: Tensor) -> Tensor | None:
        """What replaces `given`: all, or the positive half where only that is passed (guidance switched off midway, skip-layer
        guidance, guess mode); None where it is something else, or was written into."""
        assert self._current is not None
        current = self._current[path]
        if _version(original) != self._versions[path]:
            return None
        if given is original:
            self._identical.add(path)
            return current
        if given.shape == original.shape:  # made anew in each step by a cast; not a negative prompt that happens to be equal
            return current if path not in self._identical and torch.equal(given, original) else None
        half = original.shape[0] // 2
        if given.shape[1:] == original.shape[1:] and given.shape[0] == half and torch.equal(given, original[half:].to(given)):
            return current[current.shape[0] // 2 :].to(given)
        return None


def _version(tensor: Tensor) -> int:
    """Counts the writes into a tensor."""
    return 0 if tensor.is_inference() else tensor._version


def _rows(old: Tensor, new: Tensor, samples: int, changed: Collection[int]) -> Tensor:
    if old.shape == new.shape and old.shape[0] % samples == 0:
        result = old.clone()
        for row in range(old.shape[0]):
            if row % samples in changed:
                result[row] = new[row].to(result)
        return result
    if old.shape == new.shape or len(changed) == samples:
        return new  # FLUX's text_ids have no batch
    raise ValueError(
        f"the new prompt's conditioning has shape {tuple(new.shape)} instead of {tuple(old.shape)}, which cannot be mixed in one batch"
    )
