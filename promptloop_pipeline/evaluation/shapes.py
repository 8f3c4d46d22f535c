"""What only the embedded shapes world can tell: its own arms, and how good each single look was.

Its stickers are seen by an exact pixel measure, so that for every preview it is known whether the prompt had to be changed,
and to what. All is judged on the preview that the host decoded, whatever the refiner was shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..refiner import Around, Refinement, Refiner, View
from ..reward import Judgement
from ..tiny.language import parse, system_caption, with_clear
from ..tiny.refiners import OracleRefiner, RotationRefiner, SingleShotRefiner, single_shot
from ..tiny.scenes import SLOTS, Spec, free_cells, plan
from ..tiny.verifier import sticker_amounts
from ..trajectory import Turn
from .arms import BEST_OF_2, LOOP, LOOP_NOIMAGE, RAW, SINGLE, ArmSpec
from .statistics import share

if TYPE_CHECKING:
    from PIL.Image import Image

THRESHOLD = 0.3  # the oracle's: the least amount of a sticker that counts as seen
# In shares of the run, so that they fit any number of steps; of 20 they are the steps of `headroom`: 8 to 15, and 2 to 11.
LATE = "start, " + ", ".join(f"{p}%" for p in range(40, 80, 5))
EARLY = "start, " + ", ".join(f"{p}%" for p in range(10, 60, 5))


class BlindRefiner(Around):
    """Another refiner's own caption at the start, then its free cells forbidden in turn without looking: the best of the
    rotations that `headroom` tried. A caption that gives no full layout is kept as it is."""

    looks = False

    def __init__(self, refiner: Refiner) -> None:
        super().__init__(refiner)
        self.rotation = RotationRefiner("spread", from_start=False)

    def refine(self, views: Sequence[View]) -> list[Refinement]:
        return self.refiner.refine(views) if views[0].step == 0 else [self._next(v) for v in views]

    def _next(self, view: View) -> Refinement:
        caption = view.turns[0].after
        try:
            if _complete(parse(caption)):
                return self.rotation.refine([replace(view, request=caption)])[0]
        except ValueError:  # nothing of this world, or too much of it
            pass
        return Refinement()


ARMS = (
    RAW,
    SINGLE,
    ArmSpec("blind", "single, then one free cell after another forbidden without looking", BlindRefiner, LATE),
    LOOP,
    LOOP_NOIMAGE,
    BEST_OF_2,
    ArmSpec("gold", "the gold caption, before the first step", lambda _: SingleShotRefiner(), "start", needs_refiner=False),
    ArmSpec("oracle", "gold, then repaired by an oracle that reads the x0-estimate through the verifier: an upper bound",
            lambda _: OracleRefiner(THRESHOLD), EARLY, needs_refiner=False),
)  # fmt: skip


def _complete(spec: Spec) -> bool:
    return all(o.size and o.quadrant for o in spec.objects)


def _caption(text: str) -> Spec | None:
    """What a complete caption of the system language says; None for a text that is none, to the letter."""
    try:
        spec = parse(text)
        return spec if _complete(spec) and system_caption(spec) == text else None
    except ValueError:
        return None


# --- single looks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One turn with a picture. needed: the oracle would have changed the prompt in force. right: the change names only stickers
    that are there, and nothing else is touched. agrees: the prompt is now what the oracle would have made it."""

    needed: bool
    changed: bool
    right: bool
    agrees: bool


def judge_look(request: str, turn: Turn) -> Judged:
    """Raises ValueError when the request names nothing of this world."""
    assert turn.image is not None  # there was something to look at
    spec = plan(parse(request))
    amounts = sticker_amounts(turn.image, spec.background or "black")
    wanted = oracle_prompt(request, turn.image) or turn.before
    before, after, right = _caption(turn.before), _caption(turn.after), False
    if turn.changed and before and after:
        same = after.background == before.background and sorted(map(str, after.objects)) == sorted(map(str, before.objects))
        free = free_cells(after.objects)
        right = same and bool(after.clear) and all(c in free and amounts[c] > THRESHOLD for c in after.clear)
    return Judged(wanted != turn.before, turn.changed, right, turn.after == wanted)


def oracle_prompt(request: str, image: Image) -> str | None:
    """What `OracleRefiner` answers to this picture, without its reasoning, which takes most of its time."""
    spec = plan(parse(request))
    if not spec.clean:
        return None
    amounts = sticker_amounts(image, spec.background or "black")
    cells = sorted(free_cells(spec.objects), key=lambda c: -amounts[c])
    found = [c for c in cells if amounts[c] > THRESHOLD][: SLOTS - len(spec.objects)]
    return with_clear(single_shot(request), tuple(found)) if found else None


def looks(images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
    """A reward in form only: each single look of the `trajectories`, judged, as details. The score is the share of looks after which
    the prompt is what the oracle would have made it; None for a run that never looked."""
    return [j.score for j in judged_looks(images, prompts, **context)]


def judged_looks(images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
    found = []
    for t in context["trajectories"]:
        of = [judge_look(t.request, turn) for turn in t.turns if turn.image is not None]
        score = sum(x.agrees for x in of) / len(of) if of else None
        found.append(Judgement(score, {"looks": [asdict(x) for x in of]}))
    return found


looks.judge = judged_looks  # type: ignore[attr-defined]  # as `Reward` says


def look_figures(details: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Shares over all turns with a picture, each with its counts and a 95% interval; {} for an arm that does not look."""
    looks = [[Judged(**x) for x in d.get("looks", ())] for d in details]
    if not any(looks):
        return {}
    every = [len(of) for of in looks]
    needed = [sum(x.needed for x in of) for of in looks]
    return {
        "change needed": share(needed, every),
        "right when needed": share([sum(x.needed and x.right for x in of) for of in looks], needed),
        "changed without need": share(
            [sum(x.changed and not x.needed for x in of) for of in looks], [a - b for a, b in zip(every, needed)]
        ),
        "as the oracle": share([sum(x.agrees for x in of) for of in looks], every),
    }
