"""The record of a generation: what was seen, said, applied and scored, and at what cost.

One record serves as ComfyUI history, training sample and evaluation row. On disk: a folder with `trajectories.jsonl`, one
record a line, and the pictures as PNG files beside it. Reading gives back exactly what was written. A field that a file
lacks gets its default, so files of older versions stay readable; a file of a newer version is refused by name.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("promptloop")
VERSION = 1
FILE = "trajectories.jsonl"


@dataclass(frozen=True)
class Turn:
    """One look. `before` and `after` are equal when the prompt was kept.

    step, num_steps, sigma, image: as in `View`; the new prompt acts from `step` on, or from the step `applied` on: a later one where
    the run did not wait for the refiner, 0 where a finished picture was looked at and the next one is made with it. raw, token_ids,
    logprobs, tokens, format_ok: as in `Refinement`. notes: what guards did. error: why nothing was applied, if so, and `boundary`
    where: "preview", "refiner", or "encode". seconds: what the turn cost, by part (preview, refiner, encode); a batch is asked as
    one, so the parts are those of the whole batch.
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
    tokens: int | None = None
    format_ok: bool | None = None
    notes: tuple[str, ...] = ()
    applied: int | None = None

    @property
    def changed(self) -> bool:
        return self.before != self.after


@dataclass
class Trajectory:
    """One sample's generation. `image`: the finished picture, if there was one. `scores`: raw values by reward name, against
    `request`. `meta`: whatever the host knows (pipeline, scheduler, seed, steps), JSON values only. `others`: runs for the same
    request that were made to choose from and not chosen (a gate's other arm, other rounds)."""

    request: str
    turns: list[Turn] = field(default_factory=list)
    image: Image | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    others: list[Trajectory] = field(default_factory=list)
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

    Nothing that is there is written over. numpy's numbers become plain ones; whatever else JSON cannot hold becomes its text.
    Returns the file. Raises OSError, naming the folder, when it cannot be written; ValueError for an id that is no plain name.
    """
    folder = Path(folder)
    file = folder / FILE
    records = [(t, to_record(t)) for t in trajectories]
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for t, record in records:
            _write_images(t, record, folder)
            torn = _torn(file)
            with open(file, "a", encoding="ascii") as f:
                f.write(("\n" if torn else "") + json.dumps(record, default=_plain) + "\n")
    except OSError as e:
        raise OSError(f"cannot write trajectories to {folder}: {e}; choose a folder that you may write to") from e
    return file


def _torn(file: Path) -> bool:
    """Whether somebody was killed in writing the last line."""
    if not file.exists() or not file.stat().st_size:
        return False
    with open(file, "rb") as f:
        f.seek(-1, 2)
        return f.read(1) != b"\n"


def load(path: str | Path) -> list[Trajectory]:
    """Reads a folder written by `save`, or its .jsonl file. A last line that was torn off in writing is left out, with a warning.

    Raises FileNotFoundError, or ValueError naming the line.
    """
    return list(iterate(path))


def iterate(path: str | Path, *, pictures: bool = True, previews: bool = True) -> Iterator[Trajectory]:
    """As `load`, one at a time, for files whose pictures are more than memory holds. pictures, previews: whether to read them; else
    they are None."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no trajectories at {path}: expected a folder with {FILE}, or such a file")
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _from_record(json.loads(line), file.parent, pictures, previews)
            except json.JSONDecodeError as e:
                if line.endswith("\n"):
                    raise ValueError(f"{file}, line {number}: not a trajectory ({e})") from e
                logger.warning("%s, line %d was torn off in writing and is left out", file, number)
            except (KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{file}, line {number}: not a trajectory ({type(e).__name__}: {e})") from e
            except (ValueError, OSError) as e:
                raise ValueError(f"{file}, line {number}: {e}") from e


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)


def _write_images(t: Trajectory, record: dict[str, Any], folder: Path) -> None:
    record["image"] = _write_image(t.image, folder, t.id)
    for k, turn in enumerate(t.turns):
        record["turns"][k]["image"] = _write_image(turn.image, folder, f"{t.id}-{k:02d}")
    for other, row in zip(t.others, record["others"], strict=True):
        _write_images(other, row, folder)


def _write_image(image: Image | None, folder: Path, stem: str) -> str | None:
    if image is None:
        return None
    data = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")).save(data, "PNG")
    name, number = f"images/{stem}.png", 2
    while (folder / name).exists():
        name, number = f"images/{stem}.{number}.png", number + 1
    (folder / name).write_bytes(data.getvalue())
    return name


def _read_image(name: str | None, folder: Path) -> Image | None:
    if name is None:
        return None
    import PIL.Image

    if not (folder / name).resolve().is_relative_to((folder / "images").resolve()):
        raise ValueError(
            f"the picture {name!r} lies outside of {folder / 'images'}; a record may only name what was saved with it"
        )
    with PIL.Image.open(folder / name) as image:
        image.load()
        return image.copy()


def to_record(t: Trajectory) -> dict[str, Any]:
    """A run as JSON values, without its pictures. Raises ValueError for an id that is no plain name."""
    if not re.fullmatch(r"[\w-]{1,64}", t.id):
        raise ValueError(f"the id {t.id!r} cannot name files; use 1 to 64 letters, digits, - and _")
    turns = [{f.name: getattr(turn, f.name) for f in fields(Turn) if f.name != "image"} for turn in t.turns]
    others = [to_record(other) for other in t.others]
    return {
        "version": VERSION, "id": t.id, "request": t.request, "scores": t.scores, "meta": t.meta, "turns": turns, "others": others,
    }  # fmt: skip


def from_record(record: dict[str, Any]) -> Trajectory:
    """What `to_record` made of a run. Raises ValueError, KeyError or TypeError for what is none."""
    return _from_record(record, Path(), False, False)


def _from_record(record: dict[str, Any], folder: Path, pictures: bool = True, previews: bool = True) -> Trajectory:
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
        image = _read_image(row.get("image"), folder) if previews else None
        turns.append(replace(turn, image=image, token_ids=ids, logprobs=logprobs, notes=tuple(turn.notes)))
    if not isinstance(record["request"], str):
        raise ValueError(f"the request is {type(record['request']).__name__}, not text")
    known = {k: record[k] for k in ("scores", "meta", "id") if k in record}
    others = [_from_record(other, folder, pictures, previews) for other in record.get("others", [])]
    image = _read_image(record.get("image"), folder) if pictures else None
    return Trajectory(record["request"], turns, image, **known, others=others)
