"""ImageReward against a plain re-statement of the published architecture, with weights under the published names."""

import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from promptloop_pipeline.rewards import weights
from promptloop_pipeline.rewards.image_reward import ImageReward, _sizes

from . import reference
from .models import PROMPTS, bert_ids, bert_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ImageReward.pt as published (also what nothing needs), and a tokenizer."""
    folder = bert_tokenizer(tmp_path_factory.mktemp("ImageReward"))
    state = reference.random_weights(reference.image_reward_shapes())
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="module")
def state(folder):
    return torch.load(folder / "ImageReward.pt", weights_only=True)


@pytest.fixture(scope="module")
def reward(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROMPTLOOP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return ImageReward.from_pretrained(folder, device="cpu")


def expected(state, images, prompts):
    return [
        reference.image_reward(state, reference.cropped(image, 48), *bert_ids(prompt)) for image, prompt in zip(images, prompts)
    ]


def test_equals_the_published_architecture(reward, state):
    images = reference.pictures(8)
    prompts = [*PROMPTS, *reversed(PROMPTS)]
    found, wanted = reward(images, prompts), expected(state, images, prompts)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert torch.tensor(wanted).std() > 0.05  # else the comparison would show little
    other = expected(state, images[::-1], prompts)
    assert max(abs(a - b) for a, b in zip(other, wanted)) > 0.05  # the picture counts, not the prompt alone


def test_reads_35_tokens(reward):
    image = reference.pictures(1)[0]
    long, longer, short = "red " * 33, "red " * 33 + "blue circle", "red " * 32
    a, b, c = reward([image] * 3, [long, longer, short])
    assert a == pytest.approx(b, abs=1e-5)
    assert a != pytest.approx(c, abs=1e-4)


def test_batch_equals_singles_and_none_stays(reward):
    images, prompts = reference.pictures(5), [*PROMPTS, " "]
    reward.batch_size = 2
    try:
        together = reward([*images, None], [*prompts, "a red circle"], seeds=[1] * 6)
    finally:
        reward.batch_size = 16
    singles = [reward([i], [p])[0] for i, p in zip(images, prompts)]
    assert together[4:] == [None, None] and singles[4] is None
    assert together[:4] == pytest.approx(singles[:4], abs=1e-5)
    assert reward([], []) == []
    with pytest.raises(ValueError, match="image-reward: 2 pictures and 1 prompts"):
        reward(images[:2], ["a"])


def test_differentiable_in_the_pixels(reward):
    pixels = reference.cropped(reference.pictures(1)[0], 48)[None].requires_grad_()
    ids, mask = bert_ids("a red circle")
    reward.model(torch.tensor([ids]), torch.tensor([mask]), pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_published_sizes():
    """At its own sizes the checkpoint has the published number of keys, and they are told to be ViT-L and BERT-base."""
    sizes = (1024, 768, (24, 12), 224, 16, 30524, 512)
    shapes = reference.image_reward_shapes(*sizes)
    assert len(shapes) == 624  # 625 with position_ids
    state = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
    found = _sizes(state)
    assert found["vision"] == {
        "hidden_size": 1024, "patch_size": 16, "image_size": 224, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096,
    }  # fmt: skip
    assert found["text"] == {
        "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512,
    }  # fmt: skip
    assert found["head"] == [1024, 128, 64, 16, 1]


def test_converts_once(folder, own_cache, monkeypatch):
    first = ImageReward.from_pretrained(folder / "ImageReward.pt", device="cpu")
    (copy,) = own_cache.rglob("*.safetensors")
    assert set(load_file(copy)) == set(torch.load(folder / "ImageReward.pt", weights_only=True))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read the pickle again"))
    again = ImageReward.from_pretrained(folder, device="cpu")
    image = reference.pictures(1)
    assert again(image, ["a red circle"]) == first(image, ["a red circle"])
    monkeypatch.undo()
    monkeypatch.setenv("PROMPTLOOP_CACHE", str(own_cache))
    copy.write_bytes(b"torn")
    assert ImageReward.from_pretrained(folder, device="cpu")(image, ["a red circle"]) == first(image, ["a red circle"])
    assert len(load_file(copy)) > 50
    assert list(own_cache.rglob("*")) == [own_cache / "weights", copy]


def test_cache_that_cannot_be_written(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROMPTLOOP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="promptloop"):
        assert ImageReward.from_pretrained(folder, device="cpu").name == "image-reward"
    assert "cannot keep ImageReward" in caplog.text


def test_where_weights_are_looked_for(folder, state, tmp_path):
    with pytest.raises(
        OSError, match="cannot get the weights of image-reward .ImageReward.pt of zai-org/ImageReward. from the hub"
    ):
        ImageReward.from_pretrained()
    with pytest.raises(OSError, match="ImageReward.pt of some/repo"):
        ImageReward.from_pretrained("some/repo")
    with pytest.raises(FileNotFoundError, match="no weights of image-reward at /no/such/thing"):
        ImageReward.from_pretrained("/no/such/thing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected ImageReward.pt in it"):
        ImageReward.from_pretrained(tmp_path / "empty")

    at = tmp_path / "home" / ".cache" / "ImageReward"  # where the published package downloads to
    at.mkdir(parents=True)
    torch.save(state, at / "ImageReward.pt")
    with pytest.raises(OSError, match="cannot load the tokenizer of image-reward from 'google-bert/bert-base-uncased'"):
        ImageReward.from_pretrained(device="cpu")
    assert ImageReward.from_pretrained(device="cpu", tokenizer=folder).model.image_size == 48
    save_file(state, tmp_path / "empty" / "ImageReward.safetensors")
    assert ImageReward.from_pretrained(tmp_path / "empty", device="cpu", tokenizer=folder).model.image_size == 48


def refused(folder, path, match=None, **changes):
    with pytest.raises(ValueError, match=match) as e:
        ImageReward.from_pretrained(path, tokenizer=folder, device="cpu", **changes)
    assert str(path) in str(e.value) or "dtype" in changes
    assert "\n" not in str(e.value)


def test_other_keys_are_refused(folder, state, tmp_path):
    path = tmp_path / "a.safetensors"
    last = "blip.visual_encoder.blocks.1.attn.proj.bias"
    save_file({k: v for k, v in state.items() if k != last}, path)
    refused(folder, path, f"missing {last}$")
    save_file(state | {"blip.something.else": torch.zeros(1)}, path)
    refused(folder, path, "unexpected blip.something.else$")
    save_file({k: v for k, v in state.items() if ".blocks.1." not in k or "norm1" in k}, path)
    refused(folder, path, r"missing .*blocks\.1\.attn\.proj\.bias, .* and 6 more$")
    save_file({k.removeprefix("blip."): v for k, v in state.items()}, path)
    refused(folder, path, "missing blip.visual_encoder.patch_embed.proj.weight; unexpected .* more")
    save_file(state | {"mlp.layers.4.bias": torch.zeros(3)}, path)
    refused(folder, path, r"another model: mlp.layers.4.bias is \(3,\), not \(64,\)")
    refused(folder, path, "dtype is 'int8'; use float32", dtype="int8")


class Payload:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_no_pickle_is_run(folder, state, tmp_path, capsys):
    path = tmp_path / "ImageReward.pt"
    torch.save(state | {"extra": Payload()}, path)
    refused(folder, path, "holds more than tensors .*was not read")
    path.write_bytes(pickle.dumps(Payload(), 2))
    refused(folder, path)
    torch.save({"a": 1}, path)
    refused(folder, path, "no checkpoint of a reward: expected tensors by name")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, path, "damaged")
    path.write_bytes(b"")
    refused(folder, path, "damaged")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    refused(folder, tmp_path / "b.safetensors", "damaged, or no safetensors file")
    assert "never" not in capsys.readouterr().out
    assert not list(weights.cache_folder().rglob("*.safetensors"))


def test_wrong_tokenizer(folder, state, tmp_path):
    small = state | {"blip.text_encoder.embeddings.word_embeddings.weight": torch.zeros(5, 192)}
    save_file(small, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="the tokenizer has 19 tokens, the model 5"):
        ImageReward.from_pretrained(tmp_path / "a.safetensors", tokenizer=folder, device="cpu")


def test_scores_that_are_no_numbers_are_errors(folder, state, tmp_path):
    save_file(state | {"mlp.layers.7.bias": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    reward = ImageReward.from_pretrained(tmp_path / "a.safetensors", tokenizer=folder, device="cpu")
    with pytest.raises(RuntimeError, match="image-reward gave nan for picture 1"):
        reward(reference.pictures(1), ["a red circle"])


def test_bfloat16(folder, reward):
    half = ImageReward.from_pretrained(folder, device="cpu", dtype="bfloat16")
    images = reference.pictures(2)
    assert half(images, PROMPTS[:2]) == pytest.approx(reward(images, PROMPTS[:2]), abs=0.1)
