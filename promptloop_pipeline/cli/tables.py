"""What `promptloop eval` prints, and puts on its page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import print_table

if TYPE_CHECKING:
    from ..evaluation.arms import ArmSpec
    from ..evaluation.benchmarks import Benchmark
    from ..evaluation.evaluate import Samples
    from ..rewards.combine import RewardSpec
    from ..trajectory import Trajectory

SHOWN = 12  # requests on the page; the figures are of all
PARTS = ("preview", "refiner", "encode")
Row = dict[str, Any]


def report(
    benchmark: Benchmark, chosen: Sequence[ArmSpec], samples: Samples, specs: Sequence[RewardSpec],
    found: dict[str, list[Trajectory]], manifest: dict[str, Any], folder: Path,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """(all figures, the page that was written)"""
    from ..evaluation.evaluate import LOOKS, measures, metrics_of, with_pictures
    from ..evaluation.figures import arm_row, by_tag, gains, reference_of
    from ..evaluation.plots import Plot, grouped_plot, interval_plot, measure_plots
    from ..evaluation.report import Arm, write_report

    metrics, reference = metrics_of(specs), reference_of(found)
    rows = []
    for spec in chosen:
        arm = found[spec.name]
        row = arm_row(spec.name, spec.note, arm, metrics)
        if (gain := gains(found, spec.name, metrics)) is not None:
            row["reference_minus_arm"] = gain
        if looks := benchmark.look_figures([t.meta["details"].get(LOOKS, {}) for t in arm]):
            row["looks"] = looks
        row["measures"] = measures(arm, folder)
        rows.append(row)
    tags = by_tag(found, samples.context.get("tag", []), metrics[0])
    results = manifest | {
        "metrics": metrics, "reference": reference, "weights": [{"name": s.name, "weight": s.weight, "cap": s.cap} for s in specs],
        "arms": rows, "tags": tags,
        "requests": samples.requests, "seeds": [samples.seed + k for k in range(len(samples))],
        "scores": {name: {m: [t.scores[m] for t in arm] for m in metrics} for name, arm in found.items()},
    }  # fmt: skip
    n = len(samples)
    what = "requests" if manifest["settings"]["per_prompt"] == 1 else "pictures"
    shown = f" Shown are the first {SHOWN} of {n} {what}; the figures are of all." if n > SHOWN else ""
    plots = [
        Plot(
            m, interval_plot({r["arm"]: r[m] for r in rows}, title=f"{m} by arm", x_label=f"{m}, 95% interval", reference=reference),
            f"The dashed line is {reference}.",
        )
        for m in metrics
    ]  # fmt: skip
    main = metrics[0]
    if gained := {r["arm"]: r["reference_minus_arm"][main] for r in rows if r.get("reference_minus_arm", {}).get(main)}:
        svg = interval_plot(gained, title=f"{reference} minus arm", x_label=f"difference of {main}, in pairs", reference=0)
        plots.append(
            Plot(f"{reference} minus arm, {main}", svg, f"Right of 0: {reference} is better on the same requests and seeds.")
        )
    if tags:
        by = {tag: {arm: of[tag] for arm, of in tags.items()} for tag in next(iter(tags.values()))}
        plots.append(Plot(f"{main} by tag", grouped_plot(by, title=f"{main} by tag", x_label=main, reference=reference)))
    plots += measure_plots({r["arm"]: r["measures"] for r in rows})
    tables = [
        ("Turns with a picture, judged by the preview that was decoded", _looks(rows)),
        ("What else changed, and what it cost", _measures(rows)),
        (f"{main} by tag", _tags(tags)),
    ]
    page = write_report(
        [Arm(row["arm"], row["note"], with_pictures(found[row["arm"]][:SHOWN], folder)) for row in rows],
        folder / "index.html", title=f"PromptLoop on {benchmark.name}", intro=benchmark.intro + shown, pixelated=benchmark.pixelated,
        table=_summary(rows, metrics, reference), tables=[(title, table) for title, table in tables if table], plots=plots,
    )  # fmt: skip
    return results, page


def print_results(results: dict[str, Any], page: Path) -> None:
    rows, metrics = results["arms"], results["metrics"]
    print_table(_summary(rows, metrics, results["reference"]))
    if looks := _looks(rows):
        print("\nTurns with a picture, judged by the preview that was decoded (intervals: bootstrap over samples):")
        print_table(looks)
    print("\nWhat else changed, and what it cost (of the last prompt; a look is one of a whole batch):")
    print_table(_measures(rows))
    if results["tags"]:
        print(f"\n{metrics[0]} by tag:")
        print_table(_tags(results["tags"]))
    n, of = len(results["requests"]), results["settings"]["n"]
    pictures = f"{of} requests" if n == of else f"{of} requests, {n} pictures"
    print(f"\n{pictures}, the same seeds in all arms; brackets are 95% intervals.\nreport: {page}")


# --- tables -------------------------------------------------------------------------------------------------------------


def _interval(value: Row | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return "-"
    bounds = "" if value.get("low") is None else f" [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
    return f"{value['mean']:{sign}.3f}{bounds}"


def _gain(value: Row | None) -> str:
    pairs = f" {value['better']} better, {value['worse']} worse" if value and value["paired"] else ""
    return _interval(value, "+") + pairs


def _summary(rows: Sequence[Row], metrics: Sequence[str], reference: str) -> list[dict[str, str]]:
    table = []
    for row in rows:
        cells = {"arm": row["arm"], "n": str(row["n"]), metrics[0]: _interval(row[metrics[0]])}
        cells |= {m: _interval(row[m]).split(" ")[0] for m in metrics[1:]}
        if any(any(r["unscored"].values()) for r in rows):
            cells["no score"] = ", ".join(f"{name} {count}" for name, count in row["unscored"].items() if count) or "0"
        cells |= {
            "changes/image": f"{row['changes_per_image']:.2f}",
            "failed turns": f"{row['failed_turns']} of {row['turns']}",
        }
        cells |= {"s/image": f"{row['seconds_per_image']:.2f}"}
        if len(rows) > 1:
            gain = row.get("reference_minus_arm")
            cells[f"{reference} minus arm, {metrics[0]}"] = _gain(gain[metrics[0]]) if gain else ""
        table.append(cells)
    return table


def _looks(rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {"arm": row["arm"], **{name: f"{_interval(x)} {x['count']} of {x['of']}" for name, x in row["looks"].items()}}
        for row in rows
        if "looks" in row
    ]


def _tags(tags: dict[str, Row]) -> list[dict[str, str]]:
    return [{"arm": arm, **{tag: _interval(value) for tag, value in of.items()}} for arm, of in tags.items()]


def _measures(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Of each arm: how much of the request is left, how long the prompt is, how alike pictures and prompts are, and the cost."""
    table = []
    for row in rows:
        of = row["measures"]
        parts = of["cost"]["parts"]
        cells = {
            "arm": row["arm"],
            "request's words kept": _interval(of["drift"]["recall"]).split(" ")[0],
            "similarity": _interval(of["drift"]["embedding"]).split(" ")[0],
            "words": " to ".join(f"{turn['mean']:.0f}" for turn in _ends(of["length"]["words"])),
            "diversity": _interval(of["diversity"]["pictures"]).split(" ")[0],
            "prompts alike": _interval(of["diversity"]["prompts"]).split(" ")[0],
        }
        cells |= {f"s/look, {part}": f"{parts[part]['per_look']:.3f}" if part in parts else "-" for part in PARTS}
        cells["peak MB"] = ", ".join(f"{name} {peak / 1e6:.0f}" for name, peak in sorted(of["memory"].items()))
        table.append(cells)
    empty = {key for key in table[0] if all(cells[key] == "-" for cells in table)}
    return [{key: value for key, value in cells.items() if key not in empty} for cells in table]


