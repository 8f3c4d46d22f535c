"""`promptloop doctor`: what is here, what is missing, and what for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from typing import Annotated, Any

import typer

FEATURES = {  # distribution -> (module, what it is for, how to get it)
    "torch": ("torch", "everything that computes", "pip install torch"),
    "diffusers": ("diffusers", "the diffusers host, the embedded generator", "pip install diffusers"),
    "transformers": ("transformers", "text encoders, refiners, rewards", "pip install transformers"),
    "accelerate": ("accelerate", "offload, large models, training", "pip install accelerate"),
    "torchvision": (
        "torchvision",
        "processors of Qwen-VL, SmolVLM, Gemma 4 refiners",
        'pip install "promptloop[vlm]", matching your torch',
    ),
    "num2words": ("num2words", "SmolVLM refiners", 'pip install "promptloop[vlm]"'),
    "peft": ("peft", "refiners with an adapter", 'pip install "promptloop[adapters]"'),
    "bitsandbytes": ("bitsandbytes", "refiners in 4 or 8 bits", "pip install bitsandbytes"),
    "rapidocr": ("rapidocr", "the reward ocr", 'pip install "promptloop[ocr]"'),
    "trl": ("trl", "training", 'pip install "promptloop[train]"'),
    "scipy": ("scipy", "LMS scheduler, the reward geneval", 'pip install "promptloop[eval]"'),
    "trackio": ("trackio", "experiment tracking", 'pip install "promptloop[track]"'),
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Versions, devices, what is installed, what is missing and for which feature."""
    from .. import __version__
    from ..tiny import GENERATORS, WEIGHTS
    from .output import print_table

    rows = []
    for name, (module, use, hint) in FEATURES.items():
        there = importlib.util.find_spec(module) is not None
        version = importlib.metadata.version(name) if there else ""
        rows.append({"package": name, "version": version or "missing", "for": use, "to install": "" if there else hint})
    missing = [r["package"] for r in rows[:4] if r["version"] == "missing"]
    weights = {name: (WEIGHTS / name / "model_index.json").is_file() for name in GENERATORS}
    facts: dict[str, Any] = {
        "promptloop": __version__, "python": platform.python_version(), "platform": platform.platform(), "devices": _devices(),
        "embedded generators": ", ".join(f"{n} ({'there' if ok else 'MISSING: reinstall promptloop'})" for n, ok in weights.items()),
    }  # fmt: skip
    if as_json:
        print(json.dumps({**facts, "packages": rows}, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key}: {value}")
        print()
        print_table(rows)
    if missing or not all(weights.values()):
        raise SystemExit(1)


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown: torch is not installed"
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(found + (["mps"] if torch.backends.mps.is_available() else []))
