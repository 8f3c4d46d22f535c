"""Whole pictures, again and again, and the best of them."""

import numpy as np
import pytest
import torch

from promptloop_pipeline import (
    FunctionRefiner,
    NoOpRefiner,
    Refinement,
    RefinerError,
    ScheduleRefiner,
    attach,
    prompt_schedule,
    refine_in_rounds,
)
from promptloop_pipeline.trajectory import load, save

from .conftest import Maker

CAT, DOG, CAR, BOAT = "a red cat", "one blue dog", "a green car", "a wet boat"


class Stories:
    """A refiner that goes through a list of prompts of each request; None keeps the prompt."""

    def __init__(self, **stories):
        self.stories, self.views = stories, []

    def refine(self, views):
        self.views.append(views)
        return [Refinement(self.stories[v.request.split()[-1]][len(v.turns)]) for v in views]


class Scores:
    """A reward that goes through a list of answers, one for each round."""

    def __init__(self, *answers):
        self.answers, self.seen = list(answers), []

    def __call__(self, images, prompts, **context):
        self.seen.append((images, prompts))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def one(makers):
    """A single family, where it does not matter which."""
    return makers.setdefault("sd", Maker("sd"))


def stock(host, prompt, *seeds, **changes):
    return host.pipe(prompt, **host.kwargs(*seeds, **changes)).images


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_round_is_returned(host, best):
    refiner, reward = Stories(cat=[DOG, CAR]), Scores(*([float(k == best)] for k in (1, 2, 3)))
    out = refine_in_rounds(host.pipe, CAT, refiner=refiner, reward=reward, **host.kwargs())
    prompts = [CAT, DOG, CAR]
    assert same(out.images, stock(host, prompts[best - 1])), "every round is the stock call from the same seed"
    (t,) = out.trajectories
    assert (t.request, t.prompt, t.scores) == (CAT, prompts[best - 1], {"Scores": 1.0})
    assert (t.meta["round"], t.meta["rounds"], t.meta["cost"]["runs"], t.meta["seed"]) == (best, 3, 3, 1)
    assert set(t.meta["cost"]["seconds"]) == {"run", "refiner", "reward"}
    rounds = sorted([t, *t.others], key=lambda t: t.meta["round"])
    assert [(r.meta["round"], r.prompt, len(r.turns), r.scores["Scores"]) for r in rounds] == [
        (k + 1, prompts[k], k, float(k + 1 == best)) for k in range(3)
    ]  # fmt: skip
    assert [prompts for _, prompts in reward.seen] == [[CAT]] * 3, "against the user's own words"


def test_the_refiner_sees_finished_pictures_and_all_that_was_said(host):
    refiner, reward = Stories(cat=[DOG, CAR]), Scores([0], [0], [0])
    refine_in_rounds(host.pipe, CAT, refiner=refiner, reward=reward, **host.kwargs(output_type="pil"))
    ((first,), (second,)) = refiner.views
    assert [(v.step, v.num_steps, v.sigma) for v in (first, second)] == [(5, 5, 0.0)] * 2
    assert [(v.request, v.prompt, [t.after for t in v.turns]) for v in (first, second)] == [(CAT, CAT, []), (CAT, DOG, [DOG])]
    assert same([first.image, second.image], [*stock(host, CAT, output_type="pil"), *stock(host, DOG, output_type="pil")])
    assert same([second.turns[0].image], [first.image])


