"""What a run is told: TRL's `GRPOConfig` and the loop's own part, checked before any model is loaded."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from promptloop_pipeline.rewards.combine import RewardSpec, parse_rewards
from promptloop_pipeline.schedule import RefinementSchedule

DERIVED = (
    "num_generations", "num_generations_eval", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
    "per_device_eval_batch_size",
)  # fmt: skip
SAMPLERS = {
    "top_k": (0, None),
    "min_p": (None,),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None,),
}  # what we leave alone


@dataclass
class PromptLoopConfig(GRPOConfig):
    """A batch is `prompts_per_step` prompts in each process, each with `group_size` trajectories of `turns` turns.
    `per_device_train_batch_size` counts turns, and says how many go through the policy at once; how often gradients are accumulated
    follows from it."""

    output_dir: str | None = field(default="promptloop-train", metadata={"help": "Checkpoints, log, samples, and the result."})
    # the policy
    refiner: str = field(
        default="tiny", metadata={"help": '"tiny" (embedded), or a folder or hub id of a vision-language model.'}
    )
    template: str | None = field(default=None, metadata={"help": 'What the policy is told; default "rewrite" (tiny: its own).'})
    max_pixels: int = field(default=448 * 448, metadata={"help": "Previews are scaled down to this many pixels."})
    # the generator
    pipeline: str = field(
        default="tiny", metadata={"help": '"tiny" (embedded), or a folder or hub id of a diffusers pipeline.'}
    )
    pipeline_dtype: str | None = field(default=None, metadata={"help": "float32, float16 or bfloat16; default: what fits."})
    num_inference_steps: int = field(default=20, metadata={"help": "Sampling steps."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Default: the pipeline's own (tiny: 3)."})
    width: int | None = field(default=None, metadata={"help": "Pixels; default: the pipeline's own."})
    height: int | None = field(default=None, metadata={"help": "Pixels; default: the pipeline's own."})
    # turns
    turns: int = field(default=3, metadata={"help": "Turns with a preview, drawn at random for each group (PromptLoop's K)."})
    fewest_turns: int | None = field(
        default=None, metadata={"help": "Each group has from this many to `turns` turns, at random; default: always `turns`."}
    )
    window: str = field(default="10%, 60%", metadata={"help": "The part of the run from which they are drawn."})
    start_turn: bool = field(
        default=False, metadata={"help": "Also a greedy turn before the first step, which carries no loss."}
    )
    refine_at: str | None = field(
        default=None, metadata={"help": 'A fixed schedule instead, such as "start" (single-turn GRPO).'}
    )
    # groups
    prompts_per_step: int = field(default=4, metadata={"help": "Prompts of a batch, in each process."})
    group_size: int = field(default=8, metadata={"help": "Trajectories of a prompt, retained ones included (G)."})
    retained: int = field(
        default=0, metadata={"help": "Of these, how many keep the user's words: they carry no loss (PromptRL: 2)."}
    )
    share_noise: bool = field(default=True, metadata={"help": "All trajectories of a group start from the same noise."})
    credit: str = field(
        default="trajectory",
        metadata={
            "help": '"trajectory": all turns share its advantage; "turn": each has what its preview gained until the next.'
        },
    )
    win_rate: bool = field(
        default=False,
        metadata={"help": "Train on the share of its group that a trajectory beats (Pref-GRPO), not on the score."},
    )
    skip_flat_groups: bool = field(
        default=True, metadata={"help": "Groups whose rewards are all equal take no part in the loss."}
    )
    rollout_batch: int | None = field(
        default=None,
        metadata={"help": "Trajectories that denoise together, at most, where memory is short; default: all of a batch."},
    )
    # rewards
    rewards: str = field(default="verifier", metadata={"help": "NAME[:WEIGHT][<=CAP], ...; weight 0: logged, not trained on."})
    reward_models: list[str] = field(
        default_factory=list, metadata={"help": "NAME[:PART]=WEIGHTS, as in `promptloop score --model`."}
    )
    by_tag: bool = field(
        default=False, metadata={"help": 'The column "tag" names the one reward of each prompt (PromptRL 4.3).'}
    )
    # data
    train_data: str = field(
        default="shapes:train", metadata={"help": '"shapes:train", a .jsonl or .txt file, or a hub dataset.'}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "The column with the request."})
    train_prompts: int | None = field(default=None, metadata={"help": "How many prompts; default: all (shapes: 4096)."})
    # watching
    watch_every: int = field(default=50, metadata={"help": "Steps between two looks at prompts held out; 0: never."})
    watch_prompts: int = field(default=64, metadata={"help": "How many these are."})
    samples_every: int = field(default=25, metadata={"help": "Steps between two records of trajectories; 0: never."})
    watch_data: str | None = field(
        default=None, metadata={"help": "Their source, as train_data; default: some of train_data (shapes: of shapes:any)."}
    )
    watch_blind: str = field(
        default="end", metadata={"help": 'When it is also watched with grey pictures: "never", "end" or "always".'}
    )
    # the run
    logging_steps: float = field(default=1, metadata={"help": "Steps that a line of the log is the mean of."})
    reward_batch: int = field(default=32, metadata={"help": "Pictures at a time through a reward."})
    resume: bool = field(default=True, metadata={"help": "Go on with the run that output_dir holds; false: refuse to."})

    def __post_init__(self) -> None:
        self.specs: list[RewardSpec] = []
        self._check()
        rows = self.prompts_per_step * self.rows_per_group
        if rows % self.per_device_train_batch_size:
            raise ValueError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}, and a batch has {rows} turns (prompts_per_step "
                f"{self.prompts_per_step} x ({self.group_size} - {self.retained}) trajectories x {self.turns_trained} turns); use a "
                "divisor of that"
            )
        self.num_generations = self.num_generations_eval = self.per_device_eval_batch_size = self.rows_per_group
        self.gradient_accumulation_steps = rows // self.per_device_train_batch_size
        self.steps_per_generation, self.generation_batch_size = None, None
        self.remove_unused_columns = False
        super().__post_init__()
        self._check_run()

    def _check(self) -> None:
        for name, least in (
            ("turns", 1),
            ("prompts_per_step", 1),
            ("group_size", 2),
            ("num_inference_steps", 1),
            ("max_pixels", 1),
            ("per_device_train_batch_size", 1),
            ("watch_every", 0),
            ("samples_every", 0),
            ("watch_prompts", 1),
            ("reward_batch", 1),
            ("rollout_batch", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; use {least} or more")
        if not 0 <= self.retained <= self.group_size - 2:
            raise ValueError(f"retained is {self.retained} of a group of {self.group_size}; use 0 to {self.group_size - 2}")
        if self.fewest_turns is not None and (self.refine_at is not None or not 1 <= self.fewest_turns <= self.turns):
            raise ValueError(
                f"fewest_turns is {self.fewest_turns}; use 1 to {self.turns} (turns)"
                + ", without refine_at" * bool(self.refine_at)
            )
        low, high = self.bounds()
        if self.refine_at is None and high - low + 1 < self.turns:
            raise ValueError(
                f"turns is {self.turns}, and the window {self.window!r} of {self.num_inference_steps} steps has room for "
                f"{max(high - low + 1, 0)}; use fewer turns, a wider window, or more steps"
            )
        if self.refine_at is not None and not self.draw_steps(random.Random(0)):
            raise ValueError(f'refine_at is {self.refine_at!r}, which has no turn; use such as "start" or "20%, 50%, 80%"')
        if self.refine_at is not None and self.num_inference_steps in self.draw_steps(random.Random(0)):
            raise ValueError(
                f"refine_at is {self.refine_at!r}: a turn at the end changes no picture, so that nothing can be learnt from it"
            )
        self.specs = parse_rewards(self.rewards)
        if not self.by_tag and all(s.held_out for s in self.specs):
            raise ValueError(f"rewards is {self.rewards!r}, of which none has a weight; give one a weight")
        if self.scale_rewards not in ("group", "batch", "none", True, False):
            raise ValueError(f'scale_rewards is {self.scale_rewards!r}; use "group", "batch" or "none"')
        if self.pipeline_dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"pipeline_dtype is {self.pipeline_dtype!r}; use float32, float16 or bfloat16")

        self._check_policy()
        self._check_credit()

    def _check_policy(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; use more than 0: trajectories that are all alike teach nothing"
            )
        if not (self.use_vllm or self.use_transformers_continuous_batching):
            for name, allowed in SAMPLERS.items():
                if getattr(self, name) not in allowed:
                    raise ValueError(f"{name} is {getattr(self, name)!r}, which only vLLM knows; use temperature and top_p")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation!r}, and rewards are put together by their weights; "
                'use "sum_then_normalize"'
            )
        if self.use_vllm and self.vllm_mode == "server" and self.world_size > 1:
            raise ValueError(
                'vllm_mode is "server", which asks for all processes at once, and their turns fall on different steps; use "colocate"'
            )

    def _check_credit(self) -> None:
        if self.credit not in ("trajectory", "turn"):
            raise ValueError(f'credit is {self.credit!r}; use "trajectory" or "turn"')
        if self.credit == "trajectory":
            return
        for wrong, why in (
            (self.retained > 0, f"retained is {self.retained}, and what is left untouched has no turns; use 0"),
            (self.win_rate, "win_rate is true, which ranks whole trajectories; use false"),
            (not any(s > 0 for s in self.draw_steps(random.Random(0))), f"refine_at is {self.refine_at!r}, without a preview"),
            (any(s.name == "format" for s in self.specs), 'rewards has "format", which is of no picture; leave it out'),
        ):
            if wrong:
                raise ValueError(f'credit is "turn", and {why}')

    def _check_run(self) -> None:
        """How it is started; and what would not be taken up from a checkpoint as if the run had never stopped."""
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs, and would cut groups in pieces; start it with accelerate launch, a process for "
                "each, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.save_only_model and self.save_strategy != "no":
            raise ValueError("save_only_model is true, and no run could go on from such a checkpoint; use false")
        if self.save_strategy != "steps" or self.save_steps < 1:
            return
        for name, part in (("num_iterations", "the batch at hand"), ("logging_steps", "the means since the last log")):
            by = getattr(self, name)
            if by > 1 and self.save_steps % by and (name == "num_iterations" or self.logging_strategy == "steps"):
                raise ValueError(
                    f"save_steps is {self.save_steps:g}, and {name} {by:g}: {part} would be lost on resuming; use a multiple of {by:g}"
                )

    def bounds(self) -> tuple[int, int]:
        """The first and the last step of the window, both possible."""
        ends = RefinementSchedule.parse(self.window).steps(self.num_inference_steps)
        if len(ends) != 2:
            raise ValueError(f'window is {self.window!r}; give its first and its last step, such as "10%, 60%"')
        return max(ends[0], 1), min(ends[1], self.num_inference_steps - 1)

    def draw_steps(self, rng: random.Random) -> list[int]:
        """The steps of a group's turns, sorted."""
        if self.refine_at is not None:
            return list(RefinementSchedule.parse(self.refine_at).steps(self.num_inference_steps))
        low, high = self.bounds()
        turns = self.turns if self.fewest_turns is None else rng.randint(self.fewest_turns, self.turns)
        return [0] * self.start_turn + sorted(rng.sample(range(low, high + 1), turns))

    def even_steps(self) -> list[int]:
        """Equally spaced over the window, as at test."""
        if self.refine_at is not None:
            return self.draw_steps(random.Random(0))
        low, high = self.bounds()
        gap = (high - low) / max(self.turns - 1, 1)
        return [0] * self.start_turn + sorted({round(low + k * gap) for k in range(self.turns)})

    @property
    def turns_trained(self) -> int:
        """Turns of a trajectory that carry loss, at most: those with a picture, or, where there is none, the one at the start."""
        if self.refine_at is None:
            return self.turns
        steps = self.draw_steps(random.Random(0))
        return len([s for s in steps if s > 0]) or len(steps)

    @property
    def rows_per_group(self) -> int:
        return (self.group_size - self.retained) * self.turns_trained

    @property
    def call(self) -> dict[str, Any]:
        given = {"guidance_scale": self.guidance_scale, "width": self.width, "height": self.height}
        if self.pipeline == "tiny" and self.guidance_scale is None:
            given["guidance_scale"] = 3.0
        return {"num_inference_steps": self.num_inference_steps} | {k: v for k, v in given.items() if v is not None}
