"""What the embedded refiner is taught: its words, what it is to say, and the lessons of its training; no model here.

Without a picture it glosses each content phrase of the request, then writes the request in the system language:
    <think> scarlet is red , disc is circle </think> <answer> large red circle top left , black background </answer>
With a preview it glosses the last content phrase, which says whether anything else is wanted or not; then it says what is wrong
with the picture, and how the prompt goes on:
    <think> alone is nothing else , sticker row two column three </think> <answer> ... , clear row two column three </answer>
    <think> disc is circle , nothing to change </think> <answer> keep </answer>

What a held-out word means it learns from a *dictionary*, lists of phrases in no order; no request of training holds one. Lest
the few words of training requests be all that it ever expects there, some are replaced by *invented* ones, which the dictionary
explains as well: without them the gloss was right, but the answer still followed the words of the request.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from .language import (
    BACKGROUND_WORDS,
    COLOR_WORDS,
    JOINS,
    NUMBERS,
    OPENINGS,
    PLURAL,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    SYSTEM_WORDS,
    Words,
    parse,
    system_caption,
    user_prompt,
    with_clear,
)
from .scenes import BACKGROUNDS, CELLS, SLOTS, Cell, free_cells, plan, random_spec
from .verifier import sticker_amounts

THRESHOLD = 0.3  # the least amount of a sticker that counts as seen, as for the oracle
NOTHING, KEEP = "nothing else", "keep"
UNKNOWN = "~"  # a word that is in no vocabulary

_CLEAN: Words = (("nothing else", "nothing more"), ("the rest empty", "alone"))


def _meanings(held_out: bool) -> dict[str, str]:
    found = {phrase: NOTHING for phrase in _CLEAN[held_out]}
    for table in (COLOR_WORDS, SHAPE_WORDS, SIZE_WORDS, RELATION_WORDS):
        found |= {phrase: name for name, words in table.items() for phrase in words[held_out]}
    return found | {PLURAL.get(p, p + "s"): name for name, words in SHAPE_WORDS.items() for p in words[held_out]}


def _invented() -> dict[str, str]:
    """Phrases that nobody knows: four for each meaning, eight for nothing else; some of several words."""
    rng = random.Random("invented")
    made: dict[str, str] = {}

    def word() -> str:
        while True:
            new = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
            if not any(new in phrase for phrase in made):
                return new

    for table in (COLOR_WORDS, SHAPE_WORDS, SIZE_WORDS):
        for name in table:
            for k in range(4):
                single = f"{word()} {word()}" if table is SHAPE_WORDS and k == 0 else word()
                made[single] = name
                if table is SHAPE_WORDS:
                    made[single + "s"] = name
    for name in RELATION_WORDS:
        made |= {word(): name, f"on {word()} of": name, f"to the {word()} of": name, f"on the {word()} {word()}": name}
    made |= {word(): NOTHING for _ in range(4)} | {f"the {word()} {word()}": NOTHING for _ in range(4)}
    return made


SEEN, HELD_OUT, INVENTED = _meanings(False), _meanings(True), _invented()  # content phrase -> what it is in the system language
MEANING = SEEN | HELD_OUT | INVENTED


def _any(phrases: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))


_PLURALS = {p for p in MEANING if p.endswith("s") and p != "cross"}
_CONTENT = re.compile(rf"\b(?:{_any(MEANING)})\b")
_KEPT = re.compile(rf"\b(?:{_any([*MEANING, *BACKGROUNDS, *NUMBERS])})\b")


def vocabulary() -> list[str]:
    """All words that the refiner knows. Filler that is held out of training is not among them."""
    filler = " ".join([*OPENINGS[0], *JOINS[0], *BACKGROUND_WORDS[0]]).replace("{}", "").replace(",", "")
    text = " ".join([*SYSTEM_WORDS, *MEANING, *MEANING.values(), filler])
    text += " a the is sticker nothing to change keep <think> </think> <answer> </answer> , |"
    return sorted(set(text.split()))


def content(request: str) -> list[str]:
    """The phrases of a request that name a colour, shape, size or relation, or want nothing else; in order."""
    return _CONTENT.findall(request.lower())


def gloss(phrases: Sequence[str]) -> str:
    return " , ".join(f"{p} is {MEANING[p]}" for p in phrases)


def rewriting(request: str, worded: str | None = None) -> str:
    """The whole answer to a request without a picture; `worded`: the same request in the words that are glossed."""
    caption = system_caption(plan(parse(request)))
    return f"<think> {gloss(content(worded or request))} </think> <answer> {caption} </answer>"


def amounts_of(request: str, image: Image.Image | np.ndarray) -> np.ndarray:
    """(4, 4): how much of a sticker is in each cell, as the oracle sees it."""
    return sticker_amounts(image, parse(request).background or "black")


def to_forbid(request: str, prompt: str, amounts: np.ndarray) -> tuple[Cell, ...]:
    """The cells that the oracle would forbid now, row by row; none where it would leave the prompt as it is."""
    spec = plan(parse(request))
    spare = SLOTS - len(spec.objects)
    if not spec.clean or not spare:
        return ()
    cells = sorted(free_cells(spec.objects), key=lambda c: -amounts[c])
    found = tuple(sorted(c for c in cells[:spare] if amounts[c] > THRESHOLD))
    return () if set(found) == set(parse(prompt).clear) else found


def repair(request: str, prompt: str, cells: tuple[Cell, ...]) -> str:
    """The whole answer to a preview in which `cells` are to be forbidden."""
    seen = " , ".join(f"sticker row {NUMBERS[r]} column {NUMBERS[c]}" for r, c in cells) or "nothing to change"
    caption = with_clear(prompt, cells) if cells else KEEP
    return f"<think> {gloss(content(request)[-1:])} , {seen} </think> <answer> {caption} </answer>"


# --- the words as tokens ------------------------------------------------------------------------------------------------

START, END, IMAGE, FENCE, WHOLE = "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = ("<|endoftext|>", START, END, IMAGE, FENCE, WHOLE, "<end_of_utterance>", "<unk>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def prompt_words(text: str, image: bool) -> list[str]:
    """The tokens that the processor makes of one user message."""
    words = text.lower().replace(",", " , ").replace("|", " | ").split()
    picture = [FENCE, WHOLE, *[IMAGE] * len(CELLS), FENCE] if image else []
    return [START, "user", *picture, *words, END, START, "assistant"]


def prompt_of(said: str) -> str:
    found = re.search(r"<answer>(.*?)(?:</answer>|$)", said)
    return found[1].strip() if found else ""


# --- what training adds --------------------------------------------------------------------------------------------------


def renamed(request: str, rng: random.Random) -> str:
    """The same request, some of its phrases replaced by invented ones, the wish for nothing else most often."""

    def other(m: re.Match[str]) -> str:
        meaning, plural = MEANING[m[0]], m[0] in _PLURALS
        if rng.random() > (0.6 if meaning == NOTHING else 0.25):
            return m[0]
        return rng.choice([p for p, means in INVENTED.items() if means == meaning and (p in _PLURALS) == plural])

    return _CONTENT.sub(other, request)


def noisy(request: str, rng: random.Random, share: float = 0.5) -> str:
    """The same request with other filler: unknown words and idle ones in the place of known ones, so that what is unknown
    is skipped. `share` of the gaps between content are changed."""
    parts: list[str] = []
    end = 0
    matches = [(m.start(), m.end()) for m in _KEPT.finditer(request)]
    for start, stop in [*matches, (len(request), len(request))]:
        gap = request[end:start]
        words = re.findall(r"[a-z]+|,", gap)
        article = words[-1:] == ["a"]
        filler = [w for w in words[: len(words) - article] if w != ","]
        if rng.random() < (share if filler else share / 10 if end else share / 5):
            drawn = rng.choices(
                (UNKNOWN, "of", "to", "with", "and", "the", "a", "on"), (12, 1, 1, 1, 1, 1, 1, 1), k=rng.randint(1, 3)
            )
            words = [*drawn, *(["a"] if article else [])]
        if stop > start or filler:  # nothing is put after the end
            parts += words
        parts.append(request[start:stop])
        end = stop
    return " ".join(p for p in parts if p)


def phrase_list(rng: random.Random, invent: bool, most: int = 8) -> list[str]:
    """Content phrases for the dictionary: known, held out and invented ones alike."""
    pools = (list(SEEN), list(HELD_OUT), *([list(INVENTED)] if invent else []))
    return list(dict.fromkeys(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, most))))


def dictionary(rng: random.Random, invent: bool) -> tuple[str, str]:
    """(a list of phrases, what they mean). Between the phrases are commas, idle words, or nothing; it is never a request."""
    while True:
        phrases = phrase_list(rng, invent)
        style = rng.random()
        text = phrases[0]
        for p in phrases[1:]:
            between = "," if style < 0.4 else rng.choice(("", "", ",", UNKNOWN, "a", "and", "and a", f"{UNKNOWN} a", "on"))
            text = " ".join(f"{text} {between} {p}".split())
        try:
            parse(text)
        except ValueError:
            return text, f"<think> {gloss(phrases)} </think>"


def some_cells(prompt: str, rng: random.Random) -> tuple[Cell, ...]:
    """Free cells at random, as many as a prompt has room for, or fewer."""
    spec = parse(prompt)
    spare = SLOTS - len(spec.objects)
    return tuple(sorted(rng.sample(free_cells(spec.objects), rng.randint(1, spare)))) if spare else ()


@dataclass
class Previews:
    """What the generator showed on its way, and the prompt that was in force."""

    images: np.ndarray  # uint8 (N, 32, 32, 3)
    requests: list[str]
    prompts: list[str]
    amounts: np.ndarray = field(init=False)  # (N, 4, 4)

    def __post_init__(self) -> None:
        self.amounts = np.stack([amounts_of(r, i) for r, i in zip(self.requests, self.images)])

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def wanting(self) -> tuple[list[int], list[int]]:
        """Those that want no change, those that want one."""
        found: tuple[list[int], list[int]] = ([], [])
        for i in range(len(self)):
            found[bool(to_forbid(self.requests[i], self.prompts[i], self.amounts[i]))].append(i)
        return found


@dataclass(frozen=True)
class Lesson:
    """What a user says, with a picture or without, and the whole answer."""

    text: str
    said: str
    image: np.ndarray | None = None


def lesson_request(rng: random.Random, invent: bool) -> Lesson:
    count = rng.choices((1, 2, 3), (0.2, 0.6, 0.2))[0]
    request = user_prompt(random_spec(rng, count, "train", clean=rng.random() < 0.6), rng, "train")
    worded = renamed(request, rng) if invent and rng.random() < 0.6 else request
    return Lesson(noisy(worded, rng) if rng.random() < 0.6 else worded, rewriting(request, worded))


def lesson_dictionary(rng: random.Random, invent: bool) -> Lesson:
    return Lesson(*dictionary(rng, invent))


def lesson_last(previews: Previews, rng: random.Random, invent: bool) -> Lesson:
    """The dictionary beside a picture: what the last phrase of a list means, often one that wants nothing else."""
    i = rng.randrange(len(previews))
    text, said = dictionary(rng, invent)
    last = said.removesuffix(" </think>").removeprefix("<think> ").split(" , ")[-1]
    if rng.random() < 0.5:
        phrase = rng.choice([p for p, meaning in MEANING.items() if meaning == NOTHING and (invent or p not in INVENTED)])
        text, last = f"{text} {phrase}", gloss([phrase])
    return Lesson(f"{text} | {previews.prompts[i]}", f"<think> {last}", previews.images[i])


def lesson_read(previews: Previews, rng: random.Random) -> Lesson:
    """All stickers of a preview, in words."""
    i = rng.randrange(len(previews))
    free = free_cells(plan(parse(previews.requests[i])).objects)
    cells = [c for c in free if previews.amounts[i][c] > THRESHOLD]
    seen = " , ".join(f"sticker row {NUMBERS[r]} column {NUMBERS[c]}" for r, c in cells)
    return Lesson("sticker", f"<think> {seen or 'nothing'} </think>", previews.images[i])


def lesson_repair(
    previews: Previews, rng: random.Random, invent: bool = False, split: str = "train", unsure: float = 0.0
) -> Lesson:
    """A preview, half of the time one that wants a change; the request in other words, at times another clause in force.

    unsure: the share of lessons that are answered without a look at the picture, nine in ten with "nothing to change". After
    sure ones they make a policy that knows the answers and seldom gives them, with which reinforcement learning begins well."""
    changes = rng.random() < 0.5
    i = rng.choice(previews.wanting[changes] or previews.wanting[not changes])
    prompt, amounts = previews.prompts[i], previews.amounts[i]
    request = user_prompt(parse(previews.requests[i]), rng, split)
    if rng.random() < 0.3 and split == "train":
        best = to_forbid(request, with_clear(prompt, ()), amounts)
        prompt = with_clear(prompt, rng.choice([(), best, some_cells(prompt, rng)]))
    cells = to_forbid(request, prompt, amounts)
    if unsure and rng.random() < unsure:
        cells = some_cells(prompt, rng) if rng.random() < 0.1 else ()
    if invent and rng.random() < 0.6:
        request = renamed(request, rng)
    said = repair(request, prompt, cells)
    if split == "train" and rng.random() < 0.6:
        request = noisy(request, rng)
    return Lesson(f"{request} | {prompt}", said, previews.images[i])


MIXTURE = {"request": 14, "dictionary": 8, "last": 6, "repair": 32, "read": 4}  # lessons of each kind in a batch
WIDER = {"request": 18, "dictionary": 12, "last": 4, "repair": 30}  # the same with invented words


def draw(rng: random.Random, previews: Previews, mixture: dict[str, int], invent: bool, unsure: float = 0.0) -> list[Lesson]:
    kinds = {
        "request": lambda: lesson_request(rng, invent), "dictionary": lambda: lesson_dictionary(rng, invent),
        "last": lambda: lesson_last(previews, rng, invent), "repair": lambda: lesson_repair(previews, rng, invent, unsure=unsure),
        "read": lambda: lesson_read(previews, rng),
    }  # fmt: skip
    return [kinds[kind]() for kind, count in mixture.items() for _ in range(count)]
