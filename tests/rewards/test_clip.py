"""The CLIP rewards against plain re-statements of open_clip's and OpenAI's forward pass and of LAION's heads."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from promptloop_pipeline.rewards import clip, load_reward

from . import models, reference
from .models import PROMPTS, clip_ids

IMAGES = reference.pictures(4)


@pytest.fixture(scope="module")
def openai(tmp_path_factory):
    """Like openai/clip-vit-large-patch14: quick GELU, and the end token by its old number."""
    return models.clip_model(tmp_path_factory.mktemp("openai") / "m", legacy_eos=True)


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    return models.clip_model(tmp_path_factory.mktemp("pick") / "m", act="gelu")


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A folder with both checkpoints of HPSv2, as published: the weights under "state_dict"."""
    folder = models.clip_tokenizer(tmp_path_factory.mktemp("hps"))
    for seed, file in enumerate(clip.HPS_FILES.values()):
        state = reference.random_weights(reference.open_clip_shapes(), seed)
        torch.save({"epoch": 1, "state_dict": state}, folder / file)
    return folder


def cosines(state, pixels, act=gelu, heads=4, length=30):
    seen = [reference.clip_image(state, p, heads, act) for p in pixels]
    said = [reference.clip_text(state, clip_ids(p, length), heads, act) for p in PROMPTS]
    return [float(a @ b) for a, b in zip(seen, said)]


def spread(values):
    return max(values) - min(values)


def test_clip_score(openai):
    state = reference.as_open_clip(load_file(openai / "model.safetensors"))
    wanted = cosines(state, [reference.cropped(i, 56) for i in IMAGES], reference.quick_gelu)
    assert load_reward("clip-score", model=openai, device="cpu")(IMAGES, PROMPTS) == pytest.approx(wanted, abs=1e-5)
    assert spread(wanted) > 0.02


def test_pickscore(pick):
    weights = load_file(pick / "model.safetensors")
    wanted = cosines(reference.as_open_clip(weights), [reference.cropped(i, 56, math.floor) for i in IMAGES])
    reward = load_reward("pickscore", model=pick, device="cpu")
    assert reward(IMAGES, PROMPTS) == pytest.approx([math.exp(2.5) * w for w in wanted], abs=1e-4)
    assert reward.scale == pytest.approx(math.exp(2.5))
    assert spread(wanted) > 0.02


@pytest.mark.parametrize(("name", "seed"), [("hpsv2", 0), ("hpsv2.1", 1)])
def test_hpsv2(hps, name, seed):
    state = reference.random_weights(reference.open_clip_shapes(), seed)
    wanted = cosines(state, [reference.letterboxed(i, 56) for i in IMAGES], heads=16, length=20)
    reward = load_reward(name, model=hps, device="cpu")
    assert reward.name == name
    assert reward(IMAGES, PROMPTS) == pytest.approx(wanted, abs=1e-5)
    assert spread(wanted) > 0.02
    one_file = load_reward(name, model=hps / clip.HPS_FILES[name.removeprefix("hpsv")], device="cpu")
    assert one_file(IMAGES, PROMPTS) == reward(IMAGES, PROMPTS)


def test_published_sizes_of_hpsv2():
    shapes = reference.open_clip_shapes(1280, 1024, (32, 24), 224, 14, 49408, 77, 1024)
    state = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**clip._open_clip_sizes(state, 49406, 49407))
    with torch.device("meta"):
        model = CLIPModel(config)
    used = set()
    for name, weight in model.state_dict().items():
        key, how = clip.open_clip_key(name)
        used.add(key)
        assert how(state[key]).shape == weight.shape, name
    assert used == set(state)
    assert sum(p.numel() for p in model.parameters()) == 986_109_441  # as open_clip counts ViT-H-14


