"""Rollouts on the embedded world: groups of trajectories, made by the very loop that users run."""

import hashlib

import numpy as np
import pytest
import torch
from promptloop_training.rollout import Rollout, Sample, _seed

from promptloop_pipeline import MLLMRefiner, tiny
from promptloop_pipeline.chat.local import TransformersChat
from promptloop_pipeline.rewards.combine import RewardSpec, load_reward, parse_rewards

from ..chat import models

STEPS, CALL = 6, {"num_inference_steps": 6, "guidance_scale": 3.0}
A, B = Sample("large red circle top left , black background", 1), Sample("small blue cross center , white background", 2)


def brightness(images, prompts, **_):
    return [float(np.asarray(image).mean()) / 255 for image in images]


def wordy(images, prompts, trajectories, **_):
    """A number in [0, 1) for what was said, whatever it was; 0 for nothing."""
    said = ["".join(turn.raw for turn in t.turns) for t in trajectories]
    return [hashlib.blake2b(s.encode(), digest_size=1).digest()[0] / 256 if s else 0.0 for s in said]


def mixed(images, prompts, trajectories, **_):
    """The same of both the picture and what was said."""
    said = [
        image.tobytes() + "".join(turn.raw for turn in t.turns).encode() for image, t in zip(images, trajectories, strict=True)
    ]
    return [hashlib.blake2b(s, digest_size=1).digest()[0] / 256 for s in said]


@pytest.fixture(scope="module")
def pipe():
    return tiny.load_pipeline()


@pytest.fixture(scope="module")
def policy():
    return tiny.load_refiner(temperature=3.0, logprobs=True, max_new_tokens=24)  # hot: trajectories are to differ


def rollout(pipe, policy, rewards=f"{__package__}.test_rollout:brightness", size=3, **changes):
    specs = parse_rewards(rewards)
    return Rollout(pipe, policy, {s.name: load_reward(s.name) for s in specs}, specs, size=size, **CALL | changes)


def record(group):
    found = [(t.request, t.prompt, [(u.step, u.before, u.after, u.token_ids) for u in t.turns]) for t in group.trajectories]
    return found, [[row and row.token_ids for row in rows] for rows in group.rows]


def gap(one, other):
    return max(
        np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).max()
        for a, b in zip(one.trajectories, other.trajectories, strict=True)
    )


def test_a_batch_equals_its_singles(pipe, policy):
    """What a sample's trajectories are does not depend on which others are in the batch, nor when their turns are."""
    roll = rollout(pipe, policy, retained=1)
    both = roll([A, B], [[1, 3], [2, 4]])
    for sample, steps, group in ((A, [1, 3], both[0]), (B, [2, 4], both[1])):
        (alone,) = roll([sample], [steps])
        assert record(alone) == record(group) and gap(alone, group) <= 2
        assert alone.rewards == pytest.approx(group.rewards, abs=1e-3)
        assert [[turn.step for turn in t.turns] for t in group.trajectories] == [steps, steps, []]
    assert len({t.prompt for t in both[0].trajectories}) > 1  # or nothing was tested


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [(1, [1] * 8), (3, [3, 3, 2]), (4, [4, 4]), (7, [4, 4]), (8, [8]), (100, [8])],
)
def test_parts_of_a_batch_equal_the_whole(pipe, policy, batch, sizes):
    """Of whole groups, or, where one is too large, of some of its trajectories; retained ones may be alone."""
    together = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: together.append(len(out[0])))
    try:
        parts, whole = (rollout(pipe, policy, size=4, retained=1, batch=b, share_steps=False) for b in (batch, None))
        cut = parts([A, B], [[0, 1, 3], [2, 4]])
        assert together == [2 * n for n in sizes for _ in range(STEPS)]  # and as many for the negative prompt
    finally:
        hook.remove()
    for one, other in zip(cut, whole([A, B], [[0, 1, 3], [2, 4]]), strict=True):
        assert record(one) == record(other) and gap(one, other) <= 2
        assert one.rewards == pytest.approx(other.rewards, abs=1e-3)
        assert [t.meta["retained"] for t in one.trajectories] == [False] * 3 + [True]
    assert len({t.prompt for group in cut for t in group.trajectories}) > 4  # or nothing was tested


