"""What an evaluation says beside its scores: how far prompts drift from what was asked for, how much pictures and prompts differ from
each other, how long prompts grow, and what the refiner costs. Plain functions on recorded trajectories.

A figure is {"mean", "low", "high", "n"}: the mean of n values with a 95% interval, JSON values only. Values of one request, as several
seeds give them, are not independent: the interval is a percentile bootstrap over requests. Mean None: there is nothing to average;
low and high None: fewer than two requests.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..trajectory import Trajectory, Turn
from .memory import peak_memory
from .words import lexical_recall, prompt_self_similarity, words

__all__ = [
    "TextEncoder", "arm_measures", "cost", "embedding_similarity", "figure", "image_diversity", "lexical_recall", "over_turns",
    "peak_memory", "prompt_self_similarity", "text_encoder_of", "token_recall",
]  # fmt: skip

Encode = Callable[[list[Any]], Any]  # N texts or pictures -> an array or tensor (N, D)
States = Callable[[list[str]], Sequence[Any]]  # N texts -> N arrays or tensors (tokens, D)
PARTS = ("preview", "refiner", "encode")
SIDE = 64  # pixels at which pictures are compared
RESAMPLES = 2000


def figure(values: Sequence[float | None], groups: Sequence[Hashable] | None = None) -> dict[str, float | int | None]:
    """The mean of the values that are numbers, with its interval; groups: what each value belongs to (default: each to itself)."""
    kept = [(x, k if groups is None else groups[k]) for k, x in enumerate(values) if x is not None and math.isfinite(x)]
    if not kept:
        return {"mean": None, "low": None, "high": None, "n": 0}
    sums: dict[Hashable, list[float]] = {}
    for x, group in kept:
        sums.setdefault(group, []).append(x)
    total, count = (np.array([f(v) for v in sums.values()], float) for f in (math.fsum, len))
    low = high = None
    if len(sums) > 1:
        rng = np.random.default_rng(0)
        drawn = (rng.integers(0, len(sums), (RESAMPLES // 10, len(sums))) for _ in range(10))  # in parts, to need little memory
        means = np.concatenate([total[rows].sum(1) / count[rows].sum(1) for rows in drawn])
        low, high = (float(q) for q in np.percentile(means, (2.5, 97.5)))
    return {"mean": float(total.sum() / count.sum()), "low": low, "high": high, "n": len(kept)}


def over_turns(
    trajectories: Sequence[Trajectory], value: Callable[[Trajectory, str], float | None]
) -> list[dict[str, float | int | None]]:
    """`value(trajectory, prompt)` of the prompt in use after each turn, averaged: {"turn", "reached", "mean", "low", "high", "n"} by
    number of the turn; turn 0 is the request itself. A trajectory with fewer turns keeps its last prompt, so that all means are of
    the same trajectories; "reached": how many have that turn."""
    found = []
    groups = [t.request for t in trajectories]
    for k in range(max((len(t.turns) for t in trajectories), default=0) + 1):
        values = [value(t, t.turns[min(k, len(t.turns)) - 1].after if k and t.turns else t.request) for t in trajectories]
        found.append({"turn": k, "reached": sum(len(t.turns) >= k for t in trajectories), **figure(values, groups)})
    return found


# --- drift: how much of the request survives (`lexical_recall`: without a model) ------------------------------------------


class TextEncoder:
    """A pipeline's own CLIP text encoder, as something that compares texts; see `text_encoder_of`.

    window: the most tokens that it reads, its two marks included; what is beyond does not count in any figure. `cut(text)`: whether
    there is something beyond.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        config = getattr(model.config, "text_config", model.config)
        self.window: int = min(config.max_position_embeddings, tokenizer.model_max_length)

    def __call__(self, texts: Sequence[str]) -> Any:
        """(N, D), float32 on the CPU: the projected embedding where the encoder has one (as in SDXL's second and SD3's), else the
        state of the end mark (SD 1.5, FLUX)."""
        import torch

        rows = [torch.zeros(0, self.model.config.hidden_size)]
        for out, _ in self._run(texts):
            pooled = getattr(out, "text_embeds", None)
            rows.append((out.pooler_output if pooled is None else pooled).float().cpu())
        return torch.cat(rows[1:] or rows)

    def tokens(self, texts: Sequence[str]) -> list[Any]:
        """N times (tokens, D), float32 on the CPU: the last states of a text's own tokens, without the marks around it."""
        return [
            states[1 : length - 1].float().cpu()
            for out, lengths in self._run(texts)
            for states, length in zip(out.last_hidden_state, lengths)
        ]

    def cut(self, text: str) -> bool:
        return len(self.tokenizer(text, verbose=False).input_ids) > self.window

    def _run(self, texts: Sequence[str]) -> Any:
        import torch

        hooks = [m._hf_hook for m in self.model.modules() if hasattr(m, "_hf_hook")]  # of an offloaded model
        where = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), self.model.device)
        for k in range(0, len(texts), self.batch_size):
            part = list(texts[k : k + self.batch_size])
            read = self.tokenizer(part, padding=True, truncation=True, max_length=self.window, return_tensors="pt")
            with torch.no_grad():
                out = self.model(read.input_ids.to(where))  # no mask: it looks to the left only, and padding is on the right
            yield out, read.attention_mask.sum(1).tolist()


