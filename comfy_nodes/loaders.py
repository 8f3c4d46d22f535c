"""Refiners that are language models: in a folder of this machine, embedded, or behind an endpoint. Nothing is ever downloaded."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from promptloop_pipeline import MLLMRefiner
from promptloop_pipeline.chat import Sampling
from promptloop_pipeline.refiners.template import Template, load_template
from promptloop_pipeline.tiny import REFINERS, TEMPLATE, WEIGHTS, quiet

from .memory import AFTERWARDS, ManagedRefiner, Weights, best_dtype, forget_on_free, shared
from .presets import load_preset, preset_names, preset_stamp
from .types import REFINER, problem

EMBEDDED = {f"embedded: {name}": WEIGHTS / folder for name, folder in REFINERS.items()}
AUTO, NONE = "auto", "none"
DTYPES = (AUTO, "bfloat16", "float16", "float32")
SHARE = {"8bit": 0.6, "4bit": 0.4}  # of the files' size, roughly, that the quantized weights take
ENV = re.compile(r"PROMPTLOOP_[A-Z0-9_]+")
CHECK = 10.0  # seconds for a server to name its models


# --- folders ------------------------------------------------------------------------------------------------------------


def roots() -> list[Path]:
    """All folders for language models: models/LLM, and those that the user has named in extra_model_paths.yaml."""
    import folder_paths

    folder_paths.add_model_folder_path("LLM", os.path.join(folder_paths.models_dir, "LLM"))
    return [Path(p) for p in folder_paths.get_folder_paths("LLM")]


def folders(mark: str) -> dict[str, Path]:
    """Every folder, one or two levels deep, with a file `mark` in it, by its name as in "owner/name". The first of a name counts."""
    found: dict[str, Path] = {}
    for root in roots():
        for file in sorted([*root.glob(f"*/{mark}"), *root.glob(f"*/*/{mark}")]):
            found.setdefault(file.parent.relative_to(root).as_posix(), file.parent)
    return found


def find(name: str, mark: str) -> Path:
    """Raises ValueError naming the folders that were searched."""
    known = (EMBEDDED if mark == "config.json" else {}) | folders(mark)
    if name not in known:
        what = "model" if mark == "config.json" else "adapter"
        raise ValueError(
            f"the {what} {name!r} is in none of {', '.join(map(str, roots()))}: put its folder (with {mark}) there, as in "
            f"{roots()[0] / 'owner' / 'name'}, or choose one of: {', '.join(known) or 'none yet'}"
        )
    return known[name]


def _stamp(*parts: Path | None) -> int:
    """Another one for weights that were written anew: the newest change, in nanoseconds."""
    return max(file.stat().st_mtime_ns for folder in parts if folder for file in folder.iterdir())


def _template(name: str, model: Path, adapter: Path | None) -> Template:
    """`auto`: the one that the adapter or the model was trained with, which lies beside its weights; else "repair"."""
    if name != AUTO:
        return load_preset(name)
    own = [folder / "template.txt" for folder in (adapter, model) if folder] + [TEMPLATE] * (model in EMBEDDED.values())
    return load_template(next((file for file in own if file.is_file()), "repair"))


def _check(model: Path, adapter: Path | None, template: Template, quantization: str) -> None:
    """What can be known before the weights are read. Raises ValueError, or ImportError saying what to install."""
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    except ImportError as e:
        raise ImportError(f'Load Refiner needs transformers: pip install "transformers>=4.56" ({e})') from e
    for package, why in (("peft", adapter), ("bitsandbytes", quantization != NONE)):
        if why and not _installed(package):
            raise ImportError(f"{'an adapter' if package == 'peft' else quantization} needs {package}: pip install {package}")
    if not any(model.glob("*.safetensors")) and not any(model.glob("*.bin")):
        raise ValueError(f"the model in {model} has no weights (*.safetensors): its download is not complete")
    try:
        sees = type(AutoConfig.from_pretrained(model, local_files_only=True)) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    except (ValueError, OSError) as e:
        raise ValueError(f"the model in {model} cannot be read by this transformers: {str(e).partition(chr(10))[0]}") from e
    if template.shows and not sees:
        texts = ", ".join(n for n in preset_names(False) if n != template.name)
        raise ValueError(
            f"the template {template.name!r} shows pictures, and the model in {model} takes text only: choose a vision-language model, "
            f"or a template for text: {texts}"
        )


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _sampling(template: Template, max_new_tokens: int, temperature: float, seed: int) -> dict[str, Any]:
    """The widgets that say something. Raises ValueError for what the template does not go with."""
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    given = {k: v for k, v in given.items() if v or k == "seed"}
    Sampling(**(template.sampling | given))
    return given


def _read(folder: Path, dtype: Any, adapter: Path | None, quantization: str, device: Any) -> Any:
    import torch

    from promptloop_pipeline.chat.local import TransformersChat

    options: dict[str, Any] = {} if quantization == NONE else {"quantization": quantization}
    if adapter is not None:
        options["adapter"] = str(adapter)
    drawn_on = [device] if torch.device(device).type == "cuda" else []
    with quiet(), torch.random.fork_rng(drawn_on):  # libraries fill weights with noise first; the run at hand must not see it
        return TransformersChat.from_pretrained(str(folder), dtype=dtype, device=str(device), local_files_only=True, **options)


def _weights(name: str, folder: Path, dtype: Any, adapter: Path | None, quantization: str) -> Weights:
    files = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
    size = 0 if quantization == NONE else int(files * SHARE[quantization])
    return Weights(name, functools.partial(_read, folder, dtype, adapter, quantization), size)


# --- nodes --------------------------------------------------------------------------------------------------------------

TOKENS = "The longest answer, in tokens; 0: as the template says, or 512."
TEMPERATURE = "How freely words are drawn; 0: always the likeliest, or as the template says."
SEED = "Another number, another draw. Matters only where temperature is above 0."


def _answer_inputs() -> list[Any]:
    return [
        io.Int.Input("max_new_tokens", default=0, min=0, max=8192, tooltip=TOKENS),
        io.Float.Input("temperature", default=0.0, min=0.0, max=2.0, step=0.05, tooltip=TEMPERATURE),
        io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip=SEED),
    ]


class PromptLoopLoadRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models, adapters = [*EMBEDDED, *folders("config.json")], [NONE, *folders("adapter_config.json")]
        return io.Schema(
            node_id="PromptLoopLoadRefiner",
            display_name="Load Refiner",
            category="PromptLoop/loaders",
            description="A language model that looks at the running picture and rewrites its prompt. Models are folders in "
            "models/LLM, or in what extra_model_paths.yaml names for LLM; nothing is downloaded. A model is read when it is first "
            "asked, and ComfyUI moves it on and off the device as it does its own.",
            inputs=[
                io.Combo.Input(
                    "model", options=models, default=models[0], tooltip="The embedded ones are for Load Embedded Pipeline only."
                ),
                io.Combo.Input(
                    "template",
                    options=[AUTO, *preset_names()],
                    default=AUTO,
                    tooltip="What the model is told. auto: what it was trained with, else repair, which changes only what is "
                    "missing or wrong. Text files of your own in user/promptloop/templates are listed too.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=adapters,
                    default=NONE,
                    tooltip="A PEFT folder (LoRA) for the model; it lies where models lie.",
                ),
                io.Combo.Input("dtype", options=list(DTYPES), default=AUTO, tooltip="auto: what the device computes well."),
                io.Combo.Input(
                    "quantization", options=[NONE, *SHARE], default=NONE, tooltip="Smaller in memory; needs bitsandbytes."
                ),
                io.Combo.Input(
                    "memory",
                    options=list(AFTERWARDS),
                    default=AFTERWARDS[0],
                    tooltip="After each answer. offload: into the computer's memory, so that the diffusion model has the room. "
                    "keep: where it is, until ComfyUI needs the room. unload: out of memory, read anew each time.",
                ),
                *_answer_inputs(),
            ],
            outputs=[REFINER.Output(display_name="refiner", tooltip="For the loop, Rewrite Prompt, Guard Refiner and Ask Me.")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return problem(model, lambda: find(str(model), "config.json"))

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, adapter: str = NONE, template: str = AUTO, **_: Any) -> Any:
        if model is None:  # linked
            return 0
        lora = find(adapter, "adapter_config.json") if adapter != NONE else None
        return [_stamp(find(model, "config.json"), lora), preset_stamp(template)]

    @classmethod
    def execute(
        cls, model: str, template: str, adapter: str, dtype: str, quantization: str, memory: str,
        max_new_tokens: int, temperature: float, seed: int,
    ) -> io.NodeOutput:  # fmt: skip
        folder = find(model, "config.json")
        lora = find(adapter, "adapter_config.json") if adapter != NONE else None
        told = _template(template, folder, lora)
        _check(folder, lora, told, quantization)
        sampling = _sampling(told, max_new_tokens, temperature, seed)
        import torch

        kind = getattr(torch, dtype) if dtype != AUTO else torch.float32 if model in EMBEDDED else best_dtype()
        key = (folder, kind, lora, quantization, _stamp(folder, lora))
        weights = shared(key, lambda: _weights(model, folder, kind, lora, quantization), memory)
        return io.NodeOutput(ManagedRefiner(weights, told, memory, **sampling))


class PromptLoopEndpointRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        presets = preset_names()
        return io.Schema(
            node_id="PromptLoopEndpointRefiner",
            display_name="Refiner at an Endpoint",
            category="PromptLoop/loaders",
            description="A language model behind an OpenAI-style server (Ollama, LM Studio, vLLM, llama.cpp, or a service) as refiner. "
            "Previews are sent to that server.",
            inputs=[
                io.String.Input("url", default="http://localhost:11434/v1", tooltip="The server's address. Never a key."),
                io.String.Input("model", default="", tooltip="The model's name on the server; empty: the first that it names."),
                io.Combo.Input("template", options=presets, default="repair", tooltip="What the model is told."),
                io.String.Input(
                    "key_env",
                    default="PROMPTLOOP_API_KEY",
                    tooltip="The name of the environment variable with the key, where one is wanted: PROMPTLOOP_... Never the key.",
                ),
                io.Float.Input("timeout", default=60.0, min=1.0, max=3600.0, step=1.0, tooltip="Seconds for one answer."),
                io.Boolean.Input("sees", default=True, tooltip="Whether the model takes pictures."),
                io.Boolean.Input("check_first", default=True, tooltip="Ask the server for its models before sampling starts."),
                *_answer_inputs(),
            ],
            outputs=[REFINER.Output(display_name="refiner", tooltip="For the loop, Rewrite Prompt, Guard Refiner and Ask Me.")],
        )

    @classmethod
    def validate_inputs(cls, url: str | None = None) -> bool | str:
        from promptloop_pipeline.chat.endpoint import EndpointChat

        return problem(url, lambda: EndpointChat(str(url)))

    @classmethod
    def fingerprint_inputs(cls, template: str = "", **_: Any) -> Any:
        return preset_stamp(template)

    @classmethod
    def execute(
        cls, url: str, model: str, template: str, key_env: str, timeout: float, sees: bool, check_first: bool,
        max_new_tokens: int, temperature: float, seed: int,
    ) -> io.NodeOutput:  # fmt: skip
        from promptloop_pipeline.chat.endpoint import EndpointChat

        told = load_preset(template)
        key_env = _variable(key_env.strip())
        sampling = _sampling(told, max_new_tokens, temperature, seed)
        options = {"key_env": key_env, "timeout": timeout, "sees": sees}
        refiner = MLLMRefiner.from_endpoint(url, model.strip() or None, told, **options, **sampling)
        if check_first:
            _ask_for_models(EndpointChat(url, key_env=key_env, timeout=min(timeout, CHECK), retries=0))
        return io.NodeOutput(refiner)


def _variable(name: str) -> str:
    """A workflow comes from anybody: it may name a key that was put aside for refiners, and no other variable. A key that was put here
    by mistake is not repeated. Raises ValueError."""
    if name and not ENV.fullmatch(name):
        raise ValueError(
            "key_env takes the name of an environment variable that begins with PROMPTLOOP_, such as PROMPTLOOP_API_KEY, never the "
            "key itself: put the key into that variable before ComfyUI starts"
        )
    if name not in ("", "PROMPTLOOP_API_KEY") and name not in os.environ:
        raise ValueError(f"there is no environment variable {name}: set it before ComfyUI starts, or leave key_env as it was")
    return name or "PROMPTLOOP_API_KEY"


def _ask_for_models(chat: Any) -> None:
    """Raises ValueError with one line for a server that is not there, or refuses the key."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    chat.on_token = throw_exception_if_processing_interrupted
    if why := chat.trouble():
        raise ValueError(f"the refiner's server cannot be asked: {why}")


forget_on_free()
NODES = [PromptLoopLoadRefiner, PromptLoopEndpointRefiner]
