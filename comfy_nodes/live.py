"""What ComfyUI shows and keeps of a run: events for the browser, results for the history, metadata for PNG files.

Metadata. Nodes that save pictures write `extra_pnginfo`, a dict that comes with each queued prompt. When a prompt with nodes of ours is
queued, an entry "promptloop" is put in there; samplers add their runs to it, whoever saves the picture. What a cached sampler did
in an earlier prompt is put in at once.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from promptloop_pipeline import trajectory as records
from promptloop_pipeline.trajectory import Trajectory, Turn

from .pictures import to_image

logger = logging.getLogger("promptloop")
KEY = "promptloop"
VERSION = 1
KEPT = 256  # finished runs whose record is remembered, for prompts that take them from ComfyUI's cache
_finished: OrderedDict[str, Any] = OrderedDict()  # record by signature
_latest: dict[str, Any] = {}  # the node that sampled last, and its runs in this prompt
_queued: list[Any] = []  # weakly, the entries of prompts that ComfyUI still holds


def install() -> None:
    """Once, when ComfyUI loads the pack."""
    from server import PromptServer

    PromptServer.instance.add_on_prompt_handler(on_prompt)


# --- events -------------------------------------------------------------------------------------------------------------


def where() -> tuple[str | None, str | None]:
    """(prompt id, node id) of what ComfyUI executes in this thread; (None, None) outside of a prompt."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return (None, None) if context is None else (context.prompt_id, context.node_id)


def item() -> int:
    """Which item of a list ComfyUI executes the node for, from 0."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return 0 if context is None else context.list_index or 0


def send(event: str, **data: Any) -> None:
    """To the browser that queued the prompt. Nobody there: nothing happens."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_sync(f"{KEY}.{event}", data, server.client_id)


def say(text: str, node: str | None) -> None:
    """One line of text under the node."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None and node is not None:
        server.send_progress_text(text, node, server.client_id)


def show(picture: Any, value: int, total: int, node: str | None) -> None:
    """A preview on the node while it runs."""
    from comfy_execution.progress import get_progress_state

    if node is not None:
        get_progress_state().update_progress(node, value, total, ("JPEG", picture, 512))


def turn_data(turn: Turn, image: Any) -> dict[str, Any]:
    """A turn as the browser draws it; image: whatever stands for its picture there."""
    names = ("step", "num_steps", "sigma", "before", "after", "reasoning", "raw", "error", "boundary", "seconds", "applied")
    return {name: getattr(turn, name) for name in names} | {"notes": list(turn.notes), "image": image}


# --- results ------------------------------------------------------------------------------------------------------------


def ui_of(trajectories: Sequence[Trajectory], cls: Any = None) -> dict[str, Any]:
    """{"promptloop": [...]} for a node's `ui`, which the browser gets and /history keeps; the pictures go to ComfyUI's temp folder."""
    from comfy_api.latest import ui

    found = []
    for t in trajectories:
        looked = [turn.image for turn in t.turns if turn.image is not None]
        saved = iter(ui.PreviewImage(to_image(looked), cls=cls).values if looked else [])
        turns = [turn_data(turn, None if turn.image is None else dict(next(saved))) for turn in t.turns]
        found.append({"id": t.id, "request": t.request, "prompt": t.prompt, "turns": turns, "scores": t.scores, "meta": t.meta})
    return {KEY: json.loads(json.dumps(found, default=str))}


def record(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Runs as JSON values for a PNG file: without pictures, tokens and log-probabilities."""
    rows = [records.to_record(t) for t in trajectories]
    for row in rows:
        for turn in row["turns"]:
            turn["token_ids"] = turn["logprobs"] = None
    return json.loads(json.dumps({"trajectories": rows}, default=str))


def from_record(record: Any) -> list[Trajectory]:
    """What `record` made of them. Raises ValueError for anything else."""
    try:
        return [records.from_record(row) for row in record["trajectories"]]
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"this is no record of PromptLoop's ({type(e).__name__}: {e})") from e


# --- metadata -----------------------------------------------------------------------------------------------------------


