"""The generator that is shipped: a stock folder of the right size, as good as its page says, steerable by what is seen."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from promptloop_pipeline import tiny
from promptloop_pipeline.evaluation.headroom import score
from promptloop_pipeline.evaluation.quality import gold_rates, reconstruction_rate
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.tiny.refiners import OracleRefiner, RotationRefiner, SingleShotRefiner
from promptloop_pipeline.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def pipe():
    return tiny.load_pipeline("sd")


def test_it_is_a_stock_folder(pipe):
    stock = DiffusionPipeline.from_pretrained(tiny.WEIGHTS / "sd", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is type(pipe) is StableDiffusionPipeline
    kwargs = {"num_inference_steps": 3, "output_type": "latent"}
    a, b = (p("large red circle top left", generator=torch.Generator().manual_seed(0), **kwargs).images for p in (stock, pipe))
    assert torch.equal(a, b)
    files = [f for f in (tiny.WEIGHTS / "sd").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt"}
    assert sum(f.stat().st_size for f in files) < 7e6


def test_its_tokenizer_is_the_one_in_the_code(pipe):
    ours = build_tokenizer()
    assert pipe.tokenizer.get_vocab() == ours.get_vocab()
    assert pipe.tokenizer.model_max_length == ours.model_max_length
    text = "large red circle top left , crimson ball"
    assert pipe.tokenizer(text).input_ids == ours(text).input_ids


def test_reconstructions(pipe):
    assert reconstruction_rate(pipe, 300) >= 0.97


def test_gold_captions_of_held_out_scenes(pipe):
    assert gold_rates(pipe, 150)["strict"] >= 0.87  # 0.90 at n = 300, less two standard errors


def test_looking_beats_not_looking(pipe):
    """A small copy of `evaluation.headroom`, whose full figures stand in the world's README."""
    asked, seeds = tiny.requests(60, seed=7), range(60)
    common = {"num_inference_steps": 20, "guidance_scale": 3.0, "score": score}
    rates = {}
    for name, refiner, refine_at in (
        ("single-shot", SingleShotRefiner(), "start"),
        ("blind", RotationRefiner("spread"), "start, 2, 4, 6, 8"),
        ("loop", OracleRefiner(), "start, 3, 5, 7, 9"),
    ):
        found = run_arm(pipe, asked, seeds, refiner, refine_at, **common)
        assert not any(t.failures for t in found)
        rates[name] = sum(t.scores["strict"] for t in found) / 60
    assert rates["loop"] > max(rates["single-shot"], rates["blind"])


def test_unknown_generator():
    with pytest.raises(ValueError, match="there is no embedded generator 'sdxl'; there are: sd"):
        tiny.load_pipeline("sdxl")
