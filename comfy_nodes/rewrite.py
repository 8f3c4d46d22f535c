"""One prompt, rewritten once: by a refiner, or from what ComfyUI's own text generation wrote."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import once
from .types import HISTORY, REFINER

AS_LOADED = "as loaded"
MODES = ("replace", "append")


def _templates() -> list[str]:
    from .presets import preset_names

    return [AS_LOADED, *preset_names()]


def _prompt(tooltip: str) -> Any:
    return io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip)


def _mode() -> Any:
    return io.Combo.Input(
        "mode",
        options=list(MODES),
        default=MODES[0],
        tooltip="replace: the new prompt is used as it is. append: your own words stay in front, the rest is added to them.",
    )


def _valid(prompt: Any) -> bool | str:
    """None: it is linked, and not known yet."""
    return True if prompt is None or prompt.strip() else once.EMPTY


class PromptLoopRewrite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopRewrite",
            "Rewrite Prompt",
            "PromptLoop/prompt",
            description="Asks a refiner once for a better prompt. If that fails, your prompt is kept and the node says why.",
            inputs=[
                REFINER.Input("refiner", tooltip="Who rewrites: a Load Refiner, an endpoint, or Ask Me."),
                _prompt("What you want to see, in your own words."),
                _mode(),
                io.Combo.Input(
                    "template",
                    options=_templates(),
                    default=AS_LOADED,
                    tooltip="What the model is told. as loaded: what its loader says. Your own: text files in the user folder, under "
                    "promptloop/templates.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="For a refiner with a temperature above 0: another seed, another prompt.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture for the refiner to look at, such as a first try; of a batch the first one.",
                ),
            ],
            outputs=[
                io.String.Output("text", "prompt", tooltip="The new prompt; yours, where the refiner kept it or failed."),
                io.String.Output("reasoning", "reasoning", tooltip="Why, in the refiner's words, and a warning if it failed."),
                io.String.Output("raw", "raw", tooltip="All that the model wrote."),
                HISTORY.Output("history", "history", tooltip="The turn as a record: to show, to save, to replay."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt: Any = None) -> bool | str:
        return _valid(prompt)

    @classmethod
    def execute(cls, refiner: Any, prompt: str, mode: str, template: str, seed: int, image: Any = None) -> io.NodeOutput:
        from comfy.model_management import (
            InterruptProcessingException,
            processing_interrupted,
            throw_exception_if_processing_interrupted,
        )

        from .pictures import to_pil
        from .presets import load_preset

        told = None if template == AS_LOADED else load_preset(template)
        picture = None if image is None else to_pil(image[:1])[0]
        trajectory = once.rewrite(
            once.adjusted(refiner, seed, told), prompt, mode == "append", picture, InterruptProcessingException, processing_interrupted
        )  # fmt: skip
        throw_exception_if_processing_interrupted()
        (turn,) = trajectory.turns
        return io.NodeOutput(turn.after, once.why(turn), turn.raw, [trajectory], ui={"text": (once.shown(turn),)})


class PromptLoopParse(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopParse",
            "Rewrite with Generate Text Output",
            "PromptLoop/prompt",
            description="Takes the prompt out of what a text generation node wrote: without <think>, tags, labels, quotes, fences.",
            inputs=[
                io.String.Input(
                    "text", force_input=True, tooltip="The output of ComfyUI's Generate Text, or of any node that writes."
                ),
                _prompt("Your own words. They are kept where the text holds no prompt."),
                _mode(),
                io.String.Input(
                    "thinking",
                    optional=True,
                    force_input=True,
                    tooltip="The thinking output of that node, where it has one; it goes to reasoning.",
                ),
            ],
            outputs=[
                io.String.Output("new_prompt", "prompt", tooltip="The prompt that the text holds; yours, where it holds none."),
                io.String.Output("reasoning", "reasoning", tooltip="What the model thought, and why if your prompt was kept."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt: Any = None) -> bool | str:
        return _valid(prompt)

    @classmethod
    def execute(cls, text: str, prompt: str, mode: str, thinking: str = "") -> io.NodeOutput:
        (turn,) = once.parsed(text, prompt, mode == "append", thinking or "").turns
        return io.NodeOutput(turn.after, once.why(turn), ui={"text": (once.shown(turn),)})


NODES = [PromptLoopRewrite, PromptLoopParse]
