"""What must hold for every family: the loop adds nothing that was not asked for, and does all that was."""

import inspect
import threading
import time

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, HeunDiscreteScheduler, KDPM2DiscreteScheduler
from PIL import Image

import promptloop_pipeline
from promptloop_pipeline import FunctionRefiner, NoOpRefiner, RefinerError, ScheduleRefiner, attach

from .factories import BETAS

CAT, DOG = "a red cat", "one blue dog, and a wet cat"


LOOKING = FunctionRefiner(lambda view: None)  # a no-op that is shown pictures


class SamplePrompts:
    """{(step, sample): prompt}; a sample is known by its request."""

    def __init__(self, prompts):
        self.prompts = prompts

    def refine(self, views):
        return [promptloop_pipeline.Refinement(self.prompts.get((v.step, v.request))) for v in views]


def clean(pipe) -> bool:
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return "step" not in vars(pipe.scheduler) and not any(m._forward_pre_hooks for m in modules)


def same(a, b) -> bool:
    return torch.equal(a, b)


@pytest.fixture
def stock(host):
    return host.pipe(CAT, **host.kwargs()).images


def test_no_op_is_bit_identical(host, stock):
    for refiner in (LOOKING, NoOpRefiner()):
        out = attach(host.pipe)(CAT, refiner=refiner, refine_at="start, 1, 3, end", **host.kwargs())
        assert same(out.images, stock)
    assert [t.step for t in out.trajectories[0].turns] == [0, 1, 3, 5]
    assert [t.error for t in out.trajectories[0].turns] == [None] * 4
    assert clean(host.pipe)


def test_same_prompt_is_bit_identical_even_when_it_is_swapped_in(host, stock):
    # away and back again before the denoiser runs: the conditioning that goes in was made by the swap
    loop = attach(host.pipe)
    out = loop(DOG, refiner=ScheduleRefiner({0: CAT}), refine_at="start", **host.kwargs())
    assert out.trajectories[0].turns[0].changed
    assert same(out.images, stock)
    out = loop(CAT, refiner=ScheduleRefiner({1: CAT, 3: CAT}), refine_at="1, 3", **host.kwargs())
    assert same(out.images, stock)


def test_swap_takes_effect_and_is_recorded(host, stock):
    out = attach(host.pipe)(CAT, refiner=FunctionRefiner(lambda v: DOG), refine_at="2", **host.kwargs())
    assert float((out.images - stock).abs().max()) > 1e-4
    (turn,) = out.trajectories[0].turns
    assert (turn.before, turn.after, turn.error) == (CAT, DOG, None)
    assert turn.image.size == (32, 32)
    assert set(turn.seconds) == {"preview", "refiner", "encode"}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_swap_at_k_equals_a_two_stage_run(host, k):
    """The second stage is the stock pipeline with the other prompt all along, fed with the first stage's latents at step k."""
    kept = {}

    def keep(pipe, i, t, kwargs):
        if i == k - 1:
            kept["latents"] = kwargs["latents"].clone()
        return kwargs

    def put(pipe, i, t, kwargs):
        if i == k - 1:
            kwargs["latents"] = kept["latents"].clone()
        return kwargs

    host.pipe(CAT, callback_on_step_end=keep, **host.kwargs())
    expected = host.pipe(DOG, callback_on_step_end=put, **host.kwargs()).images
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({k: DOG}), refine_at=k, **host.kwargs())
    assert torch.allclose(out.images, expected, atol=1e-5)


def test_refining_sample_1_leaves_sample_0_bit_identical(host):
    stock = host.pipe([CAT, "a green car"], **host.kwargs(1, 2)).images
    refiner = SamplePrompts({(1, "a green car"): DOG})
    out = attach(host.pipe)([CAT, "a green car"], refiner=refiner, refine_at="1", **host.kwargs(1, 2))
    assert same(out.images[0], stock[0])
    assert not same(out.images[1], stock[1])


def test_a_batch_equals_its_singles(host):
    refiner = SamplePrompts({(1, CAT): DOG, (3, "a green car"): "a boat"})
    loop = attach(host.pipe)
    batch = loop([CAT, "a green car"], refiner=refiner, refine_at="1, 3", **host.kwargs(1, 2)).images
    for i, (prompt, seed) in enumerate(((CAT, 1), ("a green car", 2))):
        single = loop(prompt, refiner=refiner, refine_at="1, 3", **host.kwargs(seed)).images
        assert torch.allclose(batch[i], single[0], atol=5e-4)  # the batch size alone changes kernels: 4e-5 in stock runs


