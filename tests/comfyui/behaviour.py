"""What a loop does when something happens, run inside ComfyUI on tiny_sd3 (and tiny_sd15's ControlNet): `behaviour.py BASE`.
Prints what came of each case; test_behaviour.py says what it has to be."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import inside
import matrix
import sharing
import torch
from inside import KEPT, OBJECTS, Failed, Graph
from matrix import A, B, World, said, same

CASES: dict[str, Any] = {}


def case(function: Any) -> Any:
    CASES[function.__name__] = function
    return function


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def turns() -> list[Any]:
    return [turn for t in KEPT["history"] for turn in t.turns]


def unload() -> None:
    import comfy.model_management as mm

    mm.unload_all_models()
    mm.soft_empty_cache()


class Throwing:
    """A refiner that throws all models out of memory when asked, and then answers as told."""

    looks = True

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def refine(self, views: Any) -> Any:
        unload()
        return self.answer(views)


@case
def everything_unloaded(world: World) -> dict[str, float]:
    """By the refiner, whatever it then answers: the LoRA (and all else) is back before the next step."""
    from promptloop_pipeline import Refinement

    def failing(views: Any) -> Any:
        raise RuntimeError("out of memory")

    answers = {
        "same": lambda views: [Refinement(v.prompt + " ") for v in views],
        "kept": lambda views: [Refinement() for v in views],
        "failed": lambda views: [Refinement(error="no") for v in views],
        "raised": failing,
    }
    hook = matrix.cases("sd3")["hook LoRA"]
    found = {}
    for name, answer in answers.items():
        for what, settings in {
            "LoRA": {"lora": True},
            "hook LoRA": hook,
            "LoRA, euler_ancestral": {"lora": True, "sampler": "euler_ancestral"},
        }.items():
            untouched = world.sample(**settings)
            found[f"{name}, {what}"] = difference(world.sample(Throwing(answer), "start, 1, 3", **settings), untouched)
    return found


@case
def unloaded_with_a_control_net(world: World) -> float:
    from promptloop_pipeline import Refinement

    other = World("sd15")
    OBJECTS["picture"] = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    settings = matrix.cases("sd15")["ControlNet and LoRA"]
    untouched = other.sample(**settings)
    refiner = Throwing(lambda views: [Refinement(v.prompt + " ") for v in views])
    try:
        return difference(other.sample(refiner, "1, 3", **settings), untouched)
    finally:
        OBJECTS["latent"] = {"samples": torch.zeros(matrix.SHAPES[world.name])}


class Slow:
    """Thinks for `seconds`, and calls on_token all the while, as a language model does."""

    looks = False
    on_token = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def refine(self, views: Any) -> Any:
        from promptloop_pipeline import Refinement

        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)
            if self.on_token is not None:
                self.on_token()
        return [Refinement(B) for _ in views]


@case
def cancelled_while_thinking(world: World) -> dict[str, Any]:
    import nodes

    found: dict[str, Any] = {}
    undisturbed = world.sample(said(lambda view: B), "2")
    for door in ("PromptLoop", "PromptLoopSampler"):
        started: list[float] = []

        def later() -> None:
            time.sleep(1.0)
            started.append(time.monotonic())
            nodes.interrupt_processing(True)

        threading.Thread(target=later, daemon=True).start()
        try:
            world.sample(Slow(30), "start", door=door)
            found[door] = "was not interrupted"
        except Failed as e:
            found[door] = {"event": e.event, "seconds": time.monotonic() - started[0]}
        found[f"{door}, again"] = difference(world.sample(said(lambda view: B), "2", door=door), undisturbed)
    return found


@case
def cancelled_by_the_refiner(world: World) -> dict[str, Any]:
    """One that asks ComfyUI itself, as loaders of other packs do; or that does not notice, and answers."""
    import comfy.model_management as mm
    import nodes

    def asks(view: Any) -> str:
        nodes.interrupt_processing(True)
        mm.throw_exception_if_processing_interrupted()
        return B

    def answers(view: Any) -> str:
        nodes.interrupt_processing(True)
        return B

    found = {}
    undisturbed = world.sample(said(lambda view: B), "2")
    for name, function in {"asks": asks, "answers": answers}.items():
        for strict in ("keep the prompt", "stop"):
            try:
                world.sample(said(function), "2, 4", more={"on_error": strict})
                found[f"{name}, {strict}"] = "was not interrupted"
            except Failed as e:
                found[f"{name}, {strict}"] = e.event
    found["again"] = difference(world.sample(said(lambda view: B), "2"), undisturbed)
    return found


@case
def failures(world: World) -> dict[str, Any]:
    """The picture is made, bit-identical to the untouched one; what went wrong is recorded."""
    from promptloop_pipeline import Refinement

    def raising(view: Any) -> str:
        raise ConnectionError("the endpoint does not answer")

    found = {}
    untouched = world.sample(sampler="dpmpp_2m_sde")
    for name, function in {
        "raises": raising,
        "error": lambda view: Refinement(error="unreadable"),
        "empty": lambda view: "   ",
        "surrogate": lambda view: "a cat \ud800",
    }.items():
        result = world.sample(said(function), "start, 2, 4", sampler="dpmpp_2m_sde")
        found[name] = {
            "diff": difference(result, untouched),
            "errors": [turn.error for turn in turns()],
            "prompts": sorted({t.prompt for t in KEPT["history"]}),
        }
    return found


@case
def odd_prompts(world: World) -> dict[str, Any]:
    """Text that no tokenizer likes is encoded, or kept out with a note; the picture is made in any case."""
    found = {}
    for name, text in {
        "long": "a very long prompt with many words, " * 300,
        "brackets": "((((a [cat: :1.5) \\( <lora:x:1>",
        "embedding": "embedding:does_not_exist, a cat",
        "line ends": "a\ncat\r\n\tBREAK AND <|endoftext|>",
        "other scripts": "\u732b\u304c\u5ea7\u308b \U0001f431",
    }.items():
        result = world.sample(said(lambda view, text=text: text), "2")
        expected = matrix.two_stages(
            world, lambda g, clip, words, text=text: g("CLIPTextEncode", text=A if words == A else text, clip=clip)[0]
        )
        found[name] = {
            "diff": difference(result, expected),
            "size": float(expected.abs().max()),
            "errors": [turn.error for turn in turns() if turn.error],
        }
    return found


@case
def batch_with_a_long_text(world: World) -> dict[str, Any]:
    """Of two samples one gets a text of several windows: both pictures are made, the other one's prompt acts as before."""
    first = iter(["a very long prompt with many words, " * 30, None])
    OBJECTS["batch"] = {"samples": torch.zeros(2, 16, 8, 8)}
    untouched = world.sample(latent="batch")
    refined = world.sample(said(lambda view: next(first)), "2", latent="batch")
    return {
        "other": difference(refined[1], untouched[1]),
        "changed": difference(refined[0], untouched[0]),
        "errors": [turn.error for turn in turns() if turn.error],
        "finite": bool(torch.isfinite(refined).all()),
    }