class _Shared(dict):
    """The queue keeps deep copies of what it runs; this entry stays one and the same in all of them."""

    awaits: dict[str, str]  # node by signature

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self


def on_prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Called by the server with each prompt, before it is queued."""
    graph: Any = request.get("prompt")
    ours = isinstance(graph, dict) and any(str(_class(node)).startswith("PromptLoop") for node in graph.values())
    if ours and isinstance(extra := request.setdefault("extra_data", {}), dict):
        keys = signatures(graph)
        shared = _Shared(version=VERSION, runs={node: _finished[key] for node, key in keys.items() if key in _finished})
        shared.awaits = {key: node for node, key in keys.items()}
        _queued.append(weakref.ref(shared))
        info = extra.get("extra_pnginfo")
        extra["extra_pnginfo"] = (info if isinstance(info, dict) else {}) | {KEY: shared}
    return request


def running() -> dict[str, Any] | None:
    """Of what executes now: {"prompt_id", "node", "graph", "info" (its `extra_pnginfo`)}; None outside of a prompt."""
    from server import PromptServer

    prompt_id, node = where()
    server = getattr(PromptServer, "instance", None)
    for item in list(server.prompt_queue.currently_running.values()) if server is not None and node is not None else ():
        if item[1] == prompt_id:
            return {"prompt_id": prompt_id, "node": node, "graph": item[2], "info": item[3].get("extra_pnginfo") or {}}
    return None


def keep(trajectories: Sequence[Trajectory]) -> None:
    """Adds a finished run of the node that executes now to the metadata of its prompt."""
    if (now := running()) is None:
        return
    this, made = (now["prompt_id"], now["node"]), record(trajectories)
    if _latest.get("of") == this:  # a node that samples several times, or is run once for each item of a list
        made["trajectories"] = _latest["made"]["trajectories"] + made["trajectories"]
    _latest.update(of=this, made=made)
    shared = now["info"].get(KEY)
    if isinstance(shared, _Shared):
        shared["runs"][now["node"]] = made
    if now["node"] in now["graph"]:  # not one that another node made in running
        key = signature(now["graph"], now["node"])
        for other in list(_queued):  # which take it from ComfyUI's cache
            if (target := other()) is None:
                _queued.remove(other)
            elif key in target.awaits:
                target["runs"][target.awaits[key]] = made
        _finished[key] = made
        while len(_finished) > KEPT:
            _finished.popitem(last=False)


def signature(graph: dict[str, Any], node: str) -> str:
    """Of a node and all that it depends on: two of the same signature give the same result. The name itself, where it is not in
    the graph."""
    return signatures(graph).get(node, node)


def signatures(graph: dict[str, Any]) -> dict[str, str]:
    """Those of all nodes. Each is made of the node's own inputs and the signatures that its links lead to, so that large graphs cost
    no more than their text."""
    import hashlib

    found: dict[str, str] = {}
    begun: set[str] = set()
    for start in graph:
        waiting = [start]
        while waiting:
            name = waiting[-1]
            links = [v[0] for v in _inputs(graph[name]).values() if _is_link(v)]
            todo = [n for n in links if n in graph and n not in begun] if name not in begun else []
            begun.add(name)
            if todo:
                waiting += todo
                continue
            waiting.pop()
            if name not in found:
                inputs = {k: [found.get(v[0]), v[1]] if _is_link(v) else v for k, v in _inputs(graph[name]).items()}
                text = json.dumps([_class(graph[name]), inputs], sort_keys=True, default=str)
                found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _class(node: Any) -> Any:
    return node.get("class_type") if isinstance(node, dict) else None


def _inputs(node: Any) -> dict[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def upstream(graph: dict[str, Any], node: str, input: str) -> list[str]:
    """The nodes that an input hangs on, nearest first."""
    found: list[str] = []
    waiting = [_inputs(graph.get(node))[input]] if input in _inputs(graph.get(node)) else []
    while waiting:
        value = waiting.pop(0)
        if _is_link(value) and value[0] not in found:
            found.append(value[0])
            waiting += _inputs(graph.get(value[0])).values()
    return found
