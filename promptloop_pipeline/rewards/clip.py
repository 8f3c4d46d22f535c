"""Rewards on CLIP, all through transformers' `CLIPModel`: clip-score, pickscore, hpsv2, hpsv2.1, aesthetic, aesthetic-v1."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import Linear

from .images import crop_pixels, in_batches, pad_pixels
from .weights import (
    Source,
    as_dtype,
    best_device,
    fill,
    find_weights,
    first_line,
    is_hub_id,
    load_tokenizer,
    plain,
    read_checkpoint,
    refuse,
)  # fmt: skip

CLIP_L, CLIP_H, PICKSCORE = (
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "yuvalkirstain/PickScore_v1",
)
HPS_REPO, HPS_FILES = "xswu/HPSv2", {"2": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
AESTHETIC = {  # version -> file, hub id
    "1": ("sa_0_4_vit_l_14_linear.pth", None),
    "2": ("aesthetic-model.pth", "trl-lib/ddpo-aesthetic-predictor"),
}
ToPixels = Callable[[Sequence[Image.Image], int], Tensor]


class Similarity:
    """The cosine between a picture and its prompt, times `scale`. Reads the first 77 tokens of a prompt.

    None where there is no picture or the prompt is empty. `to_pixels`: how the weights' publishers make pixels of a picture.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        scale: float = 1.0,
        to_pixels: ToPixels = crop_pixels,
        batch_size: int = 16,
    ) -> None:
        if len(tokenizer) > (words := model.config.text_config.vocab_size):
            raise ValueError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {words}; they do not belong together"
            )
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.scale, self.to_pixels, self.batch_size = scale, to_pixels, batch_size

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return in_batches(self.name, self._score, images, prompts, self.batch_size)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        different = list(dict.fromkeys(prompts))  # pictures of one group share theirs
        said = self.read(different)[[different.index(p) for p in prompts]]
        return self.scale * (see(self.model, images, self.to_pixels) * said).sum(-1)

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """(N, width): what the prompts say, of length one."""
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        words = words.to(self.model.device)
        return _unit(self.model.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"]))


class Aesthetic:
    """How good a picture looks, whatever was asked for: a small head on CLIP ViT-L/14's view of it. Unit: marks from 1 to 10.

    None where there is no picture; the prompts are not read.
    """

    def __init__(self, name: str, model: Any, head: nn.Module, *, batch_size: int = 16) -> None:
        self.name, self.model, self.head, self.batch_size = name, model, head, batch_size

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return in_batches(self.name, self._score, images, prompts, self.batch_size, blind=True)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return self.head(see(self.model, images))[:, 0]


@torch.no_grad()
def see(model: Any, images: Sequence[Image.Image], to_pixels: ToPixels = crop_pixels) -> Tensor:
    """(N, width): what is in the pictures, of length one."""
    pixels = to_pixels(images, model.config.vision_config.image_size)
    return _unit(model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)))


def _unit(features: Any) -> Tensor:
    features = getattr(features, "pooler_output", features)  # transformers 5 returns an object, 4 the tensor
    return nn.functional.normalize(features.float(), dim=-1)


# --- loading ------------------------------------------------------------------------------------------------------------


def clip_score(
    model: str | Path = CLIP_L, *, name: str = "clip-score", tokenizer: str | Path | None = None, dtype: Any = None,
    device: str | None = None, batch_size: int = 16,
) -> Similarity:  # fmt: skip
    """CLIPScore (arXiv 2104.08718) without its factor of 2.5: the plain cosine, in practice .1 to .4. Weights: MIT.

    model: a folder or hub id of a `CLIPModel`. tokenizer: likewise; default: the model's own. dtype: default float32.
    """
    clip = load_clip(model, name, dtype, device)
    return Similarity(name, clip, _tokenizer(name, tokenizer, model), batch_size=batch_size)


