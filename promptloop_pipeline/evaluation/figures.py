"""The figures of arms that were judged: JSON values only, in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..trajectory import Trajectory
from .statistics import Values, by_prompt, difference, mean

REFERENCE = "loop"  # the arm that all others are held against
TOTAL = "total"


def arm_row(name: str, note: str, found: Sequence[Trajectory], metrics: Sequence[str], per_prompt: int) -> dict[str, Any]:
    """What one arm has on its own. Intervals are over prompts."""
    row: dict[str, Any] = {"arm": name, "note": note, "n": len(found)}
    row |= {m: mean(by_prompt(column(found, m), per_prompt)) for m in metrics}
    row["unscored"] = {m: sum(v is None for v in column(found, m)) for m in metrics}
    row["changes_per_image"] = sum(turn.changed for t in found for turn in t.turns) / len(found)
    row["turns"] = sum(len(t.turns) for t in found)
    row["failed_turns"] = sum(len(t.failures) for t in found)
    row["seconds_per_image"] = sum(t.meta["seconds"] for t in found) / len(found)
    return row


def gains(
    arms: Mapping[str, Sequence[Trajectory]], name: str, metrics: Sequence[str], per_prompt: int
) -> dict[str, Any] | None:
    """The reference arm minus this one, in pairs; None for itself, and where it was not run."""
    if REFERENCE not in arms or name == REFERENCE:
        return None
    both = [{m: by_prompt(column(arms[arm], m), per_prompt) for m in metrics} for arm in (REFERENCE, name)]
    return {m: difference(both[0][m], both[1][m], paired=True) for m in metrics}


def by_tag(
    arms: Mapping[str, Sequence[Trajectory]], tags: Sequence[str | None], metric: str, per_prompt: int
) -> dict[str, dict[str, Any]]:
    """The metric of each arm for each tag (one of each prompt), and "mean of tags", in which each counts the same, as in GenEval."""
    names = [t for t in dict.fromkeys(tags) if t is not None]
    if len(names) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for arm, trajectories in arms.items():
        values = by_prompt(column(trajectories, metric), per_prompt)
        parts = {tag: mean([v for v, t in zip(values, tags, strict=True) if t == tag]) for tag in names}
        means = [p["mean"] for p in parts.values() if p["mean"] is not None]
        overall = {"mean": sum(means) / len(means) if means else None}
        found[arm] = {**parts, "mean of tags": overall}
    return found


def column(arm: Sequence[Trajectory], metric: str) -> list[float | None]:
    return [t.scores[metric] for t in arm]


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results side by side, arm by arm: the second minus the first, in pairs where both have the same requests and seeds."""
    paired = all(first[k] == second[k] for k in ("requests", "seeds"))
    one, two = ({row["arm"]: row for row in results["arms"]} for results in (first, second))
    made_with = [{**r["settings"], **r.get("files", {}), **r.get("versions", {})} for r in (first, second)]
    rows: list[dict[str, Any]] = []

    def values(results: dict[str, Any], scores: Values) -> list[float | None]:
        return by_prompt(scores, results["settings"].get("per_prompt", 1))

    for arm in dict.fromkeys([*one, *two]):
        scores = [{m: values(r, v) for m, v in r["scores"].get(arm, {}).items()} for r in (first, second)]
        for metric in dict.fromkeys([*scores[0], *scores[1]]):
            row: dict[str, Any] = {"arm": arm, "figure": metric}
            row |= {side: mean(s[metric]) for side, s in zip(("first", "second"), scores) if metric in s}
            if all(metric in s for s in scores):
                row["second_minus_first"] = difference(scores[1][metric], scores[0][metric], paired=paired)
            rows.append(row)
        looks = [found.get(arm, {}).get("looks", {}) for found in (one, two)]
        for name in dict.fromkeys([*looks[0], *looks[1]]):
            rows.append({"arm": arm, "figure": name, **{s: x[name] for s, x in zip(("first", "second"), looks) if name in x}})
    differs = {k: [m.get(k) for m in made_with] for k in dict.fromkeys([*made_with[0], *made_with[1]])}
    return {"paired": paired, "differs": {k: v for k, v in differs.items() if v[0] != v[1]}, "rows": rows}
