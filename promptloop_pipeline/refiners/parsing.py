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
# Every repetition that another one like it may follow is bounded, or time would grow with the square of the length.
_THINK = re.compile(r"<\s{0,9}(/?)\s{0,9}(?:think|thinking|thought|reason|reasoning)\b[^<>]{0,100}>", re.I)
_ANSWER = re.compile(r"<\s{0,9}(/?)\s{0,9}answer\b[^<>]{0,100}>", re.I)
_MARKUP = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?s>")  # <|im_end|> and the like: a server may let them by
_FENCE = re.compile(r"\A(?:[^`\n]{0,200}:\s{0,9})?```(?:[^\n`]{0,40}\n)?(.*?)(?:```|\Z)", re.S)  # "Here it is:" may come first
_LABEL = re.compile(
    r"\A[#*]{0,6} ?(?:here(?: is|['\u2019]s) )?(?:(?:the|your|my) )?"
    r"(?:(?:new|final|refined|revised|rewritten|enhanced|improved|updated) )?(?:image )?prompt ?\*{0,2} ?: ?\*{0,2} ?",
    re.I,
)
_KEPT = re.compile(r"\W*keep(?:\W+(?:the|this|it|as|is|in|use|same|current|original|prompt|unchanged))*\W*", re.I)
_KEPT_BECAUSE = re.compile(r"\W*KEEP\W{0,5}?(?:[.,:;!(\n\u2013\u2014]|\s-\s)")  # and then it says why
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u201e": "\u201c", "\u2018": "\u2019"}
_QUOTES |= {"\u00ab": "\u00bb", "\u300c": "\u300d", "\u300e": "\u300f"}
# Byte order mark, the sign for bytes that are no character (an answer was cut off within one), direction overrides.
_INVISIBLE = dict.fromkeys([0xFEFF, 0xFFFD, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


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
    if _KEPT.fullmatch(prompt) or _KEPT_BECAUSE.match(answer.strip()) or (not complete and _ends_with_keep(answer)):
        return Parsed(None, reasoning, format_ok)
    if not any(c.isalnum() or unicodedata.category(c) == "So" for c in prompt):  # So: emoji
        return Parsed(None, reasoning, False, "there is no prompt in what the model said")
    if len(prompt) > LONGEST:
        return Parsed(None, reasoning, False, f"the model's prompt is {len(prompt)} characters long, more than {LONGEST}")
    return Parsed(prompt, reasoning, format_ok)


def _split_reasoning(text: str) -> tuple[str, str]:
    """(what is left, the reasoning)"""
    parts: list[tuple[str, bool]] = []  # (text, whether it is reasoning)
    depth, at, settled = 0, 0, 0
    for m in _THINK.finditer(text):
        parts.append((text[at : m.start()], depth > 0))
        at = m.end()
        if not m[1]:
            depth += 1
        elif depth:
            depth -= 1
        else:
            settled = len(parts)  # the chat template had opened it: all until here is reasoning
    tail = text[at:]
    closing = [m for m in _ANSWER.finditer(tail) if m[1]] if depth else []
    if closing and not any(c.isalnum() for c in tail[closing[-1].end() :]):
        # never closed, but the answer did come: in full, and last. A mere mention of it, cut off by the budget, is none
        opening = _ANSWER.search(tail)
        start = opening.start() if opening is not None and not opening[1] else len(tail)
        parts += [(tail[:start], True), (tail[start:], False)]
    else:
        parts.append((tail, depth > 0))
    outside = [part for k, (part, inside) in enumerate(parts) if not inside and k >= settled]
    inside = [part.strip() for k, (part, inside) in enumerate(parts) if inside or k < settled]
    return " ".join(outside), "\n".join(part for part in inside if part)


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


def _ends_with_keep(answer: str) -> bool:
    """As a sentence of its own: "Nothing is missing. KEEP"."""
    words = answer.split()
    return len(words) > 1 and words[-1].strip(".!*\"'`") == KEEP and words[-2][-1] in ".:!?"


def _bare(answer: str) -> str:
    """One line, without fences, a label, and quotes around it all."""
    text = _ANSWER.sub(" ", answer).strip()
    if (fence := _FENCE.match(text)) and fence[1].strip():
        text = fence[1]
    text = " ".join(text.split())
    for _ in range(3):  # quotes around the label, around the prompt, or both
        text = _LABEL.sub("", text).strip()
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not set(text[1:-1]) & {text[0], text[-1]}:
            text = text[1:-1].strip()
    return text
