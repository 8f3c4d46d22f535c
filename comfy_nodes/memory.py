"""Language models inside ComfyUI's memory manager, which then sees them, evicts them for others and unloads them as its own.

A model is on the device while it is asked, and gone from there when the answer is back (unless it is to be kept), so that the diffusion
model, which the loop brings back next, finds the room.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from promptloop_pipeline import MLLMRefiner, Refinement, View
from promptloop_pipeline.chat import Sampling
from promptloop_pipeline.refiners.template import Template

AFTERWARDS = ("offload", "keep", "unload")
PROMPT_TOKENS = 2048  # of a question, pictures included: for the estimate of what an answer takes beside the weights


class Weights:
    """One language model: read when it is first asked, then moved by ComfyUI.

    name: for messages. read(device) -> TransformersChat with its model there. size: in bytes, of weights that cannot be moved
    between devices (4 and 8 bit): they are read onto the device, and given up where others would be offloaded; 0 for all others.
    """

    def __init__(self, name: str, read: Callable[[Any], Any], size: int = 0) -> None:
        self.name, self.read, self.size = name, read, size
        self.patcher: Any = None
        self._lock = threading.Lock()

    def ask(self, question: Callable[[Any], Any], afterwards: str, tokens: int) -> Any:
        """question(chat model), with the weights on their device; it is not to hold on to them. tokens: of all conversations at once,
        for the estimate of memory.

        Raises what reading and the question raise, and the device's own error where it is too small.
        """
        import comfy.model_management as mm

        with self._lock:
            try:
                return question(self._loaded(mm, tokens))
            except Exception as e:
                traceback.clear_frames(e.__traceback__)  # or what the computation had on the device stays there with the error
                raise
            finally:
                if afterwards != "keep":
                    self.release()
                if afterwards == "unload":
                    self.patcher = None
                    gc.collect()
                    mm.soft_empty_cache()

    def _loaded(self, mm: Any, tokens: int) -> Any:
        device, rest = _devices(mm)
        if self.patcher is None and self.size:
            self.patcher = _classes()["given up"](_holder(read=self.read), device, rest, size=self.size)
        elif self.patcher is None:
            self.patcher = whole_patcher(_holder(self.read(rest)), device, rest)
        holder = self.patcher.model
        room = tokens * _bytes_a_token(holder.chat.model) if holder.chat is not None else 0
        mm.load_models_gpu([self.patcher], memory_required=room, force_full_load=True)
        return holder.chat

    def release(self) -> None:
        """Takes the model off its device, as ComfyUI itself does it."""
        import comfy.model_management as mm

        loaded = mm.current_loaded_models
        for k in reversed([k for k, entry in enumerate(loaded) if entry.model is not None and entry.model is self.patcher]):
            loaded.pop(k).model_unload()
        mm.soft_empty_cache()


class ManagedRefiner:
    """A language model as a refiner, whose weights live in ComfyUI's memory manager.

    afterwards: what becomes of them after each answer. "offload": they wait in memory beside the device; "keep": they stay until
    ComfyUI needs the room; "unload": they are read anew next time. sampling: options of `MLLMRefiner`.
    """

    managed = True  # it has its turn with the diffusion model: nothing can be sampled meanwhile

    def __init__(self, weights: Weights, template: Template, afterwards: str = "offload", **sampling: Any) -> None:
        if afterwards not in AFTERWARDS:
            raise ValueError(f"memory is {afterwards!r}; use one of {', '.join(AFTERWARDS)}")
        self.weights, self.template, self.afterwards, self.sampling = weights, template, afterwards, sampling
        self.on_token: Callable[[], None] | None = None

    @property
    def looks(self) -> bool:
        return self.template.looks

    def refine(self, views: Sequence[View], seeds: Sequence[int] | None = None) -> list[Refinement]:
        """A cancelled run stops before the weights are read and after each token, also where no host has set `on_token`.

        Raises MemoryError where the device is too small, else what reading and generating raise.
        """
        import comfy.model_management as mm

        on_token = self.on_token or mm.throw_exception_if_processing_interrupted
        on_token()
        if all(self.template.conversation(v, v.image, v.source) is None for v in views):  # nothing to ask: nothing to load
            return MLLMRefiner(SimpleNamespace(generate=None, sees=True), self.template).refine(views)
        said = Sampling(**(self.template.sampling | self.sampling))
        tokens = len(views) * said.num_beams * (said.max_new_tokens + PROMPT_TOKENS)

        def question(chat: Any) -> list[Refinement]:
            chat.on_token = on_token
            try:
                on_token()
                return MLLMRefiner(chat, self.template, **self.sampling).refine(views, seeds)
            finally:
                chat.on_token = None

        try:
            return self.weights.ask(question, self.afterwards, tokens)
        except mm.OOM_EXCEPTION as e:
            failed = str(e).partition("\n")[0][:200]
        raise MemoryError(  # out here, where the device's error is gone
            f"the refiner's model does not fit: use quantization 4bit, a smaller model or a smaller batch ({failed})"
        )

    def get_ram_usage(self) -> int:
        """In bytes: ComfyUI's cache asks, where it is told to mind the memory."""
        return self.weights.patcher.model_size() if self.weights.patcher is not None else 0

    def __repr__(self) -> str:
        return f"{self.weights.name} (template {self.template.name}, {self.afterwards})"


