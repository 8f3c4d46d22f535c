"""`promptloop demo`: the main job on the embedded world."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

INTRO = (
    "A tiny diffusion model draws shapes, and scatters orange stickers that nobody asked for; where depends on the seed. All arms "
    "have the same prompts and seeds; an exact verifier scores every picture against the user's own words. The refiner is a tiny "
    "vision-language model: it says a request in the generator's words, then looks at the x0-estimate and forbids the stickers that "
    "form. The blind schedule forbids stickers in one cell after another without looking; the oracle reads the x0-estimate through "
    "the verifier, so it shows what looking can gain at most."
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for index.html, overview.png, trajectories.jsonl.")] = Path(
        "promptloop-demo"
    ),
    n: Annotated[int, typer.Option(min=1, max=1000, help="How many prompts.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Raw, single-shot, blind, closed-loop and oracle pictures of the same seeds on the embedded world, with scores and a report."""
    from .output import fresh_folder, print_table, quiet_libraries

    folder = fresh_folder(out)
    quiet_libraries()
    start = time.perf_counter()
    from tqdm import tqdm

    from ..evaluation.headroom import score
    from ..evaluation.report import Arm, write_report
    from ..evaluation.run import run_arm
    from ..evaluation.shapes import ARMS, EARLY
    from ..evaluation.sheet import contact_sheet
    from ..evaluation.statistics import paired_difference
    from ..tiny import load_pipeline, load_refiner, requests
    from ..trajectory import save

    pipe, refiner = load_pipeline("sd"), load_refiner()
    prompts = requests(n)
    kinds = [a for a in ARMS if a.name in ("raw", "single", "blind", "loop", "oracle")]
    arms, rows, figures = [], [], []
    with tqdm(total=len(kinds) * n, unit="image", leave=False) as bar:
        for kind in kinds:
            bar.set_description(kind.name)
            clock = time.perf_counter()
            found = run_arm(
                pipe, prompts, range(seed, seed + n), kind.make(refiner), kind.refine_at or EARLY, score=score, progress=bar.update,
                num_inference_steps=20, guidance_scale=3.0,
            )  # fmt: skip
            seconds = (time.perf_counter() - clock) / n
            for t in found:
                t.meta["arm"] = kind.name
            save(found, folder)
            arms.append(Arm(kind.name, kind.note, found))
            figures.append({
                "arm": kind.name,
                "score": sum(t.scores["score"] or 0 for t in found) / n,
                "strict": sum(t.scores["strict"] or 0 for t in found) / n,
                "changes": sum(turn.changed for t in found for turn in t.turns) / n,
                "failures": sum(len(t.failures) for t in found),
                "seconds": seconds,
            })  # fmt: skip
    loop = next([t.scores["strict"] or 0.0 for t in arm.trajectories] for arm in arms if arm.name == "loop")
    for figure, arm in zip(figures, arms):
        gain = "" if arm.name == "loop" else str(paired_difference(loop, [t.scores["strict"] or 0.0 for t in arm.trajectories]))
        figure["loop_gain"] = gain
        rows.append({
            "arm": arm.name, "all as asked": f"{figure['strict']:.2f}", "score": f"{figure['score']:.3f}",
            "prompt changes": f"{figure['changes']:.1f}", "failures": str(figure["failures"]),
            "s/image": f"{figure['seconds']:.2f}", "the loop gains": gain,
        })  # fmt: skip
    page = write_report(arms, folder / "index.html", title="PromptLoop demo", intro=INTRO, table=rows, pixelated=True)
    contact_sheet(arms).save(folder / "overview.png")
    total = time.perf_counter() - start
    if as_json:
        print(json.dumps({"n": n, "seed": seed, "arms": figures, "seconds": total, "report": str(page)}, indent=1))
        return
    print_table(rows)
    print(f"\n{n} prompts, the same seeds in all arms; the oracle reads the verifier, an upper bound. {total:.0f} s")
    print(f"report: {page}")
