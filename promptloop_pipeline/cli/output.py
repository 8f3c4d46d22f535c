"""Where commands write, and how they print."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def quiet_libraries() -> None:
    """Notices of the libraries below are not the user's concern here; warnings of ours are. To be called before they load."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def check_text(prompt: str) -> None:
    """Raises ValueError for a prompt that is empty, or not UTF-8 (a terminal's other encodings arrive as lone surrogates)."""
    if not prompt.strip():
        raise ValueError('the prompt is empty; say what you want to see, for example "a red circle left of a blue square"')
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the prompt {prompt!r:.80} is not UTF-8; set the terminal to UTF-8") from e


def fresh_folder(wanted: Path) -> Path:
    """`wanted`, or its first numbered neighbour if something is there already: nothing is ever written over.

    Raises OSError, naming the folder, when it cannot be written.
    """
    wanted = wanted.expanduser().resolve()
    folder, number = wanted, 2
    while folder.is_dir() and any(folder.iterdir()):
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".promptloop"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise OSError(f"cannot write to the folder {folder}: {e.strerror or e}; choose another one with --out") from e
    return folder


def checked_folder(wanted: Path, option: str) -> Path:
    """Absolute; nothing is made yet. Raises OSError, naming the folder and the option, where it could not be written."""
    folder = wanted.expanduser().resolve()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"cannot write to the folder {folder}; choose another one with {option}")
    return folder


def write_json(file: Path, content: Any) -> None:
    """As a whole or not at all."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Plain aligned columns, the same in a terminal and in a log."""
    keys = list(rows[0])
    widths = [max(len(k), *(len(r[k]) for r in rows)) for k in keys]
    for row in [dict(zip(keys, keys)), *rows]:
        print("  ".join(row[k].ljust(w) for k, w in zip(keys, widths)).rstrip())