def test_each_sample_has_its_own_best_round(host, tmp_path):
    def pictures(*prompts):
        return stock(host, list(prompts), 1, 2, 3, output_type="pt")

    refiner = Stories(cat=[DOG, CAR], boat=[None, "a boat"], car=[None, None])
    reward = Scores([0.1, 0.2, 0.3], [0.3, 0.2, 0.3], [0.2, 0.4, 0.3])
    kwargs = host.kwargs(1, 2, 3, output_type="pt")
    out = refine_in_rounds(host.pipe, [CAT, BOAT, CAR], refiner=refiner, reward=reward, **kwargs)
    assert same(out.images[0:1], pictures(DOG, BOAT, CAR)[0:1])
    assert same(out.images[1:2], pictures(CAR, "a boat", CAR)[1:2])
    assert same(out.images[2:3], pictures(CAT, BOAT, CAR)[2:3])
    assert type(out.images) is type(pictures(CAT, BOAT, CAR))
    assert [t.meta["round"] for t in out.trajectories] == [2, 3, 1]
    assert [[o.meta["round"] for o in t.others] for t in out.trajectories] == [[1, 3], [1], []], "no picture is listed twice"
    assert [prompt_schedule(t) for t in out.trajectories] == [{0: DOG}, {0: "a boat"}, {0: CAR}]
    assert [[turn.after for turn in t.turns] for t in out.trajectories] == [[DOG], [BOAT, "a boat"], [CAR, CAR]]
    save(out.trajectories, tmp_path)
    for read, t in zip(load(tmp_path), out.trajectories, strict=True):
        assert (read.meta, read.scores, [o.prompt for o in read.others]) == (t.meta, t.scores, [o.prompt for o in t.others])
        assert [turn.applied for turn in read.turns] == [turn.applied for turn in t.turns]


def test_the_best_round_can_be_played_again(one):
    refiner, reward = Stories(cat=[DOG, CAR]), Scores([0], [0], [1])
    out = refine_in_rounds(one.pipe, CAT, refiner=refiner, reward=reward, **one.kwargs())
    again = ScheduleRefiner(prompt_schedule(out.trajectories[0]))
    assert again.prompts == {0: CAR}
    assert same(attach(one.pipe)(CAT, refiner=again, refine_at=again.refine_at, **one.kwargs()).images, out.images)


def test_it_ends_where_nothing_is_changed(host):
    begun = []

    def callback(pipe, i, t, kwargs):
        begun.append(i)
        return kwargs

    def keep(view):
        return Refinement(reasoning="all there")

    for refiner in (NoOpRefiner(), FunctionRefiner(keep)):
        begun.clear()
        kwargs = host.kwargs(callback_on_step_end=callback)
        out = refine_in_rounds(host.pipe, CAT, refiner=refiner, reward=Scores([0.5]), rounds=4, **kwargs)
        assert len(begun) == 5
        assert same(out.images, stock(host, CAT))
        (t,) = out.trajectories
        assert (t.meta["cost"]["runs"], t.others, len(t.turns)) == (1, [], 1)
    assert t.turns[0].reasoning == "all there", "the look that found nothing to do is on record"
    out = refine_in_rounds(host.pipe, CAT, refiner=Stories(cat=[DOG, None]), reward=Scores([0], [1]), rounds=4, **host.kwargs())
    assert (out.trajectories[0].meta["cost"]["runs"], len(out.trajectories[0].turns)) == (2, 2)
    assert same(out.images, stock(host, DOG))


def test_one_round_is_the_stock_call(one):
    refiner = Stories()
    out = refine_in_rounds(one.pipe, CAT, refiner=refiner, reward=Scores([0.5]), rounds=1, **one.kwargs())
    assert same(out.images, stock(one, CAT))
    assert (refiner.views, out.trajectories[0].scores) == ([], {"Scores": 0.5})
    pair = refine_in_rounds(one.pipe, CAT, refiner=refiner, reward=Scores([0.5]), rounds=1, **one.kwargs(return_dict=False))
    assert same(pair[0], out.images)
    assert pair[-1][0].prompt == CAT


