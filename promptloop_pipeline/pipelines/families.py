"""What differs from family to family: how an x0-estimate becomes a picture. Everything else is the pipeline's own business.

One row each. A pipeline that no row names still works when its latents are plain (B, C, H, W) and its VAE a stock one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

DENOISERS = ("unet", "transformer")
MODULES = (*DENOISERS, "controlnet")  # what may be fed the prompt in every step


def _plain(pipe: Any, x0: Tensor, height: int | None, width: int | None) -> Tensor:
    return x0


def _unpacked(pipe: Any, x0: Tensor, height: int | None, width: int | None) -> Tensor:
    """FLUX: (B, tokens, 4 C) -> (B, C, H, W)"""
    default = pipe.default_sample_size * pipe.vae_scale_factor
    return pipe._unpack_latents(x0, height or default, width or default, pipe.vae_scale_factor)


@dataclass(frozen=True)
class Family:
    """`prefix`: how the names of its stock classes begin. `unpack(pipe, x0, height, width)`: to (B, C, H, W)."""

    name: str
    prefix: str
    unpack: Callable[[Any, Tensor, int | None, int | None], Tensor] = _plain


FAMILIES = (
    Family("sdxl", "StableDiffusionXL"),
    Family("sd3", "StableDiffusion3"),
    Family("sd", "StableDiffusion"),
    Family("flux", "Flux", _unpacked),
)
PLAIN = Family("plain", "")
_UNPROVEN = {  # begins like a family, is not one
    "Flux2": "its latents need a decoder of their own",
    "FluxKontext": "it chooses another size than it is asked for, which its previews do not follow yet",
}


@lru_cache(maxsize=64)
def signature_of(call: Callable[..., Any]) -> inspect.Signature:
    """Of a class's function; kept, since a run asks for it again and again."""
    return inspect.signature(call)


def stock_class(pipe: Any) -> type:
    """The diffusers class that a pipeline is, or its own class when there is none."""
    return next((c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.")), type(pipe))


def family_of(pipe: Any) -> Family:
    """The row for a pipeline object. Raises TypeError, saying what is missing, when the loop cannot work with it."""
    stock = stock_class(pipe).__name__
    missing = [
        what
        for what, there in (
            ("a scheduler with step()", hasattr(getattr(pipe, "scheduler", None), "step")),
            (f"a {' or '.join(DENOISERS)}", any(getattr(pipe, m, None) is not None for m in DENOISERS)),
            ("encode_prompt()", hasattr(pipe, "encode_prompt")),
        )
        if not there
    ]
    reason = (
        f"it lacks {' and '.join(missing)}" if missing else next((r for n, r in _UNPROVEN.items() if stock.startswith(n)), None)
    )
    if reason:
        raise TypeError(
            f"{stock} is not supported: {reason}. Supported are the text-to-image pipelines of Stable Diffusion 1.x/2.x, XL, 3.x and "
            "FLUX.1, and others with a prompt and plain latents"
        )
    return next((f for f in FAMILIES if stock.startswith(f.prefix)), PLAIN)


@torch.no_grad()
def decode_preview(
    pipe: Any, family: Family, x0: Tensor, height: int | None, width: int | None, vae: Any = None
) -> list[Image]:
    """PIL images of x0-estimates, through the pipeline's VAE or a given one (AutoencoderTiny: cheap)."""
    own = vae is None
    vae = pipe.vae if own else vae
    z = family.unpack(pipe, x0, height, width)
    if z.ndim != 4:
        raise TypeError(
            f"{type(pipe).__name__} has latents of shape {tuple(z.shape)}; give preview= a function (pipe, x0) -> PIL images"
        )
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (torch.tensor(v, device=z.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        z = z * std / config.scaling_factor + mean
    else:
        z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    upcast = vae.dtype == torch.float16 and getattr(config, "force_upcast", False)  # SDXL's VAE overflows in half precision
    if upcast:
        vae.to(torch.float32)
    try:
        device = next(vae.parameters()).device if not own else z.device
        picture = vae.decode(z.to(device, torch.float32 if upcast else vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    return pipe.image_processor.postprocess(picture, output_type="pil")
