"""Ways to refine besides stopping and asking: prompts written beforehand, answers that come later, runs that are played again;
and prompts that are longer than the encoders."""

import threading

import pytest
import torch

from promptloop_pipeline import (
    FunctionRefiner,
    NoOpRefiner,
    Refinement,
    RefinerError,
    ScheduleRefiner,
    attach,
    load_schedule,
    prompt_schedule,
    save_schedule,
)
from promptloop_pipeline.pipelines.budget import fit_to, token_limits

from .conftest import Maker

CAT, DOG, CAR, BOAT = "a red cat", "one blue dog", "a green car", "a wet boat"


def same(a, b) -> bool:
    return torch.equal(a, b)


def written(prompts):
    """A refiner that can see, and answers by step."""
    return FunctionRefiner(lambda view: prompts.get(view.step))


def played(host, prompts, request=CAT, **changes):
    """The picture of a blind schedule: what every other way to the same prompts is held against."""
    refiner = ScheduleRefiner(prompts)
    return attach(host.pipe)(request, refiner=refiner, refine_at=refiner.refine_at, **host.kwargs(**changes)).images


# --- prompts written beforehand -------------------------------------------------------------------------------------------


def test_a_priori_equals_the_schedule_that_was_written(host):
    views, begun = [], []
    refiner = FunctionRefiner(lambda v: views.append((v, len(begun))) or {1: DOG, 3: CAR}.get(v.step))
    handle = (getattr(host.pipe, "unet", None) or host.pipe.transformer).register_forward_hook(lambda *_: begun.append(1))
    try:
        out = attach(host.pipe)(CAT, refiner=refiner, refine_at="1, 2, 3", apriori=True, **host.kwargs())
    finally:
        handle.remove()
    assert same(out.images, played(host, {1: DOG, 3: CAR}))
    assert [(v.step, v.prompt, v.image, n) for v, n in views] == [(1, CAT, None, 0), (2, DOG, None, 0), (3, DOG, None, 0)]
    assert [[t.after for t in v.turns] for v, _ in views] == [[], [DOG], [DOG, DOG]], "what is planned already is seen"
    assert [(t.step, t.before, t.after, t.image) for t in out.trajectories[0].turns] == [
        (1, CAT, DOG, None), (2, DOG, DOG, None), (3, DOG, CAR, None),
    ]  # fmt: skip


def test_a_priori_that_changes_nothing_is_bit_identical(host):
    stock = host.pipe(CAT, **host.kwargs()).images
    refiner = FunctionRefiner(lambda v: None)
    assert same(attach(host.pipe)(CAT, refiner=refiner, refine_at="start, 2", apriori=True, **host.kwargs()).images, stock)


def test_a_priori_still_looks_at_the_end(host):
    views = []
    refiner = FunctionRefiner(lambda v: views.append(v) or {1: DOG}.get(v.step))
    attach(host.pipe)(CAT, refiner=refiner, refine_at="1, end", apriori=True, **host.kwargs())
    assert [(v.step, v.image is None) for v in views] == [(1, True), (5, False)]
    assert views[1].prompt == DOG


def test_a_failure_in_the_plan_costs_its_turn(host):
    def fail(view):
        if view.step == 1:
            raise TimeoutError("no answer")
        return DOG

    out = attach(host.pipe)(CAT, refiner=FunctionRefiner(fail), refine_at="1, 3", apriori=True, **host.kwargs())
    assert same(out.images, played(host, {3: DOG}))
    assert [(t.step, t.after, t.error) for t in out.trajectories[0].turns] == [
        (1, CAT, "TimeoutError: no answer"), (3, DOG, None),
    ]  # fmt: skip
    with pytest.raises(RefinerError, match="step 1: the refiner failed: TimeoutError"):
        attach(host.pipe)(CAT, refiner=FunctionRefiner(fail), refine_at="1, 3", apriori=True, strict=True, **host.kwargs())