@pytest.mark.parametrize("noise", [True, False])
def test_shared_steps_change_nothing(pipe, policy, noise):
    shared, alone = (rollout(pipe, policy, share_noise=noise, share_steps=s) for s in (True, False))
    one, other = shared([A], [[2, 4]])[0], alone([A], [[2, 4]])[0]
    assert record(one) == record(other) and gap(one, other) <= 2
    rows, computed = shared.computed["unet"]
    # all from one noise: two rows instead of six until the first turn; from three: only the negative prompt is shared, nowhere
    assert rows == 6 * STEPS and (computed <= 2 * 2 + 6 * 4 if noise else computed == rows)
    assert noise == (one.trajectories[0].turns[0].image.tobytes() == one.trajectories[1].turns[0].image.tobytes())


def test_parts_share_their_steps(pipe, policy):
    """Trajectories of a group, until their first turn; and all that was computed is counted."""
    for batch, parts in ((3, [3]), (2, [2, 1])):
        roll = rollout(pipe, policy, batch=batch)
        roll([A], [[2, 4]])
        rows, computed = roll.computed["unet"]
        assert rows == 6 * STEPS and 0 < computed <= sum(2 * 2 + 2 * n * (STEPS - 2) for n in parts) < rows


def test_the_retained_are_the_stock_pipelines_own(pipe, policy):
    asked = []

    class Counting(MLLMRefiner):
        def refine(self, views, seeds=None):
            asked.append(len(views))
            return policy.refine(views, seeds)

    roll = rollout(pipe, Counting(policy.chat, policy.template), size=4, retained=2)
    (group,) = roll([A], [[1, 3]])
    assert asked == [2, 2] and len(group.rows) == 2 and [len(rows) for rows in group.rows] == [2, 2]
    kept = group.trajectories[2:]
    assert all(t.prompt == A.request and not t.turns and t.meta["retained"] for t in kept)
    assert not any(t.meta["retained"] for t in group.trajectories[:2])
    own = pipe(A.request, generator=torch.Generator().manual_seed(_seed(A.seed, "noise", 0)), **CALL).images[0]
    assert all(np.abs(np.asarray(t.image, float) - np.asarray(own, float)).max() <= 2 for t in kept)
    assert len(group.rewards) == 4 and group.rewards[2] == group.rewards[3]
    (untouched,) = roll([A], [[1, 3]], retained=4)
    assert asked == [2, 2] and untouched.rows == [] and len(set(untouched.rewards)) == 1


def test_only_previews_that_are_due_are_decoded(pipe, policy):
    decoded = []

    def preview(pipe, latents):
        decoded.append(len(latents))
        return [image.convert("RGB") for image in pipe.image_processor.postprocess(latents[:, :3])]

    rollout(pipe, policy, retained=1, preview=preview)([A, B], [[1, 3], [3, 4]])
    assert decoded == [2, 4, 2]


def test_a_start_turn_is_greedy_and_carries_no_loss(pipe, policy):
    (group,) = rollout(pipe, policy)([A], [[0, 2]])
    assert [[turn.step for turn in t.turns] for t in group.trajectories] == [[0, 2]] * 3
    assert len({t.turns[0].raw for t in group.trajectories}) == 1  # greedy
    assert len({t.turns[1].raw for t in group.trajectories}) > 1
    for t, rows in zip(group.trajectories, group.rows, strict=True):
        assert [row.token_ids for row in rows] == [t.turns[1].token_ids]
        assert len(rows[0].logprobs) == len(rows[0].token_ids)


