"""Rewards of pictures that lie on disk, arm by arm, into a file beside them: `scores.jsonl`, one line a picture and reward.

Scores are kept apart from the pictures so that a reward can be added, or asked again after it failed, without rendering anything, and
so that no reward has to share a GPU with the generator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..reward import Judgement, Reward, ask_each
from ..rewards.images import load_image
from ..trajectory import FILE, Trajectory, iterate
from .arms import cut_torn

SCORES = "scores.jsonl"
Found = dict[str, dict[str, Judgement]]  # reward -> id of a trajectory -> what it said


def read_scores(folder: Path, by: Mapping[str, str] | None = None) -> Found:
    """What rewards said of an arm's pictures; a line that was torn off in writing is cut off. Of several lines on one picture the last
    counts. by: for each reward, by what it judges (weights, files, what it is told); lines that were written by another are left
    out. Raises ValueError naming a line that is damaged."""
    file = folder / SCORES
    found: Found = {}
    if not file.is_file():
        return found
    cut_torn(file)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if by is None or by.get(row["reward"], row["by"]) == row["by"]:
                found.setdefault(row["reward"], {})[row["id"]] = Judgement(row["score"], row["details"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{file}, line {number}: no score ({type(e).__name__}: {e}); delete the file to score anew") from e
    return found


def failed(judgement: Judgement | None) -> bool:
    """Whether it is to be asked (again): a score that is missing for a reason that may pass."""
    return judgement is None or (judgement.score is None and "error" in judgement.details)


def score_arm(
    folder: Path,
    name: str,
    reward: Reward,
    context: Mapping[str, Sequence[Any]],
    *,
    batch: int,
    by: str = "",
    pictures: bool = True,
    previews: bool = False,
    progress: Callable[[int], Any] = lambda n: None,
) -> None:
    """Asks a reward for the pictures of an arm that it has not scored, batch by batch. What it fails on gets the error for its
    details, and a warning tells of it.

    context: of each sample, by its position, which is its id. by: as for `read_scores`. pictures, previews: whether the reward
    looks at the finished pictures, and at those of the turns.
    """
    said = read_scores(folder, {name: by}).get(name, {})
    waiting = (t for t in iterate(folder / FILE, pictures=False, previews=False) if failed(said.get(t.id)))
    todo = {t.id for t in waiting}
    if not todo:
        return
    for part in _batches((t for t in iterate(folder / FILE, pictures=pictures, previews=previews) if t.id in todo), batch):
        rows = [int(t.id) for t in part]
        given = {key: [values[i] for i in rows] for key, values in context.items()}
        if "source" in given:
            given["source"] = [None if path is None else load_image(path) for path in given["source"]]
        found = ask_each(
            reward, [t.image for t in part], [t.request for t in part], name, refined=[t.prompt for t in part],
            format_ok=[_format_ok(t) for t in part], trajectories=part, **given,
        )  # fmt: skip
        lines = [
            {"id": t.id, "reward": name, "by": by, "score": j.score, "details": j.details}
            for t, j in zip(part, found, strict=True)
        ]
        try:
            with open(folder / SCORES, "a", encoding="ascii") as f:
                f.writelines(json.dumps(line, default=str) + "\n" for line in lines)
        except OSError as e:
            raise OSError(
                f"cannot write scores to {folder / SCORES}: {e.strerror or e}; the pictures are there, run it again"
            ) from e
        progress(len(part))


def _format_ok(t: Trajectory) -> float | None:
    """Share of the turns that were asked for a form and kept it."""
    asked = [turn.format_ok for turn in t.turns if turn.format_ok is not None]
    return sum(asked) / len(asked) if asked else None


def _batches(items: Iterable[Trajectory], size: int) -> Iterable[list[Trajectory]]:
    them = iter(items)
    while part := list(islice(them, size)):
        yield part