def text_encoder_of(pipe: Any, batch_size: int = 32) -> TextEncoder | None:
    """The CLIP text encoder that a diffusers pipeline brings, on its device: one with a projection if there is one. None without one
    (T5 and language models have no embedding of a whole text).

    It reads as many tokens as its window holds, 77 for published ones. Embeddings of the end mark without projection are all rather
    alike: compare arms by them, and make nothing of their absolute height.
    """
    found = []
    for suffix in ("", "_2", "_3"):
        model, tokenizer = (getattr(pipe, name + suffix, None) for name in ("text_encoder", "tokenizer"))
        if model is not None and tokenizer is not None and type(model).__name__.startswith("CLIPText"):
            found.append((type(model).__name__ != "CLIPTextModelWithProjection", suffix, model, tokenizer))
    if not found:
        return None
    *_, model, tokenizer = min(found, key=lambda row: row[:2])
    return TextEncoder(model, tokenizer, batch_size)


def embedding_similarity(requests: Sequence[str], prompts: Sequence[str], encode: Encode) -> list[float | None]:
    """The cosine between each request and its prompt, -1 to 1. None where either is empty, or an embedding is no direction.

    encode: a `TextEncoder`, a sentence encoder's `encode`, ... Each text is encoded once. Raises ValueError for what does not fit.
    """
    _same_length(requests, prompts)
    different = [t for t in dict.fromkeys([*requests, *prompts]) if t.strip()]
    row = {t: v for t, v in zip(different, _directions(encode, different))} if different else {}
    return [_number(row[r] @ row[p]) if r in row and p in row else None for r, p in zip(requests, prompts)]


def token_recall(requests: Sequence[str], prompts: Sequence[str], states: States) -> list[float | None]:
    """For each token of the request the cosine with the most similar token of the prompt, averaged: BERTScore's recall (arXiv
    1904.09675, eq. 2; request = reference, prompt = candidate) without idf weights and rescaling, -1 to 1. None where either has no
    token.

    states: `TextEncoder.tokens`, or any encoder's last states. PromptLoop reports this recall on BERTScore's own RoBERTa; figures on
    another encoder are not comparable with it. CLIP's tokens know only what stands before them.
    """
    _same_length(requests, prompts)
    different = [t for t in dict.fromkeys([*requests, *prompts]) if t.strip()]
    row = {t: _units(_array(s)) for t, s in zip(different, states(different), strict=True)} if different else {}
    pairs = [(row.get(r), row.get(p)) for r, p in zip(requests, prompts)]
    return [None if a is None or b is None or not len(a) or not len(b) else _number((a @ b.T).max(1).mean()) for a, b in pairs]