def pickscore(
    model: str | Path = PICKSCORE, *, name: str = "pickscore", tokenizer: str | Path | None = None, dtype: Any = None,
    device: str | None = None, batch_size: int = 16,
) -> Similarity:  # fmt: skip
    """PickScore v1 (arXiv 2305.01569): which of two pictures users picked. Unit: CLIP logits, about 18 to 25 (some papers divide by
    26). Weights: MIT in the authors' repository; the model card names no licence. Arguments: as in `clip_score`."""
    clip = load_clip(model, name, dtype, device)
    words = _tokenizer(name, tokenizer, model, CLIP_H)
    to_pixels = partial(crop_pixels, half=math.floor)  # published with transformers' processor
    return Similarity(
        name, clip, words, scale=clip.logit_scale.float().exp().item(), to_pixels=to_pixels, batch_size=batch_size
    )


def hpsv2(
    model: str | Path | None = None, *, version: str = "2", name: str | None = None, tokenizer: str | Path | None = None,
    dtype: Any = None, device: str | None = None, batch_size: int = 16,
) -> Similarity:  # fmt: skip
    """Human Preference Score v2 (arXiv 2306.09341): a cosine, about .2 to .35 (some papers give it times 100). Weights: Apache-2.0.

    model: `HPS_v2_compressed.pt` (2.1: `HPS_v2.1_compressed.pt`), a folder with it, or a hub id; default: xswu/HPSv2.
    version: "2" or "2.1". The rest as in `clip_score`; its tokenizer is that of every CLIP.
    """
    from transformers import CLIPConfig, CLIPModel

    if version not in HPS_FILES:
        raise ValueError(f"there is no version {version!r} of hpsv2; use {' or '.join(HPS_FILES)}")
    name = name or ("hpsv2" if version == "2" else f"hpsv{version}")
    path, kind = find_weights(name, model, HPS_FILES[version], HPS_REPO), as_dtype(dtype)
    words = _tokenizer(name, tokenizer, path.parent, CLIP_H)
    state = read_checkpoint(path)
    try:
        config = CLIPConfig(**_open_clip_sizes(state, words.bos_token_id, words.eos_token_id))
    except KeyError as e:
        refuse(str(path), [str(e.args[0])], [])
        raise
    clip = fill(lambda: CLIPModel(config), state, open_clip_key, r"^attn_mask$|^logit_bias$", str(path))
    clip = clip.to(device or best_device(), kind)
    return Similarity(name, clip, words, to_pixels=pad_pixels, batch_size=batch_size)


def aesthetic(
    model: str | Path | None = None, *, version: str = "2", name: str | None = None, clip: str | Path = CLIP_L, dtype: Any = None,
    device: str | None = None, batch_size: int = 16,
) -> Aesthetic:  # fmt: skip
    """LAION's aesthetic predictors: v2 is an MLP without activations (Apache-2.0), v1 linear (MIT).

    model: the head: a file, a folder with it, or a hub id. Default for v2: trl-lib/ddpo-aesthetic-predictor. v1 is on no hub: give
    `sa_0_4_vit_l_14_linear.pth` of github.com/LAION-AI/aesthetic-predictor. clip: folder or hub id of CLIP ViT-L/14 (MIT). dtype:
    CLIP's, default float32.
    """
    if version not in AESTHETIC:
        raise ValueError(f"there is no version {version!r} of aesthetic; use {' or '.join(AESTHETIC)}")
    name = name or ("aesthetic" if version == "2" else f"aesthetic-v{version}")
    path = find_weights(name, model, *AESTHETIC[version])
    state = read_checkpoint(path)
    tower = load_clip(clip, name, dtype, device)
    width = tower.config.projection_dim
    build = partial(_linear_head, width) if version == "1" else partial(_mlp_head, width)
    published = (lambda key: plain(key.removeprefix("0."))) if version == "1" else (lambda key: plain(f"layers.{key}"))
    return Aesthetic(
        name, tower, fill(build, state, published, "$^", str(path)).float().to(tower.device), batch_size=batch_size
    )


def _linear_head(width: int) -> nn.Module:
    return nn.Sequential(Linear(width, 1))