def test_aesthetic(openai, tmp_path):
    state = reference.as_open_clip(load_file(openai / "model.safetensors"))
    seen = torch.stack([reference.clip_image(state, reference.cropped(i, 56), 4, reference.quick_gelu) for i in IMAGES])
    shapes, width = {}, 24
    for k, out in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)):
        shapes |= {f"layers.{k}.weight": (out, width), f"layers.{k}.bias": (out,)}
        width = out
    mlp = reference.random_weights(shapes)
    torch.save(mlp, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    linear = reference.random_weights({"weight": (1, 24), "bias": (1,)})
    torch.save(linear, tmp_path / "sa_0_4_vit_l_14_linear.pth")

    wanted = seen
    for k in (0, 2, 4, 6, 7):
        wanted = reference.dense(mlp, f"layers.{k}", wanted)
    v2 = load_reward("aesthetic", model=tmp_path / "sac+logos+ava1-l14-linearMSE.pth", clip=openai, device="cpu", batch_size=3)
    assert v2(IMAGES, PROMPTS) == pytest.approx(wanted[:, 0].tolist(), abs=1e-5)
    assert spread(wanted[:, 0].tolist()) > 0.02
    v1 = load_reward("aesthetic-v1", model=tmp_path, clip=openai, device="cpu")
    assert v1(IMAGES, ["", "", "", ""]) == pytest.approx((seen @ linear["weight"].T + linear["bias"])[:, 0].tolist(), abs=1e-5)
    assert v1([None, IMAGES[0]], ["a", "b"]) == [None, pytest.approx(v1(IMAGES[:1], ["x"])[0], abs=1e-5)]
    assert (v1.name, v2.name) == ("aesthetic-v1", "aesthetic")

    with pytest.raises(ValueError, match=r"sa_0_4.*missing layers.0.bias, .* and 6 more; unexpected bias, weight"):
        load_reward("aesthetic", model=tmp_path / "sa_0_4_vit_l_14_linear.pth", clip=openai, device="cpu")
    with pytest.raises(
        FileNotFoundError, match="aesthetic-v1 are in no known place; give model=, the path of sa_0_4_vit_l_14_linear"
    ):
        load_reward("aesthetic-v1")


@pytest.mark.parametrize("name", ["clip-score", "hpsv2"])
def test_batch_equals_singles_and_none_stays(name, openai, hps):
    reward = load_reward(name, model=openai if name == "clip-score" else hps, device="cpu", batch_size=3)
    images, prompts = [*IMAGES, None, IMAGES[0]], [*PROMPTS, "a", "  "]
    together = reward(images, prompts)
    assert together[4:] == [None, None]
    assert reward(IMAGES, PROMPTS[:1] * 4)[0] == pytest.approx(together[0], abs=1e-5)
    assert together[:4] == pytest.approx([reward([i], [p])[0] for i, p in zip(IMAGES, PROMPTS)], abs=1e-5)


def test_pictures_of_any_kind_score_the_same(openai):
    import numpy as np

    reward = load_reward("clip-score", model=openai, device="cpu")
    array = np.asarray(IMAGES[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    assert len(set(reward([IMAGES[0], array, tensor, array / 255.0], ["a red circle"] * 4))) == 1


def test_other_keys_are_refused(openai, hps, tmp_path):
    gone = "text_model.final_layer_norm.bias"
    with pytest.raises(ValueError, match=f"less.*missing {gone}$"):
        load_reward("clip-score", model=models.damaged_copy(openai, tmp_path / "less", drop=gone), device="cpu")
    with pytest.raises(ValueError, match=r"more.*unexpected text_model\.extra$"):
        load_reward("pickscore", model=models.damaged_copy(openai, tmp_path / "more", add="text_model.extra"), device="cpu")
    old = models.damaged_copy(openai, tmp_path / "old", add="text_model.embeddings.position_ids")  # in all old checkpoints
    assert load_reward("clip-score", model=old, device="cpu")

    wide = models.damaged_copy(
        openai, tmp_path / "wide", drop="text_model.final_layer_norm.bias", add="text_model.final_layer_norm.bias"
    )
    with pytest.raises(ValueError, match=f"wide.*missing {gone}$"):  # there, and of another width
        load_reward("clip-score", model=wide, device="cpu")

    state = reference.random_weights(reference.open_clip_shapes())
    path = tmp_path / "x.safetensors"
    words = {"tokenizer": hps, "device": "cpu"}
    gone = "visual.transformer.resblocks.1.attn.in_proj_weight"
    save_file({k: v for k, v in state.items() if k != gone}, path)
    with pytest.raises(ValueError, match=f"missing {gone}$"):
        load_reward("hpsv2", model=path, **words)
    save_file(state | {"visual.head": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected visual.head$"):
        load_reward("hpsv2", model=path, **words)
    save_file({k: v for k, v in state.items() if k != "visual.conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"missing visual.conv1.weight$"):
        load_reward("hpsv2", model=path, **words)


def test_what_is_not_there(openai, hps, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no model for clip-score at /no/such: expected a folder with config.json, or a hub id"
    ):
        load_reward("clip-score", model="/no/such")
    with pytest.raises(OSError, match="cannot load the model of pickscore from 'yuvalkirstain/PickScore_v1'"):
        load_reward("pickscore")
    with pytest.raises(OSError, match=r"hpsv2.1 \(HPS_v2.1_compressed.pt of xswu/HPSv2\) from the hub"):
        load_reward("hpsv2.1")
    with pytest.raises(OSError, match="cannot load the tokenizer of hpsv2 from 'laion/CLIP-ViT-H-14"):
        file = tmp_path / "h.pt"
        file.write_bytes((hps / "HPS_v2_compressed.pt").read_bytes())
        load_reward("hpsv2", model=file)
    with pytest.raises(ValueError, match="no version '3' of hpsv2; use 2 or 2.1"):
        clip.hpsv2(version="3")
    with pytest.raises(ValueError, match="no version '3' of aesthetic; use 1 or 2"):
        clip.aesthetic(version="3")
    with pytest.raises(ValueError, match="dtype is 'int8'; use float32"):
        load_reward("clip-score", model=openai, dtype="int8")
    with pytest.raises(ValueError, match="do not belong together"):
        big = models.clip_tokenizer(tmp_path / "big")
        words = clip._tokenizer("x", big)
        words.add_tokens([f"w{k}" for k in range(20)])
        words.save_pretrained(big)
        load_reward("clip-score", model=openai, tokenizer=big, device="cpu")


class Payload:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_no_pickle_is_run(openai, hps, tmp_path, capsys):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in openai.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(openai / "model.safetensors") | {"extra": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot load the model of clip-score"):
        load_reward("clip-score", model=folder, device="cpu")
    torch.save({"state_dict": reference.random_weights(reference.open_clip_shapes()), "extra": Payload()}, tmp_path / "h.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_reward("hpsv2", model=tmp_path / "h.pt", tokenizer=hps, device="cpu")
    assert "never" not in capsys.readouterr().out
