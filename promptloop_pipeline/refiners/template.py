"""Templates: what a model is told, as data. A text file, one of `templates/` by name, or anybody's own by path:

    Source: where this comes from            (line 1)
    answer: tags                             (or "text": the whole output is the prompt, no <answer> was asked for)
    max_new_tokens: 256                      (any field of `chat.Sampling`; arguments of the refiner win)
    [system]
    ...
    [user]                                   asked when there is a picture to look at
    {image} {request} {prompt} ...
    [user without image]                     asked when there is none
    ...
    [continue]                               instead of all these: a text to be continued, for models without a chat template

Without a section for the case at hand the model is not asked, and the prompt is kept. {source} is the picture that an
image-to-image run starts from; a section that names it is only for runs that have one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat import OPTIONS, Conversation, Sampling
from ..refiner import View

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).parent / "templates"
PLACES = ("request", "prompt", "step", "num_steps", "percent", "image", "source")
SECTIONS = ("system", "user", "user without image", "continue")
_PLACE = re.compile(r"\{(\w+)\}")
_PICTURE = re.compile(r"\{(image|source)\}")
_SECTION = re.compile(r"^\[([^\]\n]+)\][ \t]*$", re.M)


def names() -> list[str]:
    return sorted(f.stem for f in FOLDER.glob("*.txt"))


@dataclass(frozen=True)
class Template:
    """`tags`: whether the answer is asked for in <answer> tags. `sampling`: fields of `chat.Sampling` that it wants otherwise."""

    name: str
    source: str
    sections: dict[str, str]
    tags: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def looks(self) -> bool:
        """Whether it ever shows a preview."""
        return any("{image}" in text for text in self.sections.values())

    @property
    def shows(self) -> bool:
        """Whether it ever shows any picture."""
        return any(_PICTURE.search(text) for text in self.sections.values())

    def conversation(self, view: View, image: Image | None, source: Image | None) -> Conversation | None:
        """What to say about a view, with its pictures in the size that the model is to see; None when there is nothing to ask."""
        pictures = {"image": image, "source": source}
        if "continue" in self.sections:
            return _fill(self.sections["continue"], view)
        section = self._section({name for name, picture in pictures.items() if picture is not None})
        if section is None:
            return None
        content: list[dict[str, Any]] = []
        for k, part in enumerate(_PICTURE.split(section)):
            if k % 2:
                content.append({"type": "image", "image": pictures[part]})
            elif text := _fill(part, view).strip("\n"):
                content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        if "system" in self.sections:
            system = [{"type": "text", "text": _fill(self.sections["system"], view)}]
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def _section(self, there: set[str]) -> str | None:
        """The first one whose pictures are all there; [user] without a picture of its own stands back where there is none at all."""
        order = ["user", "user without image"]
        if not there or not _PICTURE.search(self.sections.get("user", "")):
            order.reverse()
        found = (self.sections[title] for title in order if title in self.sections)
        return next((section for section in found if set(_PICTURE.findall(section)) <= there), None)


def load_template(template: str | Path | Template) -> Template:
    """By name ("repair") or by path. Raises FileNotFoundError naming what there is, ValueError naming the file and what is wrong."""
    if isinstance(template, Template):
        return template
    path = FOLDER / f"{template}.txt" if str(template) in names() else Path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no template {str(template)!r}; use one of {', '.join(names())}, or the path of a file of your own"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark in front
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text file in UTF-8 ({e})") from e
    return parse_template(text, path.stem, str(path))


def parse_template(text: str, name: str, where: str) -> Template:
    head, *rest = _SECTION.split(text)
    lines = [line for line in head.splitlines() if line.strip()]
    if not lines or not lines[0].startswith("Source:"):
        raise ValueError(f'{where}: the first line must say where the template comes from, as "Source: ..."')
    tags = True
    sampling: dict[str, Any] = {}
    for line in lines[1:]:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "answer" and value in ("tags", "text"):
            tags = value == "tags"
        elif key in OPTIONS:
            try:
                sampling[key] = OPTIONS[key](value)
            except ValueError:
                raise ValueError(f"{where}: {key} is {value!r}, not a number") from None
        else:
            allowed = f'"answer: tags", "answer: text", or one of {", ".join(OPTIONS)} with a number'
            raise ValueError(f"{where}: cannot read {line!r} before the first section; use {allowed}")
    titles = [title.strip().lower() for title in rest[::2]]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"{where}: the section [{twice[0]}] is there more than once; give it once")
    sections = {title: body.strip("\n") for title, body in zip(titles, rest[1::2], strict=True)}
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise ValueError(f"{where}: unknown section [{unknown[0]}]; use {', '.join(f'[{s}]' for s in SECTIONS)}")
    if not set(sections) & set(SECTIONS[1:]):
        raise ValueError(f"{where}: there is nothing to say; give a section [user], [user without image] or [continue]")
    for title, body in sections.items():
        if unknown := [p for p in _PLACE.findall(body) if p not in PLACES]:
            raise ValueError(f"{where}: unknown placeholder {{{unknown[0]}}}; use {', '.join(f'{{{p}}}' for p in PLACES)}")
        if title not in ("user", "user without image") and _PICTURE.search(body):
            raise ValueError(f"{where}: a picture can only stand in [user], not in [{title}]")
    try:
        Sampling(**sampling)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    return Template(name, lines[0].removeprefix("Source:").strip(), sections, tags, sampling)


def _fill(text: str, view: View) -> str:
    """In one pass, so that braces in a user's words stay what they are."""
    values = {
        "request": view.request,
        "prompt": view.prompt,
        "step": str(view.step),
        "num_steps": str(view.num_steps),
        "percent": f"{100 * view.step / max(view.num_steps, 1):.0f}",
    }
    return _PLACE.sub(lambda m: values[m[1]], text)
