"""One page that shows what arms of an experiment made of the same requests, and each look that led there.

A single file without scripts and without references to anything outside, so that it can be opened from disk, mailed and
archived. Prompts and model output are untrusted: all text is escaped, and the page's policy allows only its own pictures.
"""

from __future__ import annotations

import base64
import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..trajectory import Trajectory, Turn

PICTURE, THUMBNAIL = 512, 256  # pixels of the longer side, at most


@dataclass(frozen=True)
class Arm:
    """One way to generate. The arms of a report have the same requests, with the same seeds, in the same order."""

    name: str
    note: str
    trajectories: list[Trajectory]


def write_report(
    arms: Sequence[Arm], path: str | Path, *,
    title: str, intro: str = "", table: Sequence[dict[str, str]] = (), pixelated: bool = False,
) -> Path:  # fmt: skip
    """Writes the page and returns its file.

    path: the .html file, or a folder that gets an index.html; made where missing, replaced as a whole where present.
    table: rows of the summary; the keys of the first row are the header (columns that only later rows have come last).
    pixelated: enlarge small pictures with hard edges; otherwise they are shown no larger than they are.
    A score is shown as passed or failed when it is a bool or its name contains "strict".

    Raises ValueError when the arms do not match, OSError, naming the file, when it cannot be written.
    """
    _check(arms)
    file = Path(path)
    file = file if file.suffix.lower() in (".html", ".htm") else file / "index.html"
    page = "\n".join(_page(arms, title, intro, table, pixelated)).encode("utf-8", "replace")  # a model may emit lone surrogates
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(page)
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


def _page(arms: Sequence[Arm], title: str, intro: str, table: Sequence[dict[str, str]], pixelated: bool) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>'
    yield f'<body{" class=pixelated" if pixelated else ""}>\n<header>\n<h1 dir="auto">{escape(title)}</h1>'
    yield (f'<p class="intro" dir="auto">{escape(intro)}</p>\n' if intro else "") + "</header>\n<main>"
    if table:
        yield from _table(table)
    if any(a.note for a in arms):
        notes = (f'<div><dt dir="auto">{escape(a.name)}</dt><dd dir="auto">{escape(a.note)}</dd></div>' for a in arms)
        yield f'<section aria-label="What is compared">\n<dl class="arms">{"".join(notes)}</dl>\n</section>'
    for i in range(len(arms[0].trajectories)):
        yield from _prompt(arms, i)
    yield "</main>\n</body>\n</html>\n"


def _table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [c for c in columns[1:] if all(_NUMBER.match(row.get(c, "")) for row in rows)]
    css = {c: ' class="number"' if c in numeric else "" for c in columns}
    head = (f'<th scope="col"{css[c]}>{escape(c)}</th>' for c in columns)
    yield '<section aria-labelledby="summary">\n<h2 id="summary">Summary</h2>'
    yield '<div class="scroll" role="region" aria-labelledby="summary" tabindex="0">'
    yield f"<table>\n<thead><tr>{''.join(head)}</tr></thead>\n<tbody>"
    for row in rows:
        cells = (f'<td dir="auto"{css[c]}>{escape(row.get(c, ""))}</td>' for c in columns[1:])
        yield f'<tr><th scope="row" dir="auto">{escape(row.get(columns[0], ""))}</th>{"".join(cells)}</tr>'
    yield "</tbody>\n</table>\n</div>\n</section>"


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
        word, sign = ("passed", "✓") if value else ("failed", "✗")
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


def word_diff(before: str, after: str) -> str:
    """HTML of `after` with what is gone from `before` in <del> and what is new in <ins>.

    Without <ins> the text is `before`, without <del> it is `after`, to the character.
    """
    if before == after:
        return escape(after)
    old, new = _words(before), _words(after)
    blocks = difflib.SequenceMatcher(None, [w for _, w in old], [w for _, w in new], autojunk=False).get_opcodes()
    sizes = [0 if tag == "equal" else max(b - a, d - c) for tag, a, b, c, d in blocks]
    page = gone = added = ""
    for k, (tag, a, b, c, d) in enumerate(blocks):
        # Few common words amid many others are chance: "left" in two unlike sentences. The diff reads better without.
        if tag != "equal" or (0 < k < len(blocks) - 1 and 2 * (b - a) <= min(sizes[k - 1], sizes[k + 1])):
            gone += "".join(space + word for space, word in old[a:b])
            added += "".join(space + word for space, word in new[c:d])
            continue
        for (space, word), (new_space, _) in zip(old[a:b], new[c:d], strict=True):
            if space != new_space:
                gone, added, space = gone + space, added + new_space, ""
            if word or space:
                page += _change(gone, added) + escape(space + word)
                gone = added = ""
    return page + _change(gone, added)


