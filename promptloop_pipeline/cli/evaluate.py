"""`promptloop eval`: arms side by side on the same requests and seeds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..schedule import RefinementSchedule

if TYPE_CHECKING:
    from ..evaluation.arms import ArmSpec
    from ..evaluation.benchmarks import Benchmark
    from ..trajectory import Trajectory

MANIFEST, RESULTS, VERSION = "manifest.json", "results.json", 1
SHOWN = 12  # requests on the page; the figures are of all
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow")


def evaluate(
    benchmark: Annotated[str, typer.Option(help='"shapes" (embedded).')] = "shapes",
    arms: Annotated[
        str | None,
        typer.Option(help="Comma-separated; default: all of raw,single,blind,loop,loop-noimage,best-of-2,gold,oracle."),
    ] = None,
    n: Annotated[int, typer.Option(help="How many requests.")] = 300,
    refiner: Annotated[str, typer.Option(help='The refiner under test: "tiny" (embedded), "module:object", ...')] = "tiny",
    refine_at: Annotated[str, typer.Option(help="When the arms with the refiner in the loop look.")] = "start, "
    "2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the benchmark's own (shapes: 3).")] = None,
    objects: Annotated[int, typer.Option(help="How many objects a request of shapes names.")] = 2,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    report: Annotated[
        Path, typer.Option(help="Folder for the results; given again with the same settings, it is taken up where it stopped.")
    ] = Path("promptloop-eval"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Nothing is run: two results.json, or their folders, side by side.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Arms on the same requests and seeds, with intervals, paired differences and a report. Takes up a run that was stopped."""
    if compare:
        _print_comparison(compare, as_json)
        return
    for option, value in (("--n", n), ("--steps", steps), ("--batch", batch)):
        if value < 1:
            raise ValueError(f"{option} {value}: give a number from 1 up")
    if seed < 0:
        raise ValueError(f"--seed {seed}: give a number from 0 up")
    refine_at = str(RefinementSchedule.parse(refine_at))
    folder = _checked_folder(report)
    from .output import quiet_libraries

    quiet_libraries()
    from ..evaluation.benchmarks import BENCHMARKS

    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; there are: {', '.join(BENCHMARKS)}")
    the_benchmark = BENCHMARKS[benchmark](n, objects)
    chosen = _chosen(arms, the_benchmark)
    for spec in chosen:
        RefinementSchedule.parse(spec.refine_at or refine_at).steps(steps)
    settings = {
        "benchmark": benchmark, "arms": [a.name for a in chosen], "n": n, "refiner": refiner, "refine_at": refine_at, "seed": seed,
        "steps": steps, "objects": objects, "batch": batch,
        "guidance_scale": the_benchmark.guidance_scale if guidance_scale is None else guidance_scale,
    }  # fmt: skip
    manifest = {"version": VERSION, "settings": settings, "versions": _versions(), "files": _files(refiner)}
    _check_manifest(folder, manifest)
    found = _run(the_benchmark, chosen, manifest, folder)
    _report(the_benchmark, found, manifest, folder, as_json)


# --- what is asked for, before anything is loaded -----------------------------------------------------------------------


def _chosen(arms: str | None, benchmark: Benchmark) -> list[ArmSpec]:
    known = {a.name: a for a in benchmark.arms}
    names = list(known) if arms is None else [name.strip() for name in arms.split(",") if name.strip()]
    there_are = f"{benchmark.name} has: {', '.join(known)}"
    if not names:
        raise ValueError(f"--arms {arms!r} names no arm; {there_are}")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown arm {unknown[0]!r}; {there_are}")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"--arms names {twice[0]!r} twice; name each arm once")
    return [known[name] for name in names]


def _checked_folder(report: Path) -> Path:
    """Absolute; nothing is made yet."""
    folder = report.expanduser().resolve()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"cannot write to the folder {folder}; choose another one with --report")
    return folder


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"promptloop": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


def _files(refiner: str) -> dict[str, str]:
    """Check sums of what is measured, so that retrained weights or an edited refiner are not taken for the old ones."""
    from ..tiny import WEIGHTS

    found = {"embedded weights": _check_sum(WEIGHTS)}
    module = refiner.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module) if ":" in refiner and "/" not in refiner else None
    except Exception:  # somebody's package that cannot be imported: the loader will say so
        spec = None
    path = Path(spec.origin) if spec and spec.origin else Path(refiner).expanduser()
    return found | ({"refiner files": _check_sum(path)} if path.exists() else {})


def _check_sum(path: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / MANIFEST
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"the folder {folder} holds something, but no evaluation; choose another one with --report")
        return
    old = _read_json(file)
    for part, wanted in manifest.items():
        before = old.get(part)
        if before == wanted:
            continue
        a, b = (p if isinstance(p, dict) else {part: p} for p in (before, wanted))
        key = next(k for k in [*b, *a] if a.get(k) != b.get(k))
        raise ValueError(
            f"the folder {folder} holds an evaluation of which the {part} differ: {key} is {_show(a.get(key))} there and "
            f"{_show(b.get(key))} now; nothing was changed. Repeat what it was made with to go on with it, or choose another folder "
            "with --report"
        )


