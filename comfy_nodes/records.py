"""Recorded runs: found on disk, read from pictures, and told in words. Nothing here needs ComfyUI."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promptloop_pipeline.replay import prompt_editing, prompt_schedule
from promptloop_pipeline.trajectory import FILE, Trajectory, Turn, from_record, load

KEY = "promptloop"
DEPTH = 3  # levels of folders that are searched for records
NESTED = 16  # levels of JSON within a run; ComfyUI copies its history again and again
MOST = 10**9  # steps
RECORDS = (".jsonl",)
FORMS = ("json", "prompt editing", "table")


# --- on disk ------------------------------------------------------------------------------------------------------------


def folder_in(output: str | Path, name: str) -> Path:
    """A folder below `output`. Raises ValueError for one that is not, or has no name."""
    text, root = name.strip().replace("\\", "/"), Path(output).resolve()
    found = root if "\0" in text else (root / text).resolve()
    if not text or found == root or not found.is_relative_to(root) or text.startswith(("/", "~")) or ":" in text:
        raise ValueError(
            f'the folder {name!r} is not inside of ComfyUI\'s output folder; use a name such as "promptloop" or "cats/monday"'
        )
    return found


def saved(folder: str | Path) -> list[str]:
    """Records that `trajectory.save` made below a folder, as paths from it, in order."""
    return sorted(str(path.relative_to(folder).as_posix()) for path in _records(Path(folder), DEPTH))


def _records(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # not there, or nothing to be read by us
        return
    for entry in entries:
        if entry.name == FILE and entry.is_file():
            yield Path(entry.path)
        elif depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and entry.name != "images":
            yield from _records(Path(entry.path), depth - 1)


def stamp(path: str | Path) -> str:
    """Another text for a file that was written since."""
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"


# --- reading ------------------------------------------------------------------------------------------------------------


def read(path: str | Path, run: str = "", sample: int = 0) -> list[Trajectory]:
    """Runs from a picture's metadata, or from what `trajectory.save` wrote.

    run: of a picture with runs of several nodes the node's id; of a record the id of a run; empty: what there is, if that is one run.
    sample: 0: all of it; from 1: that one alone.
    Raises FileNotFoundError, or ValueError that says what there is.
    """
    path, run = Path(path), run.strip()
    if path.suffix.lower() in RECORDS:
        try:
            found = [_checked(t) for t in load(path)]
        except RecursionError:
            raise ValueError(f"{path.name} cannot be read: it is nested too deeply") from None
        if run:
            found = _chosen({t.id: [t] for t in found}, run, path, "run")
    else:
        found = _chosen(in_picture(path), run, path, "node")
    if sample > len(found):
        raise ValueError(f"{path.name} has {len(found)} pictures of that run, and no sample {sample}; use 0 for all of them")
    return [found[sample - 1]] if sample else found


def _chosen(runs: dict[str, list[Trajectory]], run: str, path: Path, what: str) -> list[Trajectory]:
    if not run and len(runs) == 1:
        return next(iter(runs.values()))
    if run not in runs:
        known = ", ".join(list(runs)[:20]) + (" ..." if len(runs) > 20 else "")
        asked = f"there is no run {run!r} in {path.name}" if run else f"{path.name} holds runs of several nodes"
        raise ValueError(f"{asked}; write one of these into run (the {what}'s id): {known}")
    return runs[run]


def in_picture(path: str | Path) -> dict[str, list[Trajectory]]:
    """The runs in a PNG's metadata, by the id of the node that made them. Raises FileNotFoundError or ValueError."""
    from PIL import Image

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name} any more; choose another")
    try:
        with Image.open(path) as picture:
            picture.load()  # the text may stand behind the pixels
            text = getattr(picture, "text", {}).get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path.name} cannot be read as a picture: {e}") from e
    if text is None:
        raise ValueError(f"{path.name} holds no run of PromptLoop; choose a PNG that was saved after one, as ComfyUI wrote it")
    return parse_metadata(text, path.name)