def test_a_text_policy_at_the_start(pipe, tmp_path):
    chat = TransformersChat.from_pretrained(models.save(models.qwen2, tmp_path), device="cpu", logprobs=True)
    policy = MLLMRefiner(chat, "reprompt", temperature=1.0, max_new_tokens=6)
    (group,) = rollout(pipe, policy, f"{__package__}.test_rollout:wordy")([A], [[0]])
    assert [len(rows) for rows in group.rows] == [1, 1, 1] and len({rows[0].token_ids for rows in group.rows}) == 3
    assert all(t.turns[0].image is None for t in group.trajectories)
    assert len(set(group.rewards)) == 3


def test_what_the_policy_sees_is_its_own(pipe, policy):
    seen = []

    class Spy(MLLMRefiner):
        def refine(self, views, seeds=None):
            seen.extend((v.request, v.step, [t.step for t in v.turns]) for v in views)
            return policy.refine(views, seeds)

    rollout(pipe, Spy(policy.chat, policy.template), size=2)([A, B], [[1, 3], [2, 4]])
    assert [s for s in seen if s[0] == A.request] == [(A.request, 1, []), (A.request, 1, []), *[(A.request, 3, [1])] * 2]


class Failing(MLLMRefiner):
    """A policy that fails at some steps."""

    def __init__(self, policy, *steps):
        super().__init__(policy.chat, policy.template)
        self.sampling, self.steps = policy.sampling, steps

    def refine(self, views, seeds=None):
        if views[0].step in self.steps:
            raise OSError("no model today")
        return super().refine(views, seeds)


def test_a_policy_that_fails_at_times(pipe, policy):
    (group,) = rollout(pipe, Failing(policy, 2))([A], [[2, 4]])
    assert all(rows[0] is None and rows[1] is not None for rows in group.rows)
    assert all("no model today" in t.turns[0].error for t in group.trajectories)


def test_a_policy_that_fails_always(pipe, policy):
    with pytest.raises(RuntimeError, match="the policy failed on every turn: OSError: no model today"):
        rollout(pipe, Failing(policy, 2, 4))([A], [[2, 4]])


def test_a_preview_that_fails_once(pipe, policy):
    """Later turns see their own rows all the same."""
    sizes = []

    def preview(pipe, latents):
        sizes.append(len(latents))
        if len(sizes) == 1:
            raise MemoryError("no room")
        return [image.convert("RGB") for image in pipe.image_processor.postprocess(latents[:, :3])]

    groups = rollout(pipe, policy, preview=preview)([A, B], [[1, 3], [3, 4]])
    assert sizes == [3, 6, 3]
    assert [[row is None for row in rows] for rows in groups[0].rows] == [[True, False]] * 3
    assert [[row is None for row in rows] for rows in groups[1].rows] == [[False, False]] * 3
    assert groups[0].trajectories[0].turns[1].image is not None


def test_x0_estimates_that_fail_once(pipe, policy, monkeypatch):
    """Here the preview is not even asked for; the next one is of the step that it is taken at."""
    from promptloop_pipeline.pipelines import engine

    real, failed = engine.x0_estimate, []

    def once(*args):
        if not failed:
            failed.append(True)
            raise ArithmeticError("no estimate")
        return real(*args)

    monkeypatch.setattr(engine, "x0_estimate", once)
    groups = rollout(pipe, policy, size=2)([A, B], [[1, 3, 4], [3, 4, 5]])
    missing = [[row is None for row in rows] for group in groups for rows in group.rows]
    assert missing[0][0] and not any(m[-1] for m in missing)
    assert all(turn.error or turn.image is not None for g in groups for t in g.trajectories for turn in t.turns)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda *a, **k: 1 / 0, "the reward 'verifier' failed: ZeroDivisionError"),
        (lambda images, prompts, **k: [float("nan")] * len(images), "the reward 'verifier' failed: ValueError: .*nan"),
        (lambda images, prompts, **k: [1.0], "the reward 'verifier' failed: ValueError"),
    ],
)
def test_rewards_that_fail_are_named(pipe, policy, reward, message):
    roll = Rollout(pipe, policy, {"verifier": reward}, parse_rewards("verifier"), size=2, **CALL)
    with pytest.raises(RuntimeError, match=message):
        roll([A], [[2]])