def test_a_planned_prompt_that_cannot_be_encoded_is_not_taken_for_the_one_in_use(host, monkeypatch):
    original = type(host.pipe).encode_prompt

    def encode(*args, **kwargs):
        if DOG in str(args[1:]) + str(kwargs):
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(type(host.pipe), "encode_prompt", encode)
    out = attach(host.pipe)(CAT, refiner=written({1: DOG, 4: CAR}), refine_at="1, 3, 4", apriori=True, **host.kwargs())
    monkeypatch.undo()
    assert [(t.before, t.after, t.boundary) for t in out.trajectories[0].turns] == [
        (CAT, CAT, "encode"), (CAT, CAT, None), (CAT, CAR, None),
    ]  # fmt: skip
    assert same(out.images, played(host, {4: CAR}))


# --- answers that come later ----------------------------------------------------------------------------------------------


def test_an_answer_acts_exactly_so_many_steps_later(host):
    for latency, prompts, acts in (
        (1, {1: DOG, 2: CAR}, {2: DOG, 3: CAR}),
        (2, {0: DOG, 2: CAR}, {2: DOG, 4: CAR}),
        (3, {1: DOG}, {4: DOG}),
    ):
        refine_at = ScheduleRefiner(prompts).refine_at
        out = attach(host.pipe)(CAT, refiner=written(prompts), refine_at=refine_at, asynchronous=latency, **host.kwargs())
        assert same(out.images, played(host, acts))
        turns = out.trajectories[0].turns
        assert [(t.step, t.applied, t.after) for t in turns] == [(k, k + latency, prompts[k]) for k in prompts]
        assert [t.image is None for t in turns] == [k == 0 for k in prompts]
        assert all({"refiner", "encode"} <= set(t.seconds) for t in turns)


def test_answers_that_keep_the_prompt_are_bit_identical(host):
    stock = host.pipe(CAT, **host.kwargs()).images
    for asynchronous in (1, 2, True):
        for refiner in (FunctionRefiner(lambda v: None), NoOpRefiner()):
            out = attach(host.pipe)(CAT, refiner=refiner, refine_at="start, 2, end", asynchronous=asynchronous, **host.kwargs())
            assert same(out.images, stock)
    assert out.trajectories[0].turns[-1].step == 5


def test_an_answer_is_taken_at_the_first_step_after_it_came(makers):
    host = makers.setdefault("sd", Maker("sd"))
    for release in range(4):
        come = threading.Event()

        class Slow:
            def refine(self, views, come=come):
                assert come.wait(60)
                return [Refinement(DOG)]

        def callback(pipe, i, t, kwargs, come=come, release=release):
            if i == release:
                come.set()
                joined(pipe, i, t, kwargs)
            return kwargs

        kwargs = host.kwargs(callback_on_step_end=callback)
        out = attach(host.pipe)(CAT, refiner=Slow(), refine_at="start, 2", asynchronous=True, **kwargs)
        assert same(out.images, played(host, {release + 1: DOG}))
        turns = {t.step: t for t in out.trajectories[0].turns}
        assert (turns[0].after, turns[0].applied) == (DOG, release + 1)
        left_out = release + 1 > 2
        assert turns[2].notes == (("left out: the refiner was still busy with step 0",) if left_out else ())


def test_a_turn_that_is_due_meanwhile_is_left_out(host):
    asked = []
    refiner = FunctionRefiner(lambda v: asked.append(v.step) or f"{v.prompt}!")
    out = attach(host.pipe)(CAT, refiner=refiner, refine_at="1, 2, 3, 4", asynchronous=2, **host.kwargs())
    assert asked == [1, 3]
    assert [(t.step, t.applied, t.after, t.notes) for t in out.trajectories[0].turns] == [
        (2, None, CAT, ("left out: the refiner was still busy with step 1",)),
        (1, 3, CAT + "!", ()),
        (4, None, CAT + "!", ("left out: the refiner was still busy with step 3",)),
        (3, None, CAT + "!", ("the refiner's answer came too late to act",)),
    ]  # fmt: skip
    assert same(out.images, played(host, {3: CAT + "!"}))


