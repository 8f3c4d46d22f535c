"""Do no harm: the better of the refined and the untouched picture, for each sample."""

import numpy as np
import pytest
import torch

import promptloop_pipeline
from promptloop_pipeline import FunctionRefiner, NoOpRefiner, Refinement, RefinerError, ScheduleRefiner, attach
from promptloop_pipeline.trajectory import load, save

from .conftest import Maker

CAT, DOG, CAR = "a red cat", "one blue dog", "a green car"
REFINED = {"refiner": ScheduleRefiner({1: DOG}), "refine_at": "1"}
TYPES = ("latent", "pil", "np", "pt")


class Preferring:
    """A reward that likes the pictures of the first, or of the second call: those of the refined, or of the untouched run."""

    name = "preferring"

    def __init__(self, *calls):
        self.calls, self.seen = list(calls), []

    def __call__(self, images, prompts, **context):
        self.seen.append((images, prompts))
        value = self.calls[len(self.seen) - 1]
        if isinstance(value, Exception):
            raise value
        return value if isinstance(value, list) else [value] * len(images)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def one(makers):
    """A single family, where it does not matter which."""
    return makers.setdefault("sd", Maker("sd"))


@pytest.mark.parametrize("output_type", TYPES)
def test_the_better_picture_is_returned(host, output_type):
    def kwargs():
        return host.kwargs(output_type=output_type)

    stock = host.pipe(CAT, **kwargs()).images
    refined = attach(host.pipe)(CAT, **REFINED, **kwargs()).images
    assert not same(stock, refined)
    for scores, kept, expected in (((0, 1), "untouched", stock), ((1, 0), "refined", refined), ((1, 1), "untouched", stock)):
        reward = Preferring(*scores)
        out = attach(host.pipe)(CAT, **REFINED, gate=reward, **kwargs())
        assert type(out.images) is type(stock) and same(out.images, expected)
        (t,) = out.trajectories
        (other,) = t.others
        assert t.meta["gate"] == {
            "reward": "preferring", "kept": kept, "runs": 2, "seconds": t.meta["gate"]["seconds"],
        }  # fmt: skip
        assert set(t.meta["gate"]["seconds"]) == {"untouched", "reward"}
        mine, theirs = (t, other) if kept == "refined" else (other, t)
        assert (mine.scores, theirs.scores) == ({"preferring": scores[0]}, {"preferring": scores[1]})
        assert [len(mine.turns), len(theirs.turns)] == [1, 0]
        assert (t.request, other.request, other.others) == (CAT, CAT, [])
        assert t.meta["seed"] == other.meta["seed"] == 1
        assert [requests for _, requests in reward.seen] == [[CAT]] * 2, "scored against the user's own words"
        assert all(image.mode == "RGB" and image.size == (32, 32) for images, _ in reward.seen for image in images)
        for seen, of in zip(reward.seen, (mine, theirs), strict=True):
            if output_type != "latent":
                assert seen[0][0].tobytes() == of.image.tobytes()
        if output_type == "pil":
            assert t.image.tobytes() == out.images[0].tobytes()


def test_each_sample_on_its_own(host):
    untouched = host.pipe([CAT, DOG, CAR], **host.kwargs(1, 2, 3)).images
    refiner = FunctionRefiner(lambda v: {CAT: "a wet boat", CAR: "a boat"}.get(v.request))
    options = {"refiner": refiner, "refine_at": "1, 3"}
    refined = attach(host.pipe)([CAT, DOG, CAR], **options, **host.kwargs(1, 2, 3)).images
    reward = Preferring([0.1, 0.2, 0.3], [0.0, 0.2, 0.4])
    out = attach(host.pipe)([CAT, DOG, CAR], **options, gate=reward, **host.kwargs(1, 2, 3))
    assert same(out.images, torch.stack([refined[0], untouched[1], untouched[2]]))
    assert [t.meta["gate"]["kept"] for t in out.trajectories] == ["refined", "untouched", "untouched"]
    assert [len(t.turns) for t in out.trajectories] == [2, 2, 0], "the looks that changed nothing stay on record"
    assert [len(t.others) for t in out.trajectories] == [1, 0, 1], "what was not changed has no other picture"
    assert [t.meta["gate"]["runs"] for t in out.trajectories] == [2, 2, 2]


def test_several_images_of_each_prompt(host):
    def kwargs(**more):
        return host.kwargs(1, 2, 3, 4, num_images_per_prompt=2, **more)

    untouched = host.pipe([CAT, CAR], **kwargs()).images
    refined = attach(host.pipe)([CAT, CAR], **REFINED, **kwargs()).images
    reward = Preferring([1, 0, 0, 1], [0, 1, 1, 0])
    out = attach(host.pipe)([CAT, CAR], **REFINED, gate=reward, **kwargs())
    assert same(out.images, torch.stack([refined[0], untouched[1], untouched[2], refined[3]]))
    assert reward.seen[0][1] == [CAT, CAT, CAR, CAR]
    pair = attach(host.pipe)([CAT, CAR], **REFINED, gate=Preferring(0, 1), **kwargs(return_dict=False))
    assert same(pair[0], untouched)
    assert [t.meta["gate"]["kept"] for t in pair[-1]] == ["untouched"] * 4


