"""Prompts to train on: the embedded world's, a file, or a `datasets` folder or hub id; and whatever else rewards are told of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from promptloop_pipeline.evaluation.benchmarks import from_file
from promptloop_pipeline.tiny.benchmark import requests

SHAPES, SHAPES_N = "shapes", 4096
SPLITS = ("train", "any", "test")
TAKEN = frozenset(  # by the trainer, which reads some columns of a dataset by their names, or by the loop
    ("request", "row", "prompts", "images", "image", "completion", "completions", "completion_ids", "chosen", "rejected", "messages",
     "environment", "trajectory_reward", "refined", "format_ok", "trajectories", "name")
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """requests: one each, in the order of their source. columns: what rewards are told of them, "tag" among it; a list, or the lazy
    column of a dataset. index: where in the columns each request is told of. digest: of the source's contents."""

    name: str
    requests: list[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    index: Sequence[int] = ()
    digest: str = ""
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.requests)

    def told(self, i: int) -> dict[str, Any]:
        """What is told of request `i`, besides itself."""
        return {name: column[int(self.index[i])] for name, column in self.columns.items()}

    def take(self, rows: Sequence[int]) -> Prompts:
        return replace(self, requests=[self.requests[i] for i in rows], index=[self.index[i] for i in rows])

    def without(self, texts: set[str]) -> Prompts:
        return self.take([i for i, request in enumerate(self.requests) if request not in texts])

    def tags(self) -> set[str]:
        return {str(self.columns["tag"][int(i)]) for i in self.index} if "tag" in self.columns else set()


def load_prompts(source: str, column: str = "prompt", n: int | None = None, seed: int = 0) -> Prompts:
    """source: "shapes:SPLIT" (the embedded world; with ":OBJECTS" 1 to 3 of them, else a mixture), a .jsonl or .txt file, or a dataset:
    a folder or hub id, "owner/name:split" for another split than train. column: the one with the request. n: that many, evenly
    spread, so that data sorted by kind stays mixed. seed: of shapes, which are other ones for each.

    Raises FileNotFoundError, OSError and ValueError, naming what there is.
    """
    if source == SHAPES or source.startswith(f"{SHAPES}:"):
        return _shapes(source, n, seed)
    path = Path(source).expanduser()
    if path.suffix in (".jsonl", ".txt"):
        found = _file(path, column)
    else:
        found = _dataset(source, column)
    if n is not None and n > len(found):
        raise ValueError(f"{n} prompts are wanted, and {source} has {len(found)}; ask for fewer")
    return found if n is None else found.take(_spread(len(found), n))


def hold_out(prompts: Prompts, n: int) -> tuple[Prompts, Prompts]:
    """(the rest, `n` of them, evenly spread); no text is in both. Raises ValueError where nothing would be left."""
    held = prompts.take(_spread(len(prompts), n)) if n <= len(prompts) else prompts
    rest = prompts.without(set(held.requests))
    if n > len(prompts) or not len(rest):
        raise ValueError(
            f"{prompts.name} has {len(prompts)} prompts, and {n} of them are to be held out for watching; lower watch_prompts, or name "
            "other prompts in watch_data"
        )
    return rest, held


def to_dataset(prompts: Prompts, conversational: bool = True) -> Any:
    """A `datasets.Dataset` for the trainer: "prompt", "request", "row", and what rewards are told. Rows are put together as they are
    read, so that pictures and nested lists come out as they are, and not as Arrow would have them."""
    from datasets import Dataset

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        where = batch["row"]
        asked = [prompts.requests[i] for i in where]
        told = [prompts.told(i) for i in where]
        return {
            "prompt": [[{"role": "user", "content": r}] if conversational else r for r in asked], "request": asked, "row": where,
            **{name: [t[name] for t in told] for name in prompts.columns},
        }  # fmt: skip

    return Dataset.from_dict({"row": list(range(len(prompts)))}).with_transform(rows)