def test_samples_of_one_prompt_are_refined_one_by_one(host):
    answers = iter([DOG, None, None, "a boat"])
    kwargs = host.kwargs(1, 2, 3, 4, num_images_per_prompt=2)
    stock = host.pipe([CAT, "a green car"], **kwargs).images
    kwargs = host.kwargs(1, 2, 3, 4, num_images_per_prompt=2)
    out = attach(host.pipe)([CAT, "a green car"], refiner=FunctionRefiner(lambda v: next(answers)), refine_at="2", **kwargs)
    assert [t.prompt for t in out.trajectories] == [DOG, CAT, "a green car", "a boat"]
    assert [t.meta["seed"] for t in out.trajectories] == [1, 2, 3, 4]
    assert [same(a, b) for a, b in zip(out.images, stock)] == [False, True, True, False]


def test_later_turns_build_on_earlier_ones(host):
    refiner = SamplePrompts({(1, CAT): DOG, (3, "a green car"): "a boat"})
    out = attach(host.pipe)([CAT, "a green car"], refiner=refiner, refine_at="1, 3", **host.kwargs(1, 2)).images
    first = attach(host.pipe)(
        [CAT, "a green car"], refiner=SamplePrompts({(1, CAT): DOG}), refine_at="1", **host.kwargs(1, 2)
    ).images
    assert same(out[0], first[0])  # the turn at 3 did not put the old prompt back
    assert not same(out[1], first[1])


def test_after_the_end_nothing_changes(host, stock):
    out = attach(host.pipe)(CAT, refiner=FunctionRefiner(lambda v: DOG), refine_at="end", **host.kwargs())
    assert same(out.images, stock)
    (turn,) = out.trajectories[0].turns
    assert (turn.step, turn.after) == (5, DOG)
    assert turn.image is not None


def test_step_beyond_the_run(host):
    with pytest.raises(ValueError, match="step 6 lies beyond this run of 5 steps"):
        attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="6", **host.kwargs())
    assert clean(host.pipe)


def test_negative_prompt_and_no_guidance(host):
    scale = "true_cfg_scale" if host.name == "flux" else "guidance_scale"
    for changes in ({"negative_prompt": "ugly, wrong", scale: 4.0}, {scale: 1.0}):
        expected = host.pipe(CAT, **host.kwargs(**changes)).images
        out = attach(host.pipe)(DOG, refiner=ScheduleRefiner({0: CAT}), refine_at="start", **host.kwargs(**changes)).images
        assert same(out, expected)
        swapped = attach(host.pipe)(CAT, refiner=ScheduleRefiner({2: DOG}), refine_at="2", **host.kwargs(**changes)).images
        assert not same(swapped, expected)


def test_negative_prompts_of_a_batch(host):
    scale = "true_cfg_scale" if host.name == "flux" else "guidance_scale"
    changes = {"negative_prompt": ["ugly", "wrong"], scale: 4.0}
    expected = host.pipe([CAT, CAT], **host.kwargs(1, 2, **changes)).images
    out = attach(host.pipe)(
        [DOG, CAT], refiner=SamplePrompts({(0, DOG): CAT}), refine_at="start", **host.kwargs(1, 2, **changes)
    ).images
    assert torch.allclose(out, expected, atol=1e-5)


def test_callback_of_the_user_is_called_and_its_changes_are_kept(host):
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        if i == 2:
            kwargs["latents"] = kwargs["latents"] * 0.5
        return kwargs

    expected = host.pipe(CAT, callback_on_step_end=callback, **host.kwargs()).images
    out = attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="1, 3", callback_on_step_end=callback, **host.kwargs())
    assert same(out.images, expected)
    assert seen == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("in_place", [False, True])
def test_conditioning_that_the_users_callback_sets_wins(host, in_place):
    def callback(pipe, i, t, kwargs):
        if i == 1 and in_place:
            kwargs["prompt_embeds"].mul_(0.5)
        elif i == 1:
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"] * 0.5
        return kwargs

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = host.pipe(CAT, **host.kwargs(), **options).images
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({3: DOG}), refine_at="3", **host.kwargs(), **options)
    assert same(out.images, expected)
    (turn,) = out.trajectories[0].turns
    assert (turn.after, turn.boundary) == (CAT, "encode"), "what was not applied must not be recorded as applied"
    assert "a callback has put its own conditioning" in turn.error


@pytest.mark.parametrize("name", ["sd", "embedded"])
def test_guidance_switched_off_midway_keeps_the_refined_prompt(name, makers):
    from .conftest import Maker

    host = makers.setdefault(name, Maker(name))

    def callback(pipe, i, t, kwargs):
        if i == 2:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    def run(prompt, **loop):
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        return attach(host.pipe)(prompt, **host.kwargs(), **options, **loop).images

    out = run(DOG, refiner=ScheduleRefiner({0: CAT}), refine_at="start")
    assert same(out, run(CAT))
    assert not same(out, run(DOG))


