"""Length, format and the embedded world's verifier: what is right beats what is not."""

import random

import numpy as np
import pytest
import torch

from promptloop_pipeline.rewards.simple import Format, Length
from promptloop_pipeline.tiny.language import system_caption
from promptloop_pipeline.tiny.reward import verifier_score, verifier_strict
from promptloop_pipeline.tiny.scenes import Spec, random_scene, render

from . import models


def words(n):
    return " ".join(["word"] * n)


def test_length():
    refined = [words(15), words(16), words(76), words(77), "", None]
    call = ([None] * 6, ["a"] * 6)
    assert Length()(*call, refined=refined, other=1) == [0, 1, 1, 0, 0, None]
    assert Length(miss=-1)(*call, refined=refined) == [-1, 1, 1, -1, -1, None]
    assert Length(0, 2)(*call, refined=["a b", "a b c", "", "  a\n", "é \u6f22 \u5b57", "a-b c"]) == [1, 0, 1, 1, 0, 1]
    with pytest.raises(ValueError, match="the reward length needs refined=, a list"):
        Length()([None], ["a"])
    with pytest.raises(ValueError, match="needs refined="):
        Length()([None], ["a"], refined="abc")
    with pytest.raises(ValueError, match="2 values of refined for 1 pictures"):
        Length()([None], ["a"], refined=["a", "b"])
    with pytest.raises(ValueError, match="length from 5 to 3: give 0 <= least <= most"):
        Length(5, 3)


def test_length_in_tokens(tmp_path):
    reward = Length(1, 7, tokenizer=models.clip_tokenizer(tmp_path / "t"))
    assert reward.count("red ball") == 7  # spelled letter by letter, without start and end
    assert reward([None] * 2, ["a"] * 2, refined=["red ball", "red balls"]) == [1, 0]
    with pytest.raises(OSError, match="cannot load the tokenizer '/no/such'"):
        Length(tokenizer="/no/such")


def test_format():
    call = ([None] * 4, ["a"] * 4)
    assert Format()(*call, format_ok=[True, False, None, 0.25]) == [1, 0, None, 0.25]
    assert Format(miss=-1)(*call, format_ok=[True, False, None, 0.25]) == [1, -1, None, -0.5]
    with pytest.raises(ValueError, match="the reward format needs format_ok="):
        Format()(*call)


def test_verifier():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(12)]
    pictures = [render(s, rng) for s in scenes]
    prompts = [system_caption(Spec(s.objects, (), s.background)) for s in scenes]
    assert verifier_strict(pictures, prompts) == [1.0] * 12
    assert verifier_score(pictures, prompts) == [1.0] * 12
    others = prompts[1:] + prompts[:1]
    mismatched = verifier_score(pictures, others, refined=prompts)
    assert all(m < 1 for m, a, b in zip(mismatched, prompts, others) if a != b)
    assert set(verifier_strict(pictures, others)) <= {0.0, 1.0}
    assert verifier_score([pictures[0], None, pictures[0]], ["an oil painting", prompts[0], prompts[0]]) == [None, None, 1.0]
    tensor = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1).float() / 255
    assert verifier_score([tensor], prompts[:1]) == [1.0]
    assert [verifier_score([i], [p])[0] for i, p in zip(pictures, others)] == mismatched
    with pytest.raises(ValueError, match="12 pictures and 1 prompts"):
        verifier_score(pictures, prompts[:1])
