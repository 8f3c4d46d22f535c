"""Several rewards at once: loaded by name, scored side by side, and put together by plain functions on lists.

Raw values and weights are never mixed: every function here takes the raw values, one list a reward, and returns a new list.
None ("does not apply") stays None, and never counts as a zero. `groups` says which samples belong together (those of one prompt):
any value for each sample; None: all are one group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dotted import load_object
from ..reward import Reward, ask

Values = Sequence[float | None]
Groups = Sequence[Hashable] | None

# The embedded world's verifier is above this package, so it is only named here, like anybody's own reward.
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "image-reward": ("promptloop_pipeline.rewards.image_reward:ImageReward.from_pretrained", {}),
    "hpsv2": ("promptloop_pipeline.rewards.clip:hpsv2", {}),
    "hpsv2.1": ("promptloop_pipeline.rewards.clip:hpsv2", {"version": "2.1"}),
    "pickscore": ("promptloop_pipeline.rewards.clip:pickscore", {}),
    "clip-score": ("promptloop_pipeline.rewards.clip:clip_score", {}),
    "aesthetic": ("promptloop_pipeline.rewards.clip:aesthetic", {}),
    "aesthetic-v1": ("promptloop_pipeline.rewards.clip:aesthetic", {"version": "1"}),
    "ocr": ("promptloop_pipeline.rewards.ocr:Ocr", {}),
    "geneval": ("promptloop_pipeline.rewards.geneval:GenEval.from_pretrained", {}),
    "geneval-strict": ("promptloop_pipeline.rewards.geneval:GenEval.from_pretrained", {"strict": True}),
    "vlm-judge": ("promptloop_pipeline.rewards.judge:vlm_judge", {}),
    "key-points": ("promptloop_pipeline.rewards.judge:key_points", {}),
    "win-rate": ("promptloop_pipeline.rewards.key_points:Pairwise", {}),
    "unified-reward": ("promptloop_pipeline.rewards.judge:unified_reward", {}),
    "edit-reward": ("promptloop_pipeline.rewards.judge:edit_reward", {}),
    "artifact": ("promptloop_pipeline.rewards.artifact:Artifact.from_pretrained", {}),
    "length": ("promptloop_pipeline.rewards.simple:Length", {}),
    "format": ("promptloop_pipeline.rewards.simple:Format", {}),
    "verifier": ("promptloop_pipeline.tiny.reward:verifier_score", {}),
    "verifier-strict": ("promptloop_pipeline.tiny.reward:verifier_strict", {}),
}
_READY = ("verifier", "verifier-strict")  # these are rewards; the others make one


@dataclass(frozen=True)
class RewardSpec:
    """One reward of several. weight 0: held out, that is scored and reported, and never part of a total. cap: what lies above it
    counts as it, against over-optimisation; in totals only, never in what is reported."""

    name: str
    weight: float = 1.0
    cap: float | None = None

    @property
    def held_out(self) -> bool:
        return self.weight == 0


def parse_rewards(text: str) -> list[RewardSpec]:
    """NAME[:WEIGHT][<=CAP], separated by commas, such as "image-reward:1.0, length:0.2, pickscore:0". Nothing is loaded.

    A name is one of `NAMED` or "module:function" of one's own. Raises ValueError naming the part.
    """
    specs = []
    for part in (p.strip() for p in text.split(",")):
        head, capped, cap = part.partition("<=")
        name, colon, weight = head.strip().rpartition(":")
        if not colon or _number(weight) is None:
            if name in NAMED:
                raise ValueError(f"the weight of {name} is {weight!r} in {text!r}; give a number")
            name, weight = head.strip(), "1"
        limit = _number(cap)
        if not name or (capped and limit is None):
            raise ValueError(
                f'cannot read {part!r} in the rewards {text!r}; write NAME[:WEIGHT][<=CAP], such as "image-reward:1.0"'
            )
        check_name(name)
        specs.append(RewardSpec(name, _number(weight) or 0.0, limit))
    twice = next((s.name for k, s in enumerate(specs) if s.name in [t.name for t in specs[:k]]), None)
    if twice:
        raise ValueError(f"the reward {twice!r} is named twice in {text!r}")
    return specs


def check_name(name: str) -> None:
    """Raises ValueError for a name that is neither known nor "module:function"."""
    if name not in NAMED and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        raise ValueError(f'unknown reward {name!r}; there are {", ".join(NAMED)}, and "module:function" of your own')


def load_reward(name: str, **options: Any) -> Reward:
    """The reward of that name, or the object at "module:object" (modules in the current folder count; a class is called).

    options: of the reward: model (a folder, file or hub id), device, dtype, batch_size, ...

    Raises ValueError for an unknown name or option, ImportError, OSError for weights that are not there.
    """
    check_name(name)
    path, preset = NAMED.get(name, (name, {}))
    found = load_object(path, "reward")
    makes = isinstance(found, type) or (name in NAMED and name not in _READY)
    if not makes and options:
        raise ValueError(f"the reward {name!r} takes no options, and was given {', '.join(options)}")
    if makes:
        try:
            found = found(**preset | options)
        except TypeError as e:
            if "unexpected keyword" not in str(e):
                raise
            raise ValueError(f"the reward {name!r} has no such option: {str(e).partition(') ')[2] or e}") from e
    if not callable(found):
        raise ValueError(f"{name!r} is {type(found).__name__}, and no reward: expected a function (images, prompts, **context)")
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def score_all(
    rewards: Mapping[str, Reward], images: Sequence[Any], prompts: Sequence[str], **context: Any
) -> dict[str, list[float | None]]:
    """Raw values of each reward, by name. Raises ValueError naming a reward that returns no list of numbers, one for each picture."""
    return {name: ask(reward, images, prompts, name=name, **context) for name, reward in rewards.items()}


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def weighted_sum(raw: Mapping[str, Values], specs: Sequence[RewardSpec]) -> list[float | None]:
    """Each reward times its weight, capped, summed over the rewards that apply to a sample. Held-out ones are left out. None where
    none applies.

    Where a reward applies to some samples of a group only, its others get nothing for it: `z_normalised` or `filled` first.
    """
    used = [s for s in specs if not s.held_out]
    unknown = [s.name for s in used if s.name not in raw]
    if unknown:
        raise ValueError(f"no values of {', '.join(unknown)}; there are {', '.join(raw) or 'none'}")
    total: list[float | None] = []
    for row in zip(*(capped(raw[s.name], s.cap) for s in used), strict=True):
        parts = [s.weight * v for s, v in zip(used, row) if v is not None]
        total.append(sum(parts) if parts else None)
    return total if used else [None] * len(next(iter(raw.values()), ()))


def capped(values: Values, cap: float | None) -> list[float | None]:
    return [v if v is None or cap is None else min(v, cap) for v in values]


def z_normalised(values: Values, groups: Groups = None) -> list[float | None]:
    """(value - mean) / standard deviation within its group, so that rewards of any unit weigh the same (what RePrompt says that it
    does). 0 in a group that is all equal: tiny gaps are no signal to be blown up."""
    found: list[float | None] = [None] * len(values)
    for rows in _members(values, groups):
        present = [_value(values, i) for i in rows]
        mean = math.fsum(present) / len(present)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in present) / len(present))
        flat = std <= 1e-8 * max(1.0, abs(mean))
        for i, v in zip(rows, present):
            found[i] = 0.0 if flat else (v - mean) / std
    return found


def filled(values: Values, groups: Groups = None) -> list[float | None]:
    """None becomes the mean of its group, where it has one: so the form of an answer neither helps nor harms the samples of a group
    that were made without any (PromptRL, arXiv 2602.01382)."""
    found = list(values)
    names = _names(values, groups)
    for rows in _members(values, groups):
        mean = math.fsum(_value(values, i) for i in rows) / len(rows)
        for i, name in enumerate(names):
            if name == names[rows[0]] and values[i] is None:
                found[i] = mean
    return found


def tagged(raw: Mapping[str, Values], tags: Sequence[str]) -> list[float | None]:
    """One reward a prompt, named by its tag, in its own unit and without weights (PromptRL 4.3). Raises ValueError for a tag that is
    no reward."""
    unknown = sorted({t for t in tags if t not in raw})
    if unknown:
        raise ValueError(f"no reward is called {', '.join(map(repr, unknown))}; tags may be {', '.join(raw)}")
    _check_length("tags", tags, next(iter(raw.values()), ()))
    return [raw[tag][i] for i, tag in enumerate(tags)]


def win_rates(
    values: Values, groups: Groups = None, *, margin: float = 0.0, beats: Callable[[int, int], float | None] | None = None
) -> list[float | None]:
    """Share of the others of its group that a sample beats, a draw being half a win: bounded, and blind to how small a gap is
    (Pref-GRPO). None where there is nobody to compare with.

    margin: values that are no further apart are a draw. beats: a pairwise judge instead: (i, j) -> 1 where sample i is better, 0
    where j is, .5 for a draw, None for no verdict; `values` then only says which samples take part.
    """
    found: list[float | None] = [None] * len(values)

    def by_score(i: int, j: int) -> float:
        gap = _value(values, i) - _value(values, j)
        return 0.5 if abs(gap) <= margin else float(gap > 0)

    for rows in _members(values, groups):
        for i in rows:
            verdicts = [(beats or by_score)(i, j) for j in rows if j != i]
            heard = [v for v in verdicts if v is not None]
            found[i] = math.fsum(heard) / len(heard) if heard else None
    return found


def gain(values: Values, untouched: Sequence[bool], groups: Groups = None) -> list[float | None]:
    """Value minus the mean of its group's untouched samples, those that were made from the user's own words (PRIP). None in a group
    without any."""
    _check_length("untouched", untouched, values)
    found: list[float | None] = [None] * len(values)
    for rows in _members(values, groups):
        base = [_value(values, i) for i in rows if untouched[i]]
        for i in rows if base else ():
            found[i] = _value(values, i) - math.fsum(base) / len(base)
    return found


def _members(values: Values, groups: Groups) -> list[list[int]]:
    """Rows of each group that have a value."""
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(_names(values, groups)):
        if values[i] is not None:
            rows.setdefault(name, []).append(i)
    return list(rows.values())


def _names(values: Values, groups: Groups) -> Sequence[Hashable]:
    if groups is None:
        return [0] * len(values)
    _check_length("groups", groups, values)
    return groups


def _value(values: Values, i: int) -> float:
    value = values[i]
    assert value is not None
    return value


def _check_length(what: str, given: Sequence[Any], values: Sequence[Any]) -> None:
    if len(given) != len(values):
        raise ValueError(f"{len(given)} {what} for {len(values)} values; give one for each")


__all__ = [
    "NAMED", "RewardSpec", "capped", "check_name", "filled", "gain", "load_reward", "parse_rewards", "score_all",
    "tagged", "weighted_sum", "win_rates", "z_normalised",
]  # fmt: skip