def test_exception_in_a_callback_leaves_the_pipe_as_it_was(host, stock):
    def callback(pipe, i, t, kwargs):
        raise ZeroDivisionError

    before = dict(vars(host.pipe))
    with pytest.raises(ZeroDivisionError):
        attach(host.pipe)(
            CAT, refiner=ScheduleRefiner({0: DOG}), refine_at="start", callback_on_step_end=callback, **host.kwargs()
        )
    assert clean(host.pipe)
    assert vars(host.pipe)["scheduler"] is before["scheduler"]
    assert same(host.pipe(CAT, **host.kwargs()).images, stock)


def test_interrupt_stops_at_once(host, stock):
    calls = []

    def callback(pipe, i, t, kwargs):
        calls.append(i)
        if i == 1:
            pipe._interrupt = True
        return kwargs

    views = []
    refiner = FunctionRefiner(lambda v: views.append(v.step) or f"{v.prompt}!")
    out = attach(host.pipe)(CAT, refiner=refiner, refine_at="1, 3", callback_on_step_end=callback, **host.kwargs())
    assert views == [1]
    assert calls == [0, 1]
    assert out.trajectories[0].meta["interrupted"] is True
    assert clean(host.pipe)
    assert same(host.pipe(CAT, **host.kwargs()).images, stock)


def test_interrupt_from_elsewhere_during_a_turn_is_not_lost(host):
    """The refiner's prompt is encoded after the interrupt; that must not put the flag back."""
    seen = []

    def interrupt(view):
        host.pipe._interrupt = True
        return DOG

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        return kwargs

    attach(host.pipe)(CAT, refiner=FunctionRefiner(interrupt), refine_at="2", callback_on_step_end=callback, **host.kwargs())
    assert seen == [0, 1, 2]  # the step at hand is finished, no other is begun


def test_failing_refiner_keeps_the_image(host, stock):
    def fail(view):
        raise TimeoutError("no answer")

    out = attach(host.pipe)(CAT, refiner=FunctionRefiner(fail), refine_at="1, 3", **host.kwargs())
    assert same(out.images, stock)
    assert [t.error for t in out.trajectories[0].turns] == ["TimeoutError: no answer"] * 2
    with pytest.raises(RefinerError, match="no answer"):
        attach(host.pipe)(CAT, refiner=FunctionRefiner(fail), refine_at="1", strict=True, **host.kwargs())
    assert clean(host.pipe)


def test_prompt_that_cannot_be_encoded_is_taken_back(host, stock, monkeypatch):
    original = type(host.pipe).encode_prompt

    def encode(*args, **kwargs):
        if DOG in str(args[1:]) + str(kwargs):
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(type(host.pipe), "encode_prompt", encode)
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: DOG}), refine_at="1", **host.kwargs())
    assert same(out.images, stock)
    (turn,) = out.trajectories[0].turns
    assert (turn.after, turn.error, turn.boundary) == (CAT, "RuntimeError: out of memory", "encode")


def test_probe_that_cannot_begin_is_a_recorded_failure(host, stock):
    host.pipe.scheduler.lock = threading.Lock()  # cannot be copied
    try:
        out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: DOG}), refine_at="1", **host.kwargs())
    finally:
        del host.pipe.scheduler.lock
    assert same(out.images, stock)
    assert out.trajectories[0].turns[0].boundary == "encode"


def test_interrupt_while_the_prompt_is_encoded_is_not_lost(host, monkeypatch):
    original, seen = type(host.pipe).encode_prompt, []

    def encode(*args, **kwargs):
        if DOG in str(args[1:]) + str(kwargs):
            host.pipe._interrupt = True
        return original(*args, **kwargs)

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        return kwargs

    monkeypatch.setattr(type(host.pipe), "encode_prompt", encode)
    refiner = ScheduleRefiner({2: DOG})
    out = attach(host.pipe)(CAT, refiner=refiner, refine_at="2, end", callback_on_step_end=callback, **host.kwargs())
    assert seen == [0, 1, 2]
    assert [t.step for t in out.trajectories[0].turns] == [2]  # what is not finished is not shown as finished


class Thinking:
    """Goes on until its `on_token` raises."""

    looks, on_token, at_work = False, None, False

    def refine(self, views):
        self.at_work = True
        for _ in range(5000):
            if self.on_token is not None:
                self.on_token()
            time.sleep(0.002)
        raise AssertionError("nobody stopped it")


