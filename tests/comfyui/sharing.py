"""Caches, copies, and what shares what: cases of behaviour.py, which see."""

from __future__ import annotations

from typing import Any

import torch
from inside import KEPT, OBJECTS, Failed, Graph, Runner
from matrix import STEPS, A, B, World, said

CASES: dict[str, Any] = {}


def case(function: Any) -> Any:
    CASES[function.__name__] = function
    return function


@case
def two_loops_in_one_model(world: World) -> str:
    g = graph(world, ["sampler"])
    first = next(n for n, node in g.items() if node["class_type"] == "PromptLoop")
    inputs = g[first]["inputs"]
    second = g("PromptLoop", **inputs | {"model": [first, 0]})
    for node in g.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["model"] = second[0]
        if node["class_type"] == "PromptLoopResult":
            node["inputs"]["run"] = second[1]
    try:
        Runner()(g)
    except Failed as e:
        return str(e.data["exception_message"])
    return "went on"


def graph(world: World, samplers: list[str], seeds: list[int] | None = None, refiner: str = "looker", text: str = A) -> Graph:
    """One PromptLoop MODEL, some samplers with a Result each; their latents and histories are kept by the samplers' names."""
    OBJECTS.setdefault("looker", said(lambda view: f"{B}, {view.step}"))
    g = Graph()
    model, clip, vae = world.parts(g)
    positive, negative = g("CLIPTextEncode", text=text, clip=clip)[0], g("CLIPTextEncode", text="blurry", clip=clip)[0]
    probe = g("ProbePROMPTLOOP_REFINER", name=refiner)
    loop = g("PromptLoop", model=model, refiner=probe[0], clip=clip, vae=vae, prompt=text, refine_at="2, 4")
    for name, seed in zip(samplers, seeds or range(len(samplers))):
        out = g(
            "KSampler", model=loop[0], seed=seed, steps=STEPS, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0,
            positive=positive, negative=negative, latent_image=g("ProbeLATENT", name="latent")[0],
        )  # fmt: skip
        told = g("PromptLoopResult", run=loop[1], latent=out[0])
        g.keep(name, told[0])
        g.keep(f"{name} history", told[3])
    return g


def kept(names: list[str]) -> list[tuple[torch.Tensor, list[str], list[int]]]:
    """(latent, ids of the trajectories, steps of the turns) of samplers by name"""
    return [
        (KEPT[n], [t.id for t in KEPT[f"{n} history"]], [turn.step for t in KEPT[f"{n} history"] for turn in t.turns])
        for n in names
    ]


@case
def caching(world: World) -> dict[str, Any]:
    """Second runs, from the cache and without one; one sampler changed while the other one is taken from the cache."""
    found: dict[str, Any] = {}
    for cache in ("CLASSIC", "NONE"):
        runner, g = Runner(cache), graph(world, ["one", "two"])
        shown = runner(g)
        first = kept(["one", "two"])
        before = KEPT["runs"]
        runner(g)
        second = kept(["one", "two"])
        found[cache] = {
            "ran": KEPT["runs"] - before,
            "equal": all(torch.equal(a[0], b[0]) for a, b in zip(first, second)),
            "same ids": [a[1] for a in first] == [b[1] for b in second],
            "shown": prompts_of(shown),
            "steps": [a[2] for a in first + second],
            "apart": first[0][1] != first[1][1],
        }
    runner = Runner()
    runner(graph(world, ["one", "two"], [0, 1]))
    first = kept(["one", "two"])
    runner(graph(world, ["one", "two"], [0, 7]))
    second = kept(["one", "two"])
    found["one changed"] = {
        "kept": first[0][1] == second[0][1] and bool(torch.equal(first[0][0], second[0][0])),
        "new": first[1][1] != second[1][1] and not torch.equal(first[1][0], second[1][0]),
        "steps": [a[2] for a in first + second],
    }
    return found


def prompts_of(shown: dict[str, Any]) -> list[Any]:
    return [t["prompt"] for ui in shown.values() for t in ui.get("promptloop", [])]


@case
def result_added_later(world: World) -> Any:
    """A Result node that is put behind a sampler whose run is already in the cache."""
    runner, g = Runner(), graph(world, ["one"])
    bare = Graph({n: node for n, node in g.items() if node["class_type"] != "PromptLoopResult"})
    for node in bare.values():
        if node["class_type"] == "ProbeKeep":
            node["inputs"]["value"] = [next(n for n in bare if bare[n]["class_type"] == "KSampler"), 0]
    try:
        runner(Graph(bare))
        runner(graph(world, ["one"]))
        return kept(["one"])[0][2]
    except Failed as e:
        return str(e)


@case
def renumbered_sampler(world: World) -> Any:
    """The same sampler under another id, as pasting a part of a workflow makes it, with a Result node that is new."""
    runner, g = Runner(), graph(world, ["one"])
    ids = {n: n for n in g} | {n: f"9{n}" for n in g if g[n]["class_type"] in ("KSampler", "PromptLoopResult")}
    bare = Graph({n: node for n, node in g.items() if node["class_type"] not in ("PromptLoopResult", "ProbeKeep")})
    bare.keep("one", [next(n for n in bare if bare[n]["class_type"] == "KSampler"), 0])
    pasted = Graph()
    for n, node in g.items():
        inputs = {k: [ids[v[0]], v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
        pasted[ids[n]] = {"class_type": node["class_type"], "inputs": inputs}
    try:
        runner(bare)
        runner(pasted)
        return kept(["one"])[0][2]
    except Failed as e:
        return str(e.data["exception_message"])


@case
def copied_sampler(world: World) -> Any:
    """Two samplers of the same settings, as copy and paste makes them: ComfyUI runs one, and takes the other from the cache."""
    try:
        Runner()(graph(world, ["one", "copy"], [5, 5]))
        return [a[2] for a in kept(["one", "copy"])]
    except Failed as e:
        return str(e)


@case
def one_refiner_two_loops(world: World) -> dict[str, Any]:
    """Two models of different prompts that share a refiner object: each gets its own request, and its own history."""
    seen: list[tuple[str, int, int]] = []

    def looks(view: Any) -> str:
        seen.append((view.request, view.step, len(view.turns)))
        return f"{view.request}, {view.step}"

    OBJECTS["shared"] = said(looks)
    g = graph(world, ["one"], [0], "shared", A)
    for name, node in graph(world, ["two"], [0], "shared", B).items():
        inputs = {k: [f"b{v[0]}", v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
        g[f"b{name}"] = {"class_type": node["class_type"], "inputs": inputs}
    Runner()(g)
    return {
        "seen": sorted(seen),
        "requests": [[t.request for t in KEPT[f"{n} history"]] for n in ("one", "two")],
        "turns": [len(KEPT[f"{n} history"][0].turns) for n in ("one", "two")],
    }
