"""`promptloop generate`: one prompt, any model, any refiner."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..refiner import View
from ..schedule import RefinementSchedule
from .named import EMBEDDED, check_model, load_model, load_refiner
from .output import check_text, fresh_folder, quiet_libraries

TINY_SCHEDULE = "start, 10%, 15%, 20%, 25%, 30%, 35%, 40%, 45%, 50%, 55%"


def generate(
    prompt: Annotated[str, typer.Argument(help="What you want to see.")],
    model: Annotated[str, typer.Option(help='"tiny" (embedded), a folder, or a hub id of a diffusers pipeline.')] = "tiny",
    refiner: Annotated[
        str,
        typer.Option(
            help='"tiny" (embedded), "oracle", "none", a model\'s folder or hub id, a server\'s URL, or "module:object".'
        ),
    ] = "tiny",
    template: Annotated[
        str | None, typer.Option(help="What a language model is told: repair (default), rewrite, ..., or the path of your own.")
    ] = None,
    server_model: Annotated[str | None, typer.Option(help="The model's name on the server, where it has several.")] = None,
    refine_at: Annotated[
        str | None,
        typer.Option(help='"start, 20%, 50%", "every 4", "end", "none". Default: 20%, 50%, 80%; tiny looks more often.'),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    n: Annotated[int, typer.Option(min=1, help="How many images.")] = 1,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; default: the pipeline's own (tiny: 3).")
    ] = None,
    apriori: Annotated[
        bool, typer.Option("--apriori", help="Write all prompts before the first step, without pictures.")
    ] = False,
    strict: Annotated[bool, typer.Option(help="Stop when a turn fails, instead of keeping the prompt.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the images, trajectories.jsonl and index.html.")] = Path(
        "promptloop-out"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Generates images with a refiner in the loop; writes them, what was changed and why, and a report."""
    replay = load_refiner(refiner) if refiner.endswith(".json") else None
    refine_at = refine_at or (replay.refine_at if replay else TINY_SCHEDULE if refiner in EMBEDDED else "20%, 50%, 80%")
    RefinementSchedule.parse(refine_at).steps(steps)
    check_text(prompt)
    if refiner in EMBEDDED:
        _check_world(prompt, model)
    check_model(model)

    quiet_libraries()
    the_refiner = replay or load_refiner(refiner, template, server_model)
    blind = apriori or not any(RefinementSchedule.parse(refine_at).steps(steps))
    the_template = getattr(the_refiner, "template", None)
    if (
        blind
        and refine_at != "none"
        and the_template
        and the_template.conversation(View(prompt, prompt, 0, steps), None, None) is None
    ):
        raise ValueError(
            f"the template {the_template.name!r} needs a preview, and no turn has one; use --template rewrite, or refine midway"
        )
    if replay and (made := json.loads(Path(refiner).read_text(encoding="utf-8")).get("num_steps")) not in (None, steps):
        print(f"promptloop: {refiner} was made in {made} steps, this run takes {steps}: not the same picture", file=sys.stderr)
    folder = fresh_folder(out)
    import torch

    from ..evaluation.report import Arm, write_report
    from ..pipelines.classes import attach
    from ..replay import save_schedule
    from ..trajectory import save

    pipe = load_model(model)
    if model == "tiny":
        guidance_scale = 3.0 if guidance_scale is None else guidance_scale
    loop = attach(pipe, refiner=the_refiner, refine_at=refine_at, strict=strict, apriori=apriori)
    options: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    generators = [torch.Generator().manual_seed(seed + k) for k in range(n)]
    result = loop([prompt] * n, num_inference_steps=steps, generator=generators, **options)
    for k, (image, trajectory) in enumerate(zip(result.images, result.trajectories, strict=True)):
        image.save(folder / f"{seed + k}.png")
        save_schedule(trajectory, folder / f"{seed + k}.prompts.json")
        if model == "tiny":
            trajectory.scores.update(_tiny_score(image, prompt))
    save(result.trajectories, folder)
    page = write_report(
        [Arm("image", "", result.trajectories)], folder / "index.html", title=prompt[:80], pixelated=model == "tiny"
    )
    if as_json:
        turns = [[_turn(turn) for turn in t.turns] for t in result.trajectories]
        print(json.dumps({"folder": str(folder), "scores": [t.scores for t in result.trajectories], "turns": turns}, indent=1))
        return
    for k, t in enumerate(result.trajectories):
        for turn in t.turns:
            what = turn.error or (f"{turn.before!r} -> {turn.after!r}" if turn.changed else "kept")
            print(f"image {seed + k}, step {turn.step} of {turn.num_steps}: {'; '.join([what, *turn.notes])}")
        print(
            f"image {seed + k}: {folder / f'{seed + k}.png'}"
            + "".join(f"  {name} {value:.3f}" for name, value in t.scores.items() if value is not None)
        )
    print(f"report: {page}")


def _check_world(prompt: str, model: str) -> None:
    """Says at once if the embedded refiners know no such model, or the embedded world no such thing."""
    if model != "tiny":
        raise ValueError(
            "the embedded refiner reads only the shapes world (--model tiny); use --refiner none, a vision-language model's folder or "
            'hub id, the URL of a server, or "module:object"'
        )
    from ..tiny.language import parse

    parse(prompt)


def _tiny_score(image: Any, prompt: str) -> dict[str, float]:
    from ..tiny import verify

    try:
        verdict = verify(image, prompt)
    except ValueError:  # not a request of this world; there is nothing to score
        return {}
    return {"score": verdict.score, "strict": float(verdict.strict)}


def _turn(turn: Any) -> dict[str, Any]:
    names = ("step", "num_steps", "sigma", "before", "after", "reasoning", "notes", "error", "boundary", "seconds", "tokens")
    return {name: getattr(turn, name) for name in names}
