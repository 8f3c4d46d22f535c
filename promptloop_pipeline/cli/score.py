"""`promptloop score`: rewards of pictures on disk."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..reward import ask_each
from ..rewards.combine import NAMED, RewardSpec, parse_rewards, weighted_sum
from .named import DTYPES, PARTS, load_named_reward, reward_options

REWARDS = (
    "NAME[:WEIGHT][<=CAP], separated by commas; weight 0: shown, and not in the total. Names: "
    + ", ".join(n for n in NAMED if n != "format" and not n.startswith("geneval"))
    + ', or "module:function" of your own.'
)
CHUNK = 64  # pictures in memory at a time


def score(
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    prompt: Annotated[
        list[str],
        typer.Option(help="What was asked for: once for all pictures, or as often as there are pictures, in their order."),
    ],
    reward: Annotated[list[str] | None, typer.Option(help=f"{REWARDS} Default: image-reward.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME[:PART]=WEIGHTS, repeatable: a file, folder, hub id or URL that a reward is to use; PART: {', '.join(PARTS)}."
        ),
    ] = None,
    refined: Annotated[
        list[str] | None, typer.Option(help="The prompts that the pictures were made with, once or one for each; for length.")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help="The pictures that were edited, once or one for each; for edit-reward.")
    ] = None,
    device: Annotated[str | None, typer.Option(help='"cuda", "cpu", ...; default: the best there is.')] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. Default: float32; of judges: as their weights are saved.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time through a model.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the scores as CSV.")] = False,
) -> None:
    """Scores pictures against what was asked for: raw values in each reward's own unit, and their weighted sum."""
    specs = parse_rewards(", ".join(reward or ["image-reward"]))
    prompts = _for_each("--prompt", prompt, len(images))
    if not all(p.strip() for p in prompts):
        raise ValueError('the prompt is empty; say what was asked for, for example "a red circle left of a blue square"')
    context: dict[str, list[Any]] = {"refined": _for_each("--refined", refined, len(images))} if refined else {}
    _check(specs, bool(refined), bool(source), dtype, batch, as_json and as_csv)
    from .output import print_table, quiet_libraries

    quiet_libraries()
    own = reward_options(model or [], specs, "--model")
    from ..rewards.images import load_image

    for path in [*images, *(source or [])]:  # all of them, before a model is loaded
        load_image(path)
    if source:
        context["source"] = [load_image(p) for p in _for_each("--source", source, len(images))]
    rewards = {s.name: load_named_reward(s.name, own[s.name], device=device, dtype=dtype, batch_size=batch) for s in specs}
    raw: dict[str, list[float | None]] = {s.name: [] for s in specs}
    details: list[dict[str, Any]] = [{} for _ in images]
    from tqdm import tqdm

    together = len(images) if "win-rate" in rewards else CHUNK  # pictures that are held against each other
    starts = range(0, len(images), together)
    for start in tqdm(starts, unit_scale=together, unit="picture", disable=None if len(starts) > 1 else True):
        part = slice(start, start + together)
        given = {key: values[part] for key, values in context.items()}
        pictures = [load_image(p) for p in images[part]]
        for name, one in rewards.items():
            for k, said in enumerate(ask_each(one, pictures, prompts[part], name, **given), start):
                raw[name].append(said.score)
                details[k] |= {name: said.details} if said.details else {}
    rows: list[dict[str, Any]] = [
        {"image": str(path), "scores": {name: values[k] for name, values in raw.items()}, "total": total}
        | ({"details": details[k]} if details[k] else {})
        for k, (path, total) in enumerate(zip(images, weighted_sum(raw, specs), strict=True))
    ]
    for name, values in raw.items():
        reasons = [d[name]["error"] for d in details if "error" in d.get(name, {})]
        if len(reasons) == len(values):
            raise RuntimeError(f"the reward {name} gave no score for any picture: {reasons[0]}")
    if as_json:
        weights = [{"name": s.name, "weight": s.weight, "cap": s.cap} for s in specs]
        print(json.dumps({"rewards": weights, "images": rows}, indent=1, default=str))
    elif as_csv:
        _print_csv(rows, specs)
    else:
        print_table([{"image": str(row["image"]), **{n: _shown(v) for n, v in _columns(row, specs).items()}} for row in rows])
        for row in rows:
            for name, said in row.get("details", {}).items():
                if "error" in said:
                    print(f"{row['image']}: {name} gave no score: {said['error']}")


def _for_each(option: str, given: list[Any], n: int) -> list[Any]:
    if len(given) not in (1, n):
        raise ValueError(f"{option} is given {len(given)} times for {n} pictures; give it once, or once for each")
    return given if len(given) == n else given * n


def _check(specs: list[RewardSpec], refined: bool, source: bool, dtype: str | None, batch: int, two_forms: bool) -> None:
    names = [s.name for s in specs]
    if "format" in names:
        raise ValueError("the reward format judges a refiner's answer, and pictures on disk have none; leave it out")
    if geneval := [name for name in names if name.startswith("geneval")]:
        raise ValueError(
            f"the reward {geneval[0]} needs to know what should be there; use `promptloop eval --benchmark` with geneval, or a .jsonl "
            "file in its form"
        )
    if "edit-reward" in names and not source:
        raise ValueError("the reward edit-reward needs --source, the picture that was edited")
    if "length" in names and not refined:
        raise ValueError("the reward length needs --refined, the prompt that the pictures were made with")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    if batch < 1:
        raise ValueError(f"--batch {batch}: give a number from 1 up")
    if two_forms:
        raise ValueError("--json and --csv exclude each other; give one")


def _columns(row: dict[str, Any], specs: list[RewardSpec]) -> dict[str, float | None]:
    several = len(specs) > 1 or specs[0].weight != 1 or specs[0].cap is not None
    return row["scores"] | ({"total": row["total"]} if several else {})


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _print_csv(rows: list[dict[str, Any]], specs: list[RewardSpec]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", *_columns(rows[0], specs)])
    for row in rows:
        writer.writerow([row["image"], *("" if v is None else v for v in _columns(row, specs).values())])