def _show(value: Any) -> str:
    return "none" if value is None else ",".join(value) if isinstance(value, list) else str(value)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is no JSON ({e})") from None
    if not isinstance(found, dict) or not isinstance(found.get("version"), int) or found["version"] > VERSION:
        raise ValueError(f"{file} was not written by this version of `promptloop eval`")
    return found


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """As a whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


# --- the run ------------------------------------------------------------------------------------------------------------


def _run(
    benchmark: Benchmark, chosen: Sequence[ArmSpec], manifest: dict[str, Any], folder: Path
) -> dict[str, list[Trajectory]]:
    """Renders what is not on disk yet; nothing is loaded when all is."""
    from tqdm import tqdm

    from ..evaluation.arms import better, render, take_up, with_rivals

    settings, asked, n = manifest["settings"], benchmark.requests, len(benchmark.requests)
    rendered = with_rivals(chosen, benchmark.arms)
    done = {a.name: take_up(folder / a.name, asked, a.seeds(settings["seed"], n)) for a in rendered}
    missing = [a for a in rendered if len(done[a.name]) < n]
    refiner = pipe = None
    if any(a.needs_refiner for a in missing):
        from .named import load_refiner

        refiner = load_refiner(settings["refiner"])
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / MANIFEST, manifest)
    with tqdm(total=len(rendered) * n, initial=sum(map(len, done.values())), unit="image", leave=False) as bar:
        for arm in missing:
            bar.set_description(arm.name)
            pipe = pipe or benchmark.load_pipeline()
            render(
                pipe, arm, refiner, settings["refine_at"], asked, arm.seeds(settings["seed"], n), done[arm.name], folder / arm.name,
                score=benchmark.score, batch=settings["batch"], progress=bar.update, num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance_scale"],
            )  # fmt: skip
    return {
        a.name: [better(done[a.second_of][i], done[a.name][i], benchmark.choose_by) if a.second_of else done[a.name][i]
                 for i in range(n)]
        for a in chosen
    }  # fmt: skip


def _report(
    benchmark: Benchmark, found: dict[str, list[Trajectory]], manifest: dict[str, Any], folder: Path, as_json: bool
) -> None:
    from ..evaluation.benchmarks import column, figures
    from ..evaluation.report import Arm, write_report
    from .output import print_table

    rows, n = figures(benchmark, found), len(benchmark.requests)
    first = manifest["settings"]["seed"]
    scores = {name: {m: column(arm, m) for m in benchmark.metrics} for name, arm in found.items()}
    samples = {"requests": benchmark.requests, "seeds": [first + i for i in range(n)], "scores": scores}
    _write_json(folder / RESULTS, manifest | {"arms": rows} | samples)
    summary, looks = _summary(rows, benchmark.metrics), _looks(rows)
    shown = f" Shown are the first {SHOWN} of {n} requests; the table is of all." if n > SHOWN else ""
    page = write_report(
        [Arm(row["arm"], row["note"], found[row["arm"]][:SHOWN]) for row in rows], folder / "index.html",
        title=f"PromptLoop on {benchmark.name}",
        intro=benchmark.intro + shown, pixelated=benchmark.pixelated,
        table=[row | next((x for x in looks if x["arm"] == row["arm"]), {}) for row in summary],
    )  # fmt: skip
    if as_json:
        print(json.dumps(manifest | {"arms": rows, "report": str(page)}, indent=1))
        return
    print_table(summary)
    if looks:
        print("\nTurns with a picture, judged by the preview that was decoded (intervals: bootstrap over samples):")
        print_table(looks)
    print(f"\n{n} requests, the same seeds in all arms; brackets are 95% intervals.\nreport: {page}")


# --- tables -------------------------------------------------------------------------------------------------------------


def _interval(value: dict[str, Any] | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def _gain(value: dict[str, Any] | None) -> str:
    pairs = f" {value['better']} better, {value['worse']} worse" if value and value["paired"] else ""
    return _interval(value, "+") + pairs


def _summary(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[dict[str, str]]:
    table = []
    for row in rows:
        cells = {"arm": row["arm"], "n": str(row["n"]), metrics[0]: _interval(row[metrics[0]])}
        cells |= {m: _interval(row[m]).split(" ")[0] for m in metrics[1:]}
        cells |= {
            "changes/image": f"{row['changes_per_image']:.2f}",
            "failed turns": f"{row['failed_turns']} of {row['turns']}",
        }
        cells |= {"s/image": f"{row['seconds_per_image']:.2f}"}
        if any("loop_minus_arm" in r for r in rows):
            cells[f"loop minus arm, {metrics[0]}"] = _gain(row["loop_minus_arm"][metrics[0]]) if "loop_minus_arm" in row else ""
        table.append(cells)
    return table


def _looks(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {"arm": row["arm"], **{name: f"{_interval(x)} {x['count']} of {x['of']}" for name, x in row["looks"].items()}}
        for row in rows
        if "looks" in row
    ]


def _print_comparison(files: tuple[Path, Path], as_json: bool) -> None:
    from ..evaluation.benchmarks import compare
    from .output import print_table

    paths = [file / RESULTS if file.is_dir() else file for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"no results at {path}: --compare takes two {RESULTS} of `promptloop eval`, or their folders"
            )
    both = [_read_json(path) for path in paths]
    for path, results in zip(paths, both):
        if missing := [k for k in ("settings", "arms", "scores", "requests", "seeds") if k not in results]:
            raise ValueError(f"{path} holds no results of `promptloop eval`: it lacks {', '.join(missing)}")
    found = compare(*both)
    if as_json:
        print(json.dumps({"first": str(paths[0]), "second": str(paths[1]), **found}, indent=1))
        return
    for name, path in zip(("first", "second"), paths):
        print(f"{name}: {path}")
    for key, (a, b) in found["differs"].items():
        print(f"{key}: {_show(a)} / {_show(b)}")
    print()
    sides = ("first", "second")
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
