"""Does looking help? The oracle against the best of a wide blind search, on the embedded world:

    python -m promptloop_pipeline.evaluation.headroom --n 300 --out build/headroom

Every request is generated with two seeds. Whatever there is to choose (the blind arm to compare with, and the looker's own
schedule) is chosen on the pictures of the first seed; the differences are reported on those of the second. All arms share
requests and seeds, all are scored by the exact verifier against the request.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..refiner import Refiner, View
from ..refiners.scripted import FunctionRefiner, NoOpRefiner
from ..tiny import load_pipeline, requests
from ..tiny.language import clear_clause, parse
from ..tiny.refiners import OracleRefiner, RotationRefiner, SingleShotRefiner, YokedRefiner, single_shot
from ..tiny.scenes import free_cells, plan
from ..tiny.verifier import verify
from ..trajectory import Trajectory
from .run import run_arm
from .statistics import paired_difference

LOOKS = {
    "look 3,5,7,9": "start, 3, 5, 7, 9",
    "look 4,6,8": "start, 4, 6, 8",
    "look 4,5,6,7,8,9": "start, 4, 5, 6, 7, 8, 9",
    "look 2..11": "start, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
}
DENSE = "start, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"
ROTATIONS = {
    "dense": DENSE,
    "dense 2..11": "start, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
    "3,5,7,9": "start, 3, 5, 7, 9",
    "2,4,6,8": "start, 2, 4, 6, 8",
    "1,3,5,7,9,11": "start, 1, 3, 5, 7, 9, 11",
    "4..11": "start, 4, 5, 6, 7, 8, 9, 10, 11",
    "every": "start, every 1",
    "late": "start, 8, 9, 10, 11, 12, 13, 14, 15",
}


def score(t: Trajectory) -> dict[str, float | None]:
    assert t.image is not None  # the pipeline gave a picture
    verdict = verify(t.image, t.request)
    return {"score": verdict.score, "strict": float(verdict.strict)}


def blind_arms() -> dict[str, tuple[Refiner, str]]:
    arms: dict[str, tuple[Refiner, str]] = {"raw words": (NoOpRefiner(), "none"), "no-op gold": (SingleShotRefiner(), "start")}
    for k in range(8):
        arms[f"one clause, cell {k}"] = (RotationRefiner(hold=k), "start")
    for order in ("rows", "columns", "spread", "center", "random"):
        arms[f"rotation {order} dense"] = (RotationRefiner(order), DENSE)
    for name, schedule in list(ROTATIONS.items())[1:]:
        arms[f"rotation spread {name}"] = (RotationRefiner("spread"), schedule)
    for name in ("dense 2..11", "4..11", "late"):
        arms[f"rotation spread {name}, none at the start"] = (RotationRefiner("spread", from_start=False), ROTATIONS[name])
    arms["all clauses at once, cut at the budget"] = (FunctionRefiner(every_clause), "start")
    arms["terse, two clauses at once"] = (FunctionRefiner(two_clauses), "start")
    arms["terse, two clauses, dense"] = (RotationRefiner("spread", terse=True), DENSE)
    arms["terse, two clauses, 3,5,7,9"] = (RotationRefiner("spread", terse=True), ROTATIONS["3,5,7,9"])
    for first in (5, 7, 9):
        steps = ", ".join(map(str, range(first, first + 6)))
        arms[f"objects dropped from {first} on, three clauses"] = (RotationRefiner("spread", alone=True), f"start, {steps}")
    return arms


def every_clause(view: View) -> str:
    """The gold caption and a clause for every free cell; the tokenizer keeps what fits."""
    cells = free_cells(plan(parse(view.request)).objects)
    return " , ".join([single_shot(view.request), *map(clear_clause, cells)])


def two_clauses(view: View) -> str:
    """Without commas and background there is room for two clauses beside two objects."""
    spec = plan(parse(view.request))
    words = [f"{o.size} {o.color} {o.shape} {o.quadrant}" for o in spec.objects]
    return " ".join([*words, *map(clear_clause, free_cells(spec.objects)[:2])])


def histories(looks: Sequence[Trajectory]) -> dict[str, list[tuple[int, ...]]]:
    """For each request the next request's looking history, as ranks of the forbidden cells among the free ones."""
    ranks = []
    for t in looks:
        cells = free_cells(plan(parse(t.request)).objects)
        ranks.append([tuple(cells.index(c) for c in parse(turn.after).clear) for turn in t.turns])
    return {t.request: ranks[(i + 1) % len(looks)] for i, t in enumerate(looks)}


