"""Folders as transformers 5 saves them, made readable by transformers 4 too: ComfyUI installations may have either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def readable_by_transformers_4(folder: Path) -> None:
    """Adds to the folder of a model or pipeline what transformers 4.57 looks for; 5 reads it as before. Does nothing twice."""
    for file in sorted(folder.rglob("tokenizer_config.json")):
        config = _read(file)
        if config["tokenizer_class"] == "TokenizersBackend":  # its name in 4
            config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        if "extra_special_tokens" in config:
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        _write(file, config)
        if config["tokenizer_class"] == "CLIPTokenizer":  # in 4 this is the one written in Python, which reads these
            model = _read(file.with_name("tokenizer.json"))["model"]
            _write(file.with_name("vocab.json"), model["vocab"])
            merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
            file.with_name("merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    for file in sorted(folder.rglob("processor_config.json")):
        config = _read(file)
        _write(
            file.with_name("preprocessor_config.json"),
            config["image_processor"] | {"processor_class": config["processor_class"]},
        )
    for file in sorted(
        folder.rglob("text_encoder/model.safetensors")
    ):  # 4 would take other names for missing weights, and draw them
        weights = load_file(file)
        if not any(name.startswith("text_model.") for name in weights):
            save_file({f"text_model.{name}": value for name, value in weights.items()}, file, {"format": "pt"})


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