def parse_metadata(text: str, name: str) -> dict[str, list[Trajectory]]:
    """The runs in {"version": 1, "runs": {node id: {"trajectories": [...]}}}. Raises ValueError."""
    try:
        data = json.loads(text)
        runs = {str(node): [_checked(from_record(row)) for row in made["trajectories"]] for node, made in data["runs"].items()}
    except RecursionError:
        raise ValueError(f"the run in {name} cannot be read: it is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"the run in {name} cannot be read ({type(e).__name__}: {e})") from e
    if not runs:
        raise ValueError(f"{name} was saved before its run was finished, and holds none")
    return runs


def _checked(trajectory: Trajectory) -> Trajectory:
    """What comes from a file may hold anything; what is drawn, replayed and kept in ComfyUI's history relies on this. A number that is
    none (nan, inf) becomes None: browsers cannot read JSON that holds one. Raises ValueError."""
    if not isinstance(trajectory.id, str) or not re.fullmatch(r"[\w-]{1,64}", trajectory.id):
        raise ValueError(f"the id of a run is {trajectory.id!r:.80}; use 1 to 64 letters, digits, - and _")
    for turn in trajectory.turns:
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(turn, name), kind):
                raise ValueError(f"{name} of a turn is {value!r:.80}, and no {getattr(kind, '__name__', kind)}")
            if kind in (int, _STEP) and value is not None and not 0 <= value <= MOST:
                raise ValueError(f"{name} of a turn is out of range; use 0 to {MOST}")
        if not all(isinstance(note, str) for note in turn.notes):
            raise ValueError("the notes of a turn are no texts")
    if not isinstance(trajectory.scores, dict) or not isinstance(trajectory.meta, dict):
        raise ValueError("scores or meta are no JSON objects")
    trajectory.turns = [replace(t, sigma=_finite(t.sigma), seconds=_finite(t.seconds)) for t in trajectory.turns]
    trajectory.scores, trajectory.meta = _finite(trajectory.scores), _finite(trajectory.meta)
    trajectory.others = [_checked(other) for other in trajectory.others]
    return trajectory


_STEP = int | None
_KINDS: dict[str, Any] = {
    "step": int, "num_steps": int, "applied": _STEP, "before": str, "after": str, "reasoning": str, "raw": str, "error": str | None,
    "boundary": str | None, "sigma": int | float | None, "seconds": dict, "tokens": _STEP, "format_ok": bool | None,
}  # fmt: skip


def _finite(value: Any, depth: int = 0) -> Any:
    """JSON values with None for numbers that are none. Raises ValueError for what is nested so deeply that copying it would fail."""
    if depth > NESTED:
        raise ValueError(f"it is nested more than {NESTED} levels deep")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(v, depth + 1) for v in value]
    return {k: _finite(v, depth + 1) for k, v in value.items()} if isinstance(value, dict) else value


# --- in words -----------------------------------------------------------------------------------------------------------


def text_of(history: Sequence[Trajectory]) -> str:
    """All runs, turn by turn, to be read and copied."""
    return "\n\n".join(_told(t, k if len(history) > 1 else None) for k, t in enumerate(history))


def _told(trajectory: Trajectory, number: int | None) -> str:
    lines = [f"picture {number}"] if number is not None else []
    lines.append(f"request: {trajectory.request}")
    for turn in trajectory.turns:
        lines += _turn(turn)
    lines.append(f"final prompt: {trajectory.prompt}")
    lines += [f"{name}: {f'{v:.4f}' if isinstance(v, float) else v}" for name, v in trajectory.scores.items() if v is not None]
    return "\n".join(lines)


def _turn(turn: Turn) -> list[str]:
    where = f"step {turn.step} of {turn.num_steps}"
    lines = [f"{where}: {turn.after}" if turn.changed else f"{where}: kept"]
    if turn.error:
        lines.append(f"    failed ({turn.boundary}): {turn.error}")
    lines += [f"    why: {line}" for line in turn.reasoning.splitlines() if line.strip()]
    return lines + [f"    note: {note}" for note in turn.notes]


def exported(trajectory: Trajectory, form: str) -> str:
    """The prompts by step: "json" as `replay.save_schedule` writes it, "prompt editing" for the web UI, "table" to be read.

    Raises ValueError for another form.
    """
    if form == "prompt editing":
        return prompt_editing(trajectory)
    schedule = prompt_schedule(trajectory)
    num_steps = trajectory.turns[0].num_steps if trajectory.turns else None
    if form == "json":
        return json.dumps({"num_steps": num_steps, "prompts": schedule}, indent=1, ensure_ascii=False)
    if form == "table":
        rows = [f"{step:>6}  {step / num_steps if num_steps else 0:>5.0%}  {prompt}" for step, prompt in schedule.items()]
        return "\n".join(["  step  share  prompt", *rows])
    raise ValueError(f"form is {form!r}; use {', '.join(FORMS)}")


def schedules(history: Sequence[Trajectory]) -> Any:
    """For `ScheduleRefiner`: one schedule where all pictures had the same, else one for each. Raises ValueError for no run."""
    if not history:
        raise ValueError("the history is empty; there is no run to be played again")
    each = [prompt_schedule(t) for t in history]
    return each[0] if all(s == each[0] for s in each) else each
