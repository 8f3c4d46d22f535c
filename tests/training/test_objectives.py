"""Advantages, against numbers made by hand and against TRL's own formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from promptloop_training.objectives import EPSILON, deviation, group_advantages, is_flat, turn_rewards
from trl.trainer.utils import nanstd

SCORES = st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=6)


def near(groups, expected):
    assert [len(g) for g in groups] == [len(g) for g in expected]
    assert [a for g in groups for a in g] == pytest.approx([a for g in expected for a in g], abs=1e-3)


def test_two_groups_of_two_by_hand():
    rewards = [[1.0, 0.0], [0.2, 0.6]]
    # each group's own deviation is sqrt(2) * half its gap: so both are 1 / sqrt(2) away from their mean
    near(group_advantages(rewards), [[0.7071, -0.7071], [-0.7071, 0.7071]])
    near(group_advantages(rewards, "none"), [[0.5, -0.5], [-0.2, 0.2]])
    # over all four: mean .45, squares .3025 + .2025 + .0625 + .0225 = .59, divided by 3, root: .44347
    near(group_advantages(rewards, "batch"), [[0.5 / 0.44347, -0.5 / 0.44347], [-0.2 / 0.44347, 0.2 / 0.44347]])
    near(group_advantages(rewards, "batch", std=0.1), [[0.5 / 0.1001, -0.5 / 0.1001], [-0.2 / 0.1001, 0.2 / 0.1001]])


def test_retained_originals_enter_mean_and_deviation_by_hand():
    # refined 1 and .5, two originals at 0: mean .375; squares .390625 + .015625 + 2 * .140625 = .6875; / 3, root: .47871
    found = group_advantages([[1.0, 0.5, 0.0, 0.0]])
    near(found, [[0.625 / 0.47871, 0.125 / 0.47871, -0.375 / 0.47871, -0.375 / 0.47871]])
    near(group_advantages([[0.5, 0.5, 0.0, 0.0]]), [[0.866, 0.866, -0.866, -0.866]])  # the refined are alike, and still better


def test_tags_keep_their_own_units():
    """A group is one prompt, and so one reward: what is a score of 20 to one is 0.2 to the other (PromptRL 4.3)."""
    near(group_advantages([[20.0, 22.0], [0.2, 0.22]]), [[-0.7071, 0.7071], [-0.7021, 0.7021]])


def test_none_takes_no_part():
    assert group_advantages([[1.0, None, 0.0]])[0][1] == 0.0
    near(group_advantages([[1.0, None, 0.0]]), [[0.7071, 0.0, -0.7071]])
    assert group_advantages([[1.0, None], [None, None]]) == [[0.0, 0.0], [0.0, 0.0]]  # nobody to compare with
    assert deviation([1.0, None]) == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_flat_groups_are_exactly_zero(scale):
    found = group_advantages([[0.1 + 0.2, 0.3, 0.3], [1.0, 0.0, 0.5]], scale)
    assert found[0] == [0.0, 0.0, 0.0]
    assert found[1][0] > 0 > found[1][1]
    assert is_flat([0.1 + 0.2, 0.3]) and is_flat([]) and is_flat([None, 1.0]) and not is_flat([1.0, 1.0 + 1e-6])


def test_another_scale():
    with pytest.raises(ValueError, match=r"scale_rewards is 'std'; use \"group\", \"batch\" or \"none\""):
        group_advantages([[1.0]], "std")


def trl(groups, k=1, scale="group"):
    """TRL 1.16's, where each of the K turns of a trajectory is a completion with the reward of it all."""
    rewards = torch.tensor(groups, dtype=torch.float64).repeat_interleave(k, dim=1)
    std = nanstd(rewards, dim=1, keepdim=True) if scale == "group" else nanstd(rewards)
    found = rewards - rewards.nanmean(dim=1, keepdim=True)
    return (found if scale == "none" else found / (std + 1e-4))[:, ::k].tolist()


@given(SCORES, st.sampled_from(["group", "batch", "none"]))
def test_one_turn_is_trl(rewards, scale):
    groups = [rewards, rewards[::-1]]
    ours, theirs = group_advantages(groups, scale), trl(groups, scale=scale)
    assert [a for g in ours for a in g] == pytest.approx([a for g in theirs for a in g], abs=1e-6)


@given(SCORES, st.integers(2, 6))
def test_trl_is_larger_by_a_known_factor_for_more_turns(rewards, k):
    if is_flat(rewards):
        return
    g, std = len(rewards), deviation(rewards)
    factor = math.sqrt((g * k - 1) / (k * (g - 1)))
    ours, theirs = group_advantages([rewards])[0], trl([rewards], k)[0]
    exact = [a * factor * (std + EPSILON) / (std + factor * EPSILON) for a in ours]  # the 1e-4 is not scaled with it
    assert theirs == pytest.approx(exact, abs=1e-6)
    assert g != 4 or k != 3 or factor == pytest.approx(1.1055, abs=1e-4)


@given(SCORES)
def test_advantages_sum_to_nothing(rewards):
    assert math.fsum(group_advantages([rewards])[0]) == pytest.approx(0, abs=1e-9)


def test_turn_rewards_by_hand():
    assert turn_rewards([0.25, 0.5, 0.25], 1.0) == [0.25, -0.25, 0.75]
    assert sum(turn_rewards([0.25, 0.5, 0.25], 1.0)) == 1.0 - 0.25
    assert turn_rewards([0.25, None, 0.25], 1.0) == [None, None, 0.75]
    assert turn_rewards([0.25, 0.5], None) == [0.25, None]
    assert turn_rewards([], 1.0) == []
