"""For scripts that run inside ComfyUI without its server loop (see server.inprocess): real loaders, samplers and executor, tiny models.

A script calls `setup(base)` first, describes a workflow with `Graph`, and runs it with `Runner`. Beside ComfyUI's nodes and ours there
are `Probe<TYPE>`, which gives an object of `OBJECTS` by name, and `ProbeKeep`, which puts what it gets into `KEPT` by name.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OBJECTS: dict[str, Any] = {}
KEPT: dict[str, Any] = {}


def setup(base: str | Path, *, extras: bool = True, pack: Path | None = ROOT) -> None:
    """ComfyUI as `main.py --cpu --base-directory BASE` makes it. extras: also ComfyUI's own extra nodes; pack: a folder of nodes."""
    from comfy.cli_args import args

    for name in ("user", "custom_nodes", "models/checkpoints", "models/loras", "models/controlnet", "input", "output", "temp"):
        (Path(base) / name).mkdir(parents=True, exist_ok=True)
    args.cpu, args.base_directory, args.disable_api_nodes, args.database_url = True, str(base), True, "sqlite:///:memory:"
    args.front_end_root = str(base)  # nobody looks
    import torch
    import utils.install_util  # noqa: F401  before `nodes` puts ComfyUI/comfy in front of it

    torch.set_num_threads(1)
    import folder_paths
    import nodes
    import server

    folder_paths.set_output_directory(str(Path(base) / "output"))
    folder_paths.set_temp_directory(str(Path(base) / "temp"))
    folder_paths.set_input_directory(str(Path(base) / "input"))
    server.PromptServer(asyncio.new_event_loop())
    if extras:
        asyncio.run(nodes.init_builtin_extra_nodes())
    if pack:
        assert asyncio.run(nodes.load_custom_node(str(pack), module_parent="custom_nodes")), f"{pack} was not loaded"
    for kind in ("MODEL", "CLIP", "VAE", "LATENT", "IMAGE", "MASK", "PROMPTLOOP_REFINER"):
        nodes.NODE_CLASS_MAPPINGS[f"Probe{kind}"] = _source(kind)
    nodes.NODE_CLASS_MAPPINGS["ProbeKeep"] = ProbeKeep


def _source(kind: str) -> type:
    class Source:
        RETURN_TYPES, FUNCTION, CATEGORY = (kind,), "run", "probe"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"name": ("STRING", {})}}

        def run(self, name: str) -> tuple[Any]:
            return (OBJECTS[name],)

    return Source


class _Any(str):
    def __ne__(self, other: object) -> bool:
        return False


class ProbeKeep:
    """Every run of it counts in KEPT["runs"]; a latent is kept as its tensor."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "probe", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {}), "value": (_Any("*"), {})}}

    def run(self, name: str, value: Any) -> dict[str, Any]:
        KEPT[name] = value["samples"].clone() if isinstance(value, dict) and "samples" in value else value
        KEPT["runs"] = KEPT.get("runs", 0) + 1
        return {"ui": {}}


class Graph(dict):
    """A workflow in API format: `node = graph("ClassType", input=..., other=node[0])`; `graph.keep(name, node[0])`."""

    def __call__(self, class_type: str, **inputs: Any) -> Node:
        name = str(len(self) + 1)
        self[name] = {"class_type": class_type, "inputs": inputs}
        return Node(name)

    def keep(self, name: str, output: list[Any]) -> None:
        self("ProbeKeep", name=name, value=output)


class Node(str):
    def __getitem__(self, output: Any) -> list[Any]:
        return [str(self), output]


class Failed(Exception):
    """A run that ended with an error; `event` is ComfyUI's name of it, `data` what came with it."""

    def __init__(self, event: str, data: dict[str, Any]) -> None:
        super().__init__(f"{event}: {data.get('exception_message')}\n{''.join(data.get('traceback') or [])}")
        self.event, self.data = event, data


class Runner:
    """ComfyUI's executor with a cache of its own ("CLASSIC", "NONE")."""

    def __init__(self, cache: str = "CLASSIC") -> None:
        import execution
        from server import PromptServer

        kind = getattr(execution.CacheType, cache, None) or execution.CacheType.DEPENDENCY_AWARE  # NONE, before 0.4
        sizes = {"cache_args": {"lru": 0, "ram": 0}} if "RAM_PRESSURE" in execution.CacheType.__members__ else {}
        self.executor = execution.PromptExecutor(PromptServer.instance, cache_type=kind, **sizes)

    def __call__(self, graph: Graph, **extra: Any) -> dict[str, Any]:
        """Runs all output nodes; returns what they show, by node id. Raises Failed; ValueError where ComfyUI refuses the workflow."""
        import execution
        from server import PromptServer

        prompt_id = uuid.uuid4().hex
        ok, error, outputs, errors = asyncio.run(execution.validate_prompt(prompt_id, graph, None))
        if not ok:
            raise ValueError(json.dumps([error, errors], default=str))
        prompt = json.loads(json.dumps(graph))
        running = PromptServer.instance.prompt_queue.currently_running  # as the server's worker has it
        running[prompt_id] = (0, prompt_id, prompt, extra, outputs)
        try:
            self.executor.execute(prompt, prompt_id, extra, outputs)
        finally:
            del running[prompt_id]
        for event, data in self.executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                raise Failed(event, data)
        return self.executor.history_result["outputs"]


class Swaps:
    """Counts how often conditioning is processed beyond the once of each run, that is, how often it was swapped while sampling."""

    def __init__(self) -> None:
        import comfy.samplers

        self.count, original = 0, comfy.samplers.process_conds

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        counted.__signature__ = inspect.signature(original)
        comfy.samplers.process_conds = counted

    def taken(self) -> int:
        """Since the last call."""
        count, self.count = self.count, 0
        return count - 1


def answer(result: Any) -> None:
    """What the test gets; nothing may be printed after it."""
    sys.stdout.flush()
    print("\n" + json.dumps(result, default=str), flush=True)
