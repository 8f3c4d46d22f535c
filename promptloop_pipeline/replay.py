"""What a run was really made with, {step: prompt}: to be kept, to be played again without the refiner, to be taken elsewhere.

schedule = prompt_schedule(out.trajectories[0])               # {0: "a cat", 6: "a black cat"}
again = ScheduleRefiner(schedule)
pipe("a cat", refiner=again, refine_at=again.refine_at, ...)  # the same picture, bit by bit
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .trajectory import Trajectory


def prompt_schedule(trajectory: Trajectory) -> dict[int, str]:
    """{step: the prompt in use from it on}: at 0 the one that the run began with, later on only where it changed.

    What a turn after the end said changed nothing in the picture and is left out.
    """
    prompts = {0: trajectory.turns[0].before if trajectory.turns else trajectory.request}
    for turn in trajectory.turns:
        step = turn.step if turn.applied is None else turn.applied
        if turn.changed and step < turn.num_steps:
            prompts[step] = turn.after
    steps = sorted(prompts)
    return {k: prompts[k] for previous, k in zip([None, *steps], steps) if previous is None or prompts[k] != prompts[previous]}


def save_schedule(trajectory: Trajectory, path: str | Path) -> Path:
    """Writes {"num_steps": 20, "prompts": {"0": "a cat", "6": "a black cat"}} as JSON. `num_steps` is null where no turn tells it.

    Raises FileExistsError rather than write over a file.
    """
    path = Path(path)
    num_steps = trajectory.turns[0].num_steps if trajectory.turns else None
    text = json.dumps({"num_steps": num_steps, "prompts": prompt_schedule(trajectory)}, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8", errors="surrogatepass") as f:
            f.write(text + "\n")
    except FileExistsError as e:
        raise FileExistsError(
            f"{path} is there already and is not written over; choose another name, or delete it first"
        ) from e
    return path


def load_schedule(path: str | Path) -> dict[int, str]:
    """Reads what `save_schedule` wrote, or somebody's own of that form; `num_steps` may be left out.

    Raises FileNotFoundError, or ValueError that says what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt schedule at {path}: expected a JSON file as save_schedule writes it")
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except ValueError as e:  # of json, or of the encoding
        raise ValueError(f"{path} is not JSON ({e}); {_FORM}") from e
    prompts = record.get("prompts") if isinstance(record, dict) else None
    if not isinstance(prompts, dict):
        raise ValueError(f"{path} has no prompts by step; {_FORM}")
    num_steps = record.get("num_steps")
    if num_steps is not None and (isinstance(num_steps, bool) or not isinstance(num_steps, int)):
        raise ValueError(f"{path}: num_steps is {num_steps!r}; {_FORM}")
    for step, prompt in prompts.items():
        if not re.fullmatch(r"[0-9]{1,9}", step):
            raise ValueError(f"{path}: the step {step!r} is not a number from 0 on; {_FORM}")
        if num_steps is not None and int(step) >= num_steps:
            raise ValueError(f"{path}: step {step} lies beyond a run of {num_steps} steps; use steps from 0 to {num_steps - 1}")
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: the prompt of step {step} is {type(prompt).__name__}, not text; {_FORM}")
    return {int(step): prompts[step] for step in sorted(prompts, key=int)}


_FORM = 'it should look like {"num_steps": 20, "prompts": {"0": "a cat", "6": "a black cat"}}'


def prompt_editing(trajectory: Trajectory, *, shares: bool = False) -> str:
    """The run in the prompt-editing syntax of AUTOMATIC1111's web UI, which other hosts read too.

    `[from:to:when]` is `from` for the first `when` steps and `to` after them; a `when` with a decimal point is a share of all steps
    (`shares=True`, for hosts that read no other and for runs of another length). More than one change nests: `[[a:b:4]:c:9]` is a
    up to step 4, b up to step 9, then c. Steps are counted as ours: `to` acts from our step `when` on, the first one being 0. The
    web UI's own sampler compares `step <= when` and so changes one step later than this; for its pictures subtract 1.

    What the syntax would take for its own stands behind a backslash: brackets for attention and editing, colons, bars, backslashes
    and the words AND and BREAK. The web UI takes these backslashes out again.
    """
    schedule = prompt_schedule(trajectory)
    num_steps = trajectory.turns[0].num_steps if trajectory.turns else 0
    text = _escaped(schedule.pop(0))
    for step, prompt in schedule.items():
        text = f"[{text}:{_escaped(prompt)}:{_share(step, num_steps) if shares else step}]"
    return re.sub(r"(:\s*)([-+]?[.\d]+\s*)$", r"\1\\\2", text)  # a number after a last colon would be the weight of it all


def _share(step: int, num_steps: int) -> str:
    """Read back as int(share * num_steps), it must give the step."""
    share = f"{step / num_steps:.4f}"
    return share if int(float(share) * num_steps) == step else f"{step / num_steps + 1e-4:.4f}"


def _escaped(prompt: str) -> str:
    return re.sub(r"[\\\[\]():|]|(?<=\bA)(?=ND\b)|(?<=\bB)(?=REAK\b)", lambda m: "\\" + m[0], prompt)
