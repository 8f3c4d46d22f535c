"""What a turn changed in the prompt, to be seen at a glance."""

from __future__ import annotations

import difflib
import re
from html import escape

_WORD = re.compile(r"(\s*)([,.;:!?()\"\u3001-\u9fff\uff01-\uff1f]|[^\s,.;:!?()\"\u3001-\u9fff\uff01-\uff1f]+)")


def word_diff(before: str, after: str) -> str:
    """HTML of `after` with what is gone from `before` in <del> and what is new in <ins>.

    Without <ins> the text is `before`, without <del> it is `after`, to the character.
    """
    if before == after:
        return escape(after)
    old, new = _words(before), _words(after)
    blocks = difflib.SequenceMatcher(None, [w for _, w in old], [w for _, w in new], autojunk=False).get_opcodes()
    sizes = [0 if tag == "equal" else max(b - a, d - c) for tag, a, b, c, d in blocks]
    page = gone = added = ""
    for k, (tag, a, b, c, d) in enumerate(blocks):
        # Few common words amid many others are chance: "left" in two unlike sentences. The diff reads better without.
        if tag != "equal" or (0 < k < len(blocks) - 1 and 2 * (b - a) <= min(sizes[k - 1], sizes[k + 1])):
            gone += "".join(space + word for space, word in old[a:b])
            added += "".join(space + word for space, word in new[c:d])
            continue
        for (space, word), (new_space, _) in zip(old[a:b], new[c:d], strict=True):
            if space != new_space:
                gone, added, space = gone + space, added + new_space, ""
            if word or space:
                page += _change(gone, added) + escape(space + word)
                gone = added = ""
    return page + _change(gone, added)


def _words(text: str) -> list[tuple[str, str]]:
    """(space before, word), where punctuation and CJK characters are words of their own; at last the space at the end."""
    end = len(text.rstrip())
    return [*_WORD.findall(text[:end]), (text[end:], "")]


def _change(gone: str, added: str) -> str:
    return (f"<del>{escape(gone)}</del>" if gone else "") + (f"<ins>{escape(added)}</ins>" if added else "")
