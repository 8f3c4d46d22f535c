"""What a model wrote, made fit to be read: without characters that are no text, its reasoning kept apart."""

from __future__ import annotations

import re
import unicodedata

# Every repetition that another one like it may follow is bounded, or time would grow with the square of the length.
THINK = re.compile(r"<\s{0,9}(/?)\s{0,9}(?:think|thinking|thought|reason|reasoning)\b[^<>]{0,100}>", re.I)
ANSWER = re.compile(r"<\s{0,9}(/?)\s{0,9}answer\b[^<>]{0,100}>", re.I)
_MARKUP = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|</?s>")  # <|im_end|> and the like: a server may let them by
# Byte order mark, the sign for bytes that are no character (an answer was cut off within one), direction overrides.
_INVISIBLE = dict.fromkeys([0xFEFF, 0xFFFD, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def clean(text: str) -> str:
    """Without lone surrogates, control characters, direction overrides and special tokens; line ends as \\n."""
    text = text.encode("utf-8", "ignore").decode("utf-8").translate(_INVISIBLE)
    text = _MARKUP.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else " " for c in text)


def split_reasoning(text: str) -> tuple[str, str]:
    """(what is left, the reasoning)"""
    parts: list[tuple[str, bool]] = []  # (text, whether it is reasoning)
    depth, at, settled = 0, 0, 0
    for m in THINK.finditer(text):
        parts.append((text[at : m.start()], depth > 0))
        at = m.end()
        if not m[1]:
            depth += 1
        elif depth:
            depth -= 1
        else:
            settled = len(parts)  # the chat template had opened it: all until here is reasoning
    tail = text[at:]
    closing = [m for m in ANSWER.finditer(tail) if m[1]] if depth else []
    if closing and not any(c.isalnum() for c in tail[closing[-1].end() :]):
        # never closed, but the answer did come: in full, and last. A mere mention of it, cut off by the budget, is none
        opening = ANSWER.search(tail)
        start = opening.start() if opening is not None and not opening[1] else len(tail)
        parts += [(tail[:start], True), (tail[start:], False)]
    else:
        parts.append((tail, depth > 0))
    outside = [part for k, (part, inside) in enumerate(parts) if not inside and k >= settled]
    inside = [part.strip() for k, (part, inside) in enumerate(parts) if inside or k < settled]
    return " ".join(outside), "\n".join(part for part in inside if part)
