"""PromptLoop's nodes for ComfyUI: thin shells around `promptloop_pipeline`. V3 API only.

Importing them loads neither transformers nor diffusers. A file whose import fails takes down its own nodes only, and says why.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

FILES = ("embedded", "loaders", "loop", "control", "rewrite", "reward", "history", "ask")
logger = logging.getLogger("promptloop")


def node_list() -> list[Any]:
    """All node classes that can be loaded, in the order of the menu."""
    found: list[Any] = []
    for name in FILES:
        try:
            nodes = importlib.import_module(f".{name}", __name__).NODES
            for node in nodes:
                node.GET_SCHEMA()
            found += nodes
        except Exception as e:  # whatever it is, the other nodes, and other packs, go on
            todo = f"pip install {e.name}" if isinstance(e, ImportError) and e.name else "see the error"
            logger.error("PromptLoop: the nodes of %s are left out; %s (%s: %s)", name, todo, type(e).__name__, e)
    return found


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI once, at its start."""
    from comfy_api.latest import ComfyExtension

    from . import live

    class PromptLoopExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return node_list()

    live.install()
    return PromptLoopExtension()