@pytest.mark.parametrize("several", [False, True])
def test_random_states_are_as_after_one_run(host, several):
    def generators():
        return [torch.Generator().manual_seed(s) for s in (1, 2)] if several else torch.Generator().manual_seed(1)

    def call(pipe, **options):
        given = generators()
        torch.manual_seed(3)
        pipe([CAT, CAR], **options, **host.kwargs(generator=given))
        return [torch.rand(2, generator=g) for g in (given if several else [given])] + [torch.rand(2)]

    expected = call(host.pipe)
    for scores in ((0, 1), (1, 0)):
        assert same(torch.cat(call(attach(host.pipe), **REFINED, gate=Preferring(*scores))), torch.cat(expected))


def test_without_a_generator_the_global_state_is_the_same_in_both_runs(host):
    torch.manual_seed(3)
    stock, drawn = host.pipe(CAT, **host.kwargs(generator=None)).images, torch.rand(2)
    torch.manual_seed(3)
    out = attach(host.pipe)(CAT, **REFINED, gate=Preferring(0, 1), **host.kwargs(generator=None))
    assert same(out.images, stock)
    assert same(torch.rand(2), drawn)


def test_what_a_refiner_draws_is_not_drawn_again(one):
    """It may sample with torch's global generator: the next run must not begin from where this one did."""
    drawn = []

    class Sampling:
        def refine(self, views):
            drawn.append(float(torch.rand(1)))
            return [Refinement(DOG) for _ in views]

    for _ in range(2):
        attach(one.pipe)(CAT, refiner=Sampling(), refine_at="1", gate=Preferring(0, 1), **one.kwargs())
    assert drawn[0] != drawn[1]


def test_no_second_run_where_nothing_was_changed(host):
    begun = []

    def callback(pipe, i, t, kwargs):
        begun.append(i)
        return kwargs

    stock = host.pipe(CAT, **host.kwargs()).images
    there_and_back = FunctionRefiner(lambda v: {0: CAT, 5: DOG}.get(v.step))
    for refiner, refine_at in ((NoOpRefiner(), "1, 3"), (there_and_back, "start, 1, end")):
        reward = Preferring(0.5)
        out = attach(host.pipe)(
            CAT, refiner=refiner, refine_at=refine_at, gate=reward, callback_on_step_end=callback, **host.kwargs()
        )
        assert same(out.images, stock)
        (t,) = out.trajectories
        assert (t.meta["gate"]["kept"], t.meta["gate"]["runs"], t.others, t.scores) == ("untouched", 1, [], {"preferring": 0.5})
        assert len(t.turns) >= 2
    assert len(begun) == 10


def test_callbacks_are_called_in_both_runs(host):
    def halve(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.5} if i == 1 else {}

    stock = host.pipe(CAT, callback_on_step_end=halve, **host.kwargs()).images
    out = attach(host.pipe)(CAT, **REFINED, gate=Preferring(0, 1), callback_on_step_end=halve, **host.kwargs())
    assert same(out.images, stock)


BROKEN = [
    TimeoutError("no answer"), [], [1, 2], [float("nan")], ["best"], ["1"], "1", 1.0, {"a": 1}, [[1]],
]  # fmt: skip


class Returning:
    """What it is asked to return, as it is; raised if it is an exception."""

    def __init__(self, refined, untouched):
        self.answers = [refined, untouched]

    def __call__(self, images, prompts, **context):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("broken", BROKEN, ids=repr)
def test_a_reward_that_fails_keeps_the_untouched_picture(one, broken):

    def kwargs():
        return one.kwargs(output_type="pil", num_inference_steps=2)

    stock = one.pipe(CAT, **kwargs()).images
    loop = attach(one.pipe, **REFINED)
    refined = loop(CAT, **kwargs()).images
    for answers in ((broken, [0.0]), ([1.0], broken)):
        out = loop(CAT, gate=Returning(*answers), **kwargs())
        assert same(out.images, stock)
        gate = out.trajectories[0].meta["gate"]
        assert (gate["kept"], gate["runs"]) == ("untouched", 2)
        assert gate["error"].startswith("the reward failed: ")
        assert same([out.trajectories[0].others[0].image], refined), "no picture is lost"
        with pytest.raises(RefinerError, match="the reward failed: ") as e:
            loop(CAT, gate=Returning(*answers), strict=True, **kwargs())
        assert same(e.value.output.images, refined)
        assert same([e.value.trajectories[0].others[0].image], stock)