# --- diversity ----------------------------------------------------------------------------------------------------------


def image_diversity(images: Sequence[Any], encode: Encode | None = None) -> float | None:
    """The mean distance between any two pictures of one request, 0 for pictures that are all the same. None for fewer than two.

    encode: embeddings of pictures, say `functools.partial(rewards.clip.see, model)`; then the distance is 1 - cosine, 0 to 2.
    Without: the root mean square difference of RGB values at 64 x 64 pixels, 0 to 1 (black against white). That needs no model but
    sees pixels, not what they show: a subject that has moved counts as much as another one.
    """
    from PIL.Image import Resampling

    from ..rewards.images import as_rgb

    pictures = [as_rgb(image) for image in images if image is not None]
    if len(pictures) < 2:
        return None
    if encode is not None:
        x = _directions(encode, pictures)
        rows = [1 - x[k + 1 :] @ x[k] for k in range(len(x) - 1)]
    else:
        small = (p.resize((SIDE, SIDE), Resampling.BOX) for p in pictures)
        x = np.stack([np.asarray(p, np.float64).ravel() / 255 for p in small])
        rows = [np.sqrt(np.square(x[k + 1 :] - x[k]).mean(1)) for k in range(len(x) - 1)]
    return _number(np.concatenate(rows).mean())


# --- cost ---------------------------------------------------------------------------------------------------------------


