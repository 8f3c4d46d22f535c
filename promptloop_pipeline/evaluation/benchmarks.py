"""What is asked for, and how it is judged.

A benchmark is plain data: requests, what rewards are told of each, the rewards and the arms. A new one is a file of prompts, or a
function that returns one and a line in `BENCHMARKS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..reward import Reward
from ..rewards.geneval import checked
from ..tiny.benchmark import requests
from . import shapes as shapes_world
from .arms import ARMS, ArmSpec
from .figures import MEAN_OF_TAGS

DATA = Path(__file__).parent / "data"
MOST = 10_000  # requests of shapes; there are more, but not so many more that drawing them would stay quick
SHAPES_N = 300
TAKEN = {"refined", "format_ok", "trajectories", "name", "images", "prompts", "reward", "self"}  # what rewards are told anyway
TAKEN_TAGS = ("arm", MEAN_OF_TAGS)


@dataclass(frozen=True)
class Benchmark:
    """requests: one a prompt. context: what rewards are told of each request, by name; `tag` says what kind it is, `source` names the
    picture that it starts from. rewards: in the notation of `parse_rewards`, the one that matters first; "": the user has to say.
    model, refiner: those to take by default, None where the user has to say. per_prompt: pictures of each request.
    choose_by: the reward that best-of-2 chooses by; None for the first. looks: a reward in form that judges single turns into details;
    look_figures: what these say of an arm.
    """

    name: str
    intro: str
    requests: list[str]
    context: dict[str, list[Any]] = field(default_factory=dict)
    rewards: str = ""
    model: str | None = None
    refiner: str | None = None
    refine_at: str = "20%, 50%, 80%"
    guidance_scale: float | None = None
    per_prompt: int = 1
    arms: tuple[ArmSpec, ...] = ARMS
    choose_by: str | None = None
    looks: Reward | None = None
    look_figures: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = lambda _: {}
    pixelated: bool = False


def shapes(n: int | None, objects: int = 2, split: str = "test") -> Benchmark:
    """The embedded world's requests, judged by its exact verifier. Raises ValueError for a number or a split it cannot have."""
    n = SHAPES_N if n is None else n
    if not 1 <= objects <= 3:
        raise ValueError(f"--objects {objects}: a request of the shapes benchmark names 1, 2 or 3 objects")
    if n > MOST:
        raise ValueError(f"--n {n}: the shapes benchmark has at most {MOST} requests")
    if split not in ("test", "train", "any"):
        raise ValueError(
            f"--split {split}: the shapes benchmark has test (held-out pairs and words), any (held-out pairs), train"
        )
    return Benchmark(
        name="shapes",
        intro="Requests of the embedded shapes world, which want nothing else in the picture; the generator scatters stickers that "
        "nobody asked for. verifier-strict: everything is as asked, by an exact verifier, against the user's own words; verifier: the "
        "share of it that is.",
        requests=requests(n, split, objects),
        rewards="verifier-strict, verifier:0",
        model="tiny",
        refiner="tiny",
        refine_at="start, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
        guidance_scale=3.0,
        arms=shapes_world.ARMS,
        choose_by="verifier",
        looks=shapes_world.looks,
        look_figures=shapes_world.look_figures,
        pixelated=True,
    )


def geneval(n: int | None) -> Benchmark:
    """GenEval's 553 prompts (arXiv 2310.11513, MIT), four pictures each, judged geneval-style: not by its own detector."""
    return replace(
        from_file(DATA / "geneval.jsonl", n), name="geneval", rewards="geneval-strict", per_prompt=4,
        intro="The 553 prompts of GenEval (arXiv 2310.11513), judged geneval-style: by a detector of transformers, so that the figures "
        "are not those of its leaderboard.",
    )  # fmt: skip


def ocr(n: int | None) -> Benchmark:
    """200 of Flow-GRPO's test prompts (arXiv 2505.05470, MIT) with a text to be rendered in double quotes."""
    return replace(
        from_file(DATA / "ocr.txt", n), name="ocr", rewards="ocr",
        intro="200 of Flow-GRPO's OCR test prompts (arXiv 2505.05470): the text in double quotes is to be seen in the picture.",
    )  # fmt: skip


def drawbench(n: int | None) -> Benchmark:
    """DrawBench's 200 prompts (Imagen, arXiv 2205.11487)."""
    return replace(
        from_file(DATA / "drawbench.txt", n), name="drawbench", rewards="image-reward",
        intro="The 200 prompts of DrawBench (arXiv 2205.11487).",
    )  # fmt: skip


BENCHMARKS: dict[str, Callable[..., Benchmark]] = {"shapes": shapes, "geneval": geneval, "ocr": ocr, "drawbench": drawbench}


def from_file(path: Path, n: int | None = None) -> Benchmark:
    """Prompts of one's own: a .txt file with one a line, or a .jsonl file of objects with `prompt`, and whatever else rewards are to be
    told: `tag`, `checks` for key-points, `source` (a picture beside the file), GenEval's `include` and `exclude`.

    n: that many, evenly spread, so that a file that is sorted by kind stays mixed. Raises ValueError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not a text file in UTF-8 ({e})") from e
    jsonl = path.suffix == ".jsonl"
    rows = [_row(line, path, number, jsonl) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    if n is not None and n > len(rows):
        raise ValueError(f"--n {n}: {path.name} has {len(rows)} prompts")
    rows = [rows[k * len(rows) // n] for k in range(n)] if n is not None else rows
    if 0 < sum("source" in row for row in rows) < len(rows):
        raise ValueError(f"{path}: some prompts have a source and some have none; give one for each, or two files")
    keys = dict.fromkeys(key for row in rows for key in row if key != "prompt")
    return Benchmark(path.stem, "", [row["prompt"] for row in rows], {key: [row.get(key) for row in rows] for key in keys})


def _row(line: str, path: Path, number: int, jsonl: bool) -> dict[str, Any]:
    if not jsonl:
        return {"prompt": line.strip()}
    try:
        row = json.loads(line)
    except ValueError as e:
        raise ValueError(f"{path}, line {number}: no JSON ({e})") from e
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{path}, line {number}: expected an object with "prompt", and found {line.strip():.80}')
    where = f"{path}, line {number}"
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: the prompt is not UTF-8 ({e.reason})") from e
    if row.get("tag") is not None and not (isinstance(row["tag"], str) and row["tag"].strip() and row["tag"] not in TAKEN_TAGS):
        raise ValueError(f"{where}: the tag is {row['tag']!r}; give a text, other than {' and '.join(map(repr, TAKEN_TAGS))}")
    if "include" in row:
        whole = {k: row[k] for k in ("tag", "include", "exclude", "prompt") if k in row}
        try:
            row = {k: v for k, v in row.items() if k not in ("include", "exclude")} | {
                "geneval": checked(whole, prompt) and whole
            }
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    if "source" in row:
        row["source"] = str((path.parent / str(row["source"])).resolve())
        if not Path(row["source"]).is_file():
            raise ValueError(f"{where}: there is no picture at {row['source']}")
    if taken := TAKEN & set(row):
        raise ValueError(f"{where}: the key {sorted(taken)[0]!r} is taken; rename it")
    return row
