"""Request sets of the embedded world, the same for everybody who asks with the same arguments."""

from __future__ import annotations

import random

from .language import user_prompt
from .scenes import random_spec


def requests(n: int, split: str = "test", objects: int | None = 2, clean: bool = True, seed: int = 0) -> list[str]:
    """`n` distinct requests in user language.

    split: "train", or "test", in which every request of two or more objects holds a pair of coloured shapes that is held out of
        all training, and half of the words are held out too; or "any", whatever pairs there are in words of training.
    objects: 1 to 3, or None for a mixture. clean: whether nothing else may be in the picture.
    """
    rng = random.Random(f"{split}-{objects}-{clean}-{seed}")
    found: dict[str, None] = {}
    while len(found) < n:
        found[user_prompt(random_spec(rng, objects, split, clean), rng, split)] = None
    return list(found)
