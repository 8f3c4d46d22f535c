"""From what a model said to a prompt, with PromptEnhancer's three-level fallback (arXiv 2509.04545):

1. the last complete answer tag; 2. else what is left without the reasoning; 3. else nothing, which keeps the prompt in use.

Reasoning (<think> and its like, closed, unclosed, nested, or opened by the chat template) is kept apart and never leaks into
the prompt. Whatever comes in, a `Parsed` comes out; nothing raises, and time is linear in the length.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from ..chat.text import ANSWER, THINK, clean, split_reasoning

LONGEST = 10_000  # characters of a prompt; more is not a prompt
KEEP = "KEEP"
# Every repetition that another one like it may follow is bounded, or time would grow with the square of the length.
_FENCE = re.compile(r"\A(?:[^`\n]{0,200}:\s{0,9})?```(?:[^\n`]{0,40}\n)?(.*?)(?:```|\Z)", re.S)  # "Here it is:" may come first
_LABEL = re.compile(
    r"\A[#*]{0,6} ?(?:here(?: is|['\u2019]s) )?(?:(?:the|your|my) )?"
    r"(?:(?:new|final|refined|revised|rewritten|enhanced|improved|updated) )?(?:image )?prompt ?\*{0,2} ?: ?\*{0,2} ?",
    re.I,
)
_KEPT = re.compile(r"\W*keep(?:\W+(?:the|this|it|as|is|in|use|same|current|original|prompt|unchanged))*\W*", re.I)
_KEPT_ELSE = re.compile(  # what models say instead, and nobody means as a prompt
    r"\W*(?:nothing(?: is)?(?: (?:to (?:change|be changed)|needed|necessary|required))"
    r"|no (?:further |other )?(?:changes?|modifications?)(?: (?:is|are))?(?: (?:needed|necessary|required))?"
    r"|(?:the )?(?:(?:current )?prompt (?:is|stays|remains) )?unchanged|n/a)\W*",
    re.I,
)
_KEPT_BECAUSE = re.compile(r"\W*KEEP\W{0,5}?(?:[.,:;!(\n\u2013\u2014]|\s-\s)")  # and then it says why
_CUT = re.compile(r"<\s{0,9}/?\s{0,9}(?:a|an|ans|answ|answe|answer)?\s{0,9}\Z", re.I)  # of a closing tag, by the token budget
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u201e": "\u201c", "\u2018": "\u2019"}
_QUOTES |= {"\u00ab": "\u00bb", "\u300c": "\u300d", "\u300e": "\u300f"}


@dataclass(frozen=True)
class Parsed:
    """prompt: None keeps the one in use, because the model said so (`error` None) or because there is none (`error` says why).
    format_ok: whether the output had the form that was asked for."""

    prompt: str | None
    reasoning: str
    format_ok: bool
    error: str | None = None


def parse_answer(text: str, tags: bool = True) -> Parsed:
    """tags: whether an <answer> was asked for; otherwise the whole text (without its reasoning) is the answer."""
    rest, reasoning = split_reasoning(clean(text))
    before, answer, complete = _last_answer(rest)
    if answer is None:
        answer = rest
    else:
        reasoning = f"{reasoning}\n{before}" if before.strip() else reasoning
    reasoning = ANSWER.sub(" ", THINK.sub(" ", reasoning)).strip()
    prompt = _bare(answer)
    format_ok = complete or not tags
    if (
        _KEPT.fullmatch(prompt)
        or _KEPT_ELSE.fullmatch(prompt)
        or _KEPT_BECAUSE.match(answer.strip())
        or (not complete and _ends_with_keep(answer))
    ):
        return Parsed(None, reasoning, format_ok)
    if not any(c.isalnum() or unicodedata.category(c) == "So" for c in prompt):  # So: emoji
        return Parsed(None, reasoning, False, "there is no prompt in what the model said")
    if len(prompt) > LONGEST:
        return Parsed(None, reasoning, False, f"the model's prompt is {len(prompt)} characters long, more than {LONGEST}")
    return Parsed(prompt, reasoning, format_ok)


def _last_answer(text: str) -> tuple[str, str | None, bool]:
    """(what came before, the last complete answer or else the last unclosed one, whether it is complete)"""
    opened: re.Match[str] | None = None
    first: int | None = None
    found: str | None = None
    for m in ANSWER.finditer(text):
        if not m[1]:
            opened, first = m, m.start() if first is None else first
        elif opened is not None:
            found, opened = text[opened.end() : m.start()], None
    if found is not None:
        return text[:first], found, True
    if opened is not None:
        return text[:first], _CUT.sub("", text[opened.end() :]), False
    return "", None, False


def _ends_with_keep(answer: str) -> bool:
    """As a sentence of its own: "Nothing is missing. KEEP"."""
    words = answer.split()
    return len(words) > 1 and words[-1].strip(".!*\"'`") == KEEP and words[-2][-1] in ".:!?"


def _bare(answer: str) -> str:
    """One line, without fences, a label, and quotes around it all."""
    text = ANSWER.sub(" ", answer).strip()
    if (fence := _FENCE.match(text)) and fence[1].strip():
        text = fence[1]
    text = " ".join(text.split())
    for _ in range(3):  # quotes around the label, around the prompt, or both
        text = _LABEL.sub("", text).strip()
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
            text = text[1:-1].strip()
    return text