def test_a_failure_aside_is_recorded(host):
    def fail(view):
        raise TimeoutError("no answer")

    stock = host.pipe(CAT, **host.kwargs()).images
    for refine_at in ("1", "4"):  # in time, and too late to act
        loop = attach(host.pipe, refiner=FunctionRefiner(fail), refine_at=refine_at, asynchronous=2)
        with pytest.raises(RefinerError, match=f"step {refine_at}: the refiner failed: TimeoutError: no answer"):
            loop(CAT, strict=True, **host.kwargs(callback_on_step_end=joined))
        out = loop(CAT, **host.kwargs(callback_on_step_end=joined))
        assert same(out.images, stock)
        assert [(t.error, t.boundary) for t in out.trajectories[0].turns] == [("TimeoutError: no answer", "refiner")]


def joined(pipe, i, t, kwargs):
    """A callback that waits until the refiner has answered."""
    for thread in threading.enumerate():
        if thread.name == "promptloop-refiner":
            thread.join(60)
    return kwargs


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("exception", [Cancelled, KeyboardInterrupt])
def test_cancel_from_aside_gets_through(host, exception):
    def cancel(view):
        raise exception

    for refine_at in ("1", "4"):
        loop = attach(host.pipe, refiner=FunctionRefiner(cancel), refine_at=refine_at, asynchronous=2, cancel=(Cancelled,))
        with pytest.raises(exception):
            loop(CAT, **host.kwargs(callback_on_step_end=joined))


def test_an_interrupt_waits_for_nobody(makers):
    host, never = makers.setdefault("sd", Maker("sd")), threading.Event()

    class Endless:
        def refine(self, views):
            never.wait(60)
            return [Refinement() for _ in views]

    def callback(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            attach(host.pipe)(
                CAT, refiner=Endless(), refine_at="start", asynchronous=True, callback_on_step_end=callback, **host.kwargs()
            )
        assert [t.name for t in threading.enumerate() if not t.daemon] == [threading.main_thread().name]
    finally:
        never.set()


def test_modes_that_exclude_each_other(host):
    with pytest.raises(ValueError, match="apriori and asynchronous exclude each other"):
        attach(host.pipe)(CAT, refiner=NoOpRefiner(), apriori=True, asynchronous=True, **host.kwargs())


# --- played again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"asynchronous": 2}, {"apriori": True}], ids=str)
@pytest.mark.parametrize("prompts", [{0: DOG, 2: CAR}, {1: DOG, 3: CAT}, {}], ids=["start", "later", "nothing"])
def test_a_run_is_played_again_bit_by_bit(host, prompts, options, tmp_path):
    out = attach(host.pipe)(CAT, refiner=written(prompts), refine_at="start, 1, 2, 3, end", **options, **host.kwargs())
    again = load_schedule(save_schedule(out.trajectories[0], tmp_path / "schedule.json"))
    assert again == prompt_schedule(out.trajectories[0])
    assert same(played(host, again), out.images)
    assert same(played(host, again, request="something else"), out.images)


def test_a_batch_is_played_again(host):
    refiner = FunctionRefiner(lambda v: {(0, CAT): BOAT, (3, CAT): CAR, (2, DOG): CAT}.get((v.step, v.request)))
    out = attach(host.pipe)([CAT, DOG], refiner=refiner, refine_at="start, 2, 3", **host.kwargs(1, 2))
    again = ScheduleRefiner([prompt_schedule(t) for t in out.trajectories])
    assert again.refine_at == "start, 2, 3"
    assert same(attach(host.pipe)([CAT, DOG], refiner=again, refine_at=again.refine_at, **host.kwargs(1, 2)).images, out.images)
    with pytest.raises(RefinerError, match="2 schedules for a batch of 1 samples"):
        attach(host.pipe)(CAT, refiner=again, refine_at="start", strict=True, **host.kwargs())


# --- longer than the encoders ---------------------------------------------------------------------------------------------


def long_prompt(limit: int) -> str:
    """One that no encoder of so many tokens holds, whatever a word is to it."""
    return ", ".join(["a red cat", "one blue dog", "a green car"] * limit)


def test_a_prompt_over_the_budget_is_cut_at_a_clause_and_noted(host):
    prompt = long_prompt(77)
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: prompt}), refine_at="1", **host.kwargs())
    (turn,) = out.trajectories[0].turns
    assert prompt.startswith(turn.after + ", "), "ends where a clause ends"
    (note,) = turn.notes
    assert note.startswith(f"too long for the text encoder, cut after {turn.after[-40:]!r}; left out: ")
    limits = token_limits(host.pipe, host.kwargs())
    assert any(len(tokenizer(turn.after).input_ids) <= limit for tokenizer, limit in limits)
    longer = prompt[: prompt.index(",", len(turn.after) + 1)]
    assert all(len(tokenizer(longer).input_ids) > limit for tokenizer, limit in limits), "not one clause less than fits"
    assert same(out.images, played(host, {1: turn.after}))