def test_random_states_are_as_after_one_run(host):
    def call(run, *seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        torch.manual_seed(3)
        run(generators or None)
        return torch.stack([torch.rand(2, generator=g) for g in generators] + [torch.rand(2)])

    prompts = [CAT, CAR]
    for seeds in ((), (1, 2)):
        expected = call(lambda g: host.pipe(prompts, **host.kwargs(generator=g)), *seeds)
        refiner = Stories(cat=[DOG, CAR], car=[BOAT, None])
        reward = Scores([0, 0], [0, 1], [1, 0])
        drawn = call(
            lambda g: refine_in_rounds(host.pipe, prompts, refiner=refiner, reward=reward, **host.kwargs(generator=g)), *seeds
        )
        assert same(drawn, expected)


def test_what_a_refiner_draws_is_not_drawn_again(one):
    drawn = []

    def sampling(view):
        drawn.append(float(torch.rand(1)))
        return [DOG, CAR, BOAT][len(view.turns)]

    kwargs = one.kwargs(generator=None)
    torch.manual_seed(3)
    refine_in_rounds(one.pipe, CAT, refiner=FunctionRefiner(sampling), reward=Scores(*[[0]] * 4), rounds=4, **kwargs)
    assert len(set(drawn)) == 3


def test_a_failing_refiner_ends_it_and_is_on_record(one):
    def fail(view):
        if view.turns:
            raise TimeoutError("no answer")
        return DOG

    for scores, prompt in (([0], [1]), DOG), (([1], [0]), CAT):
        out = refine_in_rounds(one.pipe, CAT, refiner=FunctionRefiner(fail), reward=Scores(*scores), **one.kwargs())
        assert same(out.images, stock(one, prompt))
        (t,) = out.trajectories
        assert [turn.error for r in (t, *t.others) for turn in r.failures] == ["TimeoutError: no answer"]
    with pytest.raises(RefinerError, match="step 5: the refiner failed: TimeoutError") as e:
        refine_in_rounds(one.pipe, CAT, refiner=FunctionRefiner(fail), reward=Scores([0], [1]), strict=True, **one.kwargs())
    assert e.value.trajectories[0].prompt == DOG
    assert same(e.value.output.images, stock(one, CAT))


def test_a_reward_that_fails(one):
    late = Scores([0.5], TimeoutError("no answer"), [0.75])
    out = refine_in_rounds(one.pipe, CAT, refiner=Stories(cat=[DOG, CAR]), reward=late, **one.kwargs())
    assert same(out.images, stock(one, CAR))
    (t,) = out.trajectories
    assert t.meta["error"] == "the reward of round 2 failed: TimeoutError: no answer"
    assert [(o.prompt, o.scores) for o in t.others] == [(CAT, {"Scores": 0.5}), (DOG, {})]

    for nonsense in (TimeoutError("no answer"), [], [float("nan")]):
        refiner = Stories(cat=[DOG, CAR])
        out = refine_in_rounds(one.pipe, CAT, refiner=refiner, reward=Scores(nonsense), **one.kwargs())
        assert same(out.images, stock(one, CAT)), "nothing can be shown to be better"
        assert (out.trajectories[0].meta["cost"]["runs"], refiner.views) == (1, [])
        assert out.trajectories[0].meta["error"].startswith("the reward of round 1 failed: ")
        with pytest.raises(RefinerError, match="the reward of round 1 failed"):
            refine_in_rounds(one.pipe, CAT, refiner=refiner, reward=Scores(nonsense), strict=True, **one.kwargs())


@pytest.mark.parametrize(
    ("scores", "best"), [((None, None, None), CAT), ((None, -1.0, None), DOG), ((0.0, None, 0.0), CAT), ((0, 1, 1), DOG)]
)
def test_scores_that_do_not_apply(one, scores, best):
    reward = Scores(*([s] for s in scores))
    out = refine_in_rounds(one.pipe, CAT, refiner=Stories(cat=[DOG, CAR]), reward=reward, **one.kwargs())
    assert out.trajectories[0].prompt == best


class Cancelled(Exception):
    pass


class Wanted(BaseException):
    pass


@pytest.mark.parametrize("exception", [Cancelled, Wanted, KeyboardInterrupt])
def test_cancel_gets_through(one, exception):

    def cancel(*args):
        raise exception

    for loop in (
        {"refiner": FunctionRefiner(cancel), "reward": Scores([1])},
        {"refiner": Stories(cat=[DOG]), "reward": cancel},
    ):
        with pytest.raises(exception) as e:
            refine_in_rounds(one.pipe, CAT, **loop, cancel=(Cancelled,), **one.kwargs())
        assert same(e.value.output.images, stock(one, CAT))
        assert e.value.trajectories[0].request == CAT


def test_an_interrupt_between_two_rounds_stops_the_refiner(one):
    class Thinking:
        on_token = None

        def refine(self, views):
            one.pipe._interrupt = True  # as another thread would
            self.on_token()
            raise AssertionError("it was not stopped")

    out = refine_in_rounds(one.pipe, CAT, refiner=Thinking(), reward=Scores([1]), strict=True, **one.kwargs())
    assert same(out.images, stock(one, CAT))
    (t,) = out.trajectories
    assert (t.prompt, t.meta["cost"]["runs"], t.others) == (CAT, 1, [])
    assert t.turns[0].notes == ("not applied: the run was interrupted",)


def counted(what, *calls):
    """A callback that does something in these calls."""
    count = iter(range(100))

    def callback(pipe, i, t, kwargs):
        if next(count) in calls:
            what(pipe)
        return kwargs

    return callback


def test_an_interrupted_round_is_not_compared(host):
    def stop(pipe):
        pipe._interrupt = True

    for call, runs in ((2, 1), (7, 2)):
        refiner, reward = Stories(cat=[DOG, CAR]), Scores([0.5])
        kwargs = host.kwargs(callback_on_step_end=counted(stop, call))
        out = refine_in_rounds(host.pipe, CAT, refiner=refiner, reward=reward, strict=True, **kwargs)
        (t,) = out.trajectories
        assert (t.prompt, t.meta["interrupted"], t.meta["cost"]["runs"]) == (CAT, runs == 1, runs)
        assert [o.meta["interrupted"] for o in t.others] == [True] * (runs - 1)
    assert same(out.images, stock(host, CAT))


def test_a_round_that_fails_does_not_cost_the_earlier_ones(one):
    def fail(pipe):
        raise MemoryError("full")

    loop = {"refiner": Stories(cat=[DOG, CAR]), "reward": Scores([0.5], [1])}
    out = refine_in_rounds(one.pipe, CAT, **loop, **one.kwargs(callback_on_step_end=counted(fail, 12)))
    assert same(out.images, stock(one, DOG))
    assert out.trajectories[0].meta["error"] == "round 3 failed: MemoryError: full"
    loop = {"refiner": Stories(cat=[DOG, CAR]), "reward": Scores([0.5], [1])}
    with pytest.raises(RefinerError, match="round 2 failed: MemoryError") as e:
        refine_in_rounds(one.pipe, CAT, **loop, strict=True, **one.kwargs(callback_on_step_end=counted(fail, 7)))
    assert same(e.value.output.images, stock(one, CAT))
    with pytest.raises(MemoryError):  # there is nothing yet that could be kept
        refine_in_rounds(one.pipe, CAT, **loop, **one.kwargs(callback_on_step_end=counted(fail, 1)))


def test_a_prompt_over_the_budget_is_cut_and_noted(host):
    prompt = ", ".join([DOG, CAR] * 99)
    out = refine_in_rounds(host.pipe, CAT, refiner=Stories(cat=[prompt, None]), reward=Scores([0], [1]), **host.kwargs())
    (cut, _) = out.trajectories[0].turns
    assert prompt.startswith(cut.after + ", ") and "too long for the text encoder" in cut.notes[0]


def test_an_attached_pipeline_keeps_its_own_defaults(one):
    kwargs = one.kwargs()
    attached = attach(one.pipe, refiner=FunctionRefiner(lambda v: BOAT), refine_at="start", height=kwargs.pop("height"))
    out = refine_in_rounds(attached, CAT, refiner=Stories(cat=[DOG, None]), reward=Scores([0], [1]), **kwargs)
    assert same(out.images, stock(one, DOG)), "the loop within a run is not part of it"


def test_bad_input(one):
    def call(prompt=CAT, **changes):
        refine_in_rounds(one.pipe, prompt, **{"refiner": NoOpRefiner(), "reward": Scores([1]), **one.kwargs(), **changes})

    for rounds in (0, -1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="rounds is .*; use a number from 1 on"):
            call(rounds=rounds)
    with pytest.raises(ValueError, match="num_images_per_prompt is 2, but each picture needs a prompt of its own; repeat"):
        call(num_images_per_prompt=2)
    with pytest.raises(TypeError, match="reward is str 'clip'; give a reward"):
        call(reward="clip")
    with pytest.raises(TypeError, match="is no refiner"):
        call(refiner="gpt")
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        call(prompt=[])
    with pytest.raises(TypeError, match="refine_at is of the loop within a run"):
        call(refine_at="50%")
    with pytest.raises(TypeError, match="cancels is no argument of StableDiffusionPipeline, nor .*; did you mean cancel\\?"):
        call(cancels=(KeyError,))