def test_several_rewards_and_the_form_of_answers(pipe, policy):
    """The retained, which answered nothing, get the mean of their group for form (PromptRL): none the better or worse for it."""
    name = f"{__package__}.test_rollout:brightness"
    roll = rollout(pipe, policy, f"{name}:2, format:0.5, length:0", size=4, retained=2)
    (group,) = roll([A], [[1, 3]])
    form = group.raw["format"]
    assert form[2:] == [None, None] and all(0 <= f <= 1 for f in form[:2])
    mean = sum(form[:2]) / 2
    for k, reward in enumerate(group.rewards):
        assert reward == pytest.approx(2 * group.raw[name][k] + 0.5 * (mean if k > 1 else form[k]))
    assert group.trajectories[0].scores == {key: values[0] for key, values in group.raw.items()}


def test_what_no_reward_applies_to_has_none(pipe, policy):
    half = lambda images, prompts, **_: [None if k == 0 else float(k) for k in range(len(images))]  # noqa: E731
    (group,) = Rollout(pipe, policy, {"x": half}, [RewardSpec("x")], size=3, **CALL)([A], [[2]])
    assert group.rewards == [None, 1.0, 2.0]


def test_tags_name_the_reward(pipe, policy):
    rewards = {"bright": brightness, "ten": lambda images, prompts, **_: [10.0] * len(images)}
    roll = Rollout(pipe, policy, rewards, [RewardSpec("bright"), RewardSpec("ten")], size=2, by_tag=True, **CALL)
    tagged = [Sample(A.request, 1, "bright"), Sample(B.request, 2, "ten")]
    one, other = roll(tagged, [[2], [2]])
    assert one.rewards == one.raw["bright"] and other.rewards == [10.0, 10.0]
    with pytest.raises(ValueError, match="no reward is called 'None'"):
        roll([A], [[2]])


def test_rewards_are_told_of_the_row(pipe, policy):
    told = []

    def reward(images, prompts, scene, **context):
        told.append((prompts, scene, context["refined"]))
        return [0.0] * len(images)

    samples = [Sample(A.request, 1, context={"scene": "one"}), B]
    groups = Rollout(pipe, policy, {"x": reward}, [RewardSpec("x")], size=2, **CALL)(samples, [[2], [2]])
    prompts, scene, refined = told[0]
    assert prompts == [A.request] * 2 + [B.request] * 2 and scene == ["one", "one", None, None]
    assert refined == [t.prompt for g in groups for t in g.trajectories]


def test_looks_are_scored_by_the_same_rewards(pipe, policy):
    roll = rollout(pipe, policy)
    groups = roll([A, B], [[0, 2, 4], [0, 1, 3]])
    for group, looks in zip(groups, roll.looks(groups), strict=True):
        assert looks == [brightness([turn.image for turn in t.turns[1:]], []) for t in group.trajectories]
        assert all(len(of) == len(rows) == 2 for of, rows in zip(looks, group.rows, strict=True))


def test_seeds_are_the_same_everywhere():
    assert len({_seed(0, 1, "policy", 2), _seed(0, 12, "policy"), _seed(0, 1, "policy", "2"), _seed(1, 0, "policy", 2)}) == 4
    assert _seed(1, "noise", 0) == int.from_bytes(hashlib.blake2b(b"(1, 'noise', 0)", digest_size=6).digest(), "big")


def test_a_group_needs_something_refined(pipe, policy):
    with pytest.raises(ValueError, match="a group of 2 trajectories cannot retain 2; retain from 0 to 1"):
        rollout(pipe, policy, size=2, retained=2)
