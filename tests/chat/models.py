"""Tiny random language models of real classes, saved to disk and loaded by folder name; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}


def tokenizer(*extra: str):
    """Every byte is a token."""
    t = transformers.Qwen2Tokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    t.add_tokens([*SPECIAL, *extra], special_tokens=True)
    t.eos_token, t.pad_token, t.model_max_length = "<|im_end|>", "<|endoftext|>", 4096
    return t


def _text(t, **kwargs):
    ids = {"pad_token_id": t.pad_token_id, "eos_token_id": t.eos_token_id, "bos_token_id": None}
    return TEXT | ids | {"vocab_size": len(t), "max_position_embeddings": 4096} | kwargs


def idefics3():
    t = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>")
    processor = transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        tokenizer=t, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = transformers.Idefics3Config(
        text_config=_text(t, model_type="llama"), vision_config=SIGHT | {"patch_size": 8}, scale_factor=2,
        image_token_id=t.convert_tokens_to_ids("<image>"), pad_token_id=t.pad_token_id,
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config), processor


def llava():
    t = tokenizer("<image>")
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=t, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    vision = SIGHT | {"model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 32}
    config = transformers.LlavaConfig(
        text_config=_text(t, model_type="qwen2"), vision_config=vision, image_token_index=t.convert_tokens_to_ids("<image>")
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen_parts(patch: int, edge: int):
    t = tokenizer()
    parts = {
        "image_processor": transformers.Qwen2VLImageProcessor(min_pixels=edge**2, max_pixels=4 * edge**2, patch_size=patch),
        "tokenizer": t,
        "video_processor": transformers.Qwen2VLVideoProcessor(),
        "chat_template": TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    }
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
    ids = {k: t.convert_tokens_to_ids(v) for k, v in (tokens | {"vision_end_token_id": "<|vision_end|>"}).items()}
    return t, parts, ids


def qwen25vl():
    """Needs torchvision, as its processor has a video part."""
    t, parts, ids = _qwen_parts(14, 28)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(t, rope_parameters=rope, tie_word_embeddings=True),
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 112}, **ids,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config), transformers.Qwen2_5_VLProcessor(**parts)


def qwen3vl():
    """Needs torchvision, as its processor has a video part."""
    t, parts, ids = _qwen_parts(16, 32)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config=_text(t, head_dim=8, rope_parameters=rope, tie_word_embeddings=True),
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, **ids,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config), transformers.Qwen3VLProcessor(**parts)


def qwen2():
    """Text only, with a chat template."""
    t = tokenizer()
    t.chat_template = TEMPLATE
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_text(t))), t


def gpt2():
    """Text only, without a chat template and without a pad token: the shape of microsoft/Promptist."""
    alphabet = sorted(ByteLevel.alphabet())
    t = transformers.GPT2Tokenizer(vocab={c: i for i, c in enumerate([*alphabet, "<|endoftext|>"])}, merges=[])
    config = transformers.GPT2Config(
        vocab_size=len(t),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=t.eos_token_id,
        eos_token_id=t.eos_token_id,
    )
    return transformers.GPT2LMHeadModel(config), t


def save(maker, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = maker()
    t = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = t.eos_token_id, t.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
