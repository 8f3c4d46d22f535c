"""Rewards judged by a chat model that sees: vlm-judge, unified-reward, edit-reward; key-points and win rates: see key_points.py.

`model` is a folder or hub id of a vision-language model, the http(s) address of an OpenAI-style server, or a `ChatModel` that is
there already, such as a refiner's. What it is asked stands in templates/*.txt, or in a file of one's own; the questions of a call go
to it together. Decoding is greedy by default, and an answer that cannot be read is not asked for again, since a greedy model repeats
itself. Whatever fails is None with {"error": why} in the details and one warning a call, and never a score.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat import ChatModel, Completion, Message, Sampling, Talks
from ..chat.text import clean, split_reasoning
from ..reward import Judgement
from .images import as_rgb
from .simple import needed

if TYPE_CHECKING:
    from PIL.Image import Image

    from .key_points import KeyPoints

logger = logging.getLogger("promptloop")
FOLDER = Path(__file__).parent / "templates"
MAX_PIXELS = 800 * 800  # a little more than what goes to a server as PNG, which takes a hundred times as long to write as JPEG
AT_ONCE = 64  # questions in one `generate`, which for a server holds all of their pictures, written out
UNIFIED_REWARD = {"1": "CodeGoat24/UnifiedReward-qwen-7b", "2": "CodeGoat24/UnifiedReward-2.0-qwen-7b"}
_PICTURES = ("image", "source", "first", "second")  # places of a template that are pictures; the others are text
_PLACE = re.compile(r"\{(\w+)\}")
Read = Callable[[str], tuple[float | None, dict[str, Any]]]


# --- asking -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """What a model is told: a text file whose first line is `Source: ...`, with {places} for texts and pictures."""

    source: str
    text: str

    def conversation(self, **values: Any) -> list[Message]:
        """One user message. Texts come from users and models: the tags that the template itself uses lose their bracket in them, so
        that nobody closes a block, or leads the model to quote an answer that is none."""
        tags = "|".join({*re.findall(r"</?(\w+)>", self.text), "think"})
        content: list[dict[str, Any]] = [{"type": "text", "text": ""}]
        for k, part in enumerate(_PLACE.split(self.text)):
            if k % 2 and part in _PICTURES:
                content += [{"type": "image", "image": values[part]}, {"type": "text", "text": ""}]
            else:
                tag = rf"<(?=\s{{0,9}}/?\s{{0,9}}(?:{tags})\b)"
                content[-1]["text"] += re.sub(tag, "\u2039", clean(values[part]), flags=re.I) if k % 2 else part
        parts = [p if p["type"] == "image" else p | {"text": p["text"].strip("\n")} for p in content]
        return [{"role": "user", "content": [p for p in parts if p.get("text") != ""]}]


def load_template(template: str | Path, places: str) -> Template:
    """By name, one of `templates/`, or by path. places: what it has to hold, such as "image request".

    Raises FileNotFoundError naming what there is, ValueError naming the file and what is wrong with it.
    """
    path = FOLDER / f"{template}.txt" if (FOLDER / f"{template}.txt").is_file() else Path(template).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(f.stem for f in FOLDER.glob("*.txt")))
        raise FileNotFoundError(f"there is no template {str(template)!r}; use one of {names}, or the path of your own")
    try:
        source, _, text = path.read_text(encoding="utf-8-sig").partition("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text file in UTF-8 ({e})") from e
    if not source.startswith("Source:"):
        raise ValueError(f'{path}: the first line must say where the template comes from, as "Source: ..."')
    if set(_PLACE.findall(text)) != set(places.split()):
        have = ", ".join(f"{{{place}}}" for place in sorted(set(_PLACE.findall(text)))) or "no place"
        need = ", ".join(f"{{{place}}}" for place in places.split())
        raise ValueError(f"{path}: it has {have}; give it {need}, and no other")
    return Template(source.removeprefix("Source:").strip(), text.strip())


def open_chat(
    name: str, model: Any, *, server_model: str | None = None, dtype: Any = None, device: str | None = None, batch_size: int = 8,
    **options: Any,
) -> ChatModel:  # fmt: skip
    """model: see the top of this file. server_model: the model's name at the server; default: the first that it has. dtype, device:
    of a local model. batch_size: conversations at a time, also at a server. options: of `EndpointChat` (timeout, retries, key_env:
    the environment variable with the key) or of `TransformersChat.from_pretrained` (quantization, adapter, template_kwargs, ...).

    Raises ValueError or TypeError for what makes no sense, OSError for a model that is not there.
    """
    if model is None:
        raise ValueError(f"the reward {name} needs model=: a folder or hub id of a vision-language model, or an address")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; use a whole number, 1 or more")
    if hasattr(model, "generate") and hasattr(model, "sees"):
        if options or server_model:
            raise TypeError(f"the reward {name} was given a ready chat model, and options for one: {options!r:.80}")
        return model
    if not isinstance(model, (str, Path)):
        raise TypeError(f"the model of {name} is {type(model).__name__}; give a folder, a hub id, an address or a ChatModel")
    if re.match(r"https?://|[\w.-]+:\d+(/|$)", str(model), re.I):
        from ..chat.endpoint import EndpointChat

        return EndpointChat(str(model), server_model, **{"concurrency": batch_size} | options)
    if server_model:
        raise ValueError(f"server_model is {server_model!r}, and the model {str(model)!r} is local; give a server's address")
    from ..chat.local import TransformersChat

    return TransformersChat.from_pretrained(model, dtype=dtype, device=device, batch_size=batch_size, pictures=True, **options)


class Asking(Talks):
    """What these rewards share. templates: what each has to hold, as "image request", by its name or path.

    max_pixels: a larger picture is scaled down to this many, width times height. options: fields of `chat.Sampling` (max_new_tokens,
    temperature, seed, ...), and those of `open_chat`. A mistake in all of these shows before weights are read. The request is given to
    the model whole; one that its context cannot hold is an error of that picture alone.
    """

    needs: tuple[str, ...] = ()

    def __init__(
        self, name: str, model: Any, templates: dict[str | Path, str], max_pixels: int = MAX_PIXELS, **options: Any
    ) -> None:
        own = {f.name: options.pop(f.name) for f in fields(Sampling) if f.name in options}
        self.name, self.max_pixels, self.sampling = name, max_pixels, Sampling(**own)
        self.templates = [load_template(template, places) for template, places in templates.items()]
        if max_pixels < 1:
            raise ValueError(f"max_pixels is {max_pixels}; use 1 or more, for example {MAX_PIXELS}")
        self.chat = open_chat(name, model, **options)
        if not self.chat.sees:
            raise ValueError(f"the reward {name} shows pictures, and {self.chat!r} takes text only; use one that sees")

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        raise NotImplementedError

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return [j.score for j in self.judge(images, prompts, **context)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.chat!r})"

    def _sort(self, images: Sequence[Any], prompts: Sequence[str]) -> tuple[dict[int, Image], dict[int, Judgement]]:
        """(pictures to be asked about, by their number; judgements of what cannot be)"""
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(
                f"{self.name}: {len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        out = {i: _skipped("there is no picture") for i, image in enumerate(images) if image is None}
        out |= {i: _skipped("nothing was asked for") for i, prompt in enumerate(prompts) if i not in out and not prompt.strip()}
        return {i: self._sized(image) for i, image in enumerate(images) if i not in out}, out

    def _sized(self, image: Any) -> Image:
        image = as_rgb(image)
        share = (self.max_pixels / (image.width * image.height)) ** 0.5
        if share >= 1:
            return image
        width, height = int(image.width * share), int(image.height * share)  # one may be 0
        return image.resize((min(max(width, 1), self.max_pixels), min(max(height, 1), self.max_pixels)))

    def _ask(self, conversations: Sequence[list[Message]]) -> list[Completion]:
        return [c for k in range(0, len(conversations), AT_ONCE) for c in self._ask_some(conversations[k : k + AT_ONCE])]

    def _ask_some(self, conversations: Sequence[list[Message]]) -> list[Completion]:
        """What `on_token` raises is the user's wish; any other exception is a failure, of one conversation if it can be found out."""
        own = self.on_token
        try:
            said = self.chat.generate(conversations, self.sampling)
            if len(said) != len(conversations):
                raise ValueError(f"{self.chat!r} gave {len(said)} completions for {len(conversations)} conversations")
            return said
        except Exception as e:
            if _raised_in(e, own):
                raise
            if len(conversations) > 1 and not isinstance(e, OSError):  # one that cannot be read, or no memory for all of them
                half = len(conversations) // 2
                return self._ask_some(conversations[:half]) + self._ask_some(conversations[half:])
            why = next(iter(str(e).splitlines()), "")[:200]
            return [Completion(error=f"{type(e).__name__}: {why}")] * len(conversations)

    def _warn(self, lost: Sequence[str], asked: int, what: str = "score", of: str = "pictures") -> None:
        """lost: why, for each that was asked about in vain."""
        if lost:
            how_many = f"{len(lost)} of {asked}" if len(lost) < asked else f"all {asked}"
            logger.warning("%s: no %s for %s %s, such as: %.400s", self.name, what, how_many, of, lost[0])


