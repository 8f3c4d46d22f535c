"""An evaluation as a whole: every arm rendered, every picture scored, nothing done twice.

folder/<arm>/trajectories.jsonl   what was rendered, with images/ beside it
folder/<arm>/scores.jsonl         what rewards said of it
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..reward import Judgement, Reward
from ..rewards.combine import RewardSpec, weighted_sum
from ..trajectory import FILE, Trajectory, iterate
from .arms import ArmSpec, better, render, take_up, with_rivals
from .benchmarks import Benchmark
from .figures import TOTAL
from .measures import SIDE, arm_measures, embedding_similarity, figure, text_encoder_of, token_recall
from .scoring import failed, read_scores, score_arm

# What lies among the scores beside rewards: judged looks, and drift by the pipeline's own encoder. No reward has such a name.
LOOKS, DRIFT = "(looks)", "(drift)"


BUILT_IN = "1"  # by what these judge; another number where they change


@dataclass(frozen=True)
class Samples:
    """What every arm renders: each request `per_prompt` times, with seeds that count up."""

    requests: list[str]
    context: dict[str, list[Any]]
    seed: int

    @classmethod
    def of(cls, benchmark: Benchmark, seed: int, per_prompt: int) -> Samples:
        def repeated(values: Sequence[Any]) -> list[Any]:
            return [v for v in values for _ in range(per_prompt)]

        return cls(repeated(benchmark.requests), {k: repeated(v) for k, v in benchmark.context.items()}, seed)

    def __len__(self) -> int:
        return len(self.requests)


def evaluate(
    benchmark: Benchmark,
    chosen: Sequence[ArmSpec],
    samples: Samples,
    specs: Sequence[RewardSpec],
    folder: Path,
    *,
    model: Callable[[], Any],
    refiner: Callable[[], Any],
    rewards: Mapping[str, Callable[[], Reward]],
    by: Mapping[str, str],
    refine_at: str,
    batch: int,
    reward_batch: int,
    begin: Callable[[], None] = lambda: None,
    progress: Callable[[str, int, int], Callable[[int], Any]] = lambda what, total, done: lambda n: None,
    **options: Any,
) -> dict[str, list[Trajectory]]:
    """Every sample of every arm, with its scores and without its pictures, in order.

    folder: one evaluation; other requests or seeds in it are refused. by: by what each reward judges, any text: what was scored
    by another is scored anew. model, refiner, rewards: how to load them; only what is needed is loaded, the refiner is gone
    before an arm that needs none (it may load one of its own), the generator before the first reward comes, and each reward before
    the next. begin: called before anything is written, when generator and refiner are loaded. progress: (what, how many there are,
    how many are done) -> what to call with each further number. options: of the pipeline's call.
    """
    arms = with_rivals(chosen, benchmark.arms)
    done = {a.name: take_up(folder / a.name, samples.requests, a.seeds(samples.seed, len(samples))) for a in arms}
    missing = [a for a in arms if len(done[a.name]) < len(samples)]
    unread = [a for a in arms if a in missing or _todo(folder, a.name, DRIFT, done[a.name].values())]
    the_refiner = refiner() if any(a.needs_refiner for a in missing) else None
    pipe = model() if unread else None
    begin()
    for arm in sorted(unread, key=lambda a: not a.needs_refiner):
        if not arm.needs_refiner:
            the_refiner = None
            _free()  # of the arm before, too
        render(
            pipe, arm, the_refiner, refine_at, samples.requests, arm.seeds(samples.seed, len(samples)), done[arm.name],
            folder / arm.name, batch=batch, sources=samples.context.get("source"),
            progress=progress(arm.name, len(samples), len(done[arm.name])), **options,
        )  # fmt: skip
        score_arm(folder / arm.name, DRIFT, _Drift(pipe), {}, batch=reward_batch, by=BUILT_IN, pictures=False)
    pipe = the_refiner = None
    _free()
    wanted: dict[str, Callable[[], Reward]] = dict(rewards)
    if (looks := benchmark.looks) is not None:
        wanted[LOOKS] = lambda: looks
    by = {**by, LOOKS: BUILT_IN, DRIFT: BUILT_IN}
    for name, load in wanted.items():
        _score(
            name, load, by[name], {a.name: list(done[a.name].values()) for a in arms}, samples, folder, reward_batch, progress
        )
    return _with_scores(benchmark, chosen, done, specs, by, folder)


def _score(
    name: str, load: Callable[[], Reward], by: str, arms: Mapping[str, Sequence[Trajectory]], samples: Samples, folder: Path,
    batch: int,
    progress: Callable[[str, int, int], Callable[[int], Any]],
) -> None:  # fmt: skip
    todo = {arm: _todo(folder, arm, name, of, by) for arm, of in arms.items()}
    if not any(todo.values()):
        return
    reward = load()
    for arm, count in todo.items():
        if count:
            score_arm(
                folder / arm, name, reward, samples.context, batch=batch, by=by, previews=name == LOOKS,
                progress=progress(f"{name}: {arm}", len(samples), len(samples) - count),
            )  # fmt: skip
    del reward
    _free()


def _todo(folder: Path, arm: str, name: str, found: Iterable[Trajectory], by: str = BUILT_IN) -> int:
    said = read_scores(folder / arm, {name: by}).get(name, {})
    return sum(failed(said.get(t.id)) for t in found)


class _Drift:
    """How close the last prompt is to the request for the pipeline's own text encoder; None where it has none that compares texts."""

    def __init__(self, pipe: Any) -> None:
        self.encoder = text_encoder_of(pipe)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return [j.score for j in self.judge(images, prompts, **context)]

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        if self.encoder is None:
            return [Judgement(None) for _ in prompts]
        last = context["refined"]
        found = embedding_similarity(prompts, last, self.encoder), token_recall(prompts, last, self.encoder.tokens)
        cut = [[self.encoder.cut(text) for text in both] for both in zip(prompts, last)]
        return [Judgement(e, {"tokens": t, "cut": c}) for e, t, c in zip(*found, cut, strict=True)]


