"""What steers the loop: when it looks, what it may rewrite, and how much of it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from promptloop_pipeline.schedule import RefinementSchedule

from .loop import readable
from .types import REFINER


class PromptLoopSchedule(io.ComfyNode):
    """When to look, by numbers."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoopSchedule",
            display_name="Refinement Schedule",
            category="PromptLoop",
            description="Says when the refiner looks, for the input refine_at.",
            inputs=[
                io.Boolean.Input(
                    "start", default=False, tooltip="Also rewrite before the first step, with nothing to see yet."
                ),
                io.Int.Input("looks", default=3, min=0, max=100, tooltip="How many looks, evenly from first to last."),
                io.Float.Input("first", default=20.0, min=0.0, max=100.0, step=1.0, tooltip="The first look, in % of the run."),
                io.Float.Input("last", default=80.0, min=0.0, max=100.0, step=1.0, tooltip="The last look, in % of the run."),
                io.Boolean.Input(
                    "end", default=False, tooltip="Also look at the finished picture; that changes nothing in it."
                ),
                io.String.Input("more", default="", tooltip='More turns as text: "6, 12" for steps, "every 4".'),
            ],
            outputs=[io.String.Output(display_name="refine_at", tooltip="For the input refine_at.")],
        )

    @classmethod
    def validate_inputs(cls, more: str | None = None) -> bool | str:
        return readable(more) if more and more.strip() else True

    @classmethod
    def execute(cls, start: bool, looks: int, first: float, last: float, end: bool, more: str) -> Any:
        shares = [first + (last - first) * k / max(looks - 1, 1) for k in range(looks)]
        items = ["start"] * start + [f"{s:.4g}%" for s in shares] + ["end"] * end + ([more] if more.strip() else [])
        return io.NodeOutput(str(RefinementSchedule.parse(", ".join(items) or "none")))


class PromptLoopTarget(io.ComfyNode):
    """Marks what may be rewritten."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoopTarget",
            display_name="Refinement Target",
            category="PromptLoop",
            description="Marks a conditioning as the one that may be rewritten, where several are combined (regional prompts).",
            inputs=[io.Conditioning.Input("conditioning", tooltip="The prompt that may be rewritten, before it is combined.")],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The same, marked.")],
        )

    @classmethod
    def execute(cls, conditioning: Any) -> Any:
        import node_helpers

        from .host import TARGET

        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, {TARGET: True}))


class PromptLoopGuard(io.ComfyNode):
    """What a refiner may do to a prompt."""

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="PromptLoopGuard",
            display_name="Guard Refiner",
            category="PromptLoop",
            description="Limits what a refiner may do to your words. Whatever it does is noted in the history.",
            inputs=[
                REFINER.Input("refiner", tooltip="Any refiner."),
                io.Boolean.Input(
                    "keep_my_words", default=False, tooltip="Your own words stay in front; it may only add to them."
                ),
                io.String.Input(
                    "must_keep", default="", tooltip="Terms that may not get lost, with commas; a lost one is put back."
                ),
                io.Float.Input(
                    "max_change",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the words that one turn may change.",
                ),
            ],
            outputs=[REFINER.Output(display_name="refiner", tooltip="The same refiner, guarded.")],
        )

    @classmethod
    def execute(cls, refiner: Any, keep_my_words: bool, must_keep: str, max_change: float) -> Any:
        from promptloop_pipeline.refiners.guards import GuardedRefiner

        terms = [term.strip() for term in must_keep.split(",") if term.strip()]
        limit = max_change if max_change < 1 else None
        return io.NodeOutput(GuardedRefiner(refiner, prefix=keep_my_words, must_keep=terms, max_change=limit))


NODES = [PromptLoopSchedule, PromptLoopTarget, PromptLoopGuard]
