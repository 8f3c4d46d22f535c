"""What a model output says about the finished picture, for any diffusers scheduler, asked before the scheduler's step() runs.

With x the sample, z the clean latents (x0), e the noise, m the model output and s the sigma, z = p x + q m for

    variance preserving   x = a z + b e, a² + b² = 1   DDIM, DDPM, PNDM, LCM, TCD by timestep; DPM++, UniPC, DEIS by s = b / a
    variance exploding    x = z + s e                  Euler, Heun, KDPM2, LMS: the VP sample divided by a
    preconditioned        x = z + s e                  EDM, consistency models: p and q are the scheduler's
    flow matching         x = (1 - s) z + s e          m = e - z; the solvers with use_flow_sigmas too
    flow, time of data    x = (1 - s) z + s e          m = z - e: inverted sigmas, MiniMax-H3

Clipping and thresholding of x0, which a scheduler may add, belong to its step() and are left out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TIME_OF_DATA = ("MiniMaxH3Scheduler", "RFD4ProteinaScheduler")  # timesteps are 1 - s: nothing but the name tells


class _Reading(NamedTuple):
    p: float
    q: float
    level: float


def x0_estimate(scheduler: Any, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
    """The x0-estimate, float32, in the space and shape of `sample` (Sana Sprint's are sigma_data times the latents).

    To be called before `scheduler.step` with the same arguments; leaves the scheduler as it was. The second half of a model
    output with twice the channels is the learned variance and is not used.

    Raises ValueError for a scheduler whose x0 cannot be told, an unknown prediction_type, and shapes that do not match.
    """
    (p, q, _), m = _reading(scheduler, timestep), model_output
    if hasattr(scheduler, "_to_grid"):  # pi-Flow: velocities for the whole way to the next step; the last is that of now
        m = scheduler._to_grid(m, sample)[:, -1]
    elif sample.ndim > 1 and m.shape == (len(sample), 2 * sample.shape[1], *sample.shape[2:]):
        m = m[:, : sample.shape[1]]
    if m.shape != sample.shape:
        shapes = f"model output {tuple(m.shape)}, sample {tuple(sample.shape)}"
        raise ValueError(f"{type(scheduler).__name__}: {shapes} differ in shape; give both as scheduler.step() gets them")
    return p * sample.float() + q * m.float()


def noise_level(scheduler: Any, timestep: float | Tensor) -> float:
    """The noise in the sample: s in [0, 1] for flow matching, else noise over signal. When and for what: as `x0_estimate`."""
    return _reading(scheduler, timestep).level


def sampling_steps(scheduler: Any, num_calls: int) -> int:
    """The sampling steps in a run of `num_calls` calls of step(). A step of order 2 (Heun, KDPM2) takes two, the last one."""
    return -(-num_calls // getattr(scheduler, "order", 1))  # UnCLIP and Wuerstchen do not say


def sampling_step(scheduler: Any, call: int) -> tuple[int, bool]:
    """(sampling step, whether the call is its first) for a call of step(), counted from 0 where the run starts."""
    step, stage = divmod(call, getattr(scheduler, "order", 1))
    return step, stage == 0


def _reading(scheduler: Any, timestep: float | Tensor) -> _Reading:
    time = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)  # Wuerstchen: one for each sample
    kind = scheduler.config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "step"):
        raise _undefined(scheduler, "it has no step(), it samples from a score by other methods")
    if hasattr(scheduler, "start_sigmas") and (scheduler.config.stages > 1 or hasattr(scheduler, "convert_flow_pred_to_x0")):
        raise _undefined(scheduler, "the pipeline keeps track of its stages (Helios), it does not know how noisy the sample is")
    if any(c.__name__ in _TIME_OF_DATA for c in type(scheduler).__mro__):
        return _Reading(1, 1 - time, 1 - time)
    if not hasattr(scheduler, "sigmas"):
        return _by_timestep(scheduler, kind, timestep, time)

    s = _sigma(scheduler, _index(scheduler, timestep))
    if hasattr(scheduler, "precondition_outputs"):
        return _Reading(scheduler.precondition_outputs(1, 0, s), scheduler.precondition_outputs(0, 1, s), s)
    if hasattr(scheduler, "get_scalings_for_boundary_condition"):
        p, q = scheduler.get_scalings_for_boundary_condition(s)
        return _Reading(p, q, s)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        if kind == "flow_prediction":
            return _Reading(1, -s, s)
        a, b = scheduler._sigma_to_alpha_sigma_t(torch.tensor(s, dtype=torch.float64))
        return _gaussian(scheduler, kind, float(a), float(b))._replace(level=s)
    # Not the config: from_config() keeps the keys of the scheduler that it copies, prediction_type and use_flow_sigmas too.
    if not hasattr(scheduler, "init_noise_sigma"):
        inverted = scheduler.sigmas[0] < scheduler.sigmas[-1]
        return _Reading(1, 1 - s, 1 - s) if inverted else _Reading(1, -s, s)
    a = 1 / math.hypot(1, s)
    p, q, _ = _gaussian(scheduler, kind, a, a * s)
    return _Reading(p * a, q, s)


def _by_timestep(scheduler: Any, kind: str, timestep: float | Tensor, time: float) -> _Reading:
    if hasattr(scheduler, "initial_alpha_cumprod"):  # DDIM inverse: the sample is one step behind the timestep
        t = int(time) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        squared = scheduler.alphas_cumprod[t] if t >= 0 else scheduler.initial_alpha_cumprod
    elif hasattr(scheduler, "alphas_cumprod"):
        squared = scheduler.alphas_cumprod[int(time)]
    elif hasattr(scheduler, "_alpha_cumprod"):  # Wuerstchen
        squared = scheduler._alpha_cumprod(torch.tensor([time]), torch.device("cpu"))
    elif hasattr(scheduler, "alphas"):  # IPNDM
        i = _index(scheduler, timestep)
        return _gaussian(scheduler, "v_prediction", float(scheduler.alphas[i]), float(scheduler.betas[i]))
    elif kind == "trigflow":
        return _gaussian(scheduler, kind, math.cos(time), math.sin(time))
    else:
        raise _undefined(scheduler, "it keeps no noise schedule (alphas_cumprod or sigmas), like those that sample tokens")
    return _gaussian(scheduler, kind, math.sqrt(squared), math.sqrt(1 - float(squared)))


def _gaussian(scheduler: Any, kind: str, a: float, b: float) -> _Reading:
    inverse = 1 / a if a > 0 else math.inf
    if kind == "epsilon":
        return _Reading(inverse, -b * inverse, b * inverse)
    if kind in ("v_prediction", "trigflow"):  # m = a e - b z
        return _Reading(a, -b, b * inverse)
    if kind in ("sample", "original_sample"):
        return _Reading(0, 1, b * inverse)
    raise ValueError(f"{type(scheduler).__name__}: unknown prediction_type {kind!r}; use epsilon, v_prediction or sample")


def _sigma(scheduler: Any, index: int) -> float:
    """The sigma that the sample is at: in the second call of a step of KDPM2 and DPMSolverSDE it lies between two sigmas."""
    second = not getattr(scheduler, "state_in_first_order", True)
    if second and hasattr(scheduler, "mid_point_sigma"):
        return float(scheduler.mid_point_sigma)
    if second and hasattr(scheduler, "sigmas_interpol"):  # the ancestral one, which has sigmas_down, is one behind
        return float(scheduler.sigmas_interpol[index - hasattr(scheduler, "sigmas_down")])
    return float(scheduler.sigmas[index])


def _index(scheduler: Any, timestep: float | Tensor) -> int:
    if scheduler.step_index is not None:
        return scheduler.step_index
    if hasattr(scheduler, "_init_step_index"):
        scheduler._init_step_index(timestep)
        index, scheduler._step_index = scheduler._step_index, None  # FlowMatchLCM tells a new run by None
        return index
    return int((scheduler.timesteps - timestep).abs().argmin())


def _undefined(scheduler: Any, why: str) -> ValueError:
    instead = 'use a scheduler with a noise schedule (DDIM, Euler, DPM++, FlowMatchEuler), or refine only at "start" or "end"'
    return ValueError(f"{type(scheduler).__name__} has no x0-estimate to show: {why}; {instead}")
