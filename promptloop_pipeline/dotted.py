"""Objects of one's own, by the name "module:object"."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any


def file_of(path: str) -> Path | None:
    """The file of the module that "module:object" names; None where there is none. Nothing is run, but for the packages around it."""
    _look_here()
    try:
        spec = importlib.util.find_spec(path.partition(":")[0])
    except Exception:  # somebody's package that cannot be imported: `load_object` will say so
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def load_object(path: str, what: str) -> Any:
    """What "module:object" or "module:object.attribute" names; modules in the current folder count.

    Raises ValueError, saying that the `what` cannot be loaded and why.
    """
    module, _, attribute = path.partition(":")
    _look_here()
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"cannot load the {what} {path!r}: {e}") from e
    return found


def _look_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
