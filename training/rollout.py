"""Rollouts: groups of trajectories of the same request, made by the very loop that users run, and what training needs to know
of them.

All trajectories of all groups denoise as one batch. Each group has turns of its own; the retained trajectories, last in each
group, have none: they are the request as the user wrote it, from the same noise.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from promptloop_pipeline import attach
from promptloop_pipeline.chat import Conversation
from promptloop_pipeline.pipelines.families import decode_preview, family_of
from promptloop_pipeline.refiner import Refinement, View
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.reward import Reward
from promptloop_pipeline.rewards.combine import RewardSpec, score_all, tagged, weighted_sum
from promptloop_pipeline.trajectory import Trajectory

from .sharing import equal_rows_once


@dataclass(frozen=True)
class Sample:
    """A request of the training data. seed: all chance of its group derives from it: the noise, and what the policy draws. tag:
    the reward that it is for, where each prompt has one of its own. context: whatever else rewards are told of it."""

    request: str
    seed: int
    tag: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One turn as a training sample: what the model was asked, what it said, and the log-probabilities that it said it with."""

    conversation: Conversation
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None


@dataclass
class Group:
    """trajectories: the refined ones first, then the retained. rows: of each refined one, one for each turn that carries loss;
    None where the policy gave nothing to learn from. raw: each reward's values; rewards: what is trained on, one a
    trajectory."""

    sample: Sample
    trajectories: list[Trajectory]
    rows: list[list[Row | None]]
    raw: dict[str, list[float | None]] = field(default_factory=dict)
    rewards: list[float | None] = field(default_factory=list)


class Rollout:
    """refiner: the policy, with the template and the sampling of its use. rewards: by name; specs: how they are put together.

    size: trajectories in a group, the `retained` ones among them. share_noise: whether all of a group start from the same noise
    (then all that differs between them is what the policy said). by_tag: each sample's reward is the one that its tag names, in
    its own unit. call: of the pipeline: num_inference_steps, guidance_scale, ... preview: as for `attach`.
    """

    def __init__(
        self,
        pipe: Any,
        refiner: MLLMRefiner,
        rewards: Mapping[str, Reward],
        specs: Sequence[RewardSpec],
        *,
        size: int,
        retained: int = 0,
        share_noise: bool = True,
        share_steps: bool = True,
        by_tag: bool = False,
        preview: Any = None,
        **call: Any,
    ) -> None:
        if not 0 <= retained < size:
            raise ValueError(f"a group of {size} trajectories cannot retain {retained}; retain from 0 to {size - 1}")
        self.pipe, self.refiner, self.rewards, self.specs = pipe, refiner, dict(rewards), list(specs)
        self.size, self.retained, self.share_noise, self.share_steps, self.by_tag = (
            size,
            retained,
            share_noise,
            share_steps,
            by_tag,
        )
        self.preview, self.call = preview, call
        self.seconds: dict[str, float] = {}

    def __call__(self, samples: Sequence[Sample], steps: Sequence[Sequence[int]], retained: int | None = None) -> list[Group]:
        """steps: for each sample, the sampling steps of its turns, sorted; 0 is the turn before the first step, without a picture.

        Raises RuntimeError when the policy failed on every turn, and whatever a reward raises.
        """
        clock = time.perf_counter()
        kept = self.retained if retained is None else retained
        of = [k for k in range(len(samples)) for _ in range(self.size)]
        place = [i % self.size for i in range(len(of))]
        refined = self.size - kept
        turns = _Turns(self, [set(steps[k]) if p < refined else set() for k, p in zip(of, place)],
                       [_seed(samples[k].seed, "policy", p) for k, p in zip(of, place)])  # fmt: skip
        noise = [_seed(samples[k].seed, "noise", 0 if self.share_noise else p) for k, p in zip(of, place)]
        loop = attach(self.pipe)
        with equal_rows_once(self.pipe) if self.share_steps else nullcontext():
            out = loop(
                [samples[k].request for k in of], generator=[torch.Generator().manual_seed(s) for s in noise], refiner=turns,
                refine_at=sorted(set().union(*map(set, steps))) or "none", preview=turns.decode, output_type="pil", **self.call,
            )  # fmt: skip
        self.seconds = {"rollout": time.perf_counter() - clock}
        for i, t in enumerate(out.trajectories):
            t.turns = [turn for turn in t.turns if turn.step in turns.due[i]]
            t.meta |= {"retained": place[i] >= refined, "tag": samples[of[i]].tag}
        groups = []
        for k, sample in enumerate(samples):
            part = slice(k * self.size, (k + 1) * self.size)
            rows = [turns.rows[i] for i in range(part.start, part.start + refined)]
            groups.append(Group(sample, out.trajectories[part], rows))
        if refined and turns.asked and not any(row for group in groups for rows in group.rows for row in rows):
            errors = [turn.error for t in out.trajectories for turn in t.failures]
            raise RuntimeError(f"the policy failed on every turn: {errors[0] if errors else 'it was never asked'}")
        clock = time.perf_counter()
        self._score(groups)
        self.seconds["rewards"] = time.perf_counter() - clock
        return groups

    def _score(self, groups: Sequence[Group]) -> None:
        flat = [(g, t) for g in groups for t in g.trajectories]
        trajectories = [t for _, t in flat]
        keys = dict.fromkeys(key for g in groups for key in g.sample.context)
        context = {key: [g.sample.context.get(key) for g, _ in flat] for key in keys}
        raw = score_all(
            self.rewards, [t.image for t in trajectories], [t.request for t in trajectories], refined=[t.prompt for t in
            trajectories], format_ok=[_share([turn.format_ok for turn in t.turns]) for t in trajectories],
            trajectories=trajectories, **context,
        )  # fmt: skip
        total = tagged(raw, [str(g.sample.tag) for g, _ in flat]) if self.by_tag else weighted_sum(raw, self.specs)
        for i, (group, t) in enumerate(flat):
            t.scores = {name: values[i] for name, values in raw.items()}
            group.rewards.append(total[i])
            for name, values in raw.items():
                group.raw.setdefault(name, []).append(values[i])


