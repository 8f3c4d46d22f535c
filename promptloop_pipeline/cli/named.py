"""Refiners, models and rewards by the names that a user types: the same names for every command."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..dotted import load_object
from ..rewards.combine import NAMED, RewardSpec, check_name, load_reward
from ..tiny import REFINERS

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("tokenizer", "clip", "server_model", "template", "version")

EMBEDDED = (*REFINERS, "oracle")  # refiners that know the embedded world only
NO_MODEL = (*EMBEDDED, "none")  # what is told nothing
SERVER = re.compile(r"https?://|[\w.-]+:\d+(/\S*)?$")
OBJECT = re.compile(r"[\w.]+:[\w.]+")
TEMPLATE = "template.txt"  # beside the weights of a model that `promptloop train` kept
ALLOWED = (
    '"tiny" (embedded), "oracle" (reads its verifier), "tiny-warm-up" (to be trained), "none", a folder or hub id, '
    'the URL of a server, or "module:object"'
)


def load_refiner(name: str, template: str | Path | None = None, model: str | None = None, **options: Any) -> Any:
    """A refiner by its name: "tiny", "tiny-warm-up", "oracle", "none", a folder or hub id, http(s)://..., a prompt schedule FILE.json,
    or "module:object" of one's own.

    template: for language models; default: the one beside the weights, else "repair". model: the model's name on a server. options: of
    `MLLMRefiner`.
    Raises ValueError, OSError or ImportError with one clear line.
    """
    if name in NO_MODEL or name.endswith(".json"):
        _refuse(name, template=template, server_model=model)
    if name == "none":
        from ..refiners.scripted import NoOpRefiner

        return NoOpRefiner()
    if name in EMBEDDED:
        from .. import tiny

        return tiny.OracleRefiner() if name == "oracle" else tiny.load_refiner(name)
    if name.endswith(".json"):
        from ..refiners.scripted import ScheduleRefiner
        from ..replay import load_schedule

        return ScheduleRefiner(load_schedule(name))
    if is_server(name):
        from ..refiners.mllm import MLLMRefiner

        return MLLMRefiner.from_endpoint(name, model, template or "repair", **options)
    if OBJECT.fullmatch(name) and not Path(name).exists():
        _refuse(name, template=template, server_model=model)
        found = load_object(name, "refiner")
        return found() if isinstance(found, type) else found
    if not (Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise ValueError(f"unknown refiner {name!r}; use {ALLOWED}")
    from ..refiners.mllm import MLLMRefiner

    return MLLMRefiner.from_pretrained(name, template or own_template(name) or "repair", **options)


def own_template(refiner: str) -> str | None:
    """The file of the template that a model was trained with, where its folder holds it."""
    file = Path(refiner).expanduser() / TEMPLATE
    return str(file.resolve()) if refiner and is_told(refiner) and file.is_file() else None


def holds_model(folder: Path) -> bool:
    """A language model, or an adapter of one."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def is_server(refiner: str) -> bool:
    return bool(SERVER.match(refiner))


def is_told(refiner: str) -> bool:
    """Whether it is a language model, which is told something by a template."""
    scripted = refiner in NO_MODEL or refiner.endswith(".json") or (OBJECT.fullmatch(refiner) and not Path(refiner).exists())
    return is_server(refiner) or not scripted


def _refuse(name: str, **given: Any) -> None:
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"the refiner {name!r} has no use for {option} {value!r}; leave it out, or name a language model")


# --- models -------------------------------------------------------------------------------------------------------------


def check_model(name: str) -> None:
    """Says at once that a folder holds no pipeline; a hub id is tried when it is loaded. Raises FileNotFoundError."""
    path = name.startswith((".", "/", "~")) or os.sep in name.rstrip("/")[name.find("/") + 1 :] or Path(name).exists()
    if name != "tiny" and path and not Path(name).expanduser().joinpath("model_index.json").is_file():
        raise FileNotFoundError(f'no pipeline at {name}: expected a folder with model_index.json, a hub id, or "tiny"')


def where_to_run(name: str, device: str | None = None, dtype: str | None = None) -> tuple[str, str]:
    """The device, by default the best there is, and the dtype: by default float32 on a CPU and for "tiny"; elsewhere bfloat16 for
    transformers, whose activations overflow float16, and float16 for UNets. Raises OSError with one clear line."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if dtype is not None or device == "cpu" or name == "tiny":
        return device, dtype or "float32"
    from diffusers import DiffusionPipeline

    try:
        return device, "bfloat16" if "transformer" in DiffusionPipeline.load_config(_place(name)) else "float16"
    except OSError as e:
        raise _no_model(name, e) from e


def load_model(name: str, device: str | None = None, dtype: str | None = None) -> Any:
    """A diffusers pipeline: "tiny" (embedded), a folder or a hub id. device, dtype: see `where_to_run`.

    Raises OSError or ValueError with one clear line.
    """
    import torch

    device, kind = where_to_run(name, device, dtype)
    if name == "tiny":
        from ..tiny import load_pipeline

        return load_pipeline("sd").to(device, getattr(torch, kind))
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(_place(name), dtype=getattr(torch, kind)).to(device)
    except OSError as e:
        raise _no_model(name, e) from e


def _place(name: str) -> str:
    return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name


def _no_model(name: str, error: OSError) -> OSError:
    return OSError(
        f"cannot load the model {name!r}: no such pipeline on the hub, or it cannot be reached ({type(error).__name__}); "
        'give a folder, a hub id, or "tiny"'
    )


# --- rewards ------------------------------------------------------------------------------------------------------------


def reward_options(given: Sequence[str], specs: Sequence[RewardSpec], option: str) -> dict[str, dict[str, str]]:
    """NAME[:PART]=WEIGHTS, as options of each reward. Raises ValueError, naming `option`."""
    found: dict[str, dict[str, str]] = {s.name: {} for s in specs}
    for name in found:
        takes(name)  # a misspelt one of the user's own says so now, not when everything is rendered
    for text in given:
        whole, equals, source = text.partition("=")
        name, _, part = whole.partition(":") if whole not in found else (whole, "", "")
        if not equals or not source.strip():
            raise ValueError(
                f"cannot read {option} {text!r}; write NAME=WEIGHTS, such as image-reward=ImageReward.pt, or NAME:PART=WEIGHTS"
            )
        check_name(name)
        if name not in found:
            raise ValueError(f"{option} {text!r} is for a reward that is not asked for; there are {', '.join(found)}")
        parts = [p for p in PARTS if p in takes(name)]
        if part and part not in parts:
            raise ValueError(f"{option} {text!r}: the reward {name} has no part {part!r}; it has {', '.join(parts) or 'none'}")
        if "model" not in takes(name) and not part:
            raise ValueError(f"{option} {text!r}: the reward {name} has no model")
        found[name][part or "model"] = source
    return found


def takes(name: str) -> frozenset[str]:
    """The options that a reward can be loaded with; none for one that is ready as it is."""
    found = load_object(NAMED[name][0] if name in NAMED else name, "reward")
    if name not in NAMED:
        return frozenset()
    parameters = frozenset(inspect.signature(found).parameters)
    return frozenset() if "images" in parameters else parameters


def load_named_reward(name: str, own: dict[str, Any], **common: Any) -> Any:
    """own: options that the user gave it. common: those of all rewards, of which it gets what it takes."""
    return load_reward(name, **{k: v for k, v in common.items() if k in takes(name)} | own)
