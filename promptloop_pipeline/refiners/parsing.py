"""From what a model said to a prompt, with PromptEnhancer's three-level fallback (arXiv 2509.04545):

1. the last complete answer tag; 2. else what is left without the reasoning; 3. else nothing, which keeps the prompt in use.

Reasoning (<think> and its like, closed, unclosed, nested, or opened by the chat template) is kept apart and never leaks into
the prompt. Whatever comes in, a `Parsed` comes out; nothing raises, and time is linear in the length.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

LONGEST = 10_000  # characters of a prompt; more is not a prompt
KEEP = "KEEP"
_THINK = re.compile(r"<\s*(/?)\s*(?:think|thinking|thought|reason|reasoning)\b[^<>]{0,100}>", re.I)
_ANSWER = re.compile(r"<\s*(/?)\s*answer\b[^<>]{0,100}>", re.I)
_MARKUP = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>")  # <|im_end|> and the like, where a server lets them through
_FENCE = re.compile(r"\A```[^\n`]{0,40}\n?(.*?)\n?```\Z", re.S)
_LABEL = re.compile(
    r"\A(?:\*{0,2}(?:(?:new|final|refined|revised|rewritten|enhanced|improved|updated) )?(?:image )?prompt\s*:\s*\*{0,2})", re.I
)
_KEPT = re.compile(r"\W*keep(?:\W+(?:the|this|it|as|is|current|prompt|unchanged))*\W*", re.I)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u300c": "\u300d", "`": "`"}
_INVISIBLE = dict.fromkeys([0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])  # byte order mark, direction overrides


@dataclass(frozen=True)
class Parsed:
    """prompt: None keeps the one in use, because the model said so (`error` None) or because there is none (`error` says why).
    format_ok: whether the output had the form that was asked for."""

    prompt: str | None
    reasoning: str
    format_ok: bool
    error: str | None = None


def clean(text: str) -> str:
    """Without lone surrogates, control characters, direction overrides and special tokens; line ends as \\n."""
    text = text.encode("utf-8", "ignore").decode("utf-8").translate(_INVISIBLE)
    text = _MARKUP.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else " " for c in text)


def parse_answer(text: str, tags: bool = True) -> Parsed:
    """tags: whether an <answer> was asked for; otherwise the whole text (without its reasoning) is the answer."""
    rest, reasoning = _split_reasoning(clean(text))
    before, answer, complete = _last_answer(rest)
    if answer is None:
        answer = rest
    else:
        reasoning = f"{reasoning}\n{before}" if before.strip() else reasoning
    reasoning = _ANSWER.sub(" ", _THINK.sub(" ", reasoning)).strip()
    prompt = _bare(answer)
    format_ok = complete or not tags
    if _KEPT.fullmatch(prompt):
        return Parsed(None, reasoning, format_ok)
    if not any(c.isalnum() for c in prompt):
        return Parsed(None, reasoning, False, "there is no prompt in what the model said")
    if len(prompt) > LONGEST:
        return Parsed(None, reasoning, False, f"the model's prompt is {len(prompt)} characters long, more than {LONGEST}")
    return Parsed(prompt, reasoning, format_ok)


def _split_reasoning(text: str) -> tuple[str, str]:
    """(what is left, the reasoning)"""
    outside: list[str] = []
    inside: list[str] = []
    depth, at = 0, 0
    for m in _THINK.finditer(text):
        (inside if depth else outside).append(text[at : m.start()])
        at = m.end()
        if not m[1]:
            depth += 1
        elif depth:
            depth -= 1
        else:  # the chat template had opened it
            inside, outside = [*outside, *inside], []
    tail = text[at:]
    if depth and (opening := _ANSWER.search(tail)):  # never closed, but the answer did come
        inside.append(tail[: opening.start()])
        outside.append(tail[opening.start() :])
    else:
        (inside if depth else outside).append(tail)
    return "".join(outside), "\n".join(part.strip() for part in inside if part.strip())


def _last_answer(text: str) -> tuple[str, str | None, bool]:
    """(what came before, the last complete answer or else the last unclosed one, whether it is complete)"""
    opened: re.Match[str] | None = None
    first: int | None = None
    found: str | None = None
    for m in _ANSWER.finditer(text):
        if not m[1]:
            opened, first = m, m.start() if first is None else first
        elif opened is not None:
            found, opened = text[opened.end() : m.start()], None
    if found is not None:
        return text[:first], found, True
    if opened is not None:
        return text[:first], text[opened.end() :], False
    return "", None, False


def _bare(answer: str) -> str:
    """One line, without fences, a label, and quotes around it all."""
    text = _ANSWER.sub(" ", answer).strip()
    if fence := _FENCE.match(text):
        text = fence[1].strip()
    text = _LABEL.sub("", text).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
        text = text[1:-1]
    return " ".join(text.split())