def cost(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """What an arm's looks cost.

    "by_turn": of the first, second, ... look: mean seconds by part, and the most memory that the refiner needed in it, by
    device, where `meta["memory_by_turn"]` tells. "parts": for preview, refiner and encode {"per_look", "n", "per_image",
    "share"}: mean seconds of one look at a whole batch and the number of such looks, seconds for each picture, and the share of
    the run's time (`meta["seconds"]`, None where a run lacks it; a refiner that works beside the run takes a share that nobody
    waits for). Samples of a batch record the same look, to the last digit of its seconds, which is how it is counted once.
    "tokens": of the refiner's answer, by turn, where it counts them. "failures": turns that failed, by boundary.
    """
    looks: dict[tuple[Any, ...], dict[str, float]] = {}
    turns = [turn for t in trajectories for turn in t.turns]
    for turn in turns:
        asked = {k: v for k, v in turn.seconds.items() if k != "encode"}  # only samples that changed record the encoding
        look = looks.setdefault((turn.step, turn.num_steps, *sorted(asked.items())), {})
        look |= turn.seconds
    runs = [s for t in trajectories if isinstance(s := t.meta.get("seconds"), (int, float))]
    whole = math.fsum(runs) if runs and len(runs) == len(trajectories) else None
    names = [*PARTS, *sorted({part for look in looks.values() for part in look} - {*PARTS})]
    parts = {}
    for name in names:
        seconds = [look[name] for look in looks.values() if name in look]
        total = math.fsum(seconds)
        if seconds:
            parts[name] = {
                "per_look": total / len(seconds), "n": len(seconds), "per_image": total / len(trajectories),
                "share": total / whole if whole else None,
            }  # fmt: skip
    failed = Counter(turn.boundary or "unknown" for turn in turns if turn.error is not None)
    return {
        "seconds_per_image": whole / len(trajectories) if whole is not None else None,
        "parts": parts,
        "by_turn": _by_turn(trajectories),
        "tokens": figure(*_by_request(trajectories, lambda turn: turn.tokens)),
        "turns": len(turns),
        "changed": sum(turn.changed for turn in turns),
        "failures": dict(sorted(failed.items())),
    }


def _by_turn(trajectories: Sequence[Trajectory]) -> list[dict[str, Any]]:
    found = []
    for k in range(max((len(t.turns) for t in trajectories), default=0)):
        seconds = [t.turns[k].seconds for t in trajectories if len(t.turns) > k]
        parts = {name: [s[name] for s in seconds if name in s] for name in dict.fromkeys(name for s in seconds for name in s)}
        peaks = [
            {name: value for name, value in row.items() if name != "step"}
            for t in trajectories
            if len(t.turns) > k
            for row in t.meta.get("memory_by_turn", ())
            if row["step"] == t.turns[k].step
        ]
        found.append({
            "turn": k + 1,
            "seconds": {name: math.fsum(values) / len(values) for name, values in parts.items()},
            "memory": {name: max(p[name] for p in peaks if name in p) for name in dict.fromkeys(name for p in peaks for name in p)},
        })  # fmt: skip
    return found


# --- all of it ------------------------------------------------------------------------------------------------------------


def arm_measures(
    trajectories: Sequence[Trajectory], *,
    encoder: TextEncoder | None = None, see: Encode | None = None, tokenizer: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """The measures of one arm, JSON values only.

    encoder: what `text_encoder_of(pipe)` gives, for drift by embeddings too. see: embeddings of pictures, for diversity (default: by
    pixels). tokenizer: a pipeline's own (default: the encoder's), for lengths in tokens, without the marks that it adds.

    "drift": "recall", "embedding" and "tokens" (None without an encoder) are figures of the last prompts, "recall_by_turn" of those
    after each turn; "cut": how many requests and last prompts reach beyond the encoder's window. "diversity": "pictures", the figure
    over requests with several pictures; "by", the measure; "prompts" and "requests", their self-similarity. "length": "words" and
    "tokens" by turn. "cost": as `cost` gives it.
    """
    asked, last = [t.request for t in trajectories], [t.prompt for t in trajectories]
    groups: dict[str, list[Any]] = {}
    for t in trajectories:
        groups.setdefault(t.request, []).append(t.image)
    tokenizer = tokenizer or getattr(encoder, "tokenizer", None)
    return {
        "n": len(trajectories),
        "drift": {
            "recall": figure([lexical_recall(r, p) for r, p in zip(asked, last)], asked),
            "recall_by_turn": over_turns(trajectories, lambda t, prompt: lexical_recall(t.request, prompt)),
            "embedding": figure(embedding_similarity(asked, last, encoder), asked) if encoder else None,
            "tokens": figure(token_recall(asked, last, encoder.tokens), asked) if encoder else None,
            "cut": {"requests": sum(map(encoder.cut, asked)), "prompts": sum(map(encoder.cut, last))} if encoder else None,
        },
        "diversity": {
            "pictures": figure([image_diversity(pictures, see) for pictures in groups.values()]),
            "by": "pixels" if see is None else "embeddings",
            "prompts": prompt_self_similarity(last, asked),
            "requests": prompt_self_similarity(asked, asked),
        },
        "length": {
            "words": over_turns(trajectories, lambda t, prompt: len(words(prompt))),
            "tokens": over_turns(trajectories, lambda t, prompt: _count(tokenizer, prompt)) if tokenizer else None,
        },
        "cost": cost(trajectories),
    }


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _by_request(
    trajectories: Sequence[Trajectory], value: Callable[[Turn], float | None]
) -> tuple[list[float | None], list[str]]:
    pairs = [(value(turn), t.request) for t in trajectories for turn in t.turns]
    return [v for v, _ in pairs], [r for _, r in pairs]


def _same_length(requests: Sequence[str], prompts: Sequence[str]) -> None:
    if isinstance(requests, str) or isinstance(prompts, str) or len(requests) != len(prompts):
        raise ValueError(f"{len(requests)} requests and {len(prompts)} prompts; give lists with one prompt for each request")


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu()
    return np.asarray(values, np.float64)


def _directions(encode: Encode, things: list[Any]) -> np.ndarray:
    """(N, D), each of length one; nan where there is no direction."""
    x = _array(encode(things))
    if x.ndim != 2 or len(x) != len(things):
        raise ValueError(
            f"encode gave an array of shape {x.shape} for {len(things)} items; it must give ({len(things)}, width)"
        )
    return _units(x)


def _units(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _number(value: ArrayLike) -> float | None:
    return float(value) if math.isfinite(value) else None  # type: ignore[arg-type]
