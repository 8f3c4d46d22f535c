"""Rebuilds every weight of the embedded generator from nothing, on two CPU cores:

    python -m promptloop_training.tiny_generator --out build/sd

Stages, each checkpointed and resumed by running the same command again:
1. autoencoder   AutoencoderTiny, 32 px -> 8 x 8 x 8, L1 + 2 MSE, noise on the latents
2. text          CLIPTextModel, pre-trained to let queries read out quadrants, background and cleared cells; then frozen
3. unet          v-prediction on cached latents, EMA, 10% empty captions
4. decoder       the decoder alone once more, on frozen latents
5. save          a stock StableDiffusionPipeline folder in fp16 safetensors

Nothing here sees a held-out pair of objects (`scenes.held_out_pair`); user language is not seen at all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Linear
from transformers import CLIPTextConfig, CLIPTextModel

from promptloop_pipeline.tiny.language import MAX_TOKENS, parse, training_caption
from promptloop_pipeline.tiny.older import readable_by_transformers_4
from promptloop_pipeline.tiny.scenes import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    QUADRANTS,
    RADIUS,
    SHAPES,
    SIZE,
    Scene,
    Spec,
    random_scene,
    render,
)  # fmt: skip
from promptloop_pipeline.tiny.tokenizer import build_tokenizer

SCENES = 48_000
LATENT = 8  # channels; the latent grid is 8 x 8
WIDTH = 96  # of the text states
CLAUSE_WEIGHT = 20.0
SAVE_EVERY = 1000  # steps


def new_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32), num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 1, 0), latent_channels=LATENT, scaling_factor=1.0,
    )  # fmt: skip


def new_text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=LATENT, out_channels=LATENT, block_out_channels=(48, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


# --- data ---------------------------------------------------------------------------------------------------------------


def make_data(n: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    return scenes, np.stack([render(s, rng) for s in scenes])


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def token_ids(captions: list[str], tokenizer: Any) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


# --- the loop that all stages share -------------------------------------------------------------------------------------


class Stage:
    """Counts steps, sets the learning rate (warm-up, flat, cosine over the last part), clips, saves and resumes."""

    def __init__(self, name: str, out: Path, params: list[Tensor], steps: int, lr: float, flat: float, state: dict[str, Any]):
        self.name, self.steps, self.lr, self.flat, self.params, self.state = name, steps, lr, flat, params, state
        self.file, self.step = out / f"{name}.pt", 0
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            self.step = saved["step"]
            self.optimizer.load_state_dict(saved["optimizer"])
            for key, module in state.items():
                module.load_state_dict(saved[key])

    def save(self) -> None:
        saved = {"step": self.step, "optimizer": self.optimizer.state_dict()}
        saved |= {key: module.state_dict() for key, module in self.state.items()}
        torch.save(saved, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def __iter__(self) -> Iterator[torch.Generator]:
        """Yields a generator seeded by the step alone, so that a resumed run equals one that never stopped."""
        start, first = time.time(), self.step
        while self.step < self.steps:
            done = self.step / self.steps
            decay = 1.0 if done < self.flat else 0.5 + 0.5 * math.cos(math.pi * (done - self.flat) / (1 - self.flat))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / 100) * decay + 1e-6
            yield torch.Generator().manual_seed(1_000_003 * len(self.name) + self.step)
            self.step += 1
            if self.step % 250 == 0:
                rate = (self.step - first) / (time.time() - start)
                mean = sum(self.losses[-250:]) / len(self.losses[-250:])
                print(f"{self.name} {self.step}/{self.steps} loss {mean:.4f} {rate:.1f} it/s", flush=True)
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()

    def update(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"{self.name}: the loss is {loss.item()} at step {self.step}; the last good state is {self.file}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())


# --- stages -------------------------------------------------------------------------------------------------------------


def train_autoencoder(vae: AutoencoderTiny, images: np.ndarray, out: Path, steps: int) -> None:
    vae.to(memory_format=torch.channels_last)
    stage = Stage("autoencoder", out, list(vae.parameters()), steps, 1.5e-3, 0.3, {"model": vae})
    for g in stage:
        x = to_tensor(images[torch.randint(len(images), (16,), generator=g).numpy()])
        z = vae.encode(x).latents
        d = vae.decode(z + 0.05 * torch.randn(z.shape, generator=g)).sample - x
        unit = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        stage.update(d.abs().mean() + 2 * d.square().mean() + 0.01 * unit)


def train_decoder(vae: AutoencoderTiny, latents: Tensor, images: np.ndarray, out: Path, steps: int) -> None:
    """The encoder stays as it is, so the latents that the UNet knows stay valid."""
    vae.to(memory_format=torch.channels_last)
    stage = Stage("decoder", out, list(vae.decoder.parameters()), steps, 1e-3, 0.1, {"model": vae})
    for g in stage:
        index = torch.randint(len(images), (16,), generator=g)
        z = latents[index]
        d = vae.decode(z + 0.05 * torch.randn(z.shape, generator=g)).sample - to_tensor(images[index.numpy()])
        stage.update(d.abs().mean() + 2 * d.square().mean())


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, images: np.ndarray) -> Tensor:
    return torch.cat([vae.encode(to_tensor(images[i : i + 500])).latents for i in range(0, len(images), 500)]).contiguous()


class ReadOut(nn.Module):
    """Queries that cross-attend the text states, as the UNet will: 4 quadrants, 1 background, 16 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(5 + len(CELLS), WIDTH))
        self.key, self.value = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH)
        self.quadrant = Linear(WIDTH, len(SHAPES) + len(COLORS) + len(RADIUS) + 3)
        self.background, self.cell = Linear(WIDTH, len(BACKGROUNDS) + 1), Linear(WIDTH, 2)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self.query @ self.key(states).transpose(1, 2) / WIDTH**0.5).softmax(-1)  # (B, 21, tokens)
        z = weights @ self.value(states)
        return self.quadrant(z[:, :4]), self.background(z[:, 4]), self.cell(z[:, 5:])