# --- weights that several nodes, or the next run, ask for ---------------------------------------------------------------

_shared: weakref.WeakValueDictionary[Any, Weights] = weakref.WeakValueDictionary()
_last: list[Weights] = []  # so that another template or seed, which makes a node anew, does not read them from disk again


def shared(key: Any, make: Callable[[], Weights], afterwards: str) -> Weights:
    """The weights under `key`. The last ones stay in memory until others are asked for, or ComfyUI is told to free its memory; with
    --cache-ram its cache alone decides."""
    from comfy.cli_args import args

    weights = _shared.get(key)
    if weights is None:
        _last.clear()  # before the next ones come
        weights = _shared[key] = make()
    _last[:] = [] if afterwards == "unload" or getattr(args, "cache_ram", False) else [weights]
    return weights


def forget_on_free() -> None:
    """Has "/free", which the buttons "Unload Models" and "Free model and node cache" call, let go of what `shared` holds."""
    server = sys.modules.get("server")  # nobody presses a button where ComfyUI's modules are used without its server

    async def watch(request: Any, response: Any) -> None:
        if request.method == "POST" and request.path.endswith("/free"):
            _last.clear()

    if (instance := getattr(getattr(server, "PromptServer", None), "instance", None)) is not None:
        instance.app.on_response_prepare.append(watch)


# --- ComfyUI's side -----------------------------------------------------------------------------------------------------


@functools.cache
def _classes() -> dict[str, Any]:
    from comfy.model_patcher import ModelPatcher

    class Whole(ModelPatcher):
        """For models that ComfyUI did not build: their layers cannot compute on one device with weights on another, so that they are
        loaded whole and unloaded whole, also with --lowvram and --novram."""

        def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):  # type: ignore[no-untyped-def]
            return super().load(device_to, 0, force_patch_weights, True, **kwargs)

        def partially_unload(self, device_to, memory_to_free=0, **kwargs):  # type: ignore[no-untyped-def]
            return 0  # the caller then unloads all of it

    class GivenUp(Whole):
        """For weights that cannot be moved: loading reads them, unloading drops them."""

        def load(self, device_to=None, *args, **kwargs):  # type: ignore[no-untyped-def]
            if self.model.chat is None:
                self.model.chat = self.model.read(device_to)
            self.model.device, self.model.model_loaded_weight_memory = device_to, self.size
            self.model.current_weight_patches_uuid = self.patches_uuid

        def unpatch_model(self, device_to=None, unpatch_weights=True):  # type: ignore[no-untyped-def]
            if unpatch_weights:
                self.model.chat = None
                self.model.device, self.model.model_loaded_weight_memory = self.offload_device, 0
                self.model.current_weight_patches_uuid = None
                gc.collect()

    return {"whole": Whole, "given up": GivenUp}


def whole_patcher(model: Any, load_device: Any, offload_device: Any) -> Any:
    """A `ModelPatcher` for a module of another library. model: an nn.Module with an attribute `device` that can be set, or none."""
    return _classes()["whole"](model, load_device=load_device, offload_device=offload_device)


def _holder(chat: Any = None, read: Any = None) -> Any:
    """An nn.Module around a chat model's, whose own `device` cannot be set."""
    import torch

    class LanguageModel(torch.nn.Module):  # its name stands in ComfyUI's log
        pass

    holder = LanguageModel()
    holder.chat, holder.read = chat, read
    if chat is not None:
        holder.weights = chat.model
    return holder


def _devices(mm: Any) -> tuple[Any, Any]:
    """(where to compute, where to wait). --novram means that nothing whole is to lie on the device."""
    rest = mm.text_encoder_offload_device()
    return (rest if mm.vram_state == mm.VRAMState.NO_VRAM else mm.get_torch_device()), rest


def best_dtype() -> Any:
    """What the device computes well: bfloat16 where it can, else float16, float32 on a CPU."""
    import comfy.model_management as mm
    import torch

    device = _devices(mm)[0]
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32


def _bytes_a_token(model: Any) -> int:
    """What the attention of all layers keeps of one token, by the usual names in a config; 0 where they are others."""
    config = model.config.get_text_config()
    layers, heads, width = (getattr(config, n, None) or 0 for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    width = getattr(config, "head_dim", None) or width // max(heads, 1)
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width * model.dtype.itemsize