def unjudged(why: str, **details: Any) -> Judgement:
    return Judgement(None, {"error": why, **details})


def _skipped(why: str) -> Judgement:
    return Judgement(None, {"skipped": why})


def _raised_in(error: BaseException, function: Any) -> bool:
    """Whether the error came out of `function`, which other threads may have replaced by now: so its code is looked for."""
    function = getattr(function, "func", function)  # a partial
    function = function if hasattr(function, "__code__") else type(function).__call__
    code = getattr(function, "__code__", None)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    return trace is not None


# --- reading ------------------------------------------------------------------------------------------------------------
# Every repetition is bounded, or time would grow with the square of the length.

SCORE = (
    "score", "rating", "grade", "marks", "puntuación", "\u8bc4\u5206", "\u5206\u6570", "\u5f97\u5206", "\u30b9\u30b3\u30a2",
    "\u70b9\u6570", "\uc810\uc218", "\u043e\u0446\u0435\u043d\u043a\u0430",
)  # fmt: skip  # Chinese, Japanese, Korean, Russian
_OF = r"(?:\s{0,3}(?:/|out of|of|von|sur|\u0438\u0437|de)\s{0,3}(?P<of>\d{1,9}))?"
_NUMBER = rf"(?P<n>[-+]?\d{{1,9}}(?:\.\d{{1,30}}|,\d{{1,2}})?){_OF}"
_ENDS = r"(?![\d%]|[.,]\d|e[-+]?\d|\s?%|\s?[-\u2013~/]\s?\d|\s(?:to|or|and)\s\d)"  # 7-8, 70% and 1e9 are no scores
_SIGNS = str.maketrans("\uff0e\u066b\uff0c\uff0f\u2044\u2212\uff0d", "..,//--")