def read_out_targets(spec: Spec) -> tuple[list[list[int]], int, list[int]]:
    by_quadrant = {o.quadrant: o for o in spec.objects}
    rows = []
    for q in QUADRANTS:
        o = by_quadrant.get(q)
        rows.append(
            [SHAPES.index(o.shape) + 1, list(COLORS).index(o.color) + 1, list(RADIUS).index(o.size or "large") + 1]
            if o else [0, 0, 0]
        )  # fmt: skip
    ground = list(BACKGROUNDS).index(spec.background) + 1 if spec.background else 0
    return rows, ground, [int(c in spec.clear) for c in CELLS]


def train_text(text: CLIPTextModel, tokenizer: Any, scenes: list[Scene], out: Path, steps: int) -> None:
    head = ReadOut()
    stage = Stage("text", out, [*text.parameters(), *head.parameters()], steps, 2e-3, 0.3, {"model": text, "head": head})
    for g in stage:
        rng = random.Random(int(torch.randint(2**31, (1,), generator=g)))
        captions: list[str] = []
        while len(captions) < 96:
            caption = training_caption(rng.choice(scenes), rng)
            if "background" in caption:
                captions.append(caption)
        targets = [read_out_targets(parse(c)) for c in captions]
        quadrant, ground, cell = head(text(token_ids(captions, tokenizer))[0])
        want = torch.tensor([t[0] for t in targets])  # (B, 4, 3)
        loss = F.cross_entropy(ground, torch.tensor([t[1] for t in targets]))
        loss = loss + F.cross_entropy(cell.flatten(0, 1), torch.tensor([t[2] for t in targets]).flatten())
        parts = quadrant.split((len(SHAPES) + 1, len(COLORS) + 1, len(RADIUS) + 1), dim=-1)
        for k, logits in enumerate(parts):
            loss = loss + F.cross_entropy(logits.flatten(0, 1), want[..., k].flatten())
        stage.update(loss)


