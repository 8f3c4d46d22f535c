"""What the published scorers compute, stated again in plain torch from papers and checkpoints' names; shares no code with ours."""

import math
import zlib

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import gelu, interpolate, layer_norm, linear, pad

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_weights(shapes, seed=0):
    """Every tensor from its own generator: matrices small, norms about one, so that scores depend on all of them."""
    state = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        x = torch.randn(shape, generator=g)
        norm = name.endswith("weight") and len(shape) == 1
        state[name] = 1 + 0.2 * x if norm else x * (0.1 if len(shape) < 2 else 1.2 / math.sqrt(shape[-1]))
    return state


# --- pictures -----------------------------------------------------------------------------------------------------------


def pictures(n=4, seed=0, sizes=((90, 70), (64, 64), (70, 101), (48, 63), (161, 48))):
    """Smooth random pictures of odd sizes."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        found.append(coarse.resize(sizes[k % len(sizes)], Image.Resampling.BICUBIC))
    return found


def normalised(array):
    """(3, H, W) from (H, W, 3) of 0 to 1."""
    return torch.from_numpy(((array - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1)).float()


def cropped(image, size, rounding=round):
    """Resize of the short side, CenterCrop, ToTensor, Normalize."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    a = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)) / 255
    top, left = int(rounding((h - size) / 2.0)), int(rounding((w - size) / 2.0))
    return normalised(a[top : top + size, left : left + size])


def letterboxed(image, size):
    """HPSv2's: ToTensor, the long side resized as a tensor, zeros around, Normalize."""
    a = torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)
    scale = size / max(a.shape[1:])
    h, w = round(a.shape[1] * scale), round(a.shape[2] * scale)
    a = interpolate(a[None], size=(h, w), mode="bicubic", antialias=True)[0]
    dh, dw = size - h, size - w
    a = pad(a, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))
    return normalised(a.permute(1, 2, 0).numpy())


# --- layers -------------------------------------------------------------------------------------------------------------


def norm(s, name, x, eps):
    return layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def dense(s, name, x):
    return linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def attend(q, k, v, heads, mask=None):
    """q, k, v (tokens, width) of one sample; mask: added to the logits."""
    split = [t.reshape(t.shape[0], heads, -1).transpose(0, 1) for t in (q, k, v)]
    logits = split[0] @ split[1].transpose(1, 2) / math.sqrt(split[0].shape[-1])
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) @ split[2]).transpose(0, 1).reshape(q.shape[0], -1)


def patches(weight, pixels, bias=None):
    """(cells, width): each cell of the picture through the patch matrix."""
    p = weight.shape[-1]
    cells = pixels.unfold(1, p, p).unfold(2, p, p)  # 3, rows, columns, p, p
    cells = cells.permute(1, 2, 0, 3, 4).reshape(-1, 3 * p * p)
    return linear(cells, weight.reshape(weight.shape[0], -1), bias)


# --- ImageReward --------------------------------------------------------------------------------------------------------


