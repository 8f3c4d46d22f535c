"""The recipe of the embedded generator: it runs, and resuming equals never having stopped."""

import random

import numpy as np
import promptloop_training.tiny_generator as recipe
import pytest
import torch
from torch.nn import Linear

from promptloop_pipeline.tiny.language import parse, training_caption
from promptloop_pipeline.tiny.tokenizer import build_tokenizer

STEPS = ("--autoencoder-steps", "4", "--text-steps", "2", "--unet-steps", "4", "--decoder-steps", "2", "--scenes", "64")


class Killed(Exception):
    pass


def weights(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted((folder / "pipeline").rglob("*.safetensors"))}


def test_resume_equals_never_having_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SAVE_EVERY", 2)
    recipe.main(["--out", str(tmp_path / "whole"), *STEPS])
    update, count = recipe.Stage.update, 0

    def fragile(self, loss):
        nonlocal count
        count += 1
        if count in (4, 9):  # in the autoencoder after its checkpoint, and in the unet after its own
            raise Killed
        update(self, loss)

    monkeypatch.setattr(recipe.Stage, "update", fragile)
    for _ in range(2):
        with pytest.raises(Killed):
            recipe.main(["--out", str(tmp_path / "killed"), *STEPS])
    recipe.main(["--out", str(tmp_path / "killed"), *STEPS])
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    assert len(weights(tmp_path / "whole")) == 3


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_state(tmp_path):
    parameter = Linear(1, 1)
    stage = recipe.Stage("x", tmp_path, list(parameter.parameters()), 3, 1e-3, 0.5, {"model": parameter})
    with pytest.raises(RuntimeError, match=r"x: the loss is nan at step 0; the last good state is .*x\.pt"):
        stage.update(torch.tensor(float("nan")))


def test_clause_weight_is_where_the_caption_says():
    weight = recipe.clause_weight(["red circle top left", "red circle top left , clear row two column four"])
    assert weight.shape == (2, 1, 8, 8)
    assert (weight[0] == 1).all()
    assert (weight[1, 0] > 1).nonzero().tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]


def test_captions_are_true_of_their_pictures():
    rng = random.Random(0)
    scenes, images = recipe.make_data(200, 5)
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    for scene in scenes:
        caption = training_caption(scene, rng)
        if "background" in caption:
            spec = parse(caption)
            assert set(spec.objects) == set(scene.objects)
            assert not set(spec.clear) & set(scene.stickers)


def test_read_out_targets():
    rows, ground, cells = recipe.read_out_targets(
        parse("small blue cross bottom left , white background , clear row one column two")
    )
    assert rows == [[0, 0, 0], [0, 0, 0], [4, 5, 1], [0, 0, 0]]
    assert ground == 2
    assert cells == [0, 1] + [0] * 14
    assert len(build_tokenizer()) == 181
