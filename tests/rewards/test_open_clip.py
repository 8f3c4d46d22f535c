"""HPSv2 against open_clip itself, where it is installed. It needs torchvision, which a plain install of PromptLoop does not; the same
is tested against a re-statement of its forward pass in test_clip.py."""

import pytest
import torch

from promptloop_pipeline.rewards import load_reward
from promptloop_pipeline.rewards.clip import HPS_FILES

from . import models, reference
from .models import PROMPTS, clip_ids

open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch, with a torchvision that matches torch")


def test_hpsv2_is_open_clips_cosine(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = open_clip.model.CLIP(
            embed_dim=48,
            vision_cfg={"image_size": 56, "layers": 3, "width": 64, "head_width": 4, "patch_size": 14},
            text_cfg={"context_length": 20, "vocab_size": 60, "width": 32, "heads": 16, "layers": 2},
        ).eval()
        for weight in theirs.parameters():
            torch.nn.init.normal_(weight, std=0.15)  # its own start is all but zero
    folder = models.clip_tokenizer(tmp_path / "hps")
    torch.save({"state_dict": theirs.state_dict()}, folder / HPS_FILES["2"])
    images = reference.pictures(4)
    pixels = torch.stack([reference.letterboxed(image, 56) for image in images])
    ids = [clip_ids(prompt, 20) for prompt in PROMPTS]
    padded = torch.tensor([row + [0] * (20 - len(row)) for row in ids])
    with torch.no_grad():
        seen, said = theirs.encode_image(pixels, normalize=True), theirs.encode_text(padded, normalize=True)
    wanted = (seen * said).sum(-1).tolist()
    assert max(wanted) - min(wanted) > 0.02
    assert load_reward("hpsv2", model=folder, device="cpu")(images, PROMPTS) == pytest.approx(wanted, abs=1e-5)
