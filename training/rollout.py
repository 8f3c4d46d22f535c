"""Rollouts: groups of trajectories of the same request, made by the very loop that users run, and what training needs to know
of them.

All trajectories of all groups denoise as one batch, or as a few where that is too large for the machine. Each group has turns of
its own; the retained trajectories, last in each group, have none: they are the request as the user wrote it, from the same noise.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from promptloop_pipeline import attach
from promptloop_pipeline.chat import Conversation
from promptloop_pipeline.pipelines.families import decode_preview, family_of
from promptloop_pipeline.refiner import Refinement, View
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.reward import Reward, ask
from promptloop_pipeline.rewards.combine import RewardSpec, filled, tagged, weighted_sum
from promptloop_pipeline.tiny import quiet
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
    trajectory; None where no reward applies."""

    sample: Sample
    trajectories: list[Trajectory]
    rows: list[list[Row | None]]
    raw: dict[str, list[float | None]] = field(default_factory=dict)
    rewards: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Shot:
    """A picture to be scored. refined: the prompt that it was made with."""

    group: int
    sample: Sample
    image: Any
    trajectory: Trajectory
    refined: str
    format_ok: float | None


class Rollout:
    """refiner: the policy, with the template and the sampling of its use. rewards: by name; specs: how they are put together.

    size: trajectories in a group, the `retained` ones among them. batch: how many trajectories denoise together, at most; None: all.
    Groups are cut only where one is larger than that. share_noise: whether all of a group start from the same noise (then all that
    differs between them is what the policy said). share_steps: whether equal rows are computed once (`sharing.equal_rows_once`); not
    for a pipeline whose rows see each other, as with style-aligned attention. by_tag: each sample's reward is the one that its tag
    names, in its own unit. call: of the pipeline: num_inference_steps, guidance_scale, ... preview: as for `attach`.

    What a sample's trajectories are does not depend on which other samples are in the batch, up to the rounding of batched
    arithmetic.

    Raises ValueError for a group without anything refined.
    """

    def __init__(
        self, pipe: Any, refiner: MLLMRefiner, rewards: Mapping[str, Reward], specs: Sequence[RewardSpec], *, size: int,
        retained: int = 0, batch: int | None = None, share_noise: bool = True, share_steps: bool = True, by_tag: bool = False,
        preview: Any = None, **call: Any,
    ) -> None:  # fmt: skip
        if not 0 <= retained < size:
            raise ValueError(f"a group of {size} trajectories cannot retain {retained}; retain from 0 to {size - 1}")
        self.pipe, self.refiner, self.rewards, self.specs = pipe, refiner, dict(rewards), list(specs)
        self.size, self.retained, self.by_tag = size, retained, by_tag
        self.batch, self.share_noise, self.share_steps = batch, share_noise, share_steps
        self.preview, self.call = preview, call
        self.seconds: dict[str, float] = {}
        self.computed: dict[str, list[int]] = {}  # by module: rows of the last batch, and how many of them were computed

    def __call__(self, samples: Sequence[Sample], steps: Sequence[Sequence[int]], retained: int | None = None) -> list[Group]:
        """steps: for each sample, the sampling steps of its turns, sorted; 0 is the turn before the first step, without a picture.

        Raises RuntimeError when the policy failed on every turn, or naming a reward that failed.
        """
        clock = time.perf_counter()
        kept = self.retained if retained is None else retained
        refined = self.size - kept
        asked = [(s, p, set(due) if p < refined else set()) for s, due in zip(samples, steps) for p in range(self.size)]
        most = len(asked) if self.batch is None else self.batch - self.batch % self.size or self.batch
        once: Any = equal_rows_once(self.pipe) if self.share_steps else nullcontext({})
        found: list[tuple[Trajectory, list[Row | None]]] = []
        with _quiet(), once as self.computed:
            for i in range(0, len(asked), most):
                found += self._denoised(asked[i : i + most])
        self.seconds = {"rollout": time.perf_counter() - clock}
        groups = []
        for k, sample in enumerate(samples):
            of = found[k * self.size : (k + 1) * self.size]
            for p, (t, _) in enumerate(of):
                t.meta |= {"retained": p >= refined, "tag": sample.tag}
            groups.append(Group(sample, [t for t, _ in of], [rows for _, rows in of[:refined]]))
        if any(due for _, _, due in asked) and not any(row for group in groups for rows in group.rows for row in rows):
            errors = [turn.error for t, _ in found for turn in t.failures]
            raise RuntimeError(f"the policy failed on every turn: {errors[0] if errors else 'it was never asked'}")
        clock = time.perf_counter()
        self._score(groups)
        self.seconds["rewards"] = time.perf_counter() - clock
        return groups

    def _denoised(self, asked: Sequence[tuple[Sample, int, set[int]]]) -> list[tuple[Trajectory, list[Row | None]]]:
        """As one batch. asked: (sample, place in its group, steps of its turns) of each."""
        turns = _Turns(self, [due for _, _, due in asked], [_seed(sample.seed, "policy", p) for sample, p, _ in asked])
        noise = [_seed(sample.seed, "noise", 0 if self.share_noise else p) for sample, p, _ in asked]
        out = attach(self.pipe)(
            [sample.request for sample, _, _ in asked], generator=[torch.Generator().manual_seed(s) for s in noise], refiner=turns,
            refine_at=sorted(set().union(*turns.due)) or "none", preview=turns.decode, output_type="pil", **self.call,
        )  # fmt: skip
        for t, due in zip(out.trajectories, turns.due, strict=True):
            t.turns = [turn for turn in t.turns if turn.step in due]
        return [(t, list(rows.values())) for t, rows in zip(out.trajectories, turns.rows, strict=True)]

    def _score(self, groups: Sequence[Group]) -> None:
        shots = [
            _Shot(k, group.sample, t.image, t, t.prompt, _share([turn.format_ok for turn in t.turns]))
            for k, group in enumerate(groups)
            for t in group.trajectories
        ]
        raw, total = self._values(shots)
        for i, shot in enumerate(shots):
            group = groups[shot.group]
            shot.trajectory.scores = {name: values[i] for name, values in raw.items()}
            group.rewards.append(total[i])
            for name, values in raw.items():
                group.raw.setdefault(name, []).append(values[i])

    def looks(self, groups: Sequence[Group]) -> list[list[list[float | None]]]:
        """The same rewards of what the policy saw: for each group, for each refined trajectory, for each of its turns that carry
        loss. None where there was no picture."""
        places, shots = [], []
        found: list[list[list[float | None]]] = []
        for k, group in enumerate(groups):
            found.append([[None] * len(rows) for rows in group.rows])
            for j, t in enumerate(group.trajectories[: len(group.rows)]):
                for n, turn in enumerate([turn for turn in t.turns if turn.step > 0]):
                    if turn.image is not None:
                        places.append((k, j, n))
                        shots.append(_Shot(k, group.sample, turn.image, t, turn.before, None))
        for (k, j, n), value in zip(places, self._values(shots)[1] if shots else []):
            found[k][j][n] = value
        return found

    def _values(self, shots: Sequence[_Shot]) -> tuple[dict[str, list[float | None]], list[float | None]]:
        """Of each reward, and of all together."""
        keys = dict.fromkeys(key for s in shots for key in s.sample.context)
        context: dict[str, Any] = {key: [s.sample.context.get(key) for s in shots] for key in keys}
        context |= {
            "refined": [s.refined for s in shots],
            "format_ok": [s.format_ok for s in shots],
            "trajectories": [s.trajectory for s in shots],
        }
        images, requests = [s.image for s in shots], [s.trajectory.request for s in shots]
        raw = {}
        for name, reward in self.rewards.items():
            try:
                raw[name] = ask(reward, images, requests, name=name, **context)
            except Exception as e:
                raise RuntimeError(f"the reward {name!r} failed: {type(e).__name__}: {e}") from e
        if self.by_tag:
            return raw, tagged(raw, [str(s.sample.tag) for s in shots])
        # What has no format, as the retained have none, gets the mean of its group: so that it neither gains nor loses by it.
        whole = {name: filled(values, [s.group for s in shots]) for name, values in raw.items()}
        applies = weighted_sum(raw, self.specs)
        return raw, [None if a is None else t for a, t in zip(applies, weighted_sum(whole, self.specs))]


