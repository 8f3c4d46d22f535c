"""The swap of text in a ComfyUI conditioning: everything that other nodes have hung on it stays.

Each sample of a batch may have a prompt of its own. Where the prompts' encodings are of the same shapes, they become the rows of one
entry. Where they are not (texts of other lengths, an encoder that splits a text by time), each prompt gets an entry of its own with a
mask that is 1 for its samples and 0 for the others: exact too, but each entry is computed for the whole batch. Repeating the shorter
text, as ComfyUI does with CLIP's windows, would change it in models whose text and picture share one attention (SD3, FLUX).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Cond = dict[str, Any]
"""One entry, as `comfy.sampler_helpers.convert_cond` makes it."""
_TEXT = {"cross_attn", "model_conds", "uuid", "clip_start_percent", "clip_end_percent"}


def rewritten(
    positive: Sequence[Cond], targets: Sequence[int], prompts: Sequence[str], request: str,
    encode: Callable[[str], list[Cond]], shape: Sequence[int],
) -> list[Cond]:  # fmt: skip
    """The positive conditioning with other text in its targets. A sample whose prompt is the request has what it had.

    prompts: one for each sample. shape: of the noise, [samples, channels, ...]. Raises ValueError where unlike prompts do not go with
    what hangs on an entry.
    """
    if all(p == request for p in prompts):
        return list(positive)
    same = all(p == prompts[0] for p in prompts)
    texts = {p: encode(p) for p in dict.fromkeys(prompts) if same or p != request}
    names = _TEXT | {name for news in texts.values() for new in news for name in new}
    found: list[Cond] = []
    done: list[Cond] = []
    for k, old in enumerate(positive):
        if k not in targets:
            found.append(old)
            continue
        rest, split = _part(old, names, False), "clip_start_percent" in old
        if split and any(_same(rest, other) for other in done):
            continue  # the parts of one text that its encoder splits by time: they are all in `news`
        done.append(rest)
        whole = [positive[j] for j in targets if _same(_part(positive[j], names, False), rest)] if split else [old]
        parts = [_part(part, names, True) for part in whole]
        news = texts[prompts[0]] if same else _of_each(prompts, texts, parts, rest, shape)
        found += [{**{n: v for n, v in new.items() if n not in rest}, **rest, "model_conds": {}} for new in news]
    return found


def _part(cond: Cond, names: set[str], text: bool) -> Cond:
    """What of an entry is its text, or what is not."""
    return {name: value for name, value in cond.items() if (name in names and name != "hooks") == text}


def _of_each(
    prompts: Sequence[str], texts: dict[str, list[Cond]], old: list[Cond], rest: Cond, shape: Sequence[int]
) -> list[Cond]:
    """The entries' texts where the samples' prompts are not all the same. old: the text of the request, in the parts that its
    encoder splits it into by time."""
    each = [texts.get(p) or [{name: _row(v, i) for name, v in part.items()} for part in old] for i, p in enumerate(prompts)]
    rows = batched(each)
    if rows is not None:
        return rows
    if hung := {"mask", "area", "gligen"} & set(rest):
        raise ValueError(
            f"the prompts of this batch are encoded in unlike lengths, which does not go with a conditioning that has its own "
            f"{sorted(hung)[0]}; use a batch size of 1"
        )
    return [
        new | {"mask": _mask([q == p for q in prompts], shape)} for p in dict.fromkeys(prompts) for new in texts.get(p) or old
    ]


def _mask(samples: Sequence[bool], shape: Sequence[int]) -> Any:
    """[samples, ...]: 1 for these, 0 for the others."""
    import torch

    return torch.tensor(samples, dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 2)).repeat(1, *shape[2:])


def _row(value: Any, row: int) -> Any:
    """Of a conditioning that has one for each sample; ComfyUI begins anew where there are fewer."""
    rows = getattr(value, "shape", (0,))
    return value[row % rows[0]][None] if len(rows) > 1 and rows[0] > 1 else value


def batched(samples: Sequence[list[Cond]]) -> list[Cond] | None:
    """One conditioning with a row for each sample, from those of the samples; None where they do not go together."""
    import torch

    if len({len(s) for s in samples}) > 1:
        return None
    found = []
    for parts in zip(*samples, strict=True):
        entry = dict(parts[0])
        for name in {name for part in parts for name in part} - {"uuid", "model_conds"}:
            values = [part.get(name) for part in parts]
            if all(isinstance(v, torch.Tensor) and v.ndim > 1 for v in values):
                if len({v.shape[1:] for v in values}) > 1:
                    return None
                entry[name] = torch.cat([v[:1] for v in values])
            elif not all(equal(v, values[0]) for v in values):
                return None
        found.append(entry)
    return found


def equal(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a.cpu(), b.cpu()))
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)


def _same(a: Cond, b: Cond) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] or (isinstance(a[k], (int, float, str)) and a[k] == b[k]) for k in a)