def image_reward_shapes(
    vision=128, text=192, layers=(2, 2), image=48, patch=16, words=40, positions=40, head=(1024, 128, 64, 16, 1)
):
    """Names and shapes of ImageReward.pt; at its own sizes: (1024, 768, (24, 12), 224, 16, 30524, 512)."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{v}.cls_token": (1, 1, vision), f"{v}.pos_embed": (1, (image // patch) ** 2 + 1, vision)}

    def add(name, out, width=None):
        shapes[f"{name}.weight"] = (out,) if width is None else (out, width)
        shapes[f"{name}.bias"] = (out,)

    shapes[f"{v}.patch_embed.proj.weight"], shapes[f"{v}.patch_embed.proj.bias"] = (vision, 3, patch, patch), (vision,)
    for k in range(layers[0]):
        b = f"{v}.blocks.{k}"
        add(f"{b}.norm1", vision), add(f"{b}.attn.qkv", 3 * vision, vision), add(f"{b}.attn.proj", vision, vision)
        add(f"{b}.norm2", vision), add(f"{b}.mlp.fc1", 4 * vision, vision), add(f"{b}.mlp.fc2", vision, 4 * vision)
    add(f"{v}.norm", vision)
    e = f"{t}.embeddings"
    shapes[f"{e}.word_embeddings.weight"], shapes[f"{e}.position_embeddings.weight"] = (words, text), (positions, text)
    add(f"{e}.LayerNorm", text)
    for k in range(layers[1]):
        b = f"{t}.encoder.layer.{k}"
        for name, width in (("attention", text), ("crossattention", vision)):
            add(f"{b}.{name}.self.query", text, text)
            add(f"{b}.{name}.self.key", text, width), add(f"{b}.{name}.self.value", text, width)
            add(f"{b}.{name}.output.dense", text, text), add(f"{b}.{name}.output.LayerNorm", text)
        add(f"{b}.intermediate.dense", 4 * text, text)
        add(f"{b}.output.dense", text, 4 * text), add(f"{b}.output.LayerNorm", text)
    add("blip.vision_proj", 256, vision), add("blip.text_proj", 256, text)
    width = text
    for k, out in zip((0, 2, 4, 6, 7), head):
        add(f"mlp.layers.{k}", out, width)
        width = out
    return shapes


def image_reward(s, pixels, ids, mask):
    """The score of one picture and one tokenised prompt."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    x = patches(s[f"{v}.patch_embed.proj.weight"], pixels, s[f"{v}.patch_embed.proj.bias"])
    x = torch.cat([s[f"{v}.cls_token"][0], x]) + s[f"{v}.pos_embed"][0]
    k = 0
    while f"{v}.blocks.{k}.norm1.weight" in s:
        b = f"{v}.blocks.{k}"
        q, key, value = dense(s, f"{b}.attn.qkv", norm(s, f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(s, f"{b}.attn.proj", attend(q, key, value, x.shape[-1] // 64))
        x = x + dense(s, f"{b}.mlp.fc2", gelu(dense(s, f"{b}.mlp.fc1", norm(s, f"{b}.norm2", x, 1e-6))))
        k += 1
    seen = norm(s, f"{v}.norm", x, 1e-6)
    e = f"{t}.embeddings"
    y = s[f"{e}.word_embeddings.weight"][ids] + s[f"{e}.position_embeddings.weight"][: len(ids)]
    y = norm(s, f"{e}.LayerNorm", y, 1e-12)
    hidden = torch.where(torch.tensor(mask) == 1, 0.0, -1e30)
    k = 0
    while f"{t}.encoder.layer.{k}.output.dense.weight" in s:
        b = f"{t}.encoder.layer.{k}"
        for name, other, m in (("attention", None, hidden), ("crossattention", seen, None)):
            other = y if other is None else other
            a = f"{b}.{name}.self"
            z = attend(
                dense(s, f"{a}.query", y), dense(s, f"{a}.key", other), dense(s, f"{a}.value", other), y.shape[-1] // 64, m
            )
            y = norm(s, f"{b}.{name}.output.LayerNorm", dense(s, f"{b}.{name}.output.dense", z) + y, 1e-12)
        z = dense(s, f"{b}.output.dense", gelu(dense(s, f"{b}.intermediate.dense", y)))
        y = norm(s, f"{b}.output.LayerNorm", z + y, 1e-12)
        k += 1
    z = y[0]
    for k in (0, 2, 4, 6, 7):
        z = dense(s, f"mlp.layers.{k}", z)
    return ((z - 0.16717362830052426) / 1.0333394966054072).item()


# --- CLIP ---------------------------------------------------------------------------------------------------------------


def open_clip_shapes(vision=64, text=32, layers=(3, 2), image=56, patch=14, words=60, positions=20, out=48):
    """Names and shapes of open_clip's CLIP; at ViT-H-14's sizes: (1280, 1024, (32, 24), 224, 14, 49408, 77, 1024)."""
    shapes = {
        "visual.class_embedding": (vision,), "visual.positional_embedding": ((image // patch) ** 2 + 1, vision),
        "visual.proj": (vision, out), "visual.conv1.weight": (vision, 3, patch, patch), "text_projection": (text, out),
        "positional_embedding": (positions, text), "token_embedding.weight": (words, text), "logit_scale": (),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, width, n in (("visual.", vision, layers[0]), ("", text, layers[1])):
        for k in range(n):
            b = f"{prefix}transformer.resblocks.{k}"
            shapes |= {f"{b}.attn.in_proj_weight": (3 * width, width), f"{b}.attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{b}.attn.out_proj.weight": (width, width), f"{b}.attn.out_proj.bias": (width,)}
            shapes |= {f"{b}.{ln}.{kind}": (width,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{b}.mlp.c_fc.weight": (4 * width, width), f"{b}.mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{b}.mlp.c_proj.weight": (width, 4 * width), f"{b}.mlp.c_proj.bias": (width,)}
    return shapes


def as_open_clip(state):
    """The weights of a transformers CLIPModel under open_clip's names."""
    renamed = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    found = {new: state[old] for old, new in renamed.items()}
    found["visual.proj"], found["text_projection"] = state["visual_projection.weight"].T, state["text_projection.weight"].T
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for old, new in (("vision_model", "visual."), ("text_model", "")):
            k = 0
            while f"{old}.encoder.layers.{k}.mlp.fc1.bias" in state:
                a, b = f"{old}.encoder.layers.{k}", f"{new}transformer.resblocks.{k}"
                found[f"{b}.attn.in_proj_{kind}"] = torch.cat([state[f"{a}.self_attn.{p}_proj.{kind}"] for p in "qkv"])
                found[f"{b}.attn.out_proj.{kind}"] = state[f"{a}.self_attn.out_proj.{kind}"]
                found[f"{b}.ln_1.{kind}"], found[f"{b}.ln_2.{kind}"] = (
                    state[f"{a}.layer_norm1.{kind}"],
                    state[f"{a}.layer_norm2.{kind}"],
                )
                found[f"{b}.mlp.c_fc.{kind}"], found[f"{b}.mlp.c_proj.{kind}"] = (
                    state[f"{a}.mlp.fc1.{kind}"],
                    state[f"{a}.mlp.fc2.{kind}"],
                )
                k += 1
    return found


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def blocks(s, prefix, x, heads, act, mask=None):
    k = 0
    while f"{prefix}transformer.resblocks.{k}.ln_1.weight" in s:
        b = f"{prefix}transformer.resblocks.{k}"
        qkv = linear(norm(s, f"{b}.ln_1", x, 1e-5), s[f"{b}.attn.in_proj_weight"], s[f"{b}.attn.in_proj_bias"])
        x = x + dense(s, f"{b}.attn.out_proj", attend(*qkv.chunk(3, -1), heads, mask))
        x = x + dense(s, f"{b}.mlp.c_proj", act(dense(s, f"{b}.mlp.c_fc", norm(s, f"{b}.ln_2", x, 1e-5))))
        k += 1
    return x


def clip_image(s, pixels, heads, act=gelu):
    x = patches(s["visual.conv1.weight"], pixels)
    x = torch.cat([s["visual.class_embedding"][None], x]) + s["visual.positional_embedding"]
    x = blocks(s, "visual.", norm(s, "visual.ln_pre", x, 1e-5), heads, act)
    x = norm(s, "visual.ln_post", x[0], 1e-5) @ s["visual.proj"]
    return x / x.norm()


def clip_text(s, ids, heads, act=gelu):
    """ids: up to and with the end token, which is where the meaning is read."""
    n = len(ids)
    x = s["token_embedding.weight"][ids] + s["positional_embedding"][:n]
    causal = torch.full((n, n), -1e30).triu(1)
    x = norm(s, "ln_final", blocks(s, "", x, heads, act, causal), 1e-5)[-1] @ s["text_projection"]
    return x / x.norm()