@pytest.mark.parametrize(
    ("refined", "untouched", "kept"),
    [
        ([None], [None], "untouched"), ([1], [None], "refined"), ([None], [-1], "untouched"), ((0.5,), (0.25,), "refined"),
        (torch.tensor([0.5]), torch.tensor([0.25]), "refined"), (np.float32([1]), np.float32([1]), "untouched"),
        ([True], [False], "refined"),
    ],
)  # fmt: skip
def test_scores_that_are_compared(one, refined, untouched, kept):
    out = attach(one.pipe)(CAT, **REFINED, gate=Returning(refined, untouched), **one.kwargs())
    assert out.trajectories[0].meta["gate"]["kept"] == kept
    assert "error" not in out.trajectories[0].meta["gate"]


def test_a_plain_function_will_do_and_is_named(one, tmp_path):

    def brightness(images, prompts):
        values = [float(np.mean(image)) for image in images]
        for image in images:
            image.paste((0, 0, 0), (0, 0, 9, 9))  # on a copy
        return values

    out = attach(one.pipe)(CAT, **REFINED, gate=brightness, **one.kwargs(output_type="pil"))
    (t,) = out.trajectories
    assert t.meta["gate"]["reward"] == "brightness" and set(t.scores) == {"brightness"}
    assert t.scores["brightness"] == float(np.mean(out.images[0])), "a reward that draws on what it sees, draws on a copy"
    save(out.trajectories, tmp_path)
    (read,) = load(tmp_path)
    assert (read.scores, read.meta, read.others[0].scores) == (t.scores, t.meta, t.others[0].scores)
    assert same([read.image, read.others[0].image], [t.image, t.others[0].image])


class Cancelled(Exception):
    pass


class Wanted(BaseException):
    pass


@pytest.mark.parametrize("exception", [Cancelled, Wanted, KeyboardInterrupt])
def test_cancel_from_a_reward_gets_through_with_the_finished_picture(one, exception):
    def cancel(images, prompts):
        raise exception

    refined = attach(one.pipe)(CAT, **REFINED, **one.kwargs()).images
    with pytest.raises(exception) as e:
        attach(one.pipe)(CAT, **REFINED, gate=cancel, cancel=[Cancelled, Wanted], **one.kwargs())
    assert same(e.value.output.images, refined)
    assert [t.after for t in e.value.trajectories[0].turns] == [DOG]


def test_an_interrupted_run_is_not_gated(host):
    def stop_at(*calls):
        count = iter(range(100))

        def callback(pipe, i, t, kwargs):
            if next(count) in calls:
                pipe._interrupt = True
            return kwargs

        return callback

    options = {**REFINED, "strict": True}
    expected = attach(host.pipe)(CAT, **options, **host.kwargs(callback_on_step_end=stop_at(2))).images
    reward = Preferring(0, 1)
    out = attach(host.pipe)(CAT, **options, gate=reward, **host.kwargs(callback_on_step_end=stop_at(2)))
    assert same(out.images, expected)
    gate = out.trajectories[0].meta["gate"]
    assert (gate["kept"], gate["runs"], reward.seen) == ("refined", 1, [])
    assert "the run was interrupted" in gate["error"]

    refined = attach(host.pipe)(CAT, **options, **host.kwargs()).images
    out = attach(host.pipe)(CAT, **options, gate=reward, **host.kwargs(callback_on_step_end=stop_at(7)))
    assert same(out.images, refined), "the finished picture, not the unfinished one"
    gate = out.trajectories[0].meta["gate"]
    assert (gate["kept"], gate["runs"], reward.seen, out.trajectories[0].others) == ("refined", 2, [], [])
    assert "the run was interrupted" in gate["error"]


def test_an_untouched_run_that_fails_does_not_cost_the_refined_picture(one):
    def failing():
        count = iter(range(100))

        def callback(pipe, i, t, kwargs):
            if next(count) == 7:
                raise MemoryError("full")
            return kwargs

        return callback

    expected = attach(one.pipe)(CAT, **REFINED, **one.kwargs()).images
    out = attach(one.pipe)(CAT, **REFINED, gate=Preferring(0, 1), **one.kwargs(callback_on_step_end=failing()))
    assert same(out.images, expected)
    assert out.trajectories[0].meta["gate"]["error"] == "the untouched run failed: MemoryError: full"
    with pytest.raises(RefinerError, match="the untouched run failed"):
        attach(one.pipe)(CAT, **REFINED, gate=Preferring(0, 1), strict=True, **one.kwargs(callback_on_step_end=failing()))


def test_what_is_no_reward_is_refused_before_anything_runs(one):
    for gate, message in (("clip", "gate is str 'clip'; give a reward: a function"), (Preferring, "the class Preferring")):
        with pytest.raises(TypeError, match=message):
            attach(one.pipe)(CAT, **REFINED, gate=gate, **one.kwargs())


def test_without_a_refiner_there_is_nothing_to_gate(one):
    stock = one.pipe(CAT, **one.kwargs()).images
    assert same(attach(one.pipe, gate=Preferring())(CAT, **one.kwargs()).images, stock)


def test_the_named_classes_take_a_gate(one):
    pipe = promptloop_pipeline.PromptLoopStableDiffusionPipeline(**one.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(CAT, **REFINED, gate=Preferring(0, 1), **one.kwargs())
    assert same(out.images, one.pipe(CAT, **one.kwargs()).images)
