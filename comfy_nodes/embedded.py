"""The generator of the embedded world as ComfyUI's own MODEL, CLIP and VAE: all samplers and nodes work on it without any download.

The denoiser is diffusers' UNet inside ComfyUI's `BaseModel`; the text encoder is ComfyUI's CLIP with the weights read into it; the VAE
is ComfyUI's `VAE` around diffusers' tiny autoencoder. A run of the sampler "ddim" with the scheduler "simple" makes the picture that
`promptloop_pipeline.tiny.load_pipeline("sd")` makes from the same noise.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from comfy_api.latest import io

from promptloop_pipeline.tiny import WEIGHTS, quiet

from .memory import whole_patcher

FOLDER = WEIGHTS / "sd"
CHANNELS, SIDE, SCALE = 8, 8, 4  # of a latent; pixels of a picture for one of a latent
# From model-space latents to -1..1, by least squares on 256 rendered scenes (R2 0.89): for the sampler's cheap previews.
RGB = (
    (0.2019, 0.2496, 0.2806), (-0.1982, 0.0985, 0.069), (0.0705, -0.0071, 0.1034), (-0.0125, -0.1574, 0.053),
    (-0.0299, 0.0446, 0.2981), (0.9009, 0.9409, 0.9444), (-0.145, -0.156, -0.0794), (-0.2462, -0.1563, -0.0896),
)  # fmt: skip
RGB_BIAS = (-0.0281, -0.0543, -0.0848)


def load() -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE), in float32, on the offload device until used. Raises ImportError saying what to install."""
    import torch

    try:
        from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    except ImportError as e:
        raise ImportError(f'Load Embedded Pipeline needs diffusers: pip install "diffusers>=0.42" ({e})') from e

    class Denoiser(UNet2DConditionModel):  # its weights keep diffusers' names, which LoRA files go by
        def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs):  # type: ignore[no-untyped-def]
            if control is not None:
                raise ValueError("the embedded generator takes no ControlNet; leave it out, or load another model")
            return super().forward(x, timesteps, context).sample

    with quiet(), torch.random.fork_rng([]):  # libraries fill weights with noise before they are read
        unet = Denoiser.from_pretrained(FOLDER / "unet").float().eval().requires_grad_(False)
        autoencoder = AutoencoderTiny.from_pretrained(FOLDER / "vae").float().eval().requires_grad_(False)
        kept = DDIMScheduler.from_pretrained(FOLDER / "scheduler").alphas_cumprod.double()
        return _model(unet, autoencoder.config.scaling_factor, ((1 - kept) / kept).sqrt()), _clip(), _vae(autoencoder)


def _model(unet: Any, scaling_factor: float, sigmas: Any) -> Any:
    import comfy.model_management as mm
    import torch
    from comfy.latent_formats import LatentFormat
    from comfy.model_base import BaseModel, ModelType
    from comfy.supported_models_base import BASE

    config = BASE({"disable_unet_model_creation": True, "in_channels": CHANNELS})
    config.latent_format = latents = LatentFormat()
    latents.scale_factor, latents.latent_channels = scaling_factor, CHANNELS
    latents.latent_rgb_factors, latents.latent_rgb_factors_bias = [list(row) for row in RGB], list(RGB_BIAS)
    config.set_inference_dtype(torch.float32, None)
    model = BaseModel(config, ModelType.V_PREDICTION, device=mm.unet_offload_device())
    model.model_sampling.set_sigmas(sigmas)
    model.diffusion_model = unet.to(mm.unet_offload_device())
    return whole_patcher(model, mm.get_torch_device(), mm.unet_offload_device())


def _clip() -> Any:
    import torch
    from comfy.sd import CLIP
    from comfy.sd1_clip import SD1ClipModel, SDClipModel
    from comfy.supported_models_base import ClipTarget
    from safetensors.torch import load_file

    config = json.loads((FOLDER / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}

    def encoder(device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> Any:
        options = {"max_length": config["max_position_embeddings"], "special_tokens": special, "return_projected_pooled": False}
        made = SDClipModel(
            device=device, dtype=dtype, textmodel_json_config=config, model_options=model_options or {}, **options
        )
        words = made.operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        made.transformer.set_input_embeddings(words)  # ComfyUI's own has the 49408 words of the large one
        return made.requires_grad_(False)

    target = ClipTarget(_Tokenizer, functools.partial(SD1ClipModel, clip_model=encoder))
    clip = CLIP(target, model_options={"dtype": torch.float32})
    weights = {k: v.float() for k, v in load_file(FOLDER / "text_encoder" / "model.safetensors").items()}
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])  # it has none
    missing, unknown = clip.cond_stage_model.clip_l.transformer.load_state_dict(weights, strict=False)
    if missing or unknown:
        raise RuntimeError(f"the embedded text encoder does not fit this ComfyUI's CLIP (missing {missing}, unknown {unknown})")
    return clip


