"""The figures of arms that were judged: JSON values only, in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..trajectory import Trajectory
from .statistics import Values, by_prompt, difference, mean

REFERENCE = "loop"  # the arm that all others are held against, if it is there; else the last one is
TOTAL = "total"
MEAN_OF_TAGS = "mean of tags"
Arms = Mapping[str, Sequence[Trajectory]]


def reference_of(arms: Arms) -> str:
    return REFERENCE if REFERENCE in arms else list(arms)[-1]


def arm_row(name: str, note: str, found: Sequence[Trajectory], metrics: Sequence[str]) -> dict[str, Any]:
    """What one arm has on its own. Intervals are over requests."""
    requests = [t.request for t in found]
    row: dict[str, Any] = {"arm": name, "note": note, "n": len(found)}
    row |= {m: mean(by_prompt(column(found, m), requests)) for m in metrics}
    row["unscored"] = {m: sum(v is None for v in column(found, m)) for m in metrics}
    row["changes_per_image"] = sum(turn.changed for t in found for turn in t.turns) / len(found)
    row["turns"] = sum(len(t.turns) for t in found)
    row["failed_turns"] = sum(len(t.failures) for t in found)
    row["seconds_per_image"] = sum(t.meta["seconds"] for t in found) / len(found)
    return row


def gains(arms: Arms, name: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    """The reference arm minus this one, in pairs of pictures that both have a score; None for itself."""
    reference = reference_of(arms)
    if name == reference:
        return None
    requests = [t.request for t in arms[name]]
    return {m: paired(column(arms[reference], m), column(arms[name], m), requests) for m in metrics}


def paired(a: Values, b: Values, requests: Sequence[str]) -> dict[str, Any] | None:
    both = [x is not None and y is not None for x, y in zip(a, b, strict=True)]
    one, two = (by_prompt([v if there else None for v, there in zip(of, both)], requests) for of in (a, b))
    return difference(one, two, paired=True)


def by_tag(arms: Arms, tags: Sequence[str | None], metric: str) -> dict[str, dict[str, Any]]:
    """The metric of each arm for each tag (one of each picture), and "mean of tags", in which each counts the same, as in GenEval."""
    names = [t for t in dict.fromkeys(tags) if t is not None]
    if len(names) < 2:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for arm, trajectories in arms.items():
        parts = {}
        for tag in names:
            mine = [t for t, of in zip(trajectories, tags, strict=True) if of == tag]
            parts[tag] = mean(by_prompt(column(mine, metric), [t.request for t in mine]))
        means = [p["mean"] for p in parts.values() if p["mean"] is not None]
        found[arm] = {**parts, MEAN_OF_TAGS: {"mean": sum(means) / len(means) if means else None}}
    return found


def column(arm: Sequence[Trajectory], metric: str) -> list[float | None]:
    return [t.scores[metric] for t in arm]


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results side by side, arm by arm: the second minus the first, in pairs where both have the same requests and seeds."""
    both, same = (first, second), all(first[k] == second[k] for k in ("requests", "seeds"))
    rows_of = [{row["arm"]: row for row in results["arms"]} for results in both]
    rows: list[dict[str, Any]] = []
    for arm in dict.fromkeys([*rows_of[0], *rows_of[1]]):
        scores = [results["scores"].get(arm, {}) for results in both]
        for metric in dict.fromkeys([*scores[0], *scores[1]]):
            row: dict[str, Any] = {"arm": arm, "figure": metric}
            means = [by_prompt(s[metric], r["requests"]) if metric in s else None for s, r in zip(scores, both)]
            row |= {side: mean(m) for side, m in zip(("first", "second"), means) if m is not None}
            if means[0] is not None and means[1] is not None:
                row["second_minus_first"] = (
                    paired(scores[1][metric], scores[0][metric], first["requests"]) if same
                    else difference(means[1], means[0], paired=False)
                )  # fmt: skip
            rows.append(row)
        looks = [found.get(arm, {}).get("looks", {}) for found in rows_of]
        for name in dict.fromkeys([*looks[0], *looks[1]]):
            rows.append({"arm": arm, "figure": name, **{s: x[name] for s, x in zip(("first", "second"), looks) if name in x}})
    made_with = [_made_with(results) for results in both]
    differs = {k: [m.get(k) for m in made_with] for k in dict.fromkeys([*made_with[0], *made_with[1]])}
    return {"paired": same, "differs": {k: v for k, v in differs.items() if v[0] != v[1]}, "rows": rows}


def _made_with(results: dict[str, Any]) -> dict[str, Any]:
    rewards = {
        f"reward {s['name']}": f"weight {s['weight']:g}" + (f", cap {s['cap']:g}" if s["cap"] is not None else "")
        + "".join(f", {k} {v}" for k, v in sorted(results.get("rewards", {}).get(s["name"], {}).items()))
        for s in results.get("weights", [])
    }  # fmt: skip
    versus = {f"{arm}, {k}": v for arm, of in results.get("versus", {}).items() for k, v in of.items()}
    return {**results["settings"], **results.get("files", {}), **results.get("versions", {}), **rewards, **versus}
