"""Tiny models, made in seconds: run inside ComfyUI as a script, `checkpoints.py BASE` writes below BASE/models

checkpoints/tiny_sd15.ckpt   one level of SD1.5's UNet, TAESD, a CLIP-L whose matrices share their memory
checkpoints/tiny_sd3.ckpt    SD3's MMDiT of two blocks, TAESD of 16 channels, the same CLIP-L
loras/*.safetensors          one for each of these
controlnet/*.safetensors     one for tiny_sd15

and `family(name)` builds what no loader takes in this size: FLUX and Wan, with the CLIP-L and VAEs of their own kinds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1], "channel_mult": (1,),
    "transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1, "context_dim": 768,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "num_heads": 8, "legacy": False,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    "num_patches": 1024, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": [],
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 768,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 128, "freq_dim": 32, "text_dim": 768, "num_heads": 2,
    "num_layers": 2, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "text_len": 77,
}  # fmt: skip


def seeded(module: Any, seed: int) -> Any:
    """Weights of a size at which everything matters: text, noise, and no layer is lost."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() < 2:
                ones = name.endswith(("norm.weight", "scale", "gamma")) or ("norm" in name and name.endswith("weight"))
                p.copy_(float(ones) + 0.02 * torch.randn(p.shape, generator=draw))
            else:
                p.copy_(torch.randn(p.shape, generator=draw) * (p[0].numel() ** -0.5) * (6 if ".attn2." in name else 1))
    return module


def diffusion(kind: str, config: dict[str, Any], seed: int) -> Any:
    """A BaseModel of ComfyUI's: the class that supported_models names for `kind`."""
    import comfy.supported_models
    import torch

    # 0.8.0's FLUX asks for one more
    config = config | ({"txt_ids_dims": []} if kind == "Flux" and _knows_txt_ids() else {})
    model_config = getattr(comfy.supported_models, kind)(config)
    model_config.set_inference_dtype(torch.float32, None)
    return seeded(model_config.get_model({}, "", device="cpu"), seed).eval()


def _knows_txt_ids() -> bool:
    import comfy.ldm.flux.model

    return "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__


def taesd(channels: int) -> dict[str, Any]:
    """A state dict of ComfyUI's tiny autoencoder: pictures around a middle grey, not all black."""
    import comfy.taesd.taesd

    state = seeded(comfy.taesd.taesd.TAESD(latent_channels=channels), 7).state_dict()
    last = max((k for k in state if k.startswith("taesd_decoder.") and k.endswith(".bias")), key=lambda k: int(k.split(".")[1]))
    state[last] = state[last] * 0 + 0.5
    return state


def clip_l() -> dict[str, Any]:
    """A state dict of CLIP-L under its own names. All its matrices are views of one pool of 2 MB: text matters, files stay small."""
    import comfy.ops
    import comfy.sd1_clip
    import torch

    model = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
    draw = torch.Generator().manual_seed(5)
    pool = torch.randn(500_000, generator=draw)
    state, place = {}, 0
    for name, p in model.transformer.state_dict().items():
        if p.dim() < 2:
            ones = "layer_norm" in name and name.endswith("weight")
            state[name] = torch.full_like(p, float(ones)) if p.dtype.is_floating_point else p
            continue
        rows, columns = p.shape
        stride = max((pool.numel() - columns - 4096) // rows, 1)  # big ones overlap with themselves
        state[name] = pool.as_strided((rows, columns), (stride, 1), place % 4096)
        place += 997
    scale = 0.03 / pool.std()
    pool.mul_(scale)
    return state


def write(base: Path) -> list[str]:
    """Raises OSError where BASE cannot be written."""
    import safetensors.torch
    import torch

    names = []
    text = clip_l()
    for name, kind, config, channels, prefix in (
        ("tiny_sd15", "SD15", SD15, 4, "cond_stage_model.transformer."),
        ("tiny_sd3", "SD3", SD3, 16, "text_encoders.clip_l.transformer."),
    ):
        model = diffusion(kind, config, seed=1)
        state = {f"model.diffusion_model.{k}": v for k, v in model.diffusion_model.state_dict().items()}
        vae = "first_stage_model."
        state |= {vae + k: v for k, v in taesd(channels).items()}
        state |= {prefix + k: v for k, v in text.items()}
        torch.save({"state_dict": state}, base / f"models/checkpoints/{name}.ckpt")
        safetensors.torch.save_file(lora(model), base / f"models/loras/{name}.safetensors")
        names.append(name)
    safetensors.torch.save_file(control(), base / "models/controlnet/tiny_sd15.safetensors")
    return names


def lora(model: Any) -> dict[str, Any]:
    """Rank 2, for half of the matrices of a diffusion model and some of CLIP-L's, strong enough to be seen."""
    import torch

    draw, state = torch.Generator().manual_seed(11), {}
    sizes = {f"diffusion_model.{n}": p.shape for n, p in model.diffusion_model.named_parameters() if n.endswith(".weight")}
    layer = "text_encoders.clip_l.transformer.text_model.encoder.layers"
    sizes |= {f"{layer}.{k}.mlp.fc1.weight": torch.Size((3072, 768)) for k in (0, 5)}
    for number, (name, shape) in enumerate(sizes.items()):
        if len(shape) == 2 and (number % 2 == 0 or name.startswith(layer)):
            key = name.removesuffix(".weight")
            state[f"{key}.lora_down.weight"] = torch.randn(2, shape[1], generator=draw) * shape[1] ** -0.5
            state[f"{key}.lora_up.weight"] = torch.randn(shape[0], 2, generator=draw) * 0.3
    return state


def control() -> dict[str, Any]:
    """A ControlNet's state dict that goes with tiny_sd15; its "zero" convolutions are not zero."""
    import comfy.cldm.cldm
    import comfy.ops

    wanted = {k: v for k, v in SD15.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(**wanted, hint_channels=3, operations=comfy.ops.disable_weight_init)
    return {k: v.contiguous() for k, v in seeded(net, 3).state_dict().items()}


def wan_vae() -> Any:
    """ComfyUI's VAE around a narrow Wan autoencoder; loaders know only wide ones."""
    import comfy.ldm.wan.vae
    import comfy.model_patcher
    import comfy.sd

    vae = comfy.sd.VAE(sd=taesd(16))
    net = comfy.ldm.wan.vae.WanVAE(
        dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    vae.first_stage_model = seeded(net, 9).eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device)
    vae.latent_dim = 3
    vae.upscale_ratio, vae.upscale_index_formula = (lambda a: max(0, a * 4 - 3), 8, 8), (4, 8, 8)
    vae.downscale_ratio, vae.downscale_index_formula = (lambda a: max(0, (a + 3) // 4), 8, 8), (4, 8, 8)
    vae.memory_used_decode = lambda shape, dtype: 1000
    return vae


def family(name: str) -> tuple[Any, Any]:
    """(MODEL, VAE) of "flux" or "wan"; their text encoder is tiny_sd15's."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.sd

    kind, config = {"flux": ("Flux", FLUX), "wan": ("WAN21_T2V", WAN)}[name]
    model = diffusion(kind, config, seed=2)
    patcher = comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())
    return patcher, wan_vae() if name == "wan" else comfy.sd.VAE(sd=taesd(16))


if __name__ == "__main__":
    import inside

    inside.setup(sys.argv[1], extras=False, pack=None)
    inside.answer(write(Path(sys.argv[1])))