@pytest.mark.parametrize(
    "mode", [{}, {"asynchronous": 1}, {"asynchronous": True}, {"apriori": True}, {"strict": True}], ids=str
)
def test_interrupt_from_another_thread_stops_a_thinking_refiner(mode, makers):
    from .conftest import Maker

    host, refiner, seen = makers.setdefault("sd", Maker("sd")), Thinking(), []

    def web_ui():
        while not refiner.at_work:
            time.sleep(0.002)
        host.pipe._interrupt = True

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        if mode == {"asynchronous": True} and i == 2:
            thread.join(60)
        return kwargs

    refiner.on_token = own = lambda: None
    thread = threading.Thread(target=web_ui)
    thread.start()
    loop = attach(host.pipe, refiner=refiner, refine_at="2, 4, end", **mode)
    out = loop(CAT, callback_on_step_end=callback, **host.kwargs(output_type="pil"))
    assert len(out.images) == 1 and out.trajectories[0].meta["interrupted"] is True
    assert len(seen) < 5
    turns = {t.step: t for t in out.trajectories[0].turns}
    assert turns[2].notes[0] == "not applied: the run was interrupted"
    assert out.trajectories[0].prompt == CAT and not out.trajectories[0].failures
    while any(t.name == "promptloop-refiner" for t in threading.enumerate()):
        time.sleep(0.002)
    assert refiner.on_token is own
    assert clean(host.pipe)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_carries_the_records_too(exception, makers):
    from .conftest import Maker

    def stop(view):
        if view.step > 1:
            raise exception

    host = makers.setdefault("sd", Maker("sd"))
    for refine_at, finished in (("1, 2", False), ("1, end", True)):
        with pytest.raises(exception) as e:
            attach(host.pipe)(CAT, refiner=FunctionRefiner(stop), refine_at=refine_at, **host.kwargs())
        assert [t.step for t in e.value.trajectories[0].turns] == [1]
        assert (e.value.output is not None) == finished
    assert clean(host.pipe)


def test_an_exception_ends_a_question_that_is_still_open(makers):
    from .conftest import Maker

    def callback(pipe, i, t, kwargs):
        raise ZeroDivisionError

    host, refiner = makers.setdefault("sd", Maker("sd")), Thinking()
    with pytest.raises(ZeroDivisionError) as e:
        attach(host.pipe)(
            CAT, refiner=refiner, refine_at="start", asynchronous=True, callback_on_step_end=callback, **host.kwargs()
        )
    for thread in threading.enumerate():
        if thread.name == "promptloop-refiner":
            thread.join(60)
    assert refiner.at_work and refiner.on_token is None
    assert e.value.trajectories[0].turns[0].notes == ("the run ended before the refiner's answer",)


def test_refiner_that_calls_the_pipeline_it_refines(host, stock):
    def nested(view):
        return str(host.pipe(DOG, **host.kwargs(num_inference_steps=3)).images.mean())

    out = attach(host.pipe)(CAT, refiner=FunctionRefiner(nested), refine_at="2", **host.kwargs())
    assert same(out.images, stock)
    assert "the refiner called the pipeline that it refines" in out.trajectories[0].turns[0].error
    assert clean(host.pipe)


def test_failures_at_the_end_keep_the_image(host, stock):
    def preview(pipe, x0):
        raise MemoryError("VAE")

    out = attach(host.pipe)(CAT, refiner=LOOKING, refine_at="end", preview=preview, **host.kwargs())
    assert same(out.images, stock)
    assert out.trajectories[0].turns[0].boundary == "preview"
    for loop in ({"refiner": FunctionRefinerWithout()}, {"refiner": FunctionRefiner(lambda v: 1 / 0), "strict": True}):
        with pytest.raises((ValueError, RefinerError)) as e:
            attach(host.pipe)(CAT, refine_at="end", **loop, **host.kwargs())
        assert same(e.value.output.images, stock)
        assert e.value.trajectories[0].request == CAT


