"""One page that shows what arms of an experiment made of the same requests, and each look that led there.

A single file without scripts and without references to anything outside, so that it can be opened from disk, mailed and
archived. Prompts and model output are untrusted: all text is escaped, and the page's policy allows only its own pictures.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .diff import word_diff
from .plots import Plot
from .style import POLICY, STYLE

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..trajectory import Trajectory, Turn

PICTURE, THUMBNAIL = 512, 256  # pixels of the longer side, at most
Rows = Sequence[Mapping[str, str]]

_NUMBER = re.compile(r"[-+±\u2212]?[.\d]|[-\u2013\u2014]?$")


@dataclass(frozen=True)
class Arm:
    """One way to generate. The arms of a report have the same requests, with the same seeds, in the same order."""

    name: str
    note: str
    trajectories: list[Trajectory]


def write_report(
    arms: Sequence[Arm], path: str | Path, *,
    title: str, intro: str = "", table: Rows = (), tables: Sequence[tuple[str, Rows]] = (), plots: Sequence[Plot] = (),
    pixelated: bool = False,
) -> Path:  # fmt: skip
    """Writes the page and returns its file.

    path: the .html file, or a folder that gets an index.html; made where missing, replaced as a whole where present.
    table: rows of the summary; the keys of the first row are the header (columns that only later rows have come last).
    tables: further ones, each (title, rows), below the summary; one without rows is left out. plots: figures below the tables.
    pixelated: enlarge small pictures with hard edges; otherwise they are shown no larger than they are.
    A score is shown as passed or failed when it is a bool or its name contains "strict".

    Raises ValueError when the arms do not match, OSError, naming the file, when it cannot be written.
    """
    _check(arms)
    file = Path(path)
    file = file if file.suffix.lower() in (".html", ".htm") else file / "index.html"
    page = "\n".join(_page(arms, title, intro, [("Summary", table), *tables], plots, pixelated))
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(page.encode("utf-8", "replace"))  # a model may emit lone surrogates
        unfinished.replace(file)
    except OSError as e:
        raise OSError(f"cannot write the report to {file}: {e.strerror or e}; choose a place that you may write to") from e
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return file


def _check(arms: Sequence[Arm]) -> None:
    if not arms:
        raise ValueError("a report needs at least one arm")
    if len({len(a.trajectories) for a in arms}) > 1:
        counts = ", ".join(f"{a.name!r} has {len(a.trajectories)}" for a in arms)
        raise ValueError(f"the arms differ in their number of trajectories: {counts}; all need the same requests, in order")
    for arm in arms[1:]:
        for i, (ours, theirs) in enumerate(zip(arms[0].trajectories, arm.trajectories, strict=True)):
            if ours.request != theirs.request:
                both = f"{arms[0].name!r} has the request {ours.request!r:.80}, {arm.name!r} has {theirs.request!r:.80}"
                raise ValueError(f"the arms differ at trajectory {i}: {both}; all need the same requests, in order")


def _page(
    arms: Sequence[Arm], title: str, intro: str, tables: Sequence[tuple[str, Rows]], plots: Sequence[Plot], pixelated: bool
) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>'
    yield f'<body{" class=pixelated" if pixelated else ""}>\n<header>\n<h1 dir="auto">{escape(title)}</h1>'
    yield (f'<p class="intro" dir="auto">{escape(intro)}</p>\n' if intro else "") + "</header>\n<main>"
    for k, (name, rows) in enumerate(tables):
        if rows:
            yield from _table(name, rows, f"table-{k}")
        if k == 0 and any(a.note for a in arms):
            notes = (f'<div><dt dir="auto">{escape(a.name)}</dt><dd dir="auto">{escape(a.note)}</dd></div>' for a in arms)
            yield f'<section aria-label="What is compared">\n<dl class="arms">{"".join(notes)}</dl>\n</section>'
    if plots:
        yield f'<section aria-label="Figures" class="plots">{"".join(map(_plot, plots))}</section>'
    for i in range(len(arms[0].trajectories)):
        yield from _prompt(arms, i)
    yield "</main>\n</body>\n</html>\n"


def _table(title: str, rows: Rows, name: str) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [c for c in columns[1:] if all(_NUMBER.match(row.get(c, "")) for row in rows)]
    css = {c: ' class="number"' if c in numeric else "" for c in columns}
    head = (f'<th scope="col"{css[c]}>{escape(c)}</th>' for c in columns)
    yield f'<section aria-labelledby="{name}">\n<h2 id="{name}" dir="auto">{escape(title)}</h2>'
    yield f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">'
    yield f"<table>\n<thead><tr>{''.join(head)}</tr></thead>\n<tbody>"
    for row in rows:
        cells = (f'<td dir="auto"{css[c]}>{escape(row.get(c, ""))}</td>' for c in columns[1:])
        yield f'<tr><th scope="row" dir="auto">{escape(row.get(columns[0], ""))}</th>{"".join(cells)}</tr>'
    yield "</tbody>\n</table>\n</div>\n</section>"


def _plot(plot: Plot) -> str:
    caption = f'<p class="small" dir="auto">{escape(plot.caption)}</p>' if plot.caption else ""
    return f'\n<figure><figcaption><h2 dir="auto">{escape(plot.title)}</h2>{caption}</figcaption>{plot.svg}</figure>'


def _prompt(arms: Sequence[Arm], i: int) -> Iterator[str]:
    n, of, samples = i + 1, len(arms[0].trajectories), [(a, a.trajectories[i]) for a in arms]
    yield f'<section class="prompt" aria-labelledby="prompt-{n}">\n<h2 id="prompt-{n}">Prompt {n} of {of}</h2>'
    yield f'<p class="request" dir="auto">{escape(samples[0][1].request)}</p>\n<div class="pictures">'
    for arm, t in samples:
        alt = f"{arm.name}: the finished picture for prompt {n}"
        yield f'<figure>{_picture(t.image, PICTURE, alt, "no picture")}<figcaption>\n<h3 dir="auto">{escape(arm.name)}</h3>'
        yield f'<dl class="scores">{"".join(_score(name, value) for name, value in t.scores.items())}</dl>' if t.scores else ""
        yield f'<p class="small">{_counts(t)}</p>\n</figcaption></figure>'
    yield "</div>"
    looking = [(arm, t) for arm, t in samples if t.turns]
    for arm, t in looking:
        # The first prompt shows what there is to unfold; the last arm is the one that a report is about.
        shown = " open" if len(arms) == 1 or (i == 0 and arm is looking[-1][0]) else ""
        counts = f"{_counts(t)}, {sum(turn.changed for turn in t.turns) or 'none'} rewrote the prompt"
        yield f'<details{shown}>\n<summary><h3 dir="auto">{escape(arm.name)}</h3> <span class="small">{counts}</span></summary>'
        yield f'<ol class="turns">{"".join(_turn(turn, arm.name) for turn in t.turns)}</ol>\n</details>'
    yield "</section>"


def _turn(turn: Turn, arm: str) -> str:
    when = "after the last step" if turn.step == turn.num_steps else f"step {turn.step} of {turn.num_steps}"
    picture = _picture(turn.image, THUMBNAIL, f"{arm}: what was seen, {when}", "no image yet")
    note = "" if turn.sigma is None else f' <span class="small">&sigma; {turn.sigma:.3f}</span>'
    note += "" if turn.changed else ' <span class="tag">prompt kept</span>'
    costs = (f"{part} {1000 * s:.0f} ms" if s < 1 else f"{part} {s:.1f} s" for part, s in turn.seconds.items())
    error = ""
    if turn.error is not None:
        where = f"Failed: {escape(turn.boundary)}" if turn.boundary else "Failed"
        error = f'\n<div class="error"><strong>{where}</strong><p dir="auto">{escape(turn.error)}</p></div>'
    notes = [*turn.notes, *([f"acted from step {turn.applied} on"] if turn.applied is not None else [])]
    rows = {
        "Seen": escape(turn.reasoning), "Prompt": word_diff(turn.before, turn.after), "Notes": escape("; ".join(notes)),
        "Time": escape(", ".join(costs)),
    }  # fmt: skip
    said = (f'<dt>{name}</dt><dd dir="auto">{content}</dd>\n' for name, content in rows.items() if content)
    head = f"<h4>{when[0].upper()}{when[1:]}{note}</h4>{error}"
    return f'\n<li><div class="thumbnail">{picture}</div>\n<div>{head}\n<dl>{"".join(said)}</dl></div></li>'


def _counts(t: Trajectory) -> str:
    n = len(t.turns)
    return f"{n} turn{'' if n == 1 else 's'}, {len(t.failures) or 'none'} failed" if n else "no turns"


def _score(name: str, value: float | None) -> str:
    mark, number = "", "not scored" if value is None else f"{float(value):.3f}"
    if value in (0, 1) and (isinstance(value, bool) or "strict" in name.lower()):
        word, sign = ("passed", "\u2713") if value else ("failed", "\u2717")
        mark = f'<span class="{word}" role="img" aria-label="{word}">{sign}</span> '
    return f'<div><dt dir="auto">{escape(name)}</dt><dd>{mark}{number}</dd></div>'


def _picture(image: Image | None, longest: int, alt: str, missing: str) -> str:
    if image is None:
        return f'<div class="missing">{missing}</div>'
    small = image.copy() if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    small.thumbnail((longest, longest))
    if max(small.size) > 128:  # a page of a hundred photographs must still open
        small.convert("RGB").save(data := io.BytesIO(), kind := "JPEG", quality=90)
    else:
        small.save(data := io.BytesIO(), kind := "PNG")
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{small.width}" height="{small.height}">'
