"""ImageReward-v1.0 (arXiv 2304.05977): what people prefer, on transformers' BLIP classes.

The published package cannot be imported with today's transformers and pins versions that break it, so its weights are read here and
its code is not needed. The published keys map one to one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import Linear

from .images import crop_pixels, in_batches
from .weights import Source, as_dtype, best_device, fill, find_weights, load_tokenizer, plain, read_checkpoint, refuse

FILE, REPO, TOKENIZER = "ImageReward.pt", "zai-org/ImageReward", "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' test set
TOKENS = 35
_HEAD = 64  # width of an attention head, in both towers
_IGNORED = r"^blip\.(vision_proj|text_proj)\.|position_ids$"  # of other tasks of BLIP
_RULES = (  # ours -> published
    (r"^vision_model\.embeddings\.class_embedding$", "blip.visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "blip.visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"blip.visual_encoder.blocks.\1.attn."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"blip.visual_encoder.blocks.\1."),
    (r"^text_encoder\.", "blip.text_encoder."),
    (r"^mlp\.", "mlp.layers."),
)


def published(name: str) -> Source:
    """Where a parameter of `ImageRewardModel` lies in the published checkpoint."""
    for pattern, key in _RULES:
        name, found = re.subn(pattern, key, name)
        if found:
            break
    return plain(name)


class ImageRewardModel(nn.Module):
    """BLIP's picture encoder, its text encoder that attends to the picture, and a head on the first token without activations."""

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any], head: Sequence[int]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.image_size = vision["image_size"]
        # is_decoder makes the text encoder attend to the picture; that attention has no other implementation than eager
        self.vision_model = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6, attn_implementation="eager"))
        options = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "is_decoder": True, "attn_implementation": "eager"}
        self.text_encoder = BlipTextModel(BlipTextConfig(**text, **options), add_pooling_layer=False)
        widths = [text["hidden_size"], *head]
        layers: list[nn.Module] = []
        for k, (a, b) in enumerate(zip(widths, widths[1:])):
            layers.append(Linear(a, b))
            if k < 3:
                layers.append(nn.Identity())  # dropout in training; it keeps the published numbering
        self.mlp = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """(N,): standardised scores. Differentiable in the pixels, as ReFL needs it."""
        seen = self.vision_model(pixel_values).last_hidden_state
        read = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state  # fmt: skip
        return (self.mlp(read[:, 0])[:, 0].float() - MEAN) / STD


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `ImageRewardModel`, read off the weights."""
    blip, head = "blip.visual_encoder", [w.shape[0] for k, w in _numbered(state, r"mlp\.layers\.(\d+)\.weight")]
    patches, words = state[f"{blip}.patch_embed.proj.weight"], state["blip.text_encoder.embeddings.word_embeddings.weight"]
    side = math.isqrt(state[f"{blip}.pos_embed"].shape[1] - 1)
    vision = {
        "hidden_size": patches.shape[0], "patch_size": patches.shape[-1], "image_size": side * patches.shape[-1],
        "num_hidden_layers": len(_numbered(state, r"blip\.visual_encoder\.blocks\.(\d+)\.norm1\.weight")),
        "num_attention_heads": max(1, patches.shape[0] // _HEAD),
        "intermediate_size": state[f"{blip}.blocks.0.mlp.fc1.weight"].shape[0],
    }  # fmt: skip
    layer = "blip.text_encoder.encoder.layer"
    text = {
        "vocab_size": words.shape[0], "hidden_size": words.shape[1], "encoder_hidden_size": patches.shape[0],
        "num_hidden_layers": len(_numbered(state, r"blip\.text_encoder\.encoder\.layer\.(\d+)\.output\.dense\.weight")),
        "num_attention_heads": max(1, words.shape[1] // _HEAD),
        "intermediate_size": state[f"{layer}.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
    }  # fmt: skip
    return {"vision": vision, "text": text, "head": head}


def _numbered(state: Mapping[str, Tensor], pattern: str) -> list[tuple[int, Tensor]]:
    found = ((re.fullmatch(pattern, k), v) for k, v in state.items())
    return sorted(((int(m[1]), v) for m, v in found if m), key=lambda pair: pair[0])


class ImageReward:
    """Unit: standard deviations from the mean of the authors' test set; about -2.3 to 2. Reads the first 35 tokens of a prompt, so
    give the user's short one. Weights: Apache-2.0, https://huggingface.co/zai-org/ImageReward, 1.8 GB.

    None where there is no picture or the prompt is empty.
    """

    name = "image-reward"

    def __init__(self, model: ImageRewardModel, tokenizer: Any, *, batch_size: int = 16) -> None:
        if len(tokenizer) > (words := model.text_encoder.config.vocab_size):
            raise ValueError(
                f"image-reward: the tokenizer has {len(tokenizer)} tokens, the model {words}; use bert-base-uncased's"
            )
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, *, tokenizer: str | Path | None = None, dtype: Any = None,
        device: str | None = None, batch_size: int = 16,
    ) -> ImageReward:  # fmt: skip
        """model: `ImageReward.pt`, a folder with it, or a hub id; default: where the published package keeps it
        (~/.cache/ImageReward), else the hub. A .pt file is kept as safetensors in the cache folder when first read.

        tokenizer: a folder or hub id; default: what lies beside the weights, else bert-base-uncased. dtype: default float32.
        Raises OSError for what is not there, ValueError for a checkpoint with other keys or with more than tensors.
        """
        from transformers import BertTokenizer

        known = [Path("~/.cache/ImageReward").expanduser() / FILE]
        path, kind = find_weights(cls.name, model, FILE, REPO, known), as_dtype(dtype)
        words = load_tokenizer(BertTokenizer, cls.name, [tokenizer] if tokenizer else [path.parent, TOKENIZER])
        state = read_checkpoint(path)
        try:
            sizes = _sizes(state)
        except KeyError as e:
            refuse(str(path), [str(e.args[0])], [k for k in state if not k.startswith(("blip.", "mlp."))])
            raise
        filled = fill(lambda: ImageRewardModel(**sizes), state, published, _IGNORED, str(path))
        assert isinstance(filled, ImageRewardModel)
        return cls(filled.to(device or best_device(), kind), words, batch_size=batch_size)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return in_batches(self.name, self._score, images, prompts, self.batch_size)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        like = next(self.model.parameters())
        words = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        pixels = crop_pixels(images, self.model.image_size).to(like.device, like.dtype)
        return self.model(words["input_ids"].to(like.device), words["attention_mask"].to(like.device), pixels)
