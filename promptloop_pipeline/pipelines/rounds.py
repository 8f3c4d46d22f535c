"""Whole pictures, again and again: the refiner looks at a finished one and writes the prompt of the next (Idea2Img,
arXiv 2310.08541), instead of steering a single run midway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from ..refiner import Refiner
from ..reward import Reward, reward_name
from ..session import Cancel, Session
from ..trajectory import Trajectory
from .budget import fit_to
from .classes import LOOP, Attached, check_names, stock_call
from .engine import Run, interrupted, meta_of, named_arguments, sources_of
from .gate import RandomState, again_from, beats, check_reward, failure, put_together, score


def refine_in_rounds(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    refiner: Refiner,
    reward: Reward,
    rounds: int = 3,
    strict: bool = False,
    cancel: Cancel = (),
    **kwargs: Any,
) -> Any:
    """Runs a pipeline up to `rounds` times; between the runs the refiner sees the finished picture and may rewrite the prompt.

        out = refine_in_rounds(pipe, "three red cubes", refiner=refiner, reward=reward, num_inference_steps=30, generator=generator)
        out.images, out.trajectories

    Every round begins from the same random state, that of the generators given, or the global one: what differs between rounds is
    the prompt alone. The first round is the stock call. Afterwards the random states are as after one run. `kwargs` are the
    pipeline's; defaults of an attached pipeline count, those of its loop do not.

    Returns the stock output with, for each sample, the picture that `reward` scores highest against the user's request, the earlier
    one where they are equal; `.trajectories` are those of these pictures, with the turns that led to them (looks at finished pictures:
    `step` is the end, `applied` 0) and the other rounds in `others`. A round that had the sample's prompt of an earlier one made the
    same picture again and is not among them. `meta["round"]` counts from 1, `meta["cost"]` tells the runs and seconds of the batch.

    The refiner is shown all earlier looks in `view.turns`. It ends early when it changes no prompt, or when a run is interrupted. A
    round whose reward fails cannot be chosen; if the first one's does, nothing can be shown to be better, and the first is returned.
    Failures are in `meta["error"]`; with `strict` they raise RefinerError, `cancel` types get through, as in `attach`, and what there
    is already is then found in the exception's `.trajectories` and `.output`.

    Raises ValueError for rounds below 1 or `num_images_per_prompt`, TypeError for what is no reward or refiner, and
    for arguments of the loop within a run.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is {rounds!r}; use a number from 1 on")
    if loop := [k for k in kwargs if k in LOOP]:
        raise TypeError(
            f"{loop[0]} is of the loop within a run; refine_in_rounds only looks at finished pictures, leave it out"
        )
    check_reward(reward, "reward")
    if isinstance(pipe, Attached):
        pipe, kwargs = pipe.pipe, {k: v for k, v in pipe.defaults.items() if k not in LOOP} | kwargs
    check_names(stock_call(pipe), pipe, kwargs, ("rounds", "reward", "refiner", "strict", "cancel"))
    kwargs = named_arguments(
        pipe, stock_call(pipe), (), {**kwargs, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
    )
    if (n := kwargs.get("num_images_per_prompt") or 1) > 1:
        raise ValueError(
            f"num_images_per_prompt is {n}, but each picture needs a prompt of its own; repeat the prompt in a list"
        )
    requests = [prompt] if isinstance(prompt, str) else list(prompt)
    session = Session(
        requests, refiner, "end", strict=strict, cancel=cancel, meta=meta_of(pipe, kwargs, len(requests)),
        sources=sources_of(pipe, kwargs, len(requests)), fit=fit_to(pipe, kwargs), interrupted=lambda: interrupted(pipe),
    )  # fmt: skip
    outputs: list[Any] = []
    tries: list[dict[str, Trajectory]] = [{} for _ in requests]  # by prompt, in the order of the rounds
    record: dict[str, Any] = {"rounds": rounds, "reward": reward_name(reward), "cost": {"runs": 0, "seconds": {}}}
    try:
        _make(pipe, kwargs, session, reward, rounds, outputs, tries, record)
    except BaseException as e:  # KeyboardInterrupt too, and a host's own
        e.trajectories = [_best(mine, record) for mine in tries if mine]  # type: ignore[attr-defined]
        e.output = outputs[0] if outputs else None  # type: ignore[attr-defined]
        raise
    trajectories = [_best(mine, record) for mine in tries]
    output = put_together(outputs, [t.meta["round"] - 1 for t in trajectories])
    if isinstance(output, tuple):
        return (*output, trajectories)
    output.trajectories = trajectories
    return output


def _make(
    pipe: Any, kwargs: dict[str, Any], session: Session, reward: Reward, rounds: int, outputs: list[Any],
    tries: list[dict[str, Trajectory]], record: dict[str, Any],
) -> None:  # fmt: skip
    """The rounds; what they give is put where the caller finds it, whatever happens."""
    start, seconds = RandomState(kwargs), dict.fromkeys(("run", "refiner", "reward"), 0.0)
    requests, record["cost"]["seconds"] = [t.request for t in session.trajectories], seconds
    for k in range(1, rounds + 1):
        prompts = session.prompts
        kwargs = kwargs | {"prompt": prompts[0] if isinstance(kwargs["prompt"], str) else prompts}
        run = Run(pipe, stock_call(pipe), Session(prompts, session.refiner, "none"), kwargs, None)  # not asked within a run
        clock = time.perf_counter()
        try:
            with again_from(start, kwargs) if k > 1 else nullcontext():
                outputs.append(run())
            pictures = run.pictures(outputs[-1])
        except Exception as e:
            if k == 1:
                raise
            _note(record, failure(session, f"round {k}", e))
            return
        seconds["run"] += time.perf_counter() - clock
        record["cost"]["runs"] = k
        fresh = [i for i, prompt in enumerate(prompts) if prompt not in tries[i]]
        for i in fresh:
            t, image = session.trajectories[i], None if run.latent else pictures[i]
            meta = t.meta | {"interrupted": run.interrupted, "round": k}
            tries[i][prompts[i]] = Trajectory(t.request, list(t.turns), image, meta=meta)
        if run.interrupted:
            return
        clock = time.perf_counter()
        try:
            scores = score(reward, pictures, requests)
        except Exception as e:
            _note(record, failure(session, f"the reward of round {k}", e))
            if k == 1:
                return
        else:
            for i in fresh:
                tries[i][prompts[i]].scores[record["reward"]] = scores[i]
        seconds["reward"] += time.perf_counter() - clock
        if k == rounds:
            return
        clock = time.perf_counter()
        session.start(run.session.num_steps)
        session.finish(pictures)
        seconds["refiner"] += time.perf_counter() - clock
        for t, mine, prompt in zip(session.trajectories, tries, prompts, strict=True):
            t.turns[-1] = replace(t.turns[-1], applied=0)  # in the next round
            if t.prompt == prompt:
                mine[prompt].turns = list(t.turns)
        if session.prompts == prompts:
            return


def _note(record: dict[str, Any], error: str) -> None:
    record["error"] = "; ".join(e for e in (record.get("error"), error) if e)


def _best(tries: dict[str, Trajectory], record: dict[str, Any]) -> Trajectory:
    name, (best, *rivals) = record["reward"], tries.values()
    for t in rivals:
        if beats(t.scores.get(name), best.scores.get(name)):
            best = t
    best.others = [t for t in tries.values() if t is not best]
    best.meta |= record | {"cost": {**record["cost"], "seconds": dict(record["cost"]["seconds"])}}
    return best