def test_a_prompt_within_the_budget_is_left_as_it_is(host):
    fit = fit_to(host.pipe, host.kwargs())
    for prompt in ("", CAT, CAT + ".", " " + CAT + ", "):
        assert fit(prompt) == prompt
    once = fit(long_prompt(77))
    assert fit(once) == once


def test_without_trim_all_is_handed_on(host):
    prompt = long_prompt(77)
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: prompt}), refine_at="1", trim=False, **host.kwargs())
    (turn,) = out.trajectories[0].turns
    assert (turn.after, turn.notes, turn.error) == (prompt, (), None)


def test_the_request_is_never_touched(host):
    request = long_prompt(77)
    seen = []
    refiner = FunctionRefiner(lambda v: seen.append((v.request, v.prompt)) or {1: request}.get(v.step))
    out = attach(host.pipe)(request, refiner=refiner, refine_at="start, 1", **host.kwargs())
    assert seen == [(request, request)] * 2
    assert [(t.after, t.notes) for t in out.trajectories[0].turns] == [(request, ())] * 2, "nor where it is answered with"
    assert same(out.images, host.pipe(request, **host.kwargs()).images)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_long_encoder_beside_clip_gives_the_budget(name, makers):
    host = makers.setdefault(name, Maker(name))
    lengths = {}
    for asked in (16, 77, 200):
        kwargs = host.kwargs(max_sequence_length=asked)
        limits = [limit for _, limit in token_limits(host.pipe, kwargs)]
        assert limits == ([77, 77, asked] if name == "sd3" else [77, asked])
        fitting = fit_to(host.pipe, kwargs)(long_prompt(200))
        lengths[asked] = len(host.pipe.tokenizer(fitting, verbose=False).input_ids)
    assert 60 < lengths[16] == lengths[77] <= 77 < 180 < lengths[200] <= 200
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: long_prompt(20)}), refine_at="1",
                            **host.kwargs(max_sequence_length=200))  # fmt: skip
    assert len(host.pipe.tokenizer(out.trajectories[0].turns[0].after, verbose=False).input_ids) > 180


def test_without_clauses_it_is_cut_at_a_word(makers):
    host = makers.setdefault("sd", Maker("sd"))
    fit = fit_to(host.pipe, {})
    words = " ".join(["word"] * 40)
    assert words.startswith(fit(words) + " ") and len(fit(words)) > 60
    assert 0 < len(fit("w" * 400)) < 80
    decimals = "a lens of f/1.8 and a very long exposure of 1,000 seconds " + "in the night " * 10
    assert "1,000 seconds in the night" in fit(decimals), "no clause ends within a number"