def test_scheduler_whose_step_names_nothing(makers, monkeypatch):
    """As a recording subclass may be written."""
    from diffusers import DDIMScheduler

    from .conftest import Maker

    class Recording(DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    host = makers.setdefault("sd", Maker("sd"))
    monkeypatch.setattr(host.pipe, "scheduler", Recording.from_config(host.pipe.scheduler.config))
    out = attach(host.pipe)(CAT, refiner=LOOKING, refine_at="2", **host.kwargs())
    assert out.trajectories[0].turns[0].image is not None
    assert out.trajectories[0].turns[0].error is None


def test_flux_with_a_negative_prompt_that_equals_the_prompt(makers):
    from .conftest import Maker

    host = makers.setdefault("flux", Maker("flux"))
    changes = {"negative_prompt": CAT, "true_cfg_scale": 4.0}
    expected = host.pipe(DOG, **host.kwargs(**changes)).images
    out = attach(host.pipe)(CAT, refiner=ScheduleRefiner({0: DOG}), refine_at="start", **host.kwargs(**changes)).images
    assert same(out, expected)


def test_embeddings_that_belong_to_a_prompt_go_along_with_several_images(makers):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))
    with torch.no_grad():
        negative = host.pipe.encode_prompt(["ugly"] * 2, "cpu", 1, False)[0]
    kwargs = {"num_images_per_prompt": 2, "negative_prompt_embeds": negative}
    expected = host.pipe([DOG, CAT], **host.kwargs(1, 2, 3, 4, **kwargs)).images
    refiner = FunctionRefiner(lambda v: {"a": DOG, "b": CAT}[v.request])
    out = attach(host.pipe)(["a", "b"], refiner=refiner, refine_at="start", **host.kwargs(1, 2, 3, 4, **kwargs))
    assert [t.failures for t in out.trajectories] == [[]] * 4
    assert torch.allclose(out.images, expected, atol=1e-5)


def test_control_net_is_fed_the_new_prompt(makers):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    from .conftest import Maker

    sd = makers.setdefault("sd", Maker("sd")).pipe
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(block.weight, 0, 0.1)  # zero at first, and then of no effect
    pipe = StableDiffusionControlNetPipeline(**sd.components, controlnet=net, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 3, "image": Image.new("RGB", (32, 32), "red"), "output_type": "latent"}

    def generator():
        return torch.Generator().manual_seed(0)

    expected = pipe(DOG, generator=generator(), **kwargs).images
    out = attach(pipe)(CAT, refiner=ScheduleRefiner({0: DOG}), refine_at="start", generator=generator(), **kwargs).images
    assert same(out, expected)


def test_image_to_image_takes_its_turns_in_the_steps_it_really_takes(makers):
    from diffusers import StableDiffusionImg2ImgPipeline

    from .conftest import Maker

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(makers.setdefault("sd", Maker("sd")).pipe)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
    stock = pipe(CAT, generator=torch.Generator().manual_seed(0), **kwargs).images
    views = []
    refiner = FunctionRefiner(lambda v: views.append((v.step, v.num_steps)))
    out = attach(pipe)(CAT, refiner=refiner, refine_at="50%, end", generator=torch.Generator().manual_seed(0), **kwargs).images
    assert views == [(2, 4), (4, 4)]
    assert same(out, stock)


def test_each_sample_is_shown_the_picture_that_it_starts_from(makers):
    from diffusers import StableDiffusionImg2ImgPipeline

    from .conftest import Maker

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(makers.setdefault("sd", Maker("sd")).pipe)
    pipe.set_progress_bar_config(disable=True)
    black, white = (Image.new("RGB", (32, 32), c) for c in ("black", "white"))
    kwargs = {"strength": 0.04, "num_inference_steps": 50, "guidance_scale": 1.0, "output_type": "latent"}

    def seeded(n):
        return [torch.Generator().manual_seed(1) for _ in range(n)]

    shown = []
    refiner = FunctionRefiner(lambda v: shown.append(v.source))
    loop = attach(pipe, refiner=refiner, refine_at="start")
    out = loop([CAT, CAT], image=[black, white], num_images_per_prompt=2, generator=seeded(4), **kwargs).images
    alone = [pipe(CAT, image=image, generator=seeded(1), **kwargs).images[0] for image in (black, white)]
    nearest = [min((0, 1), key=lambda k: float((alone[k] - x).abs().mean())) for x in out]
    assert [shown.index(s) for s in shown] == nearest == [0, 1, 0, 1]
    shown.clear()
    loop([CAT, DOG], image=black, generator=seeded(2), **kwargs)
    assert shown == [black, black]