def _words(text: str) -> list[tuple[str, str]]:
    """(space before, word), where punctuation and CJK characters are words of their own; at last the space at the end."""
    end = len(text.rstrip())
    return [*_WORD.findall(text[:end]), (text[end:], "")]


def _change(gone: str, added: str) -> str:
    return (f"<del>{escape(gone)}</del>" if gone else "") + (f"<ins>{escape(added)}</ins>" if added else "")


_NUMBER = re.compile(r"[-+±\u2212]?[.\d]|[-\u2013\u2014]?$")
_WORD = re.compile(r"(\s*)([,.;:!?()\"\u3001-\u9fff\uff01-\uff1f]|[^\s,.;:!?()\"\u3001-\u9fff\uff01-\uff1f]+)")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --page: #f7f8f9; --card: #fff; --text: #1c2126; --quiet: #59636e; --line: #dde1e5;
  --gone: #a11a1a; --gone-bg: #fdebea; --new: #11602b; --new-bg: #e0f4e5; }
@media (prefers-color-scheme: dark) { :root { --page: #121518; --card: #1a1e22; --text: #e4e7ea; --quiet: #9da7b1;
  --line: #30363d; --gone: #ff9d96; --gone-bg: #3d1e1e; --new: #86dd9d; --new-bg: #173622; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; } h3, h4 { font-size: 16px; font-weight: 600; }
h2, thead th { font-size: 14px; font-weight: 600; color: var(--quiet); } section { margin-top: 32px; }
.intro, .small { color: var(--quiet); } .intro { margin-top: 8px; max-width: 75ch; } .small { font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; overflow-wrap: normal; }
th, td { text-align: start; padding: 8px 0 8px 16px; border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; } td.number, .scores dd { white-space: nowrap; }
.number { text-align: end; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; margin-top: 8px; }
.arms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 12px 24px; }
.arms, .scores { font-size: 14px; } .arms dt { font-weight: 600; } .arms dd, .scores dt, .turns dt { color: var(--quiet); }
.prompt { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; }
.request { font-size: 20px; line-height: 1.35; margin: 2px 0 16px; } .request, .turns dd, .error p { white-space: pre-wrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 20px; }
figure { max-width: 512px; min-width: 0; } figcaption { margin-top: 8px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; box-shadow: 0 0 0 1px var(--line); }
.pixelated img { width: 100%; image-rendering: pixelated; }
.missing { display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--quiet); border-radius: 6px;
  max-width: 256px; color: var(--quiet); font-size: 14px; }
.scores div { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); margin-top: 16px; padding-top: 12px; } .turns { list-style: none; padding: 0; }
summary { cursor: pointer; } summary h3 { display: inline; margin-inline-end: 8px; }
.turns li { display: grid; grid-template-columns: 128px minmax(0, 1fr); gap: 20px; margin-top: 20px; }
.turns dl { display: grid; grid-template-columns: 56px minmax(0, 1fr); gap: 6px 12px; margin-top: 6px; }
h4 span { margin-inline-start: 6px; font-weight: 400; }
.tag { border: 1px solid var(--line); border-radius: 4px; padding: 0 6px; font-size: 13px; }
.error { margin: 6px 0 8px; padding: 6px 12px; border-left: 3px solid var(--gone); background: var(--gone-bg); }
.error, .turns dl { font-size: 15px; } .error strong, .failed, del { color: var(--gone); } .passed, ins { color: var(--new); }
del, ins { border-radius: 3px; padding: 0 2px; } del { background: var(--gone-bg); text-decoration: line-through; }
ins { background: var(--new-bg); text-decoration: underline; text-underline-offset: 3px; }
@media (max-width: 560px) { body { padding: 24px 12px 40px; } h1 { font-size: 24px; } .prompt { padding: 16px 14px; }
  .pictures { gap: 14px; } .turns li, .turns dl { grid-template-columns: minmax(0, 1fr); gap: 8px; } .turns dl { gap: 2px; }
  .thumbnail { width: 128px; } table { font-size: 14px; } th, td { padding-left: 8px; } .turns dd { margin-bottom: 6px; } }
"""