def _ends(turns: list[Row]) -> list[Row]:
    return turns if len(turns) < 3 else [turns[0], turns[-1]]


# --- two results --------------------------------------------------------------------------------------------------------


def print_comparison(both: Sequence[tuple[Path, dict[str, Any]]], as_json: bool) -> None:
    from ..evaluation.figures import compare

    found = compare(*(results for _, results in both))
    sides = ("first", "second")
    if as_json:
        print(json.dumps({side: str(path) for side, (path, _) in zip(sides, both)} | found, indent=1))
        return
    for side, (path, _) in zip(sides, both):
        print(f"{side}: {path}")
    for key, (a, b) in found["differs"].items():
        print(f"{key}: {shown(a)} / {shown(b)}")
    print()
    print_table([
        {"arm": row["arm"], "figure": row["figure"], **{s: _interval(row.get(s)) for s in sides},
         "second minus first": _gain(row["second_minus_first"]) if "second_minus_first" in row else ""}
        for row in found["rows"]
    ])  # fmt: skip
    how = (
        "the same requests and seeds: differences are paired" if found["paired"]
        else "requests or seeds differ: differences are NOT paired, and their intervals wider than they could be"
    )  # fmt: skip
    print(f"\n{how}; brackets are 95% intervals")


def shown(value: Any) -> str:
    return "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
