"""Objects of one's own, by the name "module:object"."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def load_object(path: str, what: str) -> Any:
    """What "module:object" or "module:object.attribute" names; modules in the current folder count.

    Raises ValueError, saying that the `what` cannot be loaded and why.
    """
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"cannot load the {what} {path!r}: {e}") from e
    return found