def test_what_a_run_does_not_start_from_is_not_shown_as_its_source(makers):
    """A control net's map: `image` in text-to-image, `control_image` beside it in image-to-image."""
    from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline, StableDiffusionControlNetPipeline

    from .conftest import Maker

    sd = makers.setdefault("sd", Maker("sd")).pipe
    net = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    edges, photo = (Image.new("RGB", (32, 32), c) for c in ("white", "red"))
    shown = []
    refiner = FunctionRefiner(lambda v: shown.append(v.source))
    for cls, images in (
        (StableDiffusionControlNetPipeline, {"image": edges}),
        (StableDiffusionControlNetImg2ImgPipeline, {"image": photo, "control_image": edges}),
    ):
        pipe = cls(**sd.components, controlnet=net, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        attach(pipe)(CAT, refiner=refiner, refine_at="start", num_inference_steps=4, output_type="latent", **images)
    assert shown == [None, photo]


def test_attached_is_the_pipeline_to_whoever_reads_or_sets(host):
    refiner = ScheduleRefiner({1: DOG})
    loop = attach(host.pipe, refiner=refiner, refine_at="1")
    again = attach(loop, strict=True)
    assert again.defaults == {"refiner": refiner, "refine_at": "1", "strict": True}
    assert loop.to("cpu") is loop
    loop.mark = 1
    assert host.pipe.mark == 1
    del host.pipe.mark
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        loop._interrupt = True
        return kwargs

    loop(CAT, callback_on_step_end=callback, **host.kwargs())
    assert seen == [0]
    import copy

    assert copy.copy(loop).pipe is host.pipe
    assert (
        attach(host.pipe, prompt="unused")(CAT, refiner=NoOpRefiner(), refine_at="1", **host.kwargs()).trajectories[0].request
        == CAT
    )
    with pytest.raises(ValueError, match="cannot read 'zzz'"):
        attach(host.pipe, refine_at="zzz")


def test_random_states_are_untouched(host):
    torch.manual_seed(3)
    host.pipe(CAT, **host.kwargs())
    expected = torch.rand(3)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(3)
    attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: DOG, 2: CAT}), refine_at="1, 2", **host.kwargs(generator=generator))
    assert torch.equal(torch.rand(3), expected)
    reference = torch.Generator().manual_seed(1)
    host.pipe(CAT, **host.kwargs(generator=reference))
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=reference))


def test_the_preview_of_the_last_step_is_nearly_the_image(host):
    seen = {}
    out = attach(host.pipe)(
        CAT,
        refiner=FunctionRefiner(lambda v: seen.update({v.step: v})),
        refine_at="1, 4, end",
        **host.kwargs(output_type="pil"),
    )
    assert seen[5].image.tobytes() == out.images[0].tobytes() == out.trajectories[0].image.tobytes()
    assert seen[1].sigma > seen[4].sigma > seen[5].sigma == 0


def test_preview_is_decoded_only_when_due(host, monkeypatch):
    calls = []
    decode = host.pipe.vae.decode
    monkeypatch.setattr(host.pipe.vae, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    attach(host.pipe)(CAT, refiner=LOOKING, refine_at="start, 2", **host.kwargs())
    assert len(calls) == 1
    attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="start, 2", **host.kwargs())
    assert len(calls) == 1  # nobody looks


def test_other_ways_to_preview(host):
    seen = []
    refiner = FunctionRefiner(lambda v: seen.append(v.image))
    if host.name != "embedded":  # its latents have eight channels
        small = AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 2, decoder_block_out_channels=(8,) * 2,
                                num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()  # fmt: skip
        attach(host.pipe)(CAT, refiner=refiner, refine_at="2", preview=small, **host.kwargs())
        assert seen[-1].mode == "RGB"
    red = Image.new("RGB", (4, 4), "red")
    attach(host.pipe)(CAT, refiner=refiner, refine_at="2", preview=lambda pipe, x0: [red] * len(x0), **host.kwargs())
    assert seen[-1] is red


@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_second_order_schedulers_count_a_turn_once_a_step(cls, makers, monkeypatch):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))
    monkeypatch.setattr(host.pipe, "scheduler", cls(**BETAS))
    views = []
    refiner = FunctionRefiner(lambda v: views.append((v.step, v.num_steps, round(v.sigma, 6))))
    stock = host.pipe(CAT, **host.kwargs()).images
    out = attach(host.pipe)(CAT, refiner=refiner, refine_at="every 1", **host.kwargs())
    assert [(s, n) for s, n, _ in views] == [(1, 5), (2, 5), (3, 5), (4, 5)]
    assert sorted((s for _, _, s in views), reverse=True) == [s for _, _, s in views]
    assert same(out.images, stock)


def test_output_is_the_stock_output(host):
    plain = host.pipe(CAT, **host.kwargs())
    out = attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="1", **host.kwargs())
    assert type(out) is type(plain)
    assert list(out.keys()) == list(plain.keys())
    assert len(out.to_tuple()) == len(plain.to_tuple())
    pair = attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="1", **host.kwargs(return_dict=False))
    assert same(pair[0], plain.images)
    assert pair[-1][0].request == CAT
    for output_type in ("np", "pt", "pil"):
        out = attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="end", **host.kwargs(output_type=output_type))
        assert out.trajectories[0].image.size == (32, 32)


def test_without_a_refiner_it_is_the_stock_call(host, stock):
    assert same(attach(host.pipe)(CAT, **host.kwargs()).images, stock)
    assert same(attach(host.pipe, refine_at="50%")(CAT, **host.kwargs()).images, stock)


