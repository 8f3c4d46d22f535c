"""A chat model that runs here, on transformers: any vision-language model of `AutoModelForImageTextToText`, and, for rewriters that
take text only, any of `AutoModelForCausalLM`.

Sampling is Gumbel-max inside a logits processor: argmax(log p + Gumbel noise) is a draw from p. So the noise comes from generators of
our own, one for each row; the global random state, on which the running diffusion may depend, is never touched, also not from
another thread.
"""

from __future__ import annotations

import inspect
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from . import NEED_SIGHT, Completion, Conversation, Sampling

QUANTIZATION = ("4bit", "8bit")
TICK = 0.1  # seconds between two polls of `on_token` while somebody else is answered
_WHERE: tuple[str, ...] = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only")


class TransformersChat:
    """model: loaded, in eval mode. processor: its processor, or its tokenizer where it takes text only.

    logprobs: record the log-probability of each token. batch_size: how many conversations at once at most; None: all.
    template_kwargs: passed to the chat template, for example {"enable_thinking": False}.
    """

    def __init__(
        self, model: Any, processor: Any, *, logprobs: bool = False, batch_size: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        _check_size(batch_size)
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees = getattr(processor, "image_processor", None) is not None
        self.logprobs, self.batch_size, self.template_kwargs = logprobs, batch_size, template_kwargs or {}
        self.on_token: Callable[[], None] | None = None
        self._lock = threading.Lock()  # one at a time, also where a late answer is still being written
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: Any = None, device: str | None = None, quantization: Any = None,
        adapter: str | Path | None = None, pictures: bool = False, logprobs: bool = False, batch_size: int | None = None,
        template_kwargs: dict[str, Any] | None = None, **options: Any,
    ) -> TransformersChat:  # fmt: skip
        """name: a hub id or a folder; a PEFT adapter's folder loads its base model too.

        dtype: a torch dtype or its name; default: as saved, float32 on a CPU. device: "cuda", "cpu", "auto" (accelerate spreads
        the model), ...; default: the best there is. quantization: "4bit" or "8bit" (bitsandbytes), or a quantization config.
        adapter: a PEFT folder or hub id. pictures: refuse a model that takes text only, before its weights are read. options: to the
        model's own `from_pretrained`. Code from the hub is never run unless `trust_remote_code=True`.

        Raises OSError for what is not there, ValueError for what cannot be used, ImportError saying what to install.
        """
        name, device = _known(name), device or _best_device()
        _check_size(batch_size)
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; use a torch dtype or its name, such as bfloat16, float16 or float32")
        if device != "auto" and quantization is None and "device_map" not in options:
            _check_device(device)
        if adapter is None and Path(name, "adapter_config.json").is_file():
            adapter, name = name, _base_of(name)
        where = {k: v for k, v in options.items() if k in _WHERE}
        sees, processor = _processor(name, where)
        if pictures and not sees:
            raise ValueError(f"pictures are to be shown, and the model {name!r} takes text only; {NEED_SIGHT}")
        if quantization is not None:
            options["quantization_config"] = _quantized(quantization)
        if device == "auto" or quantization is not None:
            options["device_map"] = device
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else "auto"
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        try:
            model = auto.from_pretrained(name, dtype=dtype, **options)
        except OSError as e:
            raise OSError(f"cannot load the weights of the model {name!r}: {_first_line(e)}") from e
        if adapter is not None:
            model = _with_adapter(model, _known(adapter), {k: v for k, v in where.items() if k != "trust_remote_code"})
            if Path(adapter, "generation_config.json").is_file():  # as it was trained, and not as its base came
                model.get_base_model().generation_config = GenerationConfig.from_pretrained(adapter)
        if "device_map" not in options:
            model = model.to(device)
        return cls(model.eval(), processor, logprobs=logprobs, batch_size=batch_size, template_kwargs=template_kwargs)

    def generate(self, conversations: Sequence[Conversation], sampling: Sampling) -> list[Completion]:
        """One batched `generate` for all conversations of one kind (as many pictures; text to be continued), padded on the left."""
        done: list[Completion | None] = [None] * len(conversations)
        kinds: dict[Any, list[int]] = {}
        for k, conversation in enumerate(conversations):
            kinds.setdefault(_kind(conversation), []).append(k)
        with self._alone():
            for rows in kinds.values():
                size = self.batch_size or len(rows)
                for part in (rows[i : i + size] for i in range(0, len(rows), size)):
                    answers = self._generate([conversations[k] for k in part], sampling, part)
                    for k, answer in zip(part, answers, strict=True):
                        done[k] = answer
        return [answer for answer in done if answer is not None]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for its turn; a stop gets through meanwhile."""
        while not self._lock.acquire(timeout=TICK):
            if self.on_token is not None:
                self.on_token()
        try:
            yield
        finally:
            self._lock.release()

    @torch.no_grad()
    def _generate(self, conversations: list[Conversation], sampling: Sampling, rows: Sequence[int]) -> list[Completion]:
        inputs = self._inputs(conversations)
        start = inputs["input_ids"].shape[1]
        room = self._context() - start
        if room < 1 and len(conversations) > 1:  # not all of them need be too long
            return [self._generate([c], sampling, [row])[0] for c, row in zip(conversations, rows, strict=True)]
        if room < 1:
            return [Completion(error=f"there is no room for an answer: {start} tokens, and {self!r} holds {self._context()}")]
        draw, ends = _Draw(sampling, rows), self._ends()
        greedy = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": sorted(ends) or None,
        }
        if sampling.num_beams > 1:
            greedy |= {"num_beams": sampling.num_beams, "length_penalty": sampling.length_penalty}
        else:
            greedy |= {"logits_processor": [draw], "num_beams": 1}
        budget = min(sampling.max_new_tokens, room)
        output = self.model.generate(
            **inputs, **greedy, max_new_tokens=budget, max_length=None, stopping_criteria=[_OnToken(self)]
        )
        found = []
        for k, ids in enumerate(output[:, start:].tolist()):
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            ids = ids[:length]
            if length == budget < sampling.max_new_tokens and ids[-1] not in ends and inputs["attention_mask"][k].sum() < start:
                found += self._generate([conversations[k]], sampling, [rows[k]])  # a longer one had taken its room
                continue
            if any(math.isnan(step[k]) for step in draw.logprobs[:length]):
                found.append(
                    Completion(error=f"{self!r} computes NaN in {self.model.dtype}; bfloat16 and float32 hold larger numbers")
                )
                continue
            logprobs = tuple(step[k] for step in draw.logprobs[:length]) if self.logprobs and sampling.num_beams == 1 else None
            text = self.tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True)
            found.append(Completion(text, tuple(ids), logprobs, length))
        return found

    def _inputs(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        """What the model is fed, on its device; pictures in its dtype."""
        moved = self._encoded(conversations).to(self.model.device)
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in moved.items()}

    def _encoded(self, conversations: list[Conversation]) -> Any:
        """As the tokenizer or processor gives it, padded on the left. Conversations of one kind only.

        Raises ValueError for messages where there is no chat template.
        """
        if isinstance(conversations[0], str):
            inputs = self.tokenizer([self._plain(str(c)) for c in conversations], return_tensors="pt", padding=True)
        else:
            if getattr(self.processor, "chat_template", None) is None:
                raise ValueError(
                    f"{self!r} has no chat template, so it can only continue a text; use a template with a section [continue], "
                    'such as "promptist"'
                )
            messages = [self._messages(c) for c in conversations if not isinstance(c, str)]
            try:
                inputs = self._templated(messages)
            except Exception as e:
                if type(e).__name__ != "TemplateError" or messages[0][0]["role"] != "system":
                    raise
                inputs = self._templated([_without_system(m) for m in messages])  # some templates know no system message
        if not self.sees:
            inputs.pop("token_type_ids", None)
        return inputs

    def _templated(self, messages: list[list[dict[str, Any]]]) -> Any:
        apply = self.processor.apply_chat_template
        padding: dict[str, Any] = {"padding": True}
        if "processor_kwargs" in inspect.signature(apply).parameters:  # transformers 5, processors only
            padding = {"processor_kwargs": padding}
        return apply(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padding,
            **self.template_kwargs,
        )

    def _messages(self, conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the model's own special tokens taken out of what users and models wrote; as plain text where it takes text only."""
        messages = []
        for message in conversation:
            parts = [p if p["type"] == "image" else p | {"text": self._plain(p["text"])} for p in message["content"]]
            content = parts if self.sees else "\n".join(p["text"] for p in parts)
            messages.append({"role": message["role"], "content": content})
        return messages

    def _plain(self, text: str) -> str:
        special = {str(t) for t in self.tokenizer.all_special_tokens}
        special |= {str(t) for t in (getattr(self.processor, n, None) for n in ("image_token", "video_token")) if t}
        special |= {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        text, found = text.encode("utf-8", "replace").decode(), True  # halves of characters are nothing that a tokenizer takes
        while found:  # what is left must not form another one
            found = False
            for token in special:
                if token.strip() and token in text:
                    text, found = text.replace(token, " "), True
        return text

    def _context(self) -> int:
        """How many tokens the model has positions for; one more may end the process on a GPU."""
        text = self.model.config.get_text_config() if hasattr(self.model.config, "get_text_config") else self.model.config
        return getattr(text, "max_position_embeddings", None) or 2**31

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}

    def __repr__(self) -> str:
        return f"{type(self.model).__name__} {getattr(self.model.config, '_name_or_path', '')}".rstrip()


