"""Other refiners beside the one under test: `NAME=REFINER` or `NAME=REFINER@SCHEDULE`, each an arm of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ..dotted import load_object
from ..evaluation.arms import ArmSpec
from ..refiners.template import load_template
from ..schedule import RefinementSchedule
from .named import NO_MODEL, OBJECT, holds_model, is_server, load_refiner

NAME = re.compile(r"[a-z0-9]([\w.-]{0,62}\w)?", re.ASCII | re.IGNORECASE)  # a folder of that name can be made anywhere
FILES = ("manifest.json", "results.json", "index.html")  # that lie beside the arms' folders
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def parse_versus(given: Sequence[str], taken: Collection[str]) -> dict[str, tuple[str, str | None]]:
    """By name: the refiner, and its schedule where it has one of its own.

    The name ends at the first "="; the schedule begins after the last "@", unless what follows holds a "/". No address of a server may
    hold "@", and no hub id does; a folder may: one that is there, and could be read either way, is refused.

    taken: names of arms that are there already. Raises ValueError for a name that is none or is taken (case does not count, since on
    some disks it makes no other folder), and for a schedule that cannot be read.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for text in given:
        name, equals, refiner = (part.strip() for part in text.partition("="))
        if not equals or not refiner:
            raise ValueError(f"cannot read --versus {_hidden(text)!r}; write NAME=REFINER or NAME=REFINER@SCHEDULE")
        if not NAME.fullmatch(name) or name.lower() in FILES:
            raise ValueError(
                f"--versus {_hidden(text)!r}: {name!r} cannot be an arm's name, which is a folder's too; use up to 64 letters, digits, "
                '".", "_" and "-", with a letter or digit first and no "." or "-" at the end'
            )
        if name.lower() in (there.lower() for there in taken):
            raise ValueError(
                f"--versus {_hidden(text)!r}: this benchmark has an arm {name.lower()} of its own; choose another name"
            )
        if name.lower() in (there.lower() for there in found):
            raise ValueError(f"--versus names {name!r} twice; give each arm a name of its own")
        found[name] = _split(name, refiner)
    return found


def _split(name: str, text: str) -> tuple[str, str | None]:
    place, at, when = text.rpartition("@")
    if not at or "/" in when:
        return text, None
    there = Path(text).expanduser().exists()
    try:
        schedule = str(RefinementSchedule.parse(when))
    except ValueError as e:
        if there:
            return text, None
        raise ValueError(
            f"--versus {name}: what follows the last @ is its schedule, and {e}; end a folder that has an @ in its name with a slash"
        ) from None
    if not place.strip():
        raise ValueError(f"--versus {name}: there is no refiner before the @; write {name}=REFINER@{when}")
    if there:
        raise ValueError(
            f"--versus {name}={text}: this is a folder, and could be {place} at {when} too; write {text}/ for the folder, or "
            f"{place}/@{when} for the schedule"
        )
    return place.strip(), schedule


def _hidden(text: str) -> str:
    """Without what may be a key in an address."""
    return re.sub(r"//[^/]*@", "//***@", text)


def check_refiner(refiner: str, template: str | None, server_model: str | None) -> None:
    """Says at once what cannot be a refiner; the weights of a model are not read, and a hub id is tried when it is loaded.

    Raises ValueError, OSError or ImportError with one clear line.
    """
    folder = Path(refiner).expanduser()
    if HUB_ID.fullmatch(refiner) and not folder.exists() and (folder.parent.is_dir() or refiner.endswith(".json")):
        raise FileNotFoundError(f"there is no refiner at {refiner}; give a folder, a prompt schedule or a hub id that is there")
    if OBJECT.fullmatch(refiner) and not is_server(refiner) and not folder.exists():
        load_object(refiner, "refiner")
    elif holds_model(folder) or (HUB_ID.fullmatch(refiner) and not folder.exists()):
        load_template(template or "repair")
    elif refiner not in NO_MODEL:
        load_refiner(refiner, template, server_model)  # a server, a schedule of prompts, or a mistake: none takes time


def versus_arm(name: str, place: str, refine_at: str | None, load: Callable[[], Any]) -> ArmSpec:
    """place: the refiner, as the user named it. refine_at: its own schedule; None for that of `loop`. load: gives the refiner, when the
    arm is rendered."""
    note = f"the refiner {place} at {refine_at or 'the schedule of loop'}"
    return ArmSpec(name, note, lambda _: load(), refine_at, needs_refiner=False)