NAMED = {
    "sd": "PromptLoopStableDiffusionPipeline", "sdxl": "PromptLoopStableDiffusionXLPipeline",
    "sd3": "PromptLoopStableDiffusion3Pipeline", "flux": "PromptLoopFluxPipeline", "embedded": "PromptLoopStableDiffusionPipeline",
}  # fmt: skip


def test_named_class(host, stock, tmp_path):
    cls = getattr(promptloop_pipeline, NAMED[host.name])
    assert {"prompt", "num_inference_steps", "refiner", "refine_at"} <= set(inspect.signature(cls.__call__).parameters)
    # from_pipe takes no AutoencoderTiny where a class is annotated with AutoencoderKL, the stock ones neither
    pipe = cls(**host.pipe.components, requires_safety_checker=False) if host.name == "embedded" else cls.from_pipe(host.pipe)
    pipe.set_progress_bar_config(disable=True)
    assert same(pipe(CAT, **host.kwargs()).images, stock)
    expected = attach(host.pipe)(CAT, refiner=ScheduleRefiner({2: DOG}), refine_at="2", **host.kwargs()).images
    assert same(pipe(CAT, refiner=ScheduleRefiner({2: DOG}), refine_at="2", **host.kwargs()).images, expected)

    assert same(attach(pipe)(CAT, refiner=ScheduleRefiner({2: DOG}), refine_at="2", **host.kwargs()).images, expected)

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)  # needs nothing of ours
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(host.pipe)
    assert torch.allclose(again(CAT, **host.kwargs()).images, stock, atol=1e-4)  # loading changes memory layouts
    ours = cls.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert type(ours) is cls
    reloaded = ours(CAT, refiner=ScheduleRefiner({2: DOG}), refine_at="2", **host.kwargs()).images
    assert torch.allclose(reloaded, expected, atol=1e-4)


def test_bad_input(host):
    loop = attach(host.pipe, refiner=NoOpRefiner())
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        loop([], **host.kwargs())
    with pytest.raises(ValueError, match="a refiner needs the prompt as text"):
        loop(prompt_embeds=torch.zeros(1, 77, 32), **host.kwargs())
    with pytest.raises(ValueError, match="cannot read 'sometimes' as a refinement schedule"):
        loop(CAT, refine_at="sometimes", **host.kwargs())
    with pytest.raises(ValueError, match="more than 100%"):
        loop(CAT, refine_at="101%", **host.kwargs())
    with pytest.raises(ValueError, match="returned 0 answers for 1 views"):
        loop(CAT, refiner=FunctionRefinerWithout(), **host.kwargs())
    with pytest.raises(TypeError, match="whose prompt is int"):
        loop(CAT, refiner=FunctionRefiner(lambda v: 3), **host.kwargs())
    assert clean(host.pipe)


class FunctionRefinerWithout:
    def refine(self, views):
        return []


def test_unsupported_pipelines_are_refused_by_name():
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    pipe = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                                    up_block_types=("UpBlock2D",) * 2), DDPMScheduler())  # fmt: skip
    with pytest.raises(TypeError, match=r"DDPMPipeline is not supported: it lacks encode_prompt\(\). Supported are"):
        attach(pipe)
    with pytest.raises(TypeError, match="dict is not supported: it lacks a scheduler"):
        attach({})


def test_scheduler_without_x0_is_refused_before_anything_is_computed(makers, monkeypatch):
    from diffusers import KarrasVeScheduler

    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))
    monkeypatch.setattr(host.pipe, "scheduler", KarrasVeScheduler())
    with pytest.raises(Exception, match="KarrasVeScheduler has no x0-estimate"):
        attach(host.pipe)(CAT, refiner=NoOpRefiner(), refine_at="2", **host.kwargs())
    assert clean(host.pipe)


def test_denoiser_that_is_fed_the_prompt_under_another_name_is_refused(makers, monkeypatch):
    """A swap that reaches nothing must not be recorded as one."""
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))

    monkeypatch.setattr("promptloop_pipeline.pipelines.conditioning.NAMES", ("cap_feats",))
    with pytest.raises(TypeError, match="StableDiffusionPipeline is not supported: its unet is not fed the prompt as"):
        attach(host.pipe)(CAT, refiner=ScheduleRefiner({1: DOG}), refine_at="1", **host.kwargs())


