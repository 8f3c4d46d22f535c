"""When to refine: a schedule is pure data, written the same way in Python, YAML, the shell and a node's widget.

"start"               before the first step: a single-shot rewrite, no image to look at
"6"                   a turn at step 6: the refiner sees the x0-estimate of step 5, its prompt acts from step 6 on
"20%, 50%, 80%"       the same at shares of the steps that this run really takes
"every 4"             steps 4, 8, 12, ...
"end"                 after the last step: looks at the finished image, changes nothing in it
"none"                never
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

_HELP = 'use "start", "end", "none", a step like "6", a share like "20%", "every 4", or several of these separated by commas'


@dataclass(frozen=True)
class RefinementSchedule:
    """Parsed and checked; `steps(n)` gives the step indices for a run of `n` steps. `str()` gives the text back."""

    items: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.items, tuple) or not all(isinstance(item, str) for item in self.items):
            raise TypeError(
                f"RefinementSchedule takes a tuple of texts, not {self.items!r}; RefinementSchedule.parse reads everything else"
            )
        object.__setattr__(self, "items", tuple(_check(item) for item in self.items))

    @classmethod
    def parse(cls, value: str | int | Iterable[str | int] | RefinementSchedule) -> RefinementSchedule:
        """Raises ValueError for a text that is no schedule, a negative step, a share above 100%, `every 0`; TypeError for
        anything but text, an integer, or several of them."""
        if isinstance(value, RefinementSchedule):
            return value
        parts: list[str] = []
        for part in value if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]:
            if isinstance(part, bool) or not isinstance(part, (str, Integral)):
                raise TypeError(f"a refinement schedule is text or step numbers, not {type(part).__name__} {part!r}; {_HELP}")
            parts += str(part).lower().split(",")
        items = tuple(re.sub(r"\s+", " ", p.strip()) for p in parts)
        if "none" in items and len(items) > 1:
            raise ValueError(f'refinement schedule {value!r}: "none" cannot be combined with other turns; {_HELP}')
        return cls(() if items == ("none",) else items)

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """Sorted, distinct indices in [0, num_steps]. A turn at index k acts from step k on; k = num_steps is after the end.

        A share above 0% is never the start and one below 100% never the end, so that few-step models are refined too; a run of a
        single step has no middle. Steps are those that the scheduler takes: PNDM takes one more than it is asked for.
        Raises ValueError when a step number lies beyond the run.
        """
        found: set[int] = set()
        for item in self.items:
            if item == "start":
                found.add(0)
            elif item == "end":
                found.add(num_steps)
            elif item.endswith("%"):
                share = float(item[:-1]) / 100
                if share in (0, 1):
                    found.add(int(share * num_steps))
                elif num_steps > 1:
                    found.add(min(max(int(share * num_steps + 0.5), 1), num_steps - 1))
            elif item.startswith("every "):
                found.update(range(int(item[6:]), num_steps, int(item[6:])))
            elif int(item) > num_steps:
                raise ValueError(
                    f"refinement step {item} lies beyond this run of {num_steps} steps; "
                    f'use a step from 0 to {num_steps}, or a share like "50%"'
                )
            else:
                found.add(int(item))
        return tuple(sorted(found))

    def __str__(self) -> str:
        return ", ".join(self.items) or "none"


def _check(item: str) -> str:
    if item in ("start", "end") or re.fullmatch(r"\d+", item):
        return item
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", item):
        if float(share[1]) > 100:
            raise ValueError(f"refinement schedule: {item!r} is more than 100% of the run; use 0% to 100%")
        return f"{share[1]}%"
    if (every := re.fullmatch(r"every (\d+)(?: steps?)?", item)) and int(every[1]) > 0:
        return f"every {every[1]}"
    raise ValueError(f"cannot read {item!r} as a refinement schedule; {_HELP}")