def column(arm: Sequence[Trajectory], key: str) -> np.ndarray:
    return np.array([t.scores[key] for t in arm], float)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="promptloop_pipeline.evaluation.headroom", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=300, help="requests, each with two seeds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--objects", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for headroom.json")
    parser.add_argument("--arms", default="", help="only blind arms whose name contains this")
    parser.add_argument("--model", default=None, help="a pipeline folder instead of the embedded one")
    args = parser.parse_args(argv)

    pipe = load(args.model)
    asked = requests(args.n, "test", args.objects)
    common = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "score": score}
    results: dict[str, tuple[list[Trajectory], list[Trajectory]]] = {}

    def run(name: str, refiner: Refiner, schedule: str, second: Refiner | None = None) -> None:
        clock = time.time()
        results[name] = tuple(  # type: ignore[assignment]
            run_arm(pipe, asked, range(half * 10**6, half * 10**6 + args.n), r, schedule, **common)
            for half, r in ((1, refiner), (2, second or refiner))
        )
        choice, report = (column(part, "strict").mean() for part in results[name])
        turns = np.mean([sum(turn.changed for turn in t.turns) for t in results[name][1]])
        print(
            f"{name:42s} strict {choice:.3f} (choice) {report:.3f} (report)  changes {turns:.2f}  {time.time() - clock:.0f} s",
            flush=True,
        )

    for name, schedule in LOOKS.items():
        run(name, OracleRefiner(), schedule)
    look = max(LOOKS, key=lambda a: column(results[a][0], "strict").mean())
    run(f"yoked to {look}", *_yoked(results[look], LOOKS[look]))
    for name, (refiner, schedule) in blind_arms().items():
        if args.arms in name or name == "no-op gold":
            run(name, refiner, schedule)

    blind = [a for a in results if a not in LOOKS]
    rotation = max((a for a in blind if "rotation" in a), key=lambda a: column(results[a][0], "strict").mean())
    best = max(blind, key=lambda a: column(results[a][0], "strict").mean())
    for name in dict.fromkeys(
        ("no-op gold", best, rotation)
    ):  # best-of-2 has one picture for each request, chosen by the verifier itself
        pair = np.stack([column(part, "score") for part in results[name]])
        picked = pair.argmax(0)
        strict = np.stack([column(part, "strict") for part in results[name]])[picked, np.arange(args.n)]
        results[f"best-of-2 {name}"] = (
            [],
            [Trajectory(r, scores={"strict": s, "score": v}) for r, s, v in zip(asked, strict, pair.max(0))],
        )
        print(f"best-of-2 {name}: strict {strict.mean():.3f}")
    print(f"\nlooker chosen on the first seeds: {look}; best blind arm: {best}\nlooker minus arm on the second seeds, strict:")
    rows = []
    for name in sorted(results, key=lambda a: -column(results[a][1], "strict").mean()):
        d = paired_difference(column(results[look][1], "strict"), column(results[name][1], "strict"))
        rows.append(
            {
                "arm": name,
                "strict": float(column(results[name][1], "strict").mean()),
                "score": float(column(results[name][1], "score").mean()),
                "difference": str(d),
                **vars(d),
            }
        )
        print(f"{name:42s} {rows[-1]['strict']:.3f}  {d}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        summary = {"arguments": {k: str(v) for k, v in vars(args).items()}, "looker": look, "best_blind": best, "rows": rows}
        (args.out / "headroom.json").write_text(json.dumps(summary, indent=1) + "\n")


def load(folder: str | Path | None) -> Any:
    if folder is None:
        return load_pipeline("sd")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _yoked(looks: tuple[list[Trajectory], list[Trajectory]], schedule: str) -> tuple[Refiner, str, Refiner]:
    return YokedRefiner(histories(looks[0])), schedule, YokedRefiner(histories(looks[1]))


if __name__ == "__main__":
    main()