def test_subclass_with_a_call_of_its_own():
    class Mine(promptloop_pipeline.PromptLoopStableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return "mine"

    assert Mine.__call__(None) == "mine"


def _everything(self, *args, **kwargs):
    return super(type(self), self).__call__(*args, **kwargs)


def _options(self, prompt, **options):
    return super(type(self), self).__call__(prompt, **options)


def _rest(self, prompt, *rest, shout=False, **kwargs):
    return super(type(self), self).__call__(prompt.upper() if shout else prompt, *rest, **kwargs)


@pytest.mark.parametrize("call", [_everything, _options, _rest])
@pytest.mark.parametrize("base", ["StableDiffusionPipeline", "PromptLoopStableDiffusionPipeline"])
def test_subclass_that_hands_everything_on(call, base, makers):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))
    parent = getattr(promptloop_pipeline if base.startswith("PromptLoop") else diffusers, base)
    pipe = type("Theirs", (parent,), {"__call__": call})(**host.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = host.pipe(DOG, **host.kwargs()).images
    loop = attach(pipe, refiner=ScheduleRefiner({0: DOG}), refine_at="start", height=64)
    assert same(loop(CAT, **host.kwargs()).images, expected)
    if call is not _options:  # which takes nothing else by position
        kwargs = host.kwargs()
        assert same(loop(CAT, kwargs.pop("height"), **kwargs).images, expected)  # wins over the default, though by position
    if call is _rest:
        shouted = host.pipe(CAT.upper(), **host.kwargs()).images
        assert same(loop(CAT, refiner=None, shout=True, **host.kwargs()).images, shouted)


def test_a_named_class_with_a_call_of_ones_own_is_attached_with_it(makers):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))

    class Mine(promptloop_pipeline.PromptLoopStableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__("my own " + prompt, **kwargs)

    pipe = Mine(**host.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    out = attach(pipe)(CAT, refiner=NoOpRefiner(), refine_at="1", **host.kwargs())
    assert out.trajectories[0].request == "my own " + CAT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": len}, "gates is no argument of StableDiffusionPipeline, nor of the loop; did you mean gate\\?"),
        ({"strct": True}, "did you mean strict\\?"),
        ({"num_inference_step": 3}, "did you mean num_inference_steps\\?"),
        ({"zzz": 3}, "zzz is no argument of .*; those of the loop are refiner, refine_at"),
        ({"gate": 5}, "gate is int 5; give a reward"),
        ({"asynchronous": -1}, "asynchronous is -1; use False, True"),
        ({"asynchronous": True, "apriori": True}, "exclude each other"),
        ({"apriori": "no"}, "apriori is 'no'; use True or False"),
        ({"trim": None}, "trim is None; use True or False"),
        ({"strict": 1}, "strict is 1; use True or False"),
        ({"refiner": 5}, "int is no refiner"),
        ({"cancel": "KeyError"}, "cancel names 'KeyError'; give types of exceptions"),
        ({"preview": "taesd"}, "preview is 'taesd'; give None, an AutoencoderTiny, or a function"),
        ({"refine_at": "x"}, "cannot read 'x'"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_what_nobody_reads_and_what_makes_no_sense_is_refused_at_once(named, options, message, makers):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))
    pipe = host.pipe
    if named:
        pipe = promptloop_pipeline.PromptLoopStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        with pytest.raises((TypeError, ValueError), match=message):
            pipe(CAT, **host.kwargs(), **options)
    with pytest.raises((TypeError, ValueError), match=message):
        attach(pipe, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        attach(pipe)(CAT, **{"refiner": NoOpRefiner()} | options, **host.kwargs())
    assert attach(pipe, cancel=[KeyError], refiner=None, preview=None, gate=None).defaults["cancel"] == [KeyError]


def test_what_a_stock_call_takes_from_its_kwargs_is_no_mistake(makers):
    from .conftest import Maker

    host, seen = makers.setdefault("sd", Maker("sd")), []
    loop = attach(host.pipe, callback_steps=1)
    loop(CAT, refiner=NoOpRefiner(), refine_at="1", callback=lambda i, t, latents: seen.append(i), **host.kwargs())
    assert seen == [0, 1, 2, 3, 4]


def test_what_somebodys_own_call_reads_from_its_kwargs_is_no_mistake(makers):
    from .conftest import Maker

    host = makers.setdefault("sd", Maker("sd"))

    def call(self, prompt, **kwargs):
        return super(type(self), self).__call__(prompt + kwargs.pop("style", ""), **kwargs)

    expected = host.pipe(CAT + ", oil on canvas", **host.kwargs()).images
    for parent in (diffusers.StableDiffusionPipeline, promptloop_pipeline.PromptLoopStableDiffusionPipeline):
        pipe = type("Theirs", (parent,), {"__call__": call})(**host.pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        out = attach(pipe, style=", oil on canvas")(CAT, refiner=NoOpRefiner(), refine_at="start", **host.kwargs())
        assert same(out.images, expected)


def test_missing_folder():
    with pytest.raises((OSError, ValueError), match="nowhere"):  # the library's own error
        promptloop_pipeline.PromptLoopStableDiffusionPipeline.from_pretrained("./nowhere/at/all")