class _Draw(LogitsProcessor):
    """Draws each token itself, greedily or by Gumbel-max, and leaves no other choice; keeps the log-probability of what it drew."""

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(sampling.seed_of(row) % 2**63) for row in rows]
        self.logprobs: list[list[float]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = scores.float()
        if self.sampling.temperature > 0:
            logp = self._nucleus(logp / self.sampling.temperature).log_softmax(-1)
            uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
            gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
            token = (logp + gumbel.to(logp)).argmax(-1, keepdim=True)
        else:
            logp = logp.log_softmax(-1)
            token = logp.argmax(-1, keepdim=True)
        self.logprobs.append(logp.gather(-1, token).squeeze(-1).tolist())
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)

    def _nucleus(self, logits: Tensor) -> Tensor:
        if self.sampling.top_p >= 1:
            return logits
        ordered, index = logits.sort(-1, descending=True)
        share = ordered.softmax(-1)
        ordered = ordered.masked_fill(share.cumsum(-1) - share >= self.sampling.top_p, -torch.inf)  # the first one always stays
        return torch.empty_like(logits).scatter_(-1, index, ordered)


class _OnToken(StoppingCriteria):
    """Lets whoever wants to stop have a say after each token."""

    def __init__(self, chat: TransformersChat) -> None:
        self.chat = chat

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.chat.on_token is not None:
            self.chat.on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _kind(conversation: Conversation) -> Any:
    if isinstance(conversation, str):
        return "text"
    return sum(part["type"] == "image" for message in conversation for part in message["content"])


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system, first, *rest = messages
    parts = [
        m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}] for m in (system, first)
    ]
    content: Any = parts[0] + parts[1]
    if isinstance(first["content"], str):
        content = "\n\n".join(p["text"] for p in content)
    return [{"role": first["role"], "content": content}, *rest]