def _spread(of: int, n: int) -> list[int]:
    return [k * of // n for k in range(n)]


# --- sources ------------------------------------------------------------------------------------------------------------


def _shapes(source: str, n: int | None, seed: int) -> Prompts:
    _, _, rest = source.partition(":")
    split, _, objects = rest.partition(":")
    split = split or "train"
    if split not in SPLITS or objects not in ("", "1", "2", "3"):
        raise ValueError(
            f"unknown prompts {source!r}; write shapes:{'|'.join(SPLITS)}, with :1, :2 or :3 for that many objects"
        )
    asked = requests(SHAPES_N if n is None else n, split, int(objects) if objects else None, seed=seed)
    return Prompts(source, asked, {}, range(len(asked)), _digest(asked))


def _file(path: Path, column: str) -> Prompts:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts at {path}")
    if path.suffix == ".jsonl":
        _check_column(path, column)
    found = from_file(path)
    if taken := TAKEN & set(found.context):
        raise ValueError(f"{path}: the key {sorted(taken)[0]!r} is taken; rename it")
    told = [[of[i] for of in found.context.values()] for i in range(len(found.requests))]
    digest = _digest([list(found.context), *zip(found.requests, told)])
    return Prompts(str(path), found.requests, found.context, range(len(told)), digest)


def _check_column(path: Path, column: str) -> None:
    """The first line has the prompt; the rest is read by `from_file`, which names the line."""
    if column != "prompt":
        raise ValueError(f'prompt_column is {column!r}: a .jsonl file has its prompts in "prompt"; rename that key')
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        first = next((line for line in f if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return
    if isinstance(row, dict) and column not in row:
        raise ValueError(
            f'{path} has no column "prompt"; there are {", ".join(row) or "none"}: rename the one with the prompts'
        )


def _dataset(source: str, column: str) -> Prompts:
    data, name = _open(source)
    if column not in data.column_names:
        raise ValueError(
            f"{source} has no column {column!r}; there are {', '.join(data.column_names)}: name the one with the prompts in "
            "prompt_column"
        )
    if not len(data):
        raise ValueError(f"{source} holds no prompt")
    asked = list(data[column])
    if wrong := [i for i, r in enumerate(asked) if not isinstance(r, str) or not r.strip()]:
        raise ValueError(f"{source}: row {wrong[0]} has the {column} {asked[wrong[0]]!r:.80}; every row needs a text there")
    left_out = tuple(c for c in data.column_names if c in TAKEN and c != column)
    names = [c for c in data.column_names if c != column and c not in TAKEN]
    plain = data.select_columns([column, *(c for c in names if _is_plain(data.features[c]))])
    return Prompts(name, asked, {c: data[c] for c in names}, range(len(asked)), _digest(plain), left_out)


def _open(source: str) -> tuple[Any, str]:
    """(the dataset, its name): a folder of `save_to_disk` or of data files, or a hub id; with its split."""
    import datasets

    place, colon, split = (
        source.rpartition(":") if ":" in source and not Path(source).expanduser().exists() else (source, "", "")
    )
    split = split if colon else "train"
    path = Path(place).expanduser()
    if not path.exists() and place.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no folder or file of prompts at {path}")
    try:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path) if path.exists() else place)
    except Exception as e:  # whatever its builders raise
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise OSError(
            f"cannot load the prompts {source!r}: no .jsonl or .txt file, and no dataset in a folder or on the hub, or no way to "
            f"reach it ({first[:200]})"
        ) from e
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"{place} has no split {split!r}; there are {', '.join(data)}: write {place}:SPLIT")
        data = data[split]
    return data, source


def _is_plain(feature: Any) -> bool:
    """Whether it is text and numbers, however nested: pictures and sounds are left out of the digest, for decoding all takes long."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(_is_plain, feature))
    inner = getattr(feature, "feature", None)
    return _is_plain(inner) if inner is not None else type(feature).__name__ in ("Value", "ClassLabel")


def _digest(rows: Any) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, default=str, sort_keys=True).encode())
    return total.hexdigest()[:16]