def answer_of(text: str) -> str:
    """What a model said, without its reasoning, digits of all scripts as 0 to 9. Where the reasoning was never closed: all of it if
    it ends with a tag that is, else nothing."""
    rest, reasoning = split_reasoning(clean(text))
    if not any(c.isalnum() for c in rest):
        rest = reasoning if re.search(r"</\s{0,9}\w{1,40}\s{0,9}>\W{0,40}\Z", reasoning[-200:]) else ""
    if not rest.isascii():
        rest = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in rest.translate(_SIGNS))
    return rest


def read_score(text: str, low: float, high: float, names: Sequence[str] = SCORE, bare: bool = True) -> float | None:
    """The last score in an answer: in a tag (<score>7</score>), else after its name and a colon ("**Score:** 7"). If `bare`, there may
    be no colon, and no name either: before the scale ("7/10"), or in an answer that is a number and no more. None where there is
    none, or one not from low to high.

    names: of the tag and the label. Never raises; time is linear in the length.
    """
    answer, words = answer_of(text), "|".join(names)
    tags = re.finditer(rf"<\s{{0,9}}(?:{words})\b[^<>]{{0,40}}>([^<]{{0,80}})", answer, re.I)
    found = [m for tag in tags if (m := re.fullmatch(rf"[^\w+-]{{0,40}}{_NUMBER}[^\d%]{{0,40}}", tag[1]))]
    if not found:
        scale = r"(?:(?:\([^()\n]{0,40}\)|(?:out of|/)\s{0,3}\d{1,9})[\s*_]{0,9})?"
        label = rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])[\s*_]{{0,9}}{scale}[\s*_`\"'\u201d]{{0,9}}"
        colon = r"[:\uff1a=|][\s*_`\"'\u201c(]{0,9}"
        filler = r"(?:[-\u2013\u2014]\s)?(?:(?:is|of|be|would|a|at)[\s*]{1,9}){0,3}[\s*_`\"'\u201c(]{0,9}"
        patterns = [rf"{label}{f'(?:{colon})?{filler}' if bare else colon}{_NUMBER}{_ENDS}"]
        if bare:
            patterns.append(
                rf"(?<![\d.,/-])(?P<n>\d{{1,9}}(?:[.,]\d{{1,9}})?)\s{{0,3}}(?:/|out of)\s{{0,3}}(?P<of>{high:g}){_ENDS}"
            )
            patterns.append(rf"\A[^\w+-]{{0,40}}{_NUMBER}(?:\s?(?:points?|\u5206|\u70b9|\uc810))?[^\w%]{{0,40}}\Z")
        labelled = list(re.finditer(rf"{label}{colon}{_NUMBER}{_ENDS}", answer, re.I))  # what it says beside that is talk
        found = labelled or sorted((m for p in patterns for m in re.finditer(p, answer, re.I)), key=lambda m: m.end("n"))
    if not found:
        return None
    value, of = float(found[-1]["n"].replace(",", ".")), found[-1]["of"]
    return value if low <= value <= high and (of is None or float(of) == high) else None


def shown(text: str) -> str:
    """For the details: an answer without what no file can hold, its end where it is long."""
    text = clean(text).strip()
    return text if len(text) <= 2000 else "..." + text[-2000:]


# --- the rewards --------------------------------------------------------------------------------------------------------


class ChatJudge(Asking):
    """One question a picture. read: from an answer to (score or None, details). source: whether it also shows the picture that was
    edited, from context `source=`, one for each picture."""

    def __init__(
        self, name: str, model: Any, template: str | Path, read: Read, *, source: bool = False, **options: Any
    ) -> None:
        super().__init__(name, model, {template: "source image request" if source else "image request"}, **options)
        self.read = read
        if source:
            self.needs = ("source",)

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        pictures, found = self._sort(images, prompts)
        sources: dict[int, Any] = {}
        if self.needs:
            given = needed(self.name, context, "source", len(images))
            found |= {i: _skipped("there is no source picture") for i in pictures if given[i] is None}
            sources = {i: self._sized(given[i]) for i in pictures if i not in found}
        rows = [i for i in pictures if i not in found]
        [template] = self.templates
        said = self._ask([template.conversation(image=pictures[i], request=prompts[i], source=sources.get(i)) for i in rows])
        asked = [self._judgement(completion) for completion in said]
        self._warn([j.details["error"] for j in asked if j.score is None], len(asked))
        found |= dict(zip(rows, asked, strict=True))
        return [found[i] for i in range(len(images))]

    def _judgement(self, said: Completion) -> Judgement:
        if said.error:
            return unjudged(said.error)
        score, details = self.read(said.text)
        if score is None:
            return unjudged(f"no score in the answer {shown(said.text)[-200:]!r}", **details, said=shown(said.text))
        return Judgement(score, {**details, "said": shown(said.text)})


def vlm_judge(
    model: Any = None, *, name: str = "vlm-judge", template: str | Path = "vlm-judge", server_model: str | None = None,
    dtype: Any = None, device: str | None = None, batch_size: int = 8, **options: Any,
) -> ChatJudge:  # fmt: skip
    """How well a picture shows what was asked for, by any vision-language model. Unit: marks from 0 to 10.

    After the VLM reward of RePrompt (arXiv 2505.17540): alignment first, authenticity second. RePrompt's own value is (score - 5) / 5,
    and 0 where its judge failed; here such a picture has no score. template: a name or path; it shows {image} {request}. options: see
    `Asking` and `open_chat`. Weights: the model's own licence.
    """
    where = {"server_model": server_model, "dtype": dtype, "device": device, "batch_size": batch_size}
    return ChatJudge(name, model, template, _marks, **where, **options)


def unified_reward(
    model: Any = None, *, version: str = "1", name: str = "unified-reward", template: str | Path | None = None,
    max_pixels: int = 512 * 512, server_model: str | None = None, dtype: Any = None, device: str | None = None, batch_size: int = 8,
    **options: Any,
) -> ChatJudge:  # fmt: skip
    """UnifiedReward (arXiv 2503.05236), pointwise: a vision-language model trained to rate generated pictures. Unit: 1 to 5 (Flow-GRPO
    divides by 5, and has 0 where nothing could be read; here that is no score).

    version: the published format that it is asked in: "1", alignment and quality in one "Final Score:", which Flow-GRPO asks for; "2",
    the mean of an alignment, a coherence and a style score, which are in the details. The format is the published one, the wording of
    the templates is ours; give the path of another as template=. model: default: the Qwen2.5-VL checkpoint of that version on the hub,
    CodeGoat24/UnifiedReward-qwen-7b or CodeGoat24/UnifiedReward-2.0-qwen-7b (MIT). Those on LLaVA-OneVision are no transformers models:
    serve them with sglang, and give the address. options: see `Asking` and `open_chat`.
    """
    if version not in UNIFIED_REWARD:
        raise ValueError(f"there is no version {version!r} of unified-reward; use {' or '.join(UNIFIED_REWARD)}")
    read, template = _unified_1 if version == "1" else _unified_2, template or f"unified-reward-{version}"
    where = {"server_model": server_model, "dtype": dtype, "device": device, "batch_size": batch_size}
    return ChatJudge(name, model or UNIFIED_REWARD[version], template, read, max_pixels=max_pixels, **where, **options)


def edit_reward(
    model: Any = None, *, name: str = "edit-reward", template: str | Path = "edit-reward", server_model: str | None = None,
    dtype: Any = None, device: str | None = None, batch_size: int = 8, **options: Any,
) -> ChatJudge:  # fmt: skip
    """How well an edit was done, by any vision-language model that takes two pictures. Unit: 0 to 10.

    It needs `source=`, the picture before the edit, for each; the prompts are the instructions. The score is the geometric mean of two
    marks from 0 to 10, both in the details: `following` the instruction, and how far all else was `kept`. So an untouched picture is as
    bad as a new one. VIEScore (arXiv 2312.14867) takes sqrt(min(following, kept) * quality), with a third mark for the look.

    This is a judge, and not the checkpoint EditReward (TIGER-Lab, arXiv 2509.26346), whose scores come out of two regression heads on
    Qwen2.5-VL or MiMo-VL, and not out of words. options: see `Asking` and `open_chat`. Weights: the model's own licence.
    """
    where = {"server_model": server_model, "dtype": dtype, "device": device, "batch_size": batch_size}
    return ChatJudge(name, model, template, _edit, source=True, **where, **options)


def key_points(
    model: Any = None, *, name: str = "key-points", most: int = 16, server_model: str | None = None, dtype: Any = None,
    device: str | None = None, batch_size: int = 8, **options: Any,
) -> KeyPoints:  # fmt: skip
    """Share of what was asked for that is in the picture, 0 to 1: see `KeyPoints` in key_points.py, and its options."""
    from .key_points import KeyPoints

    where = {"server_model": server_model, "dtype": dtype, "device": device, "batch_size": batch_size}
    return KeyPoints(model, name=name, most=most, **where, **options)


def _marks(text: str) -> tuple[float | None, dict[str, Any]]:
    return read_score(text, 0, 10), {}


def _unified_1(text: str) -> tuple[float | None, dict[str, Any]]:
    return read_score(text, 1, 5, ("final score",)), {}


def _unified_2(text: str) -> tuple[float | None, dict[str, Any]]:
    axes = {axis: read_score(text, 1, 5, (f"{axis} score", axis), bare=False) for axis in ("alignment", "coherence", "style")}
    heard = [v for v in axes.values() if v is not None]
    return (math.fsum(heard) / 3 if len(heard) == 3 else None), axes


def _edit(text: str) -> tuple[float | None, dict[str, Any]]:
    following, kept = (read_score(text, 0, 10, (mark,), bare=False) for mark in ("following", "kept"))
    score = None if following is None or kept is None else math.sqrt(following * kept)
    return score, {"following": following, "kept": kept}
