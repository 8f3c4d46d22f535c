"""The oracle: a model that knows the clean latents X0 and answers in the terms of the scheduler. Whatever the scheduler, the
x0-estimate must then be X0 at every call.

The noise of each call is worked out here from the schedule and the number of the call. That this is the noise which the
scheduler means is shown by a witness: its own x0, or a path that stays on X0 and the first noise, or an end at X0.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import schedulers
from diffusers.schedulers.scheduling_piflow import DXPolicy

from promptloop_pipeline.pipelines.x0 import noise_level, sampling_step, sampling_steps, x0_estimate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The `scale_model_input` function")

STEPS = 10
# A float32 is exact to 6e-8 of its value; samples are up to 5 noise levels large, and x0 is what is left of them and the noise.
TOLERANCE = 1e-6  # times the noise level, where the noise is subtracted; measured: 6.4e-7
PATH_TOLERANCE = 1e-4  # of a whole run, times the first noise: the rounding of the solvers; measured: 6.2e-5 (DEIS)
X0, NOISE = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

UNDEFINED = {  # class: (what its constructor needs, why there is no x0)
    "AmusedScheduler": ({"mask_token_id": 0}, "no noise schedule"),  # tokens
    "BlockRefinementScheduler": ({}, "no noise schedule"),  # tokens
    "ConsistencyDecoderScheduler": ({}, "no noise schedule"),  # decodes latents to pixels, is not a sampler of latents
    "DiscreteDDIMScheduler": ({}, "no noise schedule"),  # tokens
    "EntropyBoundScheduler": ({}, "no noise schedule"),  # tokens
    "HeliosDMDScheduler": ({}, "stages"),
    "KarrasVeScheduler": ({}, "no noise schedule"),  # step() takes sigmas in place of a timestep
    "ScoreSdeVeScheduler": ({}, r"no step\(\)"),
    "ScoreSdeVpScheduler": ({}, r"no step\(\)"),
    "VQDiffusionScheduler": ({"num_vec_classes": 8}, "no noise schedule"),  # tokens
}

NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}  # their cases are skipped without it

Noise = Callable[[Any, int], tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Case:
    """noise(scheduler, call) -> (a, b) with sample = a X0 + b e. witness: own | path | end | add_noise."""

    name: str
    noise: Noise
    output: str
    witness: str
    config: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name.removesuffix("Scheduler"), self.output, self.note)))

    def scheduler(self) -> Any:
        try:
            scheduler = copy.deepcopy(constructed(self))
        except ImportError as e:
            pytest.skip(str(e).strip().splitlines()[0])
        scheduler.set_timesteps(STEPS, **self.timesteps)
        return scheduler


@cache  # KDPM2 takes long
def constructed(case: Case) -> Any:
    return getattr(schedulers, case.name)(**case.config)


# --- the forward process of each family -----------------------------------------------------------------------------------


def by_timestep(scheduler: Any, call: int) -> tuple[float, float]:
    a = float(scheduler.alphas_cumprod[int(scheduler.timesteps[call])])
    return math.sqrt(a), math.sqrt(1 - a)


def by_the_timestep_before(scheduler: Any, call: int) -> tuple[float, float]:
    a = float(scheduler.alphas_cumprod[int(scheduler.timesteps[call - 1])]) if call else 1.0
    return math.sqrt(a), math.sqrt(1 - a)


def by_cosine(scheduler: Any, call: int) -> tuple[float, float]:
    t, s = float(scheduler.timesteps[call]), 0.008
    a = (math.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2
    a = min(max(a, 0.0001), 0.9999)
    return math.sqrt(a), math.sqrt(1 - a)


def by_angle(scheduler: Any, call: int) -> tuple[float, float]:
    angle = float(scheduler.timesteps[call])
    return math.cos(angle), math.sin(angle)


def by_betas(scheduler: Any, call: int) -> tuple[float, float]:
    b = math.sin(math.pi / 2 * (1 - call / STEPS)) ** 2
    return math.sqrt(1 - b**2), b


def normalised(scheduler: Any, call: int) -> tuple[float, float]:
    ratio = float(scheduler.sigmas[call])
    return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)


def exploding(scheduler: Any, call: int) -> tuple[float, float]:
    return 1.0, float(scheduler.sigmas[call])


def exploding_midway(scheduler: Any, call: int) -> tuple[float, float]:
    if call % 2 == 0:
        return exploding(scheduler, call)
    return 1.0, math.sqrt(float(scheduler.sigmas[call - 1]) * float(scheduler.sigmas[call]))


def flow(scheduler: Any, call: int) -> tuple[float, float]:
    return 1 - float(scheduler.sigmas[call]), float(scheduler.sigmas[call])


def flow_from_zero(scheduler: Any, call: int) -> tuple[float, float]:
    return float(scheduler.sigmas[call]), 1 - float(scheduler.sigmas[call])


def flow_by_time(scheduler: Any, call: int) -> tuple[float, float]:
    return float(scheduler.timesteps[call]), 1 - float(scheduler.timesteps[call])


def answer(case: Case, scheduler: Any, x: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """What a model that knows X0 says of the sample."""
    e = (x.double() - a * X0) / b if b else NOISE
    if case.output == "epsilon":
        return e
    if case.output == "sample":
        return X0
    if case.output in ("v_prediction", "trigflow"):
        return (a * e - b * X0) / math.hypot(a, b)
    if case.output == "flow_prediction":
        return e - X0
    if case.output == "data_flow":
        return X0 - e
    if case.output == "grid":  # pi-Flow: (batch, ..., 10 times the channels)
        return (e - X0).repeat(1, 1, 1, 10)
    data, low = scheduler.config.sigma_data, 0.0
    if case.output == "consistency":
        low = scheduler.config.sigma_min
    skip = data**2 / ((b - low) ** 2 + data**2)
    out = (b - low) * data / math.sqrt(b**2 + data**2) * (-1 if case.output == "edm-v" else 1)
    return (X0 - skip * x) / out


def cases() -> list[Case]:
    three, two = ("epsilon", "v_prediction", "sample"), ("epsilon", "v_prediction")
    found: list[Case] = []

    def add(name: str, noise: Noise, outputs: Any, witness: str, note: str = "", timesteps: Any = None, **config: Any) -> None:
        for output in [outputs] if isinstance(outputs, str) else outputs:
            kind = {"prediction_type": output} if not isinstance(outputs, str) else {}
            found.append(Case(f"{name}Scheduler", noise, output, witness, config | kind, timesteps or {}, note))

    plain = BETAS | {"clip_sample": False}
    for name in ("DDIM", "DDIMParallel", "CogVideoXDDIM", "DDPM", "DDPMParallel", "CogVideoXDPM", "LCM"):
        add(name, by_timestep, three, "own", **plain)
    add("DDIMInverse", by_the_timestep_before, two, "own", **plain)
    zero = plain | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    add("DDIM", by_timestep, ("v_prediction",), "own", "zero-snr", **zero)
    add("DDPM", by_timestep, ("epsilon",), "own", "learned", variance_type="learned_range", **plain)
    add("TCD", by_timestep, three, "path", **BETAS)
    for note, skip in (("", True), ("prk", False)):  # it mixes the v of several noise levels: no path to witness
        add("PNDM", by_timestep, ("epsilon",), "path", note, skip_prk_steps=skip, **BETAS)
        add("PNDM", by_timestep, ("v_prediction",), "none", note, skip_prk_steps=skip, **BETAS)
    add("UnCLIP", by_timestep, ("epsilon", "sample"), "own", clip_sample=False)
    add("UnCLIP", by_timestep, ("epsilon",), "own", "learned", clip_sample=False, variance_type="learned_range")
    add("RePaint", by_timestep, "epsilon", "own", timesteps={"jump_length": 2, "jump_n_sample": 2}, clip_sample=False)
    add("DDPMWuerstchen", by_cosine, "epsilon", "add_noise")
    add("IPNDM", by_betas, "v_prediction", "path")
    add("SCM", by_angle, ("trigflow",), "own", timesteps={"intermediate_timesteps": None})

    flow_sigmas = {"use_flow_sigmas": True, "flow_shift": 3.0}
    add("DPMSolverMultistepInverse", normalised, three, "path", **BETAS)
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver"):
        exact: dict[str, Any] = {"tau_func": lambda t: 0.0} if name == "SASolver" else {}
        add(name, normalised, three, "path", **BETAS, **exact)
        add(name, flow, ("flow_prediction", "sample"), "path", "flow", **flow_sigmas, **exact)
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep"):
        add(name, normalised, three, "end", "sde", algorithm_type="sde-dpmsolver++", **BETAS)
        add(name, normalised, three, "path", "noise", algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **BETAS)
    add("DPMSolverMultistep", normalised, two, "path", "karras", use_karras_sigmas=True, **BETAS)
    add("DPMSolverMultistep", flow, ("epsilon",), "path", "flow", **flow_sigmas)
    add("UniPCMultistep", normalised, three, "path", "noise", predict_x0=False, final_sigmas_type="sigma_min", **BETAS)
    add("Helios", flow, ("flow_prediction",), "path", stages=1)
    add("Helios", flow, ("flow_prediction",), "path", "euler", stages=1, scheduler_type="euler")

    for name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete"):
        add(name, exploding, three, "path", **BETAS)
        add(name, exploding, two, "path", "karras-leading", use_karras_sigmas=True, timestep_spacing="leading", **BETAS)
    add("EulerDiscrete", exploding, "sample", "path", "alias", prediction_type="original_sample", **BETAS)
    add("EulerDiscrete", exploding, ("v_prediction",), "path", "zero-snr", rescale_betas_zero_snr=True, **BETAS)
    add("EulerAncestralDiscrete", exploding, two, "own", **BETAS)
    add("KDPM2Discrete", exploding_midway, two, "path", **BETAS)
    add("KDPM2Discrete", exploding_midway, two, "path", "karras", use_karras_sigmas=True, **BETAS)
    add("KDPM2AncestralDiscrete", exploding, two, "own", **BETAS)  # midway to where it steps down: at the next sigma
    add("DPMSolverSDE", exploding_midway, two, "own", noise_sampler_seed=0, **BETAS)

    for name, witness in (("EDMEuler", "path"), ("EDMDPMSolverMultistep", "path"), ("CosineDPMSolverMultistep", "end")):
        add(name, exploding, "edm", witness, prediction_type="epsilon")
        add(name, exploding, "edm-v", witness, prediction_type="v_prediction")
    add("CMStochasticIterative", exploding, "consistency", "end", clip_denoised=False, s_noise=0.0)

    add("FlowMatchEulerDiscrete", flow, "flow_prediction", "path", shift=3.0)
    dynamic = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    add("FlowMatchEulerDiscrete", flow, "flow_prediction", "path", "dynamic", {"mu": 1.1}, **dynamic)
    add("FlowMatchEulerDiscrete", flow, "flow_prediction", "end", "stochastic", stochastic_sampling=True)
    add("FlowMatchEulerDiscrete", flow_from_zero, "data_flow", "path", "inverted", invert_sigmas=True)
    add("FlowMatchHeunDiscrete", flow, "flow_prediction", "path", shift=3.0)
    add("FlowMatchLCM", flow, "flow_prediction", "end", shift=3.0)
    add("LTXEulerAncestralRF", flow, "flow_prediction", "path", eta=0.0)
    add("LTXEulerAncestralRF", flow, "flow_prediction", "end", "ancestral")
    add("FlowMapEulerDiscrete", flow, "flow_prediction", "path", shift=3.0)
    add("Piflow", flow, "grid", "path")
    add("MiniMaxH3", flow, "data_flow", "path", shift=1.0)
    add("MiniMaxH3", flow, "data_flow", "path", "set", {"sigmas": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]})
    add("RFD4Proteina", flow_by_time, "data_flow", "path", schedule_mode="power", noise_mode="1/t", tsr_k=1.0, tsr_sigma=1.0,
        tail_steps=0, t_lim_ode=0.0)  # fmt: skip
    return found


CASES = cases()
FROM_THE_START = ("DPMSolverMultistepInverseScheduler", "HeliosScheduler")
BY_INDEX = (by_angle, by_betas, normalised, exploding, exploding_midway, flow, flow_from_zero)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


# --- a run ----------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    sample: torch.Tensor
    a: float
    b: float
    estimate: torch.Tensor | None
    level: float
    own: torch.Tensor | None  # the scheduler's x0
    seen: torch.Tensor  # what `own` should be


def run(case: Case, *, watch: bool = True, start: int = 0, begin: bool = False) -> list[Call]:
    """The calls of a whole run and, as the last one, where it ended. `start`: the first call, as in image-to-image."""
    scheduler = case.scheduler()
    parameters = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(1)} if "generator" in parameters else {}
    extra |= {"eta": 0.0} if case.name == "TCDScheduler" else {}
    extra |= {"original_image": X0.float(), "mask": torch.zeros_like(X0).float()} if "mask" in parameters else {}
    if "emit_mask" in parameters:
        extra["emit_mask"] = torch.ones(1, 4, 8)
    if begin:
        scheduler.set_begin_index(start)
    a, b = case.noise(scheduler, start)
    x = (a * X0 + b * NOISE).float()
    times = list(scheduler.timesteps[:-1] if case.name in ("SCMScheduler", "DDPMWuerstchenScheduler") else scheduler.timesteps)
    calls, old, before = [], None, None
    for call in range(start, len(times)):
        t = times[call].expand(1) if case.name == "DDPMWuerstchenScheduler" else times[call]
        a, b = case.noise(scheduler, call)
        m = answer(case, scheduler, x, a, b).float()
        if case.note == "learned":
            m = torch.cat([m, torch.zeros_like(m)], 1)
        estimate, level = (x0_estimate(scheduler, m, t, x), noise_level(scheduler, t)) if watch else (None, 0.0)
        seen = X0.float()
        if case.name == "CogVideoXDPMScheduler":
            following, old = scheduler.step(m, old, t, before, x, **extra)
            own, before = old, t
        else:
            result = scheduler.step(m, t, x, **extra)
            following, own = result.prev_sample, getattr(result, "pred_original_sample", None)
            if case.name == "LCMScheduler":
                skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
                own, seen = result.denoised, (out * X0 + skip * x).float()
        calls.append(Call(x, a, b, estimate, level, own, seen))
        x = following
    return [*calls, Call(x, 1.0, 0.0, None, 0.0, None, X0.float())]


watched = cache(run)


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def amplified(case: Case, call: Call) -> float:
    """How much larger than x0 the numbers are that it is computed from."""
    return max(1.0, call.b / call.a) if case.output == "epsilon" and call.a else 1.0


# --- the tests ------------------------------------------------------------------------------------------------------------


EXPORTED = {n for n in dir(schedulers) if n.endswith("Scheduler") and inspect.isclass(getattr(schedulers, n))}


def test_every_scheduler_of_diffusers_is_covered():
    assert {c.name for c in CASES} | set(UNDEFINED) == EXPORTED
    assert not {c.name for c in CASES} & set(UNDEFINED)
    assert not {n for n in EXPORTED if not issubclass(getattr(schedulers, n), schedulers.SchedulerMixin)} - NEED_TORCHSDE


@each_case
def test_estimate_is_x0(case):
    calls = watched(case)[:-1]
    assert all(c.estimate.dtype == torch.float32 and c.estimate.shape == c.sample.shape for c in calls)
    errors = [worst(c.estimate, X0) / amplified(case, c) for c in calls]
    assert max(errors) < TOLERANCE, errors


@each_case
def test_the_noise_is_what_the_scheduler_means(case):
    calls = watched(case)
    owns = [c for c in calls if c.own is not None]
    for c in owns:
        assert worst(c.own, c.seen) < TOLERANCE * amplified(case, c)
    if case.witness == "own":
        assert len(owns) == len(calls) - 1
    if case.witness == "path":
        if case.name == "IPNDMScheduler":  # its first step, from noise alone, loses X0
            calls = run(case, start=1)
        for c in calls[:-1]:
            assert worst(c.sample, c.a * X0 + c.b * NOISE) < PATH_TOLERANCE * max(calls[0].b, amplified(case, calls[0]), 1.0)
    if case.witness == "end":
        assert worst(calls[-1].sample, X0) < TOLERANCE
    if case.witness == "add_noise":
        scheduler = case.scheduler()
        for c, t in zip(calls[:-1], scheduler.timesteps):
            expected = c.a * X0 + c.b * NOISE
            assert worst(scheduler.add_noise(X0, NOISE, t.expand(1)), expected) < TOLERANCE


@each_case
def test_step_is_not_changed(case):
    for one, other in zip(watched(case), run(case, watch=False), strict=True):
        assert torch.equal(one.sample, other.sample)


@each_case
def test_noise_level(case):
    calls = watched(case)[:-1]
    levels = [c.level for c in calls]
    flows = case.noise in (flow, flow_from_zero, flow_by_time)
    for c in calls:
        expected = c.b if flows else c.b / c.a if c.a > 0 else math.inf
        assert c.level == pytest.approx(expected, rel=1e-5, abs=1e-7)
    if flows:
        assert all(0 <= level <= 1 for level in levels)
    if case.name == "RePaintScheduler":  # jumps back
        return
    if "Inverse" in case.name:
        levels.reverse()
    assert all(one >= other * (1 - 1e-5) for one, other in itertools.pairwise(levels))
    first = levels[:: sampling_steps(case.scheduler(), 2) % 2 + 1]
    assert case.name == "PNDMScheduler" or all(one > other for one, other in itertools.pairwise(first))
    assert levels[-1] < 0.3 * levels[0]


@pytest.mark.parametrize("begin", [False, True], ids=["by-timestep", "by-begin-index"])
@pytest.mark.parametrize("case", [c for c in CASES if c.noise in BY_INDEX and c.name not in FROM_THE_START], ids=str)
def test_start_in_the_middle(case, begin):
    start = 3 * getattr(case.scheduler(), "order", 1)
    for c in run(case, start=start, begin=begin)[:-1]:
        assert worst(c.estimate, X0) < TOLERANCE * amplified(case, c)


class TestSamplingSteps:
    """A step of the second-order schedulers is two calls, the last one a single call."""

    SECOND = ("FlowMatchHeunDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")

    def test_which_are_second_order(self):
        installed = [s for name in EXPORTED if issubclass(s := getattr(schedulers, name), schedulers.SchedulerMixin)]
        orders = {s.__name__.removesuffix("Scheduler"): getattr(s, "order", 1) for s in installed}
        assert {n for n, order in orders.items() if order == 2} | {"DPMSolverSDE"} == {*self.SECOND, "KarrasVe"}
        assert set(orders.values()) == {1, 2}

    @pytest.mark.parametrize("name", SECOND)
    @pytest.mark.parametrize("num_steps", [2, 3, 10])
    def test_second_order(self, name, num_steps):
        case = next(c for c in CASES if c.name == f"{name}Scheduler")
        scheduler = case.scheduler()
        for start in range(num_steps):  # image-to-image begins at a later step
            scheduler.set_timesteps(num_steps)
            scheduler.set_begin_index(start * scheduler.order)
            times = scheduler.timesteps[start * scheduler.order :]
            assert sampling_steps(scheduler, len(times)) == num_steps - start
            x = torch.ones(1, 4, 8, 8)
            firsts = []
            for call, t in enumerate(times):
                step, first = sampling_step(scheduler, call)
                assert first == scheduler.state_in_first_order
                firsts += [step] if first else []
                assert step == len(firsts) - 1
                x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
            assert firsts == list(range(num_steps - start))

    @pytest.mark.parametrize("name", ["DDIM", "PNDM", "UnCLIP", "DDPMWuerstchen", "EulerDiscrete", "DPMSolverSinglestep"])
    def test_every_call_is_a_step(self, name):
        scheduler = getattr(schedulers, f"{name}Scheduler")()
        assert sampling_steps(scheduler, 11) == 11
        assert [sampling_step(scheduler, call) for call in range(3)] == [(0, True), (1, True), (2, True)]


# --- what cannot be told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined(name):
    config, why = UNDEFINED[name]
    scheduler = getattr(schedulers, name)(**config)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=rf"{name} has no x0-estimate.*{why}.*use a scheduler .*or refine only"):
        x0_estimate(scheduler, x, 0, x)
    with pytest.raises(ValueError, match=name):
        noise_level(scheduler, 0)


def test_stages_of_helios_are_undefined():
    scheduler = schedulers.HeliosScheduler()
    scheduler.set_timesteps(STEPS, stage_index=0)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"HeliosScheduler has no x0-estimate.*stages"):
        x0_estimate(scheduler, x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "EDMEuler"])
def test_unknown_prediction_type(name):
    scheduler = getattr(schedulers, f"{name}Scheduler")(prediction_type="epsilom")
    scheduler.set_timesteps(STEPS)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="epsilom"):
        x0_estimate(scheduler, x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 8, 4), (2, 4, 8, 8), (1, 12, 8, 8)], ids=str)
def test_shapes_that_differ(shape):
    scheduler = schedulers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"DDIMScheduler: model output .* differ in shape"):
        x0_estimate(scheduler, torch.zeros(shape), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8))


# --- traps ----------------------------------------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32():
    scheduler = schedulers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(STEPS)
    sigma = float(scheduler.sigmas[0])
    x, e = (X0 + sigma * NOISE).bfloat16(), NOISE.bfloat16()
    estimate = x0_estimate(scheduler, e, scheduler.timesteps[0], x)
    assert estimate.dtype == torch.float32
    assert torch.equal(estimate, x.float() - sigma * e.float())


@pytest.mark.parametrize("watch", [False, True], ids=["alone", "watched"])
def test_the_growing_size_of_flow_match_lcm(watch):
    """It takes the size of the latents from the first call, which it knows by step_index being None."""
    scheduler = schedulers.FlowMatchLCMScheduler(scale_factors=[2.0], upscale_mode="nearest")
    for size in (8, 6):
        scheduler.set_timesteps(2)
        x = torch.zeros(1, 4, size, size)
        if watch:
            x0_estimate(scheduler, x, scheduler.timesteps[0], x)
            assert noise_level(scheduler, scheduler.timesteps[0]) == 1
        assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape[-1] == 2 * size


def test_keys_of_another_scheduler_in_the_config_mean_nothing():
    of_sigmas = schedulers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="sample", **BETAS)
    euler = schedulers.EulerDiscreteScheduler.from_config(of_sigmas.config)
    assert euler.config.use_flow_sigmas
    of_noise = schedulers.DPMSolverMultistepScheduler(prediction_type="sample", **BETAS)
    matching = schedulers.FlowMatchEulerDiscreteScheduler.from_config(of_noise.config)
    assert matching.config.prediction_type == "sample"
    for scheduler, output in ((matching, NOISE - X0), (euler, X0)):
        scheduler.set_timesteps(STEPS)
        sigma = scheduler.sigmas[3]
        x = ((1 - sigma) if scheduler is matching else 1.0) * X0 + sigma * NOISE
        assert worst(x0_estimate(scheduler, output, scheduler.timesteps[3], x), X0) < TOLERANCE


def test_subclasses_are_what_their_base_is():
    class Mine(schedulers.FlowMatchEulerDiscreteScheduler):
        pass

    class Theirs(schedulers.MiniMaxH3Scheduler):
        pass

    for scheduler, output in ((Mine(), NOISE - X0), (Theirs(shift=1.0), X0 - NOISE)):
        scheduler.set_timesteps(STEPS)
        sigma = scheduler.sigmas[3]
        x = (1 - sigma) * X0 + sigma * NOISE
        assert worst(x0_estimate(scheduler, output, scheduler.timesteps[3], x), X0) < TOLERANCE


def test_the_velocity_of_pi_flow_is_that_of_now():
    scheduler = schedulers.PiflowScheduler(n_grid=10)
    scheduler.set_timesteps(4)
    x, output = X0.float(), torch.randn(1, 4, 8, 80, generator=torch.Generator().manual_seed(2))
    sigma = scheduler.sigmas[:1]
    segment = (scheduler._piflow_raw_timesteps[0] - scheduler._piflow_raw_timesteps[1]).expand(1)
    grid = scheduler._to_grid(output, x)
    policy = DXPolicy(grid, x, sigma.view(1, 1, 1, 1), segment, shift=scheduler.config.shift, eps=scheduler.eps)
    velocity = policy.pi(x, sigma)
    assert worst(x0_estimate(scheduler, output, scheduler.timesteps[0], x), x - sigma * velocity) < 10 * TOLERANCE


def test_a_timestep_for_each_sample():
    scheduler = schedulers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(STEPS)
    a, b = by_cosine(scheduler, 4)
    x = (a * X0 + b * NOISE).repeat(2, 1, 1, 1)
    estimate = x0_estimate(scheduler, NOISE.repeat(2, 1, 1, 1), scheduler.timesteps[4].expand(2), x)
    assert worst(estimate, X0.repeat(2, 1, 1, 1)) < TOLERANCE