class _Turns:
    """The policy, asked at each step only for the samples whose turn it is; only their previews are decoded."""

    def __init__(self, rollout: Rollout, due: list[set[int]], seeds: list[int]) -> None:
        self.rollout, self.policy, self.due, self.seeds = rollout, rollout.refiner, due, seeds
        self.rows: list[list[Row | None]] = [[] for _ in due]
        self.asked = any(due)
        every = set().union(*due)
        # One forward pass takes rows with pictures or rows without: where turns look, the one that cannot is answered, not trained.
        self.looking = self.policy.looks and every - {0} != set()
        self._next: Iterator[int] = iter(sorted(every - {0}))

    @property
    def looks(self) -> bool:
        return self.looking

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        step = views[0].step
        mine = [i for i in range(len(views)) if step in self.due[i]]
        answers = [Refinement()] * len(views)
        if not mine:
            return answers
        trained = step > 0 or not self.looking
        policy = self.policy if trained else _greedy(self.policy)
        said = policy.refine([views[i] for i in mine], [_seed(self.seeds[i], step) for i in mine])
        for i, answer in zip(mine, said, strict=True):
            answers[i] = answer
            if trained:
                self.rows[i].append(_row(self.policy, views[i], answer))
        return answers

    def decode(self, pipe: Any, latents: Any) -> list[Any]:
        step = next(self._next)
        rows = [i for i, due in enumerate(self.due) if step in due]
        height, width = self.rollout.call.get("height"), self.rollout.call.get("width")
        pictures = decode_preview(pipe, family_of(pipe), latents[rows], height, width, self.rollout.preview)
        found: list[Any] = [None] * len(self.due)
        for i, picture in zip(rows, pictures, strict=True):
            found[i] = picture
        return found


def _greedy(policy: MLLMRefiner) -> MLLMRefiner:
    greedy = MLLMRefiner(policy.chat, policy.template, max_pixels=policy.max_pixels)
    greedy.sampling = replace(policy.sampling, temperature=0.0)
    return greedy


def _row(policy: MLLMRefiner, view: View, answer: Refinement) -> Row | None:
    conversation = policy.conversation(view)
    if conversation is None or not answer.token_ids:
        return None
    return Row(conversation, answer.token_ids, answer.logprobs)


def _share(values: Sequence[bool | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _seed(*parts: Any) -> int:
    """The same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "big")