def measures(found: Sequence[Trajectory], folder: Path) -> dict[str, Any]:
    """`arm_measures` of samples as they come from `evaluate`, with drift as it was recorded."""
    requests, several = [t.request for t in found], len({t.request for t in found}) < len(found)
    of = arm_measures([replace(t, image=image) for t, image in _thumbnails(found, folder)] if several else found)
    drift = [t.meta["details"].get(DRIFT, {}) for t in found]
    if any("cut" in d for d in drift):
        of["drift"] |= {
            "embedding": figure([t.meta["drift"] for t in found], requests),
            "tokens": figure([d.get("tokens") for d in drift], requests),
            "cut": {part: sum(d["cut"][k] for d in drift if "cut" in d) for k, part in enumerate(("requests", "prompts"))},
        }
    of["memory"] = {
        name: max(t.meta["memory"][name]["peak"] for t in found if name in t.meta["memory"])
        for name in {name for t in found for name in t.meta["memory"]}
    }
    return of


def _thumbnails(found: Sequence[Trajectory], folder: Path) -> Iterator[tuple[Trajectory, Any]]:
    small = {}
    for arm in {t.meta["arm"] for t in found}:
        for t in iterate(folder / arm / FILE, previews=False):
            small[arm, t.id] = None if t.image is None else t.image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    for t in found:
        yield t, small[t.meta["arm"], t.id]


def _with_scores(
    benchmark: Benchmark, chosen: Sequence[ArmSpec], done: Mapping[str, Mapping[int, Trajectory]], specs: Sequence[RewardSpec],
    by: Mapping[str, str], folder: Path,
) -> dict[str, list[Trajectory]]:  # fmt: skip
    found: dict[str, list[Trajectory]] = {}
    names, (main, *_) = [s.name for s in specs], metrics_of(specs)
    for arm, by_position in done.items():
        said = read_scores(folder / arm, by)
        of = [by_position[i] for i in range(len(by_position))]
        raw = {name: [said[name][t.id].score for t in of] for name in names}
        if main == TOTAL:
            lost = [any(failed(said[s.name][t.id]) for s in specs if not s.held_out) for t in of]  # half a total is none
            raw = {TOTAL: [None if out else v for v, out in zip(weighted_sum(raw, specs), lost)], **raw}
        found[arm] = [
            replace(
                t,
                scores={name: values[k] for name, values in raw.items()},
                meta=t.meta
                | {
                    "details": {name: said[name][t.id].details for name in said if t.id in said[name]},
                    "drift": said[DRIFT][t.id].score,
                },
            )
            for k, t in enumerate(of)
        ]
    chooses = benchmark.choose_by if benchmark.choose_by in names else main
    return {
        a.name: list(map(better, found[a.second_of], found[a.name], [chooses] * len(found[a.name])))
        if a.second_of
        else found[a.name]
        for a in chosen
    }


def metrics_of(specs: Sequence[RewardSpec]) -> list[str]:
    """Names of what is reported, the one that matters first: the total where several rewards count, or one not in its own unit."""
    counted = [s for s in specs if not s.held_out]
    names = [s.name for s in [*counted, *(s for s in specs if s.held_out)]]
    own_unit = len(counted) < 2 and all(s.weight == 1 and s.cap is None for s in counted)
    return names if own_unit else [TOTAL, *names]


def with_pictures(found: Sequence[Trajectory], folder: Path) -> list[Trajectory]:
    """The same samples with all of their pictures, as they lie on disk."""
    place = {(t.meta["arm"], t.id): k for k, t in enumerate(found)}
    whole = list(found)
    for arm in {arm for arm, _ in place}:
        for t in iterate(folder / arm / FILE):
            if (k := place.pop((arm, t.id), None)) is not None:
                whole[k] = replace(t, scores=found[k].scores, meta=found[k].meta)
            if not any(a == arm for a, _ in place):
                break
    return whole


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