class _Tokenizer:
    """ComfyUI's tokenizer with the words of the embedded world, weights as in (red:1.2) included. ComfyUI goes on in a second window
    where a prompt is too long; this model never saw one, so what is beyond the first is cut, as in its pipeline."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        from comfy.sd1_clip import SD1Tokenizer, SDTokenizer
        from transformers import CLIPTokenizerFast

        config = json.loads((FOLDER / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        options = {"embedding_directory": embedding_directory, "embedding_size": 96, "tokenizer_class": CLIPTokenizerFast}
        options["tokenizer_args"] = {"model_max_length": 10**6}  # no warning: what is too long is cut below
        made = functools.partial(
            SDTokenizer, tokenizer_path=str(FOLDER / "tokenizer"), max_length=config["model_max_length"], **options
        )
        self.windows = SD1Tokenizer(
            tokenizer=lambda **kwargs: made(**{k: v for k, v in kwargs.items() if k == "tokenizer_data"})
        )
        self.windows.clip_l.max_word_length = 0  # a window is filled to its end, also within a word

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        return {k: v[:1] for k, v in self.windows.tokenize_with_weights(text, return_word_ids, **kwargs).items()}

    def promptloop_fit(self, prompt: str) -> str:
        """What of a prompt is not cut: up to the last comma, or, where that gives away too much, the last word."""
        from promptloop_pipeline.pipelines.budget import KEPT

        if len(self.windows.tokenize_with_weights(prompt)["l"]) == 1:
            return prompt

        def longest(ends: str) -> str:
            found = (prompt[: m.start()] for m in reversed([*re.finditer(ends, prompt)]))
            return next((part for part in found if len(self.windows.tokenize_with_weights(part)["l"]) == 1), "")

        words, clauses = longest(r"\s+"), longest(r"\s*,")
        return (clauses if len(clauses) >= KEPT * len(words) else words) or prompt

    def __getattr__(self, name: str) -> Any:
        if name == "windows":
            raise AttributeError(name)
        return getattr(self.windows, name)


def _vae(autoencoder: Any) -> Any:
    import comfy.model_management as mm
    import torch
    from comfy.sd import VAE
    from comfy.taesd.taesd import TAESD

    class Autoencoder(torch.nn.Module):
        """Pictures in -1..1 as ComfyUI's VAE hands them over; tensors for tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder

        def encode(self, pixels: Any) -> Any:
            return self.encoder(pixels)

        def decode(self, latents: Any) -> Any:
            return self.decoder(latents)

    # Made for a model of this kind, so that whatever this ComfyUI's VAE has about it is there; then ours takes its place.
    vae = VAE(sd=TAESD(latent_channels=CHANNELS).state_dict(), dtype=torch.float32)
    made: Any = Autoencoder().eval()
    vae.first_stage_model = made.to(mm.vae_offload_device(), memory_format=torch.channels_last)
    vae.patcher = whole_patcher(vae.first_stage_model, vae.device, mm.vae_offload_device())
    vae.downscale_ratio = vae.upscale_ratio = SCALE
    vae.latent_channels, vae.size = CHANNELS, None
    return vae


class PromptLoopLoadEmbedded(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PromptLoopLoadEmbedded",
            display_name="Load Embedded Pipeline",
            category="PromptLoop/loaders",
            description="A tiny text-to-image model that comes with PromptLoop: nothing is downloaded, and a picture of 32 x 32 pixels "
            "takes a second on any computer. It draws coloured shapes, to see the loop work before a large model is loaded.",
            inputs=[
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many pictures the empty latent stands for; each is refined on its own.",
                )
            ],
            outputs=[
                io.Model.Output(
                    tooltip="Trained for pictures of 32 x 32 pixels; cfg 3 and 20 steps suit it. For any sampler; heun wants the "
                    "scheduler karras or exponential."
                ),
                io.Clip.Output(tooltip="Knows the words of its world only; prompts of more than 20 words and commas are cut."),
                io.Vae.Output(tooltip="Turns a latent into a picture of four times its width and height."),
                io.Latent.Output(tooltip="An empty latent of the right size."),
            ],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        import torch
        from comfy.model_management import intermediate_device

        latent = {"samples": torch.zeros(batch_size, CHANNELS, SIDE, SIDE, device=intermediate_device())}
        return io.NodeOutput(*load(), latent)


NODES = [PromptLoopLoadEmbedded]
