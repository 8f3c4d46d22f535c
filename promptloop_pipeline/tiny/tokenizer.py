"""The tokenizer of the embedded generator: a stock CLIPTokenizer in which each system word is one token.

Any other word falls apart into letters, as rare words do in large models. `MAX_TOKENS` is the hard budget of a prompt.
"""

from __future__ import annotations

import string
from typing import Any

from .language import MAX_TOKENS, SYSTEM_WORDS


def build_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for c in string.ascii_lowercase + string.digits + ",.-'":
        vocab[c] = len(vocab)
        vocab[c + "</w>"] = len(vocab)
    merges: list[tuple[str, str]] = []

    def pieces(word: str) -> list[str]:
        """`word` under the merges so far; a later word must be built on the merges that earlier words brought in."""
        p = [*word[:-1], word[-1] + "</w>"]
        while ranked := [(merges.index(pair), i) for i, pair in enumerate(zip(p, p[1:])) if pair in merges]:
            i = min(ranked)[1]
            p[i : i + 2] = [p[i] + p[i + 1]]
        return p

    for word in SYSTEM_WORDS:
        while len(p := pieces(word)) > 1:
            merges.append((p[0], p[1]))
            vocab.setdefault(p[0] + p[1], len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
