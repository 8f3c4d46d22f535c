"""Equal rows are computed once, and nobody can tell: on the real pipelines, at tiny sizes."""

import types

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import EulerAncestralDiscreteScheduler
from peft import LoraConfig
from promptloop_training.sharing import MODULES, equal_rows_once

from ..pipelines.conftest import Maker, made

FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(params=FAMILIES)
def host(request):
    return made(request.param)


def denoiser(host):
    return "transformer" if hasattr(host.pipe, "transformer") else "unet"


def images(host, prompts, seeds, **changes):
    kwargs = host.kwargs(*seeds, num_inference_steps=3, output_type="pt", **changes)
    return host.pipe(prompts, **kwargs).images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_and_counts(host, guidance):
    prompts, seeds = ["a", "b", "a", "a"], (1, 1, 1, 2)  # the third is the first
    plain = images(host, prompts, seeds, guidance_scale=guidance)
    with equal_rows_once(host.pipe) as counts:
        shared = images(host, prompts, seeds, guidance_scale=guidance)
    assert torch.equal(shared[0], shared[2]) and not torch.equal(shared[0], shared[1])
    assert (plain - shared).abs().max() < 1e-4
    doubled = guidance > 1 and host.name != "flux"  # FLUX is told its guidance
    # three of four differ, in three steps; of the negative ones two do in the first step: one prompt, two noises
    assert counts[denoiser(host)] == ([24, 9 + 2 + 3 + 3] if doubled else [12, 9])
    assert counts["text_encoder"] == ([8, 3] if doubled and host.name in ("sd", "sd3") else [4, 2])
    assert counts["vae"] == [4, 3]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rows_that_all_differ_are_bit_identical(host, guidance):
    call = {"guidance_scale": guidance} | ({"negative_prompt": ["x", "y", "z"]} if guidance > 1 and host.name != "flux" else {})
    plain = images(host, ["a", "b", "c"], (1, 2, 3), **call)
    with equal_rows_once(host.pipe) as counts:
        assert torch.equal(images(host, ["a", "b", "c"], (1, 2, 3), **call), plain)
    assert all(asked == computed for asked, computed in counts.values()) and counts[denoiser(host)][0] >= 9


def test_a_stochastic_scheduler():
    host = Maker("sd")
    host.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(host.pipe.scheduler.config)
    plain = images(host, ["a", "a", "a"], (1, 1, 2))
    with equal_rows_once(host.pipe) as counts:
        shared = images(host, ["a", "a", "a"], (1, 1, 2))
    assert (plain - shared).abs().max() < 1e-4
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], shared[2])
    assert counts["unet"] == [18, 12]  # twice three rows, three steps; two of three differ


def test_adapters_keep_their_scale():
    host = Maker("sd")
    torch.manual_seed(0)
    host.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for scale in (0.0, 1.0):
        call = {"cross_attention_kwargs": {"scale": scale}}
        plain = images(host, ["a", "a"], (1, 1), **call)
        with equal_rows_once(host.pipe) as counts:
            assert (images(host, ["a", "a"], (1, 1), **call) - plain).abs().max() < 1e-4
        assert counts["unet"][1] * 2 == counts["unet"][0]


# --- a first side that equals the batch by chance -----------------------------------------------------------------------


def calls(module, **kwargs):
    """(what the module gives, rows asked and computed) with sharing."""
    pipe = types.SimpleNamespace(unet=module)
    with torch.no_grad(), equal_rows_once(pipe) as counts:
        return module(**kwargs), counts["unet"]


def flux_call(rows, side):
    """As many positions as rows."""
    torch.manual_seed(1)

    def one(*shape):
        return torch.randn(1, *shape).expand(rows, *shape).clone()

    return {
        "hidden_states": one(side, 16), "encoder_hidden_states": one(side, 32), "pooled_projections": one(32),
        "timestep": torch.full((rows,), 0.5), "img_ids": torch.randn(side, 3), "txt_ids": torch.zeros(side, 3), "return_dict": False,
    }  # fmt: skip


def test_positions_are_no_rows():
    module = Maker("flux").pipe.transformer
    call = flux_call(4, 4)
    expected = module(**call)[0].detach()
    (found,), counts = calls(module, **call)
    assert counts == [4, 1] and (found - expected).abs().max() < 1e-5
    call["img_ids"][1:] = call["img_ids"][:1]  # equal positions are no equal rows either
    call["hidden_states"][2] += 1
    (found,), counts = calls(module, **call)
    assert counts == [4, 2] and (found - module(**call)[0].detach()).abs().max() < 1e-5


