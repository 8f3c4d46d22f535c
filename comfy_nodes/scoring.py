"""Pictures scored by several rewards, for nodes: what was paid for is never lost to a reward that fails. Nothing here needs ComfyUI."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptloop_pipeline.reward import Judgement, ask_each
from promptloop_pipeline.rewards.combine import NAMED, RewardSpec, filled, parse_rewards, weighted_sum

AT_ONCE = 4  # pictures between two looks at whether the user has cancelled
TOGETHER = ("win-rate",)  # rewards that hold the pictures of a call against each other
_NEEDS = {  # what a picture and a prompt do not tell
    "geneval": "what should be there; use `promptloop eval --benchmark` with it",
    "geneval-strict": "what should be there; use `promptloop eval --benchmark` with it",
    "format": "a refiner's answer, which pictures do not hold",
    "length": "the prompt that the picture was made with; use `promptloop score` with --refined",
    "edit-reward": "the picture that was edited; use `promptloop score` with --source",
}
BLIND = ("aesthetic", "aesthetic-v1", "artifact")  # read no prompt
NAMES = tuple(n for n in NAMED if n not in _NEEDS)
_PUBLISHED = {  # reward, part -> how its publisher calls the file or folder
    ("image-reward", "model"): "ImageReward.pt", ("image-reward", "tokenizer"): "bert-base-uncased",
    ("hpsv2", "model"): "HPS_v2_compressed.pt", ("hpsv2", "tokenizer"): "CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("hpsv2.1", "model"): "HPS_v2.1_compressed.pt", ("hpsv2.1", "tokenizer"): "CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("pickscore", "model"): "PickScore_v1", ("pickscore", "tokenizer"): "CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("clip-score", "model"): "clip-vit-large-patch14",
    ("aesthetic", "model"): "aesthetic-model.pth", ("aesthetic", "clip"): "clip-vit-large-patch14",
    ("aesthetic-v1", "model"): "sa_0_4_vit_l_14_linear.pth", ("aesthetic-v1", "clip"): "clip-vit-large-patch14",
}  # fmt: skip
_lock = threading.Lock()


def read_rewards(text: str) -> list[RewardSpec]:
    """As `parse_rewards`. A workflow comes from anybody, so that code of one's own ("module:function") is not loaded by its name here.

    Raises ValueError, also for a reward that a picture and a prompt are not enough for, and where nothing would count.
    """
    if not text.strip():
        raise ValueError(f"no reward is named; give one or more of {', '.join(NAMES)}")
    specs = parse_rewards(text)
    for spec in specs:
        if spec.name not in NAMED:
            raise ValueError(f"the reward {spec.name!r} is code of your own, which nodes do not load; use {', '.join(NAMES)}")
        if spec.name in _NEEDS:
            raise ValueError(f"the reward {spec.name} needs to know {_NEEDS[spec.name]}")
    if all(s.held_out for s in specs):
        raise ValueError(f"all rewards of {text!r} have the weight 0, so there is no total; give one of them another weight")
    return specs


def for_each(prompts: Sequence[str], batches: Sequence[int]) -> list[str]:
    """One prompt for each picture, from one for all, one for each, or one for each batch. batches: how many pictures each holds.

    Raises ValueError for another number of prompts.
    """
    n = sum(batches)
    if len(prompts) == n:
        return list(prompts)
    if len(prompts) == 1:
        return list(prompts) * n
    if len(prompts) == len(batches):
        return [p for p, count in zip(prompts, batches, strict=True) for _ in range(count)]
    raise ValueError(f"there are {len(prompts)} prompts for {n} pictures; give one for all of them, or one for each")


def check_prompts(prompts: Sequence[str], specs: Sequence[RewardSpec]) -> None:
    """Raises ValueError for an empty prompt, unless no reward reads it."""
    readers = [s.name for s in specs if s.name not in BLIND]
    if readers and not all(p.strip() for p in prompts):
        raise ValueError(f"the prompt is empty, and {readers[0]} scores pictures against it; say what was asked for")


# --- loading ------------------------------------------------------------------------------------------------------------


def weights_of(text: str, specs: Sequence[RewardSpec], folders: Sequence[str | Path]) -> dict[str, dict[str, str]]:
    """Options of each reward: what `text` says (NAME[:PART]=PATH, one a line), else what lies in `folders` under its own name or its
    publisher's. A path in `text` may start in one of `folders`. Raises ValueError."""
    from promptloop_pipeline.cli.named import reward_options, takes

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = reward_options(lines, specs, "weights")
    for name, options in own.items():
        for part, value in options.items():
            options[part] = _in(folders, value) or value
        for part in ("model", "tokenizer", "clip"):
            known = [name if part == "model" else "", _PUBLISHED.get((name, part), "")]
            found = next((path for k in known if k and (path := _in(folders, k))), None)
            if found and part not in options and part in takes(name):
                options[part] = found
    return own


def _in(folders: Sequence[str | Path], name: str) -> str | None:
    return next((str(path) for folder in folders if (path := Path(folder) / name).exists()), None)


@contextmanager
def offline() -> Iterator[None]:
    """What is asked of the hub meanwhile comes from its cache, or not at all. The libraries read this switch at each request."""
    from huggingface_hub import constants

    with _lock:
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


