"""Rewards that look at no picture: whether the refined prompt has a fitting length, and whether the refiner's answer had its form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Length:
    """1 where the refined prompt has from `least` to `most` words, else `miss`. None where there is no refined prompt.

    It needs `refined=`: the prompts that the pictures were made with, one for each. The defaults are RePrompt's (arXiv 2505.17540:
    more than 15 and fewer than 77 words; with miss=-1 it is theirs to the number). tokenizer: a folder or hub id: counts its tokens
    instead of words, without those that it adds itself, for encoders that cut at 77.
    """

    needs = ("refined",)

    def __init__(
        self, least: int = 16, most: int = 76, *, miss: float = 0.0, tokenizer: str | Path | None = None, name: str = "length"
    ) -> None:
        if not 0 <= least <= most:
            raise ValueError(f"length from {least} to {most}: give 0 <= least <= most")
        self.name, self.least, self.most, self.miss = name, least, most, miss
        self._tokenizer = None if tokenizer is None else _load(tokenizer)

    def count(self, text: str) -> int:
        if self._tokenizer is None:
            return len(text.split())
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        refined = needed(self.name, context, "refined", len(images))
        return [None if r is None else 1.0 if self.least <= self.count(r) <= self.most else self.miss for r in refined]


class Format:
    """1 where the refiner's answer had the form that was asked for, else `miss`. None where no form was asked for.

    It needs `format_ok=`: True, False or None for each picture, or the share of its turns that kept the form. {0, 1} is PromptRL's
    (arXiv 2602.01382), miss=-1 RePrompt's.
    """

    needs = ("format_ok",)

    def __init__(self, miss: float = 0.0, *, name: str = "format") -> None:
        self.name, self.miss = name, miss

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        shares = needed(self.name, context, "format_ok", len(images))
        return [None if s is None else self.miss + (1 - self.miss) * float(s) for s in shares]


def needed(name: str, context: dict[str, Any], key: str, n: int) -> Sequence[Any]:
    """`context[key]`, one for each picture. Raises ValueError saying what is missing."""
    values = context.get(key)
    if values is None or isinstance(values, str):
        raise ValueError(f"the reward {name} needs {key}=, a list with one value for each picture")
    if len(values) != n:
        raise ValueError(f"the reward {name} got {len(values)} values of {key} for {n} pictures; give one for each")
    return values


def _load(tokenizer: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except Exception as e:  # the libraries below agree on no kind of error
        reason = next(iter(str(e).splitlines()), type(e).__name__)[:200]
        raise OSError(f"cannot load the tokenizer {str(tokenizer)!r}; give a folder or hub id ({reason})") from e