class Odd(torch.nn.Module):
    """Takes what nobody has heard of."""

    def __init__(self, out=None):
        super().__init__()
        self.out = out

    def forward(self, sample, bias=None, scales=None, state=None, **kwargs):
        if self.out is not None:
            return {"sample": sample * 2, "other": self.out}
        return {"sample": sample * 2 if bias is None else sample * 2 + bias}


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "shared"),
    [
        ({}, True),
        ({"bias": torch.ones(1, 2)}, True),  # for all rows
        ({"bias": torch.arange(6.0).view(3, 2)}, False),  # rows or not, nobody knows
        ({"scales": [torch.ones(3)]}, False),
        ({"state": object()}, False),  # may hold anything
        ({"attention_mask": torch.ones(6, 2)}, False),  # folded with heads
        ({"cross_attention_kwargs": {"scale": 0.5}}, True),
        ({"cross_attention_kwargs": {"scale": torch.ones(3)}}, False),
        ({"guidance": torch.ones(3)}, True),
        ({"guidance": torch.tensor([1.0, 2.0, 1.0])}, True),
        ({"added_cond_kwargs": {"text_embeds": ONES, "time_ids": ONES, "image_embeds": [ONES, ONES]}}, True),
        ({"added_cond_kwargs": {"whatever": ONES}}, False),
        ({"timestep": torch.tensor(7)}, True),
        ({"timestep": 7}, True),
    ],
)
def test_only_what_is_known_is_shared(call, shared):
    module = Odd().eval()
    found, counts = calls(module, sample=ONES, **call)
    assert torch.equal(found["sample"], module(sample=ONES, **call)["sample"])
    differ = 2 if len(set(torch.as_tensor(call.get("guidance", 0)).flatten().tolist())) == 2 else 1
    assert counts == [3, differ if shared else 3]


def test_an_output_that_is_no_row_is_computed_anew():
    found, counts = calls(Odd(out=torch.arange(5.0)).eval(), sample=ONES)
    assert counts == [3, 3] and found["other"].tolist() == [0, 1, 2, 3, 4] and found["sample"].shape == (3, 2)


def test_a_module_in_training_mode_is_left_alone():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5))
    module.forward = types.MethodType(lambda self, sample: self[0](sample), module)
    pipe = types.SimpleNamespace(unet=module.train())
    with equal_rows_once(pipe) as counts:
        rows = module(sample=torch.ones(4, 64))
    assert counts["unet"] == [4, 4] and len({tuple(r.tolist()) for r in rows}) == 4


# --- restoring ----------------------------------------------------------------------------------------------------------


def forwards(pipe):
    return {name: vars(m).get("forward") for name in MODULES if (m := getattr(pipe, name, None)) is not None}


def test_an_exception_restores_the_modules(host):
    before = forwards(host.pipe)
    with pytest.raises(KeyboardInterrupt), equal_rows_once(host.pipe):
        assert all(f is not None for f in forwards(host.pipe).values())
        raise KeyboardInterrupt
    assert forwards(host.pipe) == before and "forward" not in vars(host.pipe.vae.decoder)


def test_modules_with_accelerate_hooks():
    host = Maker("sd")
    expected = images(host, ["a", "a"], (1, 1))
    add_hook_to_module(host.pipe.unet, AlignDevicesHook(execution_device="cpu"))
    hooked = vars(host.pipe.unet)["forward"]
    with equal_rows_once(host.pipe) as counts:
        assert (images(host, ["a", "a"], (1, 1)) - expected).abs().max() < 1e-4
    assert counts["unet"] == [12, 6] and vars(host.pipe.unet)["forward"] is hooked
    remove_hook_from_module(host.pipe.unet)
    assert torch.equal(images(host, ["a", "a"], (1, 1)), expected)


def test_hooks_that_come_and_go_meanwhile():
    """As a pipeline with CPU offload does at the end of each call."""
    host = Maker("sd")
    with equal_rows_once(host.pipe) as counts:
        add_hook_to_module(host.pipe.unet, AlignDevicesHook(execution_device="cpu"))
        images(host, ["a", "a"], (1, 1))
    assert counts["unet"] == [12, 6]
    hooked = vars(host.pipe.unet)["forward"]
    images(host, ["a", "a"], (1, 1))
    assert counts["unet"] == [12, 6] and vars(host.pipe.unet)["forward"] is hooked  # the hook stays, sharing does not
