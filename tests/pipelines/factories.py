"""Tiny random pipelines of the real classes, one for each family; nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer() -> CLIPTokenizer:
    """Every printable character is a token."""
    characters = [chr(c) for c in range(33, 127)]
    words = characters + [c + "</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip(cls: type = CLIPTextModel) -> CLIPTextModel:
    t = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(t), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, bos_token_id=t.bos_token_id, eos_token_id=t.eos_token_id,
        pad_token_id=t.pad_token_id,
    )  # fmt: skip
    return cls(config).eval()


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()


def vae(**kwargs: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4, sample_size=32, **kwargs,
    ).eval()  # fmt: skip


def unet(**kwargs: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(32, 64), sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **kwargs,
    ).eval()  # fmt: skip


def sd() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=tokenizer(), unet=unet(layers_per_block=1, cross_attention_dim=32),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    model = unet(
        layers_per_block=2, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=model,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=tokenizer(), text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(), text_encoder_3=t5(), tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    return FluxPipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


MAKERS = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}
EXTRA = {"sd": {}, "sdxl": {}, "sd3": {"max_sequence_length": 64}, "flux": {"max_sequence_length": 64}}  # of each family's call
