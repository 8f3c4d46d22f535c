"""The record of a generation: what was seen, said, applied and scored, and at what cost.

One record serves as ComfyUI history, training sample and evaluation row. On disk: a folder with `trajectories.jsonl`, one
record a line, and the pictures as PNG files beside it. Reading gives back exactly what was written. A field that a file
lacks gets its default, so files of older versions stay readable; a file of a newer version is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1
FILE = "trajectories.jsonl"


@dataclass(frozen=True)
class Turn:
    """One look. `before` and `after` are equal when the prompt was kept.

    step, num_steps, sigma, image: as in `View`. error: why nothing was applied, if so, and `boundary` where: "preview",
    "refiner", or "encode". seconds: what the turn cost, by part (preview, refiner, encode).
    """

    step: int
    num_steps: int
    before: str
    after: str
    sigma: float | None = None
    image: Image | None = None
    reasoning: str = ""
    raw: str = ""
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    error: str | None = None
    boundary: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return self.before != self.after


@dataclass
class Trajectory:
    """One sample's generation. `image`: the finished picture, if there was one. `scores`: raw values by reward name, against
    `request`. `meta`: whatever the host knows (pipeline, scheduler, seed, steps), JSON values only."""

    request: str
    turns: list[Turn] = field(default_factory=list)
    image: Image | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid4().hex[:16])

    @property
    def prompt(self) -> str:
        """The prompt in use at the end."""
        return self.turns[-1].after if self.turns else self.request

    @property
    def failures(self) -> list[Turn]:
        return [t for t in self.turns if t.error is not None]


def save(trajectories: Iterable[Trajectory], folder: str | Path) -> Path:
    """Appends to `folder/trajectories.jsonl`, pictures first, so that a line never names a picture that is not there.

    Returns the file. Raises OSError, naming the folder, when it cannot be written.
    """
    folder = Path(folder)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for t in trajectories:
            line = json.dumps(_record(t, folder), ensure_ascii=False)
            with open(folder / FILE, "a", encoding="utf-8") as f:
                f.write(line + "\n")
    except OSError as e:
        raise OSError(f"cannot write trajectories to {folder}: {e}; choose a folder that you may write to") from e
    return folder / FILE


def load(path: str | Path) -> list[Trajectory]:
    """Reads a folder written by `save`, or its .jsonl file. Raises FileNotFoundError, or ValueError naming the line."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no trajectories at {path}: expected a folder with {FILE}, or such a file")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                found.append(_from_record(json.loads(line), file.parent))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{file}, line {number}: not a trajectory ({type(e).__name__}: {e})") from e
            except ValueError as e:
                raise ValueError(f"{file}, line {number}: {e}") from e
    return found


def _write_image(image: Image | None, folder: Path, name: str) -> str | None:
    if image is None:
        return None
    image.save(folder / "images" / name)
    return f"images/{name}"


def _read_image(name: str | None, folder: Path) -> Image | None:
    if name is None:
        return None
    import PIL.Image

    with PIL.Image.open(folder / name) as image:
        image.load()
        return image.copy()


def _record(t: Trajectory, folder: Path) -> dict[str, Any]:
    turns = []
    for k, turn in enumerate(t.turns):
        row = {f.name: getattr(turn, f.name) for f in fields(Turn)}
        turns.append(row | {"image": _write_image(turn.image, folder, f"{t.id}-{k:02d}.png")})
    image = _write_image(t.image, folder, f"{t.id}.png")
    return {
        "version": VERSION, "id": t.id, "request": t.request, "image": image, "scores": t.scores, "meta": t.meta, "turns": turns,
    }  # fmt: skip


def _from_record(record: dict[str, Any], folder: Path) -> Trajectory:
    version = record["version"]
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"trajectory version {version} is newer than {VERSION}, the newest that this PromptLoop reads; upgrade it"
        )
    names = {f.name for f in fields(Turn)}
    turns = []
    for row in record.get("turns", []):
        turn = Turn(**{k: v for k, v in row.items() if k in names})
        ids = None if turn.token_ids is None else tuple(turn.token_ids)
        logprobs = None if turn.logprobs is None else tuple(turn.logprobs)
        turns.append(replace(turn, image=_read_image(row.get("image"), folder), token_ids=ids, logprobs=logprobs))
    known = {k: record[k] for k in ("scores", "meta", "id") if k in record}
    return Trajectory(record["request"], turns, _read_image(record.get("image"), folder), **known)