@case
def batch_with_an_encoder_that_splits_by_time(world: World) -> dict[str, Any]:
    """Hooks on the text encoder make it give several entries, each for a part of the run. Of two samples only one gets another text."""
    OBJECTS["batch"] = {"samples": torch.zeros(2, 16, 8, 8)}
    untouched = world.sample(latent="batch", hooked=True)
    both = world.sample(said(lambda view: B), "2", latent="batch", hooked=True)
    first = iter([B, None])
    refined = world.sample(said(lambda view: next(first)), "2", latent="batch", hooked=True)
    return {
        "other": difference(refined[1], untouched[1]),
        "changed": difference(refined[0], both[0]),
        "effect": difference(refined[0], untouched[0]),
        "size": float(untouched.abs().max()),
        "errors": [turn.error for turn in turns() if turn.error],
    }


@case
def strict(world: World) -> str:
    def raising(view: Any) -> str:
        raise ConnectionError("the endpoint does not answer")

    try:
        world.sample(said(raising), "2", more={"on_error": "stop"})
    except Failed as e:
        return str(e.data["exception_message"])
    return "went on"


@case
def wrong_vae(world: World) -> dict[str, Any]:
    """A preview that cannot be decoded is a failure of the turn."""
    import nodes

    untouched = world.sample()
    OBJECTS["other vae"] = nodes.CheckpointLoaderSimple().load_checkpoint("tiny_sd15.ckpt")[2]
    result = world.sample(same(), "2", vae="other vae")
    return {
        "diff": difference(result, untouched),
        "boundary": [turn.boundary for turn in turns()],
        "errors": [turn.error for turn in turns()],
    }