def load(name: str, options: dict[str, str], device: str | None, allow_download: bool) -> Any:
    """A reward by name. Raises OSError, ValueError or ImportError that says what to do."""
    from contextlib import nullcontext

    from promptloop_pipeline.cli.named import load_named_reward

    with nullcontext() if allow_download else offline():
        try:
            return load_named_reward(name, dict(options), device=device, batch_size=AT_ONCE)
        except OSError as e:
            if allow_download:
                raise
            names = " or ".join(filter(None, (f"{name}/", _PUBLISHED.get((name, "model")))))
            raise OSError(
                f"its weights are not there: put {names} under models/rewards, write the path into weights, or allow the download ({e})"
            ) from e


def modules_of(found: Any, depth: int = 3) -> list[Any]:
    """The torch modules that a reward works with."""
    import torch

    if isinstance(found, torch.nn.Module):
        return [found]
    if depth == 0 or not type(found).__module__.startswith("promptloop_pipeline."):
        return []
    return [m for value in vars(found).values() for m in modules_of(value, depth - 1)]


# --- scoring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """raw: values by reward, one for each picture. errors: why a picture has none, by reward and picture. broken: rewards that gave no
    score for any picture, and why. totals: None where a reward that counts failed on that picture, or none applies."""

    specs: list[RewardSpec]
    raw: dict[str, list[float | None]]
    errors: dict[str, dict[int, str]]
    broken: dict[str, str]
    totals: list[float | None]


def score(
    specs: Sequence[RewardSpec],
    get: Callable[[str], Any],
    images: Sequence[Any],
    prompts: Sequence[str],
    groups: Sequence[Any] | None = None,
    on_picture: Callable[[int], None] = lambda done: None,
) -> Scores:
    """get: loads a reward by name; whatever it raises makes that reward a broken one.

    groups: which pictures are compared; default: those of one prompt. A reward that does not apply to some of a group counts there as
    the mean of the others. on_picture: called with the number of scores so far; may raise, to cancel.
    """
    raw: dict[str, list[float | None]] = {}
    errors: dict[str, dict[int, str]] = {}
    done = 0
    for spec in specs:
        judged: list[Judgement] = []
        try:
            reward = get(spec.name)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as e:
            judged = [Judgement(None, {"error": str(e) or type(e).__name__})] * len(images)
        step = len(images) if spec.name in TOGETHER else AT_ONCE
        while len(judged) < len(images):
            on_picture(done + len(judged))
            part = slice(len(judged), len(judged) + step)
            judged += ask_each(reward, images[part], prompts[part], spec.name)
        done += len(images)
        on_picture(done)
        raw[spec.name] = [j.score for j in judged]
        errors[spec.name] = {
            k: str(j.details["error"]) for k, j in enumerate(judged) if j.score is None and "error" in j.details
        }
    broken = {name: found[0] for name, found in errors.items() if images and len(found) == len(images)}
    used = [s for s in specs if s.name not in broken and not s.held_out]
    whole = {s.name: filled(raw[s.name], list(groups if groups is not None else prompts)) for s in used}
    totals = weighted_sum(whole, used) if used else [None] * len(images)
    lost = {k for s in used for k in errors[s.name]}
    return Scores(list(specs), raw, errors, broken, [None if k in lost else t for k, t in enumerate(totals)])


def best(totals: Sequence[float | None], count: int) -> list[int]:
    """The places of the highest totals, highest first; of equals, and of those without one, the first."""
    order = sorted(range(len(totals)), key=lambda k: (totals[k] is None, -(totals[k] or 0.0), k))
    return order[:count]


def gate(scores: Scores, shown: Sequence[tuple[int, int]], count: int) -> tuple[list[bool], list[str]]:
    """(for each of `count` samples whether its refined picture is kept, and that in words). shown: (0 refined or 1 untouched, sample)
    of each scored picture; a video's frames count as their mean. Nothing shows that refining did no harm where a reward fails.
    """
    from promptloop_pipeline.pipelines.gate import beats

    failed = {shown[k][1] for s in scores.specs if not s.held_out for k in scores.errors[s.name]}
    keep, lines = [], []
    for sample in range(count):
        means = [_mean([t for t, where in zip(scores.totals, shown) if where == (arm, sample)]) for arm in (0, 1)]
        keep.append(sample not in failed and beats(*means))
        why = "a reward failed" if sample in failed else f"refined {_shown(means[0])}, untouched {_shown(means[1])}"
        lines.append(f"picture {sample}: {why}; the {'refined' if keep[-1] else 'untouched'} one is kept")
    return keep, lines


def _mean(totals: Sequence[float | None]) -> float | None:
    values = [t for t in totals if t is not None]
    return sum(values) / len(values) if values and len(values) == len(totals) else None


def plain(total: float | None) -> float:
    """For ComfyUI's FLOAT, which knows no None: nan."""
    return math.nan if total is None else total


def table(scores: Scores, labels: Sequence[str] | None = None) -> str:
    """Columns of text: each reward's own value for each picture, the total, and below what failed."""
    names = labels or [str(k) for k in range(len(scores.totals))]
    heads = ["picture", *(f"{s.name} (weight {s.weight:g})" for s in scores.specs), "total"]
    rows = [
        [name, *(_shown(scores.raw[s.name][k]) for s in scores.specs), _shown(scores.totals[k])] for k, name in enumerate(names)
    ]
    widths = [max(len(row[c]) for row in [heads, *rows]) for c in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [heads, *rows]]
    return "\n".join([*lines, *failures(scores, names)])


def failures(scores: Scores, names: Sequence[str]) -> list[str]:
    lines = [f"WARNING: {name} gave no score and is left out: {why}" for name, why in scores.broken.items()]
    for name, found in scores.errors.items():
        if name not in scores.broken:
            lines += [f"WARNING: {name} gave no score for picture {names[k]}: {why}" for k, why in found.items()]
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