# --- loading ------------------------------------------------------------------------------------------------------------


def _known(name: str | Path) -> str:
    text = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    looks_like_a_folder = text.startswith((".", "/")) or text.count("/") > 1
    if looks_like_a_folder and not Path(text).is_dir():
        raise FileNotFoundError(
            f"there is no model at {text}: expected a folder with config.json, or a hub id such as owner/name"
        )
    return text


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch's own, for what it does not know and for what is not there
        raise ValueError(
            f'device is {device!r}; use "auto", or one that is there, as {_best_device()!r} ({_first_line(e)})'
        ) from e


def _check_size(batch_size: int | None) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; use a whole number, 1 or more, or None for all at once")


def _base_of(adapter: str) -> str:
    base = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {adapter} does not name its base model; give the model, and adapter={adapter!r}")
    return _known(base)


def _processor(name: str, where: dict[str, Any]) -> tuple[bool, Any]:
    """(whether the model takes pictures, its processor or tokenizer)"""
    try:
        config = AutoConfig.from_pretrained(name, **where)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return sees, (AutoProcessor if sees else AutoTokenizer).from_pretrained(name, **where)
    except OSError as e:
        raise OSError(
            f"cannot load the model {name!r}: no such model in a folder or on the hub, or no way to reach it ({_first_line(e)})"
        ) from e
    except ValueError as e:  # no config.json, or one of a model that this transformers does not know
        raise ValueError(f"cannot load the model {name!r}: {_first_line(e)}") from e
    except (ImportError, AttributeError) as e:  # a processor with a video part, without torchvision: AttributeError
        raise ImportError(
            f'the processor of {name!r} needs packages that are not there: pip install "promptloop[vlm]", with a torchvision that '
            f"matches your torch ({_first_line(e)})"
        ) from e


def _quantized(quantization: Any) -> Any:
    if not isinstance(quantization, str):
        return quantization
    if quantization not in QUANTIZATION:
        raise ValueError(f"quantization is {quantization!r}; use {' or '.join(QUANTIZATION)}, or a quantization config")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _with_adapter(model: Any, adapter: str, where: dict[str, Any]) -> Any:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise ImportError('an adapter needs peft: pip install "promptloop[adapters]"') from e
    try:
        return PeftModel.from_pretrained(model, adapter, **where)
    except (OSError, ValueError) as e:
        raise OSError(f"cannot load the adapter {adapter!r}: expected a PEFT folder or hub id ({_first_line(e)})") from e


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
