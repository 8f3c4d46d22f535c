"""Tiny models of the published kinds with random weights, saved under the published names; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from . import reference

WORDS = ["a", "the", "red", "blue", "green", "circle", "square", "left", "of", "and", "on", "black", "nothing", "else"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
PROMPTS = ["a red circle", "the blue square left of the green circle and nothing else", "red " * 60, "on black"]


def bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT))
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(BERT)}).save_pretrained(folder)
    return folder


def bert_ids(prompt: str, length: int = 35) -> tuple[list[int], list[int]]:
    ids = [BERT.index(w) for w in prompt.split()][: length - 2]
    ids = [BERT.index("[CLS]"), *ids, BERT.index("[SEP]")]
    return ids + [0] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
CLIP = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]  # spelled letter by letter


def clip_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(CLIP)}, merges=[]).save_pretrained(folder)
    return folder


def clip_ids(prompt: str, length: int) -> list[int]:
    letters = [c if k < len(w) - 1 else c + "</w>" for w in prompt.split() for k, c in enumerate(w)]
    return [CLIP.index(c) for c in ["<|startoftext|>", *letters[: length - 2], "<|endoftext|>"]]


def clip_model(folder: Path, act: str = "quick_gelu", legacy_eos: bool = False) -> Path:
    """A transformers CLIPModel and its tokenizer. legacy_eos: as in the configs of the oldest published models."""
    towers = {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": act,
        "projection_dim": 24,
    }
    eos = 2 if legacy_eos else CLIP.index("<|endoftext|>")
    text = towers | {
        "vocab_size": len(CLIP), "hidden_size": 32, "max_position_embeddings": 30, "eos_token_id": eos, "bos_token_id": 0,
    }  # fmt: skip
    vision = towers | {"hidden_size": 48, "image_size": 56, "patch_size": 14}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(reference.random_weights(shapes) | {"logit_scale": torch.tensor(2.5)})
    model.save_pretrained(folder)
    clip_tokenizer(folder)
    return folder


def damaged_copy(folder: Path, to: Path, drop: str = "", add: str = "") -> Path:
    """A model's folder with one weight less, or one more."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop(drop, None)
    if add:
        state[add] = torch.zeros(3)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((to / "config.json").read_text())
    return to
