"""Refiners by the name that a user types: the same names for every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..dotted import load_object

ALLOWED = (
    '"tiny" (embedded), "oracle" (reads its verifier), "none", a folder or hub id, the URL of a server, or "module:object"'
)


def load_refiner(name: str, template: str | Path | None = None, model: str | None = None, **options: Any) -> Any:
    """name: "tiny", "oracle", "none", a folder or hub id, http(s)://..., a prompt schedule FILE.json, or "module:object" of one's own.

    template: for language models; default: "repair". model: the model's name on a server. options: of `MLLMRefiner`.
    Raises ValueError, OSError or ImportError with one clear line.
    """
    if name in ("none", "tiny", "oracle") or name.endswith(".json"):
        _refuse(name, template=template, server_model=model)
    if name == "none":
        from ..refiners.scripted import NoOpRefiner

        return NoOpRefiner()
    if name in ("tiny", "oracle"):
        from .. import tiny

        return tiny.OracleRefiner() if name == "oracle" else tiny.load_refiner()
    if name.endswith(".json"):
        from ..refiners.scripted import ScheduleRefiner
        from ..replay import load_schedule

        return ScheduleRefiner(load_schedule(name))
    if re.match(r"https?://", name) or re.fullmatch(r"[\w.-]+:\d+(/\S*)?", name):
        from ..refiners.mllm import MLLMRefiner

        return MLLMRefiner.from_endpoint(name, model, template or "repair", **options)
    if re.fullmatch(r"[\w.]+:[\w.]+", name) and not Path(name).exists():
        _refuse(name, template=template, server_model=model)
        found = load_object(name, "refiner")
        return found() if isinstance(found, type) else found
    if not (Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise ValueError(f"unknown refiner {name!r}; use {ALLOWED}")
    from ..refiners.mllm import MLLMRefiner

    return MLLMRefiner.from_pretrained(name, template or "repair", **options)


def _refuse(name: str, **given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"the refiner {name!r} has no use for {option} {value!r}; leave it out, or name a language model")
