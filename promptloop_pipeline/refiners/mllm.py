"""The refiner that is a language model: a template says what it is asked, a chat model answers, parsing takes the prompt out.

A vision-language model in the loop (PromptLoop), a single-shot rewriter (RePrompt, PromptEnhancer, Promptist) and an edit-instruction
rewriter (PromptRL) are this one class with different templates; local weights or a server are different chat models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat import NEED_SIGHT, OPTIONS, ChatModel, Completion, Conversation, Sampling, Talks
from ..refiner import Refinement, View
from .parsing import parse_answer
from .template import Template, load_template

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 448 * 448
_SAMPLING = frozenset(OPTIONS)


class MLLMRefiner(Talks):
    """chat: the model, local (`TransformersChat`) or behind an endpoint (`EndpointChat`); see `from_pretrained`, `from_endpoint`.

    template: the name of one of `refiners/templates/`, or the path of one's own. The default, "repair", is for models that were not
        trained for this: they change only what is missing or wrong (an untrained model that rewrites freely makes images worse,
        arXiv 2510.00430). "rewrite" is for trained ones.
    max_pixels: a larger picture is scaled down to this many, width times height, before the model sees it.
    sampling: fields of `chat.Sampling`: max_new_tokens, temperature, top_p, num_beams, length_penalty, seed. Greedy by default. The
        random state of the run is never touched; two calls at the same step with the same seed sample the same.

    Raises FileNotFoundError or ValueError for a template that cannot be used, TypeError for an unknown option.
    """

    def __init__(
        self, chat: ChatModel, template: str | Path | Template = "repair", *, max_pixels: int = MAX_PIXELS, **sampling: Any
    ) -> None:
        if not hasattr(chat, "generate") or not hasattr(chat, "sees"):
            what = repr(chat) if isinstance(chat, (str, Path)) else type(chat).__name__
            raise TypeError(
                f"chat is {what}, no ChatModel; for a name or a folder use MLLMRefiner.from_pretrained, for an address "
                "MLLMRefiner.from_endpoint, for a loaded model TransformersChat(model, processor)"
            )
        self.chat, self.template, self.max_pixels = chat, load_template(template), max_pixels
        self.sampling = _checked(self.template, max_pixels, **sampling)
        if self.template.shows and not chat.sees:
            raise ValueError(f"the template {self.template.name!r} shows pictures, and {chat!r} takes text only; {NEED_SIGHT}")

    @classmethod
    def from_pretrained(cls, model: str | Path, template: str | Path | Template = "repair", **options: Any) -> MLLMRefiner:
        """A hub id or a folder, of a vision-language model or (with a template for text) a language model.

        options: those of this class, of `TransformersChat.from_pretrained` (dtype, device, quantization, adapter, ...), or of the
        model's own `from_pretrained`.
        """
        from ..chat.local import TransformersChat

        template = load_template(template)  # a mistake shows before the weights are read
        own, rest = _split(options)
        _checked(template, **own)
        return cls(TransformersChat.from_pretrained(model, pictures=template.shows, **rest), template, **own)

    @classmethod
    def from_endpoint(
        cls, url: str, model: str | None = None, template: str | Path | Template = "repair", **options: Any
    ) -> MLLMRefiner:
        """Any OpenAI-style server: vLLM, Ollama, LM Studio, llama.cpp. options: those of this class or of `EndpointChat`."""
        from ..chat.endpoint import EndpointChat

        own, rest = _split(options)
        own = {"num_beams": 1} | own  # servers have no beam search
        if own["num_beams"] != 1:
            raise ValueError(f"num_beams is {own['num_beams']!r}; a server has no beam search, use num_beams=1")
        return cls(EndpointChat(url, model, **rest), load_template(template), **own)

    @property
    def looks(self) -> bool:
        return self.template.looks

    def refine(self, views: Sequence[View], seeds: Sequence[int] | None = None) -> list[Refinement]:
        """seeds: of the noise of each answer, one for each view, where it is not to depend on the rest of the batch."""
        asked = [self.conversation(v) for v in views]
        conversations = [c for c in asked if c is not None]
        step = views[0].step if views else 0
        sampling = replace(self.sampling, seed=self.sampling.seed * 1009 + step)  # turns of a run draw noise of their own
        if seeds is not None:
            sampling = replace(sampling, seeds=tuple(s for s, c in zip(seeds, asked, strict=True) if c is not None))
        said = self.chat.generate(conversations, sampling) if conversations else []
        if len(said) != len(conversations):
            raise ValueError(f"{self.chat!r} gave {len(said)} completions for {len(conversations)} conversations")
        answers = iter(said)
        missing = "a picture to start from" if "{source}" in str(self.template.sections) else "a preview"
        unasked = Refinement(notes=(f"not asked: the template {self.template.name!r} needs {missing}, and there is none",))
        return [unasked if c is None else self._read(next(answers)) for c in asked]

    def conversation(self, view: View) -> Conversation | None:
        """What the model is asked about a view; None when there is nothing to ask."""
        return self.template.conversation(view, self._sized(view.image), self._sized(view.source))

    def _read(self, said: Completion) -> Refinement:
        found: dict[str, Any] = {
            "raw": said.text,
            "token_ids": said.token_ids,
            "logprobs": said.logprobs,
            "tokens": said.tokens,
        }
        if said.error:
            return Refinement(error=said.error, format_ok=False, **found)
        parsed = parse_answer(said.text, self.template.tags)
        return Refinement(parsed.prompt, parsed.reasoning, error=parsed.error, format_ok=parsed.format_ok, **found)

    def _sized(self, image: Image | None) -> Image | None:
        if image is None:
            return None
        image = image.convert("RGB")
        share = (self.max_pixels / (image.width * image.height)) ** 0.5
        if share >= 1:
            return image
        width, height = int(image.width * share), int(image.height * share)  # one may be 0
        return image.resize((min(max(width, 1), self.max_pixels), min(max(height, 1), self.max_pixels)))

    def __repr__(self) -> str:
        return f"MLLMRefiner({self.chat!r}, template={self.template.name!r})"


def _checked(template: Template, max_pixels: int = MAX_PIXELS, **sampling: Any) -> Sampling:
    if unknown := set(sampling) - _SAMPLING:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; use max_pixels, {', '.join(sorted(_SAMPLING))}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}; use 1 or more, for example {MAX_PIXELS}")
    return Sampling(**(template.sampling | sampling))


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {k: v for k, v in options.items() if k in _SAMPLING or k == "max_pixels"}
    return own, {k: v for k, v in options.items() if k not in own}
