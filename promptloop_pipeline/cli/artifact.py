"""`promptloop artifact`: trains the reward `artifact` on a folder of good and a folder of bad pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .named import DTYPES
from .output import checked_folder, print_table, quiet_libraries, write_json

REPORT = "report.json"
CLIP = "openai/clip-vit-large-patch14"


def artifact(
    good: Annotated[Path, typer.Argument(help="Folder of good pictures, with those in its folders; at least 10.")],
    bad: Annotated[Path, typer.Argument(help="Folder of bad pictures, likewise: what the model must not drift into.")],
    out: Annotated[Path, typer.Option(help="Folder for the guard and its report.")] = Path("promptloop-artifact"),
    clip: Annotated[
        str, typer.Option(help='Folder or hub id of a CLIP model; "none": pixel statistics alone, which need no weights.')
    ] = CLIP,
    device: Annotated[str | None, typer.Option(help='"cuda", "cpu", ...; default: the best there is.')] = None,
    dtype: Annotated[str, typer.Option(help=f"Of CLIP: {', '.join(DTYPES)}.")] = "float32",
    batch: Annotated[int, typer.Option(help="Pictures at a time through CLIP.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Learns what broken pictures of your model look like; `promptloop score --reward artifact --model artifact=DIR` then uses it."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    if batch < 1:
        raise ValueError(f"--batch {batch}: give a number from 1 up")
    for what, folder in (("good", good), ("bad", bad)):
        if not folder.expanduser().is_dir():
            raise NotADirectoryError(f"there is no folder {folder} of {what} pictures")
    folder = checked_folder(out, "--out")
    quiet_libraries()
    from ..rewards.artifact import check_target, fit

    check_target(folder)  # before minutes of work
    _check_report(folder / REPORT)
    place = None if clip.lower() == "none" else clip
    guard = fit(good, bad, clip=place, device=device, dtype=dtype, batch_size=batch)
    guard.save(folder)
    write_json(folder / REPORT, guard.report)
    if as_json:
        print(json.dumps({"folder": str(folder), **guard.report}, indent=1))
        return
    report = guard.report
    print(f"{report['good']} good and {report['bad']} bad pictures{_note(report)}. On pictures held out of training:\n")
    rows = (("AUC", "auc"), ("good pictures kept (above .5)", "good_kept"), ("bad pictures caught", "bad_caught"))
    print_table(
        [{"": label, "value": _shown(report[key], "value"), "95% interval": _interval(report[key])} for label, key in rows]
    )
    print(f'\n{folder}\npromptloop score IMAGE... --prompt "..." --reward artifact --model artifact={folder}')


def _note(report: dict[str, Any]) -> str:
    parts = []
    if report["duplicates"]:
        parts.append(f"{report['duplicates']} duplicates left out")
    if report["clip"] and not report["clip_used"]:
        parts.append("CLIP did not help and is not used")
    return f" ({'; '.join(parts)})" if parts else ""


def _shown(figure: dict[str, float], key: str) -> str:
    return f"{figure[key]:.3f}"


def _interval(figure: dict[str, float]) -> str:
    return f"[{_shown(figure, 'low')}, {_shown(figure, 'high')}]"


def _check_report(file: Path) -> None:
    """Raises FileExistsError for a file of that name that this command did not write."""
    if not file.exists():
        return
    try:
        ours = json.loads(file.read_text(encoding="utf-8"))["kind"] == "promptloop artifact"
    except (ValueError, KeyError, TypeError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(f"{file} is there and was not written by this command; choose another folder with --out")
