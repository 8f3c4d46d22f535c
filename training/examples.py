"""From trajectories to examples for supervised fine-tuning: which turns to learn from, what they were asked, and what the answer
should have been, in the form that the policy's template asks for. No model here.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptloop_pipeline.chat import Conversation
from promptloop_pipeline.chat.text import ANSWER, THINK, clean
from promptloop_pipeline.evaluation.arms import RAW
from promptloop_pipeline.evaluation.scoring import Found, read_scores
from promptloop_pipeline.refiner import View
from promptloop_pipeline.refiners.mllm import MAX_PIXELS, MLLMRefiner
from promptloop_pipeline.refiners.parsing import KEEP, Parsed, parse_answer
from promptloop_pipeline.refiners.template import Template
from promptloop_pipeline.rewards.combine import RewardSpec, weighted_sum
from promptloop_pipeline.trajectory import FILE, Trajectory, Turn, iterate

TAKEN = "examples"
Tally = dict[str, Counter[str]]  # folder -> how many of its turns became examples, and how many were left out for each reason


@dataclass(frozen=True)
class Selection:
    """Which trajectories and turns are good enough; totals are of `specs`, and there is one wherever one is asked for.

    min_score: the least total. min_gain: how much better than the untouched picture of the same request and seed. best_of_request:
    only so many of each request, the best. keep_share: the largest share of examples that keep the prompt, 0 to 1; those that are
    too many are dropped at random, by `seed`.
    """

    specs: Sequence[RewardSpec] = ()
    min_score: float | None = None
    min_gain: float | None = None
    best_of_request: int | None = None
    keep_share: float = 1.0
    seed: int = 0

    @property
    def scores(self) -> bool:
        return any(v is not None for v in (self.min_score, self.min_gain, self.best_of_request))


@dataclass(frozen=True)
class Example:
    """asked: with its picture, in the size that the model sees. kept: whether the answer keeps the prompt. folder: where it is from."""

    asked: Conversation
    answer: str
    request: str
    kept: bool
    folder: str

    @property
    def pictures(self) -> list[Any]:
        return [p["image"] for m in self.asked if isinstance(m, dict) for p in m["content"] if p["type"] == "image"]

    def key(self) -> str:
        """The same for examples that are the same."""
        pixels = [f"{p.size} {hashlib.blake2b(p.tobytes()).hexdigest()}" for p in self.pictures]
        return hashed([json.dumps(self.asked, default=lambda picture: picture.mode), self.answer, *pixels])


def hashed(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# --- answers ------------------------------------------------------------------------------------------------------------


def write_answer(prompt: str | None, reasoning: str, template: Template) -> str | None:
    """What the model should have said: the inverse of `parse_answer`. prompt: None keeps the one in use. The reasoning stands first
    where the template asks for <think>. None where parsing would not give back the same, as for a prompt that is all in quotes."""
    said = KEEP if prompt is None else " ".join(prompt.split())
    thought = ""
    if template.tags and any("<think>" in section for section in template.sections.values()):
        thought = ANSWER.sub(" ", THINK.sub(" ", clean(reasoning))).strip()
    text = f"<answer>{said}</answer>" if template.tags else said
    text = f"<think>{thought}</think>\n{text}" if thought else text
    return text if parse_answer(text, template.tags) == Parsed(None if prompt is None else said, thought, True) else None


def answer_of(turn: Turn, template: Template) -> tuple[str | None, str]:
    """(what the policy is to say, ""), or (None, why this turn teaches nothing). What the teacher said is left as it is where it
    has the form and was done; else it is written anew from the reasoning and the prompt."""
    if turn.error is not None:
        return None, "failed"
    if turn.step >= turn.num_steps and turn.applied is None:
        return None, "after the last step"
    if turn.raw:
        raw = (
            f"<think>{turn.raw}" if (first := THINK.search(turn.raw)) and first[1] else turn.raw
        )  # a chat template had opened it
        said = parse_answer(raw, template.tags)
        done = said.error is None and (turn.before if said.prompt is None else said.prompt) == turn.after
        if done and said.format_ok and template.tags:
            return raw.strip(), ""
        if not done and not turn.changed:
            return None, "not done (a guard kept the prompt, or the run was cut short)"
    elif turn.notes and not turn.changed:
        return None, "not asked"
    answer = write_answer(turn.after if turn.changed else None, turn.reasoning, template)
    return answer, "" if answer else "cannot be said in the template's form"


# --- examples -----------------------------------------------------------------------------------------------------------


def gather(
    folders: Sequence[str | Path], template: Template, select: Selection = Selection(), max_pixels: int = MAX_PIXELS
) -> tuple[list[Example], Tally]:
    """Examples of all folders, in order, each once; and how many turns became one or did not, and why.

    A trajectory without turns is an untouched one, to compare with; so are those of a folder `raw` beside an arm of an evaluation.
    Raises FileNotFoundError, and ValueError naming a damaged line.
    """
    tally: Tally = {str(folder): Counter() for folder in folders}
    good = _good(list(tally), select, tally) if select.scores else None
    asking = MLLMRefiner(_NoModel(), template, max_pixels=max_pixels)
    found: dict[str, Example] = {}
    for folder in tally:
        for t in iterate(folder, pictures=False):
            if good is not None and (folder, t.id) not in good:
                continue
            for k, turn in enumerate(t.turns):
                answer, why = answer_of(turn, template)
                view = View(t.request, turn.before, turn.step, turn.num_steps, turn.sigma, turn.image, tuple(t.turns[:k]))
                asked = asking.conversation(view)
                if answer is None or asked is None:
                    tally[folder][why or f"the template {template.name!r} asks nothing there"] += 1
                    continue
                example = Example(asked, answer, t.request, not turn.changed, folder)
                if found.setdefault(example.key(), example) is not example:
                    tally[folder]["there already"] += 1
    examples, kept = list(found.values()), [e for e in found.values() if e.kept]
    share, changing = select.keep_share, len(examples) - len(kept)
    most = len(kept) if share >= 1 else int(share / (1 - share) * changing + 1e-9)
    dropped = {id(e) for e in random.Random(select.seed).sample(kept, max(len(kept) - most, 0))}
    for e in examples:
        tally[e.folder]["more than keep_share allows" if id(e) in dropped else TAKEN] += 1
    return [e for e in examples if id(e) not in dropped], tally


def _good(folders: Sequence[str], select: Selection, tally: Tally) -> set[tuple[str, str]]:
    """(folder, id) of the trajectories that are good enough; the turns of the others are counted."""
    untouched: dict[tuple[str, int], float] = {}
    scored: list[tuple[str, Trajectory, float]] = []
    beside = {str(_home(f).parent / RAW.name) for f in folders} - {str(_home(f)) for f in folders}
    for folder in [*folders, *sorted(f for f in beside if Path(f, FILE).is_file())]:
        said = read_scores(_home(folder))
        for t in iterate(folder, pictures=False, previews=False):
            total = _total(t, said, select.specs)
            if not t.turns and total is not None and t.meta.get("seed") is not None:
                untouched[t.request, t.meta["seed"]] = total
            elif t.turns and folder in tally and total is None:
                tally[folder]["no score"] += len(t.turns)
            elif t.turns and folder in tally and total is not None:
                scored.append((folder, t, total))
    good: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for folder, t, total in sorted(scored, key=lambda row: -row[2]):  # stable: of equal ones the first
        before = untouched.get((t.request, t.meta.get("seed", -1)))
        if select.min_score is not None and total < select.min_score:
            tally[folder]["score below min_score"] += len(t.turns)
        elif select.min_gain is not None and before is None:
            tally[folder]["nothing untouched to compare with"] += len(t.turns)
        elif select.min_gain is not None and before is not None and total - before < select.min_gain:
            tally[folder]["gain below min_gain"] += len(t.turns)
        elif select.best_of_request is not None and len(good[t.request]) >= select.best_of_request:
            tally[folder]["not among the best of its request"] += len(t.turns)
        else:
            good[t.request].append((folder, t.id))
    return {key for of in good.values() for key in of}


def _home(folder: str) -> Path:
    return Path(folder) if Path(folder).is_dir() else Path(folder).parent


def _total(t: Trajectory, said: Found, specs: Sequence[RewardSpec]) -> float | None:
    raw = t.scores | {name: of[t.id].score for name, of in said.items() if t.id in of}
    if any(s.name not in raw for s in specs if not s.held_out):
        return None
    return weighted_sum({name: [value] for name, value in raw.items()}, specs)[0]


def told(tally: Tally) -> str:
    """In words, a line a folder."""
    lines = []
    for folder, of in tally.items():
        rest = ", ".join(f"{n} {why}" for why, n in of.most_common() if why != TAKEN)
        lines.append(f"{folder}: {of[TAKEN]} examples" + (f"; left out: {rest}" if rest else ""))
    return "\n".join(lines)


def check_folder(folder: Path) -> None:
    """Raises FileNotFoundError, naming what is inside where that has trajectories."""
    file = folder / FILE if folder.is_dir() else folder
    if file.is_file():
        return
    inside = sorted(f.parent.name for f in folder.glob(f"*/{FILE}")) if folder.is_dir() else []
    hint = f"; it has {', '.join(inside)}: name one of them, such as {folder / inside[0]}" if inside else ""
    raise FileNotFoundError(f"no trajectories at {folder}: expected a folder with {FILE}, or such a file{hint}")


class _NoModel:
    """Stands for a chat model where only what it would be asked matters."""

    sees = True

    def generate(self, conversations: Any, sampling: Any) -> Any:
        raise NotImplementedError