def clause_weight(captions: list[str]) -> Tensor:
    """(B, 1, 8, 8): more weight where a caption says that a cell is clear. A weight by place leaves the optimum, the conditional
    mean at that place, as it is; without it the clauses, which matter in few places of few pictures, are learned 10 x slower."""
    weight = torch.ones(len(captions), 1, 8, 8)
    for k, caption in enumerate(captions):
        for row, column in parse(caption).clear if "clear" in caption else ():
            weight[k, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = CLAUSE_WEIGHT
    return weight


def train_unet(
    unet: UNet2DConditionModel, ema: UNet2DConditionModel, text: CLIPTextModel, tokenizer: Any, scenes: list[Scene],
    latents: Tensor, out: Path, steps: int, batch: int = 32,
) -> None:  # fmt: skip
    alphas = new_scheduler().alphas_cumprod
    unet.to(memory_format=torch.channels_last)
    params = list(unet.parameters())
    stage = Stage("unet", out, params, steps, 1.2e-3, 0.6, {"model": unet, "ema": ema})
    for g in stage:
        index = torch.randint(len(latents), (batch,), generator=g)
        rng = random.Random(int(torch.randint(2**31, (1,), generator=g)))
        with torch.no_grad():
            captions = [training_caption(scenes[i], rng) for i in index.tolist()]
            states = text(token_ids(captions, tokenizer))[0]
        x0 = latents[index]
        t = ((torch.arange(batch) + torch.rand(batch, generator=g)) / batch * 1000).long().clamp(max=999)  # stratified
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=g)
        v = a.sqrt() * noise - (1 - a).sqrt() * x0
        error = (unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, states).sample - v).square()
        stage.update((clause_weight(captions) * error).mean())
        decay = min(0.999, (1 + stage.step) / (10 + stage.step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in params], 1 - decay)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="promptloop_training.tiny_generator", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="work folder: checkpoints, and the pipeline in OUT/pipeline")
    parser.add_argument("--autoencoder-steps", type=int, default=8000)
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--unet-steps", type=int, default=12000)
    parser.add_argument("--decoder-steps", type=int, default=6000)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    vae, text, unet, ema = new_autoencoder(), new_text_encoder(len(tokenizer)), new_unet(), new_unet()
    ema.load_state_dict(unet.state_dict())
    ema.requires_grad_(False)

    scenes, images = make_data(args.scenes, args.seed + 1)
    print(f"{len(scenes)} scenes of {SIZE} px drawn", flush=True)
    train_autoencoder(vae, images, args.out, args.autoencoder_steps)
    train_text(text, tokenizer, scenes, args.out, args.text_steps)
    text.requires_grad_(False).eval()
    latents = encode_all(vae, images)
    scale = latents.std().item()
    print(f"latent std {scale:.3f}, per channel {[round(s, 2) for s in latents.std((0, 2, 3)).tolist()]}", flush=True)
    train_unet(unet, ema, text, tokenizer, scenes, latents / scale, args.out, args.unet_steps)
    train_decoder(vae, latents, images, args.out, args.decoder_steps)

    vae.register_to_config(scaling_factor=1 / scale)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=ema, scheduler=new_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for module in (vae, text, ema):
        module.to(torch.float16)
    pipe.save_pretrained(args.out / "pipeline", safe_serialization=True)
    config = args.out / "pipeline" / "vae" / "config.json"  # diffusers writes a key here that it warns of when reading
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "block_out_channels"}, indent=2) + "\n"
    )
    readable_by_transformers_4(args.out / "pipeline")
    print(f"saved {args.out / 'pipeline'}", flush=True)


if __name__ == "__main__":
    main()