@case
def global_randomness(world: World) -> dict[str, Any]:
    """A refiner that draws and seeds shifts neither the sampler's noise nor anybody's random state."""
    from promptloop_pipeline import FunctionRefiner

    def draws(view: Any) -> str:
        torch.manual_seed(0)
        torch.rand(100)
        return view.prompt + " "

    found = {}
    at = "start, 1, 3"
    for sampler in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "er_sde", "seeds_3", "lcm", "ddpm", "euler"):
        at = "end" if sampler == "euler" else at
        torch.manual_seed(123)
        untouched = world.sample(sampler=sampler)
        state = torch.get_rng_state()
        torch.manual_seed(123)
        refined = world.sample(FunctionRefiner(draws), at, sampler=sampler)
        found[f"{sampler}, {at}"] = [difference(refined, untouched), bool(torch.equal(state, torch.get_rng_state()))]
    return found


@case
def part_of_a_run(world: World) -> dict[str, Any]:
    """A sampler that makes only some of the steps, or starts from a picture: shares are of the steps that it makes."""
    found = {}
    for name, settings in {"denoise": {"denoise": 0.5}, "karras": {"scheduler": "karras", "sampler": "dpmpp_2m"}}.items():
        untouched = world.sample(**settings)
        refined = world.sample(same(), "50%", **settings)
        found[name] = [difference(refined, untouched), [turn.step for turn in turns()]]
    return found


@case
def in_the_background(world: World) -> dict[str, Any]:
    """wait off: sampling goes on; what comes too late is said, and an interrupted run leaves no thread that acts on the next."""
    untouched = world.sample()
    refined = world.sample(Slow(0.0), "1", more={"wait": False})
    early = [turn.applied for turn in turns()]
    late = world.sample(Slow(5.0), "5", more={"wait": False})
    return {
        "early": early,
        "effect": difference(refined, untouched),
        "late": difference(late, untouched),
        "notes": [turn.notes for turn in turns()],
    }


@case
def several_conditionings(world: World) -> str:
    """None of them marked, none of them made of the prompt: refused before the first step, in words."""

    def foreign(g: Graph, clip: Any, words: str) -> Any:
        one, two = (g("CLIPTextEncode", text=t, clip=clip)[0] for t in ("a forest", "a lake"))
        return g("ConditioningCombine", conditioning_1=one, conditioning_2=two)[0]

    try:
        world.sample(same(), "2", conds=foreign)
    except Failed as e:
        return str(e.data["exception_message"])
    return "went on"


if __name__ == "__main__":
    inside.setup(sys.argv[1])
    world, wanted = World("sd3"), sys.argv[2:]
    found = {}
    for name, function in (CASES | sharing.CASES).items():
        if not wanted or name in wanted:
            clock = time.monotonic()
            try:
                found[name] = function(world)
            except Exception as e:
                import traceback

                found[name] = {"exception": "".join(traceback.format_exception(e))[-3000:]}
            print(f"{name}: {time.monotonic() - clock:.1f} s", file=sys.stderr)
    inside.answer(found)