class _Turns:
    """The policy, asked at each step only for the samples whose turn it is; only their previews are decoded. rows: for each
    sample, by step, those of its turns that carry loss: those with a preview, or, where it has none, the one at the start.
    (One forward pass takes rows with pictures or rows without, so a start before others is answered greedily, and not trained.)"""

    def __init__(self, rollout: Rollout, due: list[set[int]], seeds: list[int]) -> None:
        self.rollout, self.policy, self.due, self.seeds = rollout, rollout.refiner, due, seeds
        self.rows: list[dict[int, Row | None]] = [{s: None for s in sorted(steps - {0} or steps)} for steps in due]
        self._waiting = sorted(set().union(*due) - {0})
        self.looks = self.policy.looks and bool(self._waiting)
        self._shown = 0

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        step = views[0].step
        self._waiting = [s for s in self._waiting if s > step]
        if self.looks and step > 0 and step != self._shown:
            raise RuntimeError(f"the preview is that of step {self._shown}, since an earlier one failed")
        answers = [Refinement()] * len(views)
        mine = [i for i, due in enumerate(self.due) if step in due]
        for trained, policy in ((True, self.policy), (False, _greedy(self.policy))):
            part = [i for i in mine if (step in self.rows[i]) == trained]
            seen = [replace(views[i], turns=tuple(t for t in views[i].turns if t.step in self.due[i])) for i in part]
            said = policy.refine(seen, [_seed(self.seeds[i], step) for i in part]) if part else []
            for i, view, answer in zip(part, seen, said, strict=True):
                answers[i] = answer
                if trained:
                    self.rows[i][step] = _row(policy, view, answer)
        return answers

    def decode(self, pipe: Any, latents: Any) -> list[Any]:
        step = self._shown = self._waiting.pop(0)
        rows = [i for i, due in enumerate(self.due) if step in due]
        height, width = self.rollout.call.get("height"), self.rollout.call.get("width")
        preview = self.rollout.preview
        if callable(preview) and not isinstance(preview, torch.nn.Module):
            pictures = preview(pipe, latents[rows])
        else:
            pictures = decode_preview(pipe, family_of(pipe), latents[rows], height, width, preview)
        found: list[Any] = [None] * len(self.due)
        for i, picture in zip(rows, pictures, strict=True):
            found[i] = picture
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Failed turns are data here, and are counted; nor need each request that is too long for a text encoder be printed."""
    log = logging.getLogger("promptloop")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        log.setLevel(level)


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