def _mlp_head(width: int) -> nn.Module:
    drop = nn.Identity()  # dropout in training; it keeps the published numbering
    return nn.Sequential(
        Linear(width, 1024), drop, Linear(1024, 128), drop, Linear(128, 64), drop, Linear(64, 16), Linear(16, 1)
    )


def load_clip(model: str | Path, reward: str, dtype: Any = None, device: str | None = None) -> Any:
    """A `CLIPModel` of a folder or hub id, in eval mode, with all of its weights. Raises OSError or ValueError with one clear line."""
    from transformers import CLIPModel

    folder, kind = Path(model).expanduser(), as_dtype(dtype)
    if not ((folder / "config.json").is_file() or is_hub_id(model)):
        raise FileNotFoundError(f"there is no model for {reward} at {model}: expected a folder with config.json, or a hub id")
    try:
        clip, info = CLIPModel.from_pretrained(
            folder if folder.exists() else str(model), dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as e:  # the libraries below agree on no kind of error
        raise OSError(f"cannot load the model of {reward} from {str(model)!r}: {first_line(e)}") from e
    missing = [*info["missing_keys"], *(str(entry[0]) for entry in info.get("mismatched_keys", ()))]
    refuse(str(model), missing, [k for k in info["unexpected_keys"] if not k.endswith("position_ids")])
    return clip.eval().requires_grad_(False).to(device or best_device())


def _tokenizer(reward: str, given: str | Path | None, *others: str | Path) -> Any:
    from transformers import CLIPTokenizer

    return load_tokenizer(CLIPTokenizer, reward, [given] if given else others)


# --- open_clip's names --------------------------------------------------------------------------------------------------

_HEADS = 16  # of both towers of ViT-H-14
_OPEN_CLIP = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm": "ln_final", "logit_scale": "logit_scale",
    "visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection",
}  # fmt: skip
_BLOCK = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def open_clip_key(name: str) -> Source:
    """Where a parameter of `CLIPModel` lies in a checkpoint of open_clip: query, key and value are one matrix there, and the two
    projections stand the other way round."""
    if name in ("visual_projection.weight", "text_projection.weight"):
        return _OPEN_CLIP[name], lambda t: t.T
    block = re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if not block:
        stem, dot, kind = name.rpartition(".")
        return plain(_OPEN_CLIP[name] if name in _OPEN_CLIP else f"{_OPEN_CLIP[stem]}{dot}{kind}")
    tower, number, part, kind = block.groups()
    base = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}."
    if part in _BLOCK:
        return plain(f"{base}{_BLOCK[part]}.{kind}")
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(part)
    return f"{base}attn.in_proj_{kind}", lambda t: t.chunk(3)[third]


def _open_clip_sizes(state: Mapping[str, Tensor], bos: int, eos: int) -> dict[str, Any]:
    """Arguments of `CLIPConfig`, read off the weights."""
    patches, words, width = state["visual.conv1.weight"], state["token_embedding.weight"], state["text_projection"].shape[1]
    side = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    towers: dict[str, dict[str, Any]] = {}
    for tower, prefix in (("vision_config", r"visual\."), ("text_config", "")):
        layers = [k for k in state if re.fullmatch(prefix + r"transformer\.resblocks\.\d+\.ln_1\.weight", k)]
        towers[tower] = {
            "num_hidden_layers": len(layers), "num_attention_heads": _HEADS, "hidden_act": "gelu", "projection_dim": width,
            "intermediate_size": state[f"{prefix.replace(chr(92), '')}transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        }  # fmt: skip
    towers["vision_config"] |= {
        "hidden_size": patches.shape[0], "patch_size": patches.shape[-1], "image_size": side * patches.shape[-1],
    }  # fmt: skip
    towers["text_config"] |= {
        "hidden_size": words.shape[1], "vocab_size": words.shape[0], "bos_token_id": bos, "eos_token_id": eos,
        "max_position_embeddings": state["positional_embedding"].shape[0],
    }  # fmt: skip
    return {**towers, "projection_dim": width}
