"""Load Embedded Pipeline inside ComfyUI, held against the diffusers pipeline of the same weights. One process for all of it."""

import json
import sys
from pathlib import Path

import pytest

REQUESTS = (
    "big red ball on the left of a small blue square on black, nothing else",
    "a little yellow triangle above a large green cross on white, nothing else",
)
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_sde",
    "ddpm",
    "lcm",
    "uni_pc",
    "res_multistep",
    "er_sde",
)


@pytest.fixture(scope="module")
def found(inprocess, tmp_path_factory):
    return inprocess(Path(__file__), tmp_path_factory.mktemp("base"))


def test_a_run_of_ddim_is_the_pipelines(found):
    for case in found["pipeline"]:
        assert case["tokens"] and case["text"] < 1e-5
        assert case["picture"] < 1e-3 < case["other seed"], case  # of 0..1
        assert case["verdict"] == case["pipeline's verdict"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_draw_what_is_asked(found, sampler):
    assert found["samplers"][sampler] > found["nonsense"] + 0.2, found["samplers"]


def test_latents_have_the_right_size(found):
    assert found["latent"] == [3, 8, 8, 8] and found["picture"] == [3, 32, 32, 3]
    assert found["four channels"] == 0  # an empty latent of ComfyUI's own node is taken too


def test_the_vae_gives_back_what_it_was_given(found):
    assert found["round trip"] < 0.03 and found["tiled"] < 0.02  # mean difference, of 0..1; tiles see less around them
    assert found["odd size"] == [1, 8, 9, 8]  # 38 x 35 pixels: cut to what the latents can hold


def test_a_picture_can_be_started_from(found):
    assert found["near at 0.3"] < found["near at 0.8"] < found["near at 1"]
    assert found["outside the mask"] < 1e-5 < found["inside the mask"]


def test_the_samplers_preview_looks_like_the_picture(found):
    assert found["preview"] > 0.8  # correlation


def test_prompts_are_cut_where_the_pipeline_cuts(found):
    assert found["cut"] == 0 and found["windows"] == 1
    assert found["cut with weights"] == 22
    assert found["fit"].endswith("clear row two column three")
    assert found["fit, no comma"].split() == ["red"] * 20
    assert found["weighted"] > 0.01 and found["skipped layer"] > 0.01


def test_a_lora_of_diffusers_names_acts_and_goes(found):
    assert found["lora's keys"] == {"model": 1, "clip": 1}
    assert found["with lora"] > 0.01 and found["after lora"] == 0


def test_models_thrown_out_of_memory_come_back(found):
    assert found["unloaded"] == 0 and found["after unloading"] == 0
    assert found["gradients"] is False


def test_a_control_net_is_refused(found):
    assert "ControlNet" in found["control"]


# --- inside ComfyUI ---------------------------------------------------------------------------------------------------


def _distance(a, b):
    return (a - b).abs().mean().item()


def _largest(a, b):
    return (a - b).abs().max().item()


class World:
    def __init__(self, model, clip, vae):
        self.model, self.clip, self.vae = model, clip, vae

    def text(self, prompt, clip=None):
        clip = clip or self.clip
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    def latent(self, prompt, seed=0, sampler="ddim", model=None, start=None, denoise=1.0, count=2, mask=None):
        import comfy.sample
        import torch

        noise = torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        start = torch.zeros(count, 8, 8, 8) if start is None else start
        return comfy.sample.sample(
            model or self.model, noise, 20, 3.0, sampler, "simple", self.text(prompt), self.text(""), start, denoise=denoise,
            seed=seed, noise_mask=mask, disable_pbar=True,
        )  # fmt: skip

    def picture(self, *args, **kwargs):
        return self.vae.decode(self.latent(*args, **kwargs))


def _against_the_pipeline(world, tiny):
    import torch
    from PIL import Image

    pipe, cases = tiny.load_pipeline("sd"), []

    def verdicts(pictures, request):
        return [tiny.verify(Image.fromarray((p.numpy() * 255).round().astype("uint8")), request).score for p in pictures]

    for seed, request in enumerate(REQUESTS):
        caption = tiny.single_shot(request)
        noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        options = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
        theirs = pipe([caption] * 2, latents=noise, **options).images.movedim(1, -1)
        ids = pipe.tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
        ours = world.picture(caption, seed)
        cases.append(
            {
                "tokens": [t for t, _ in world.clip.tokenize(caption)["l"][0]] == ids[0].tolist(),
                "text": _largest(world.text(caption)[0][0], pipe.text_encoder(ids)[0]),
                "picture": _largest(ours, theirs),
                "other seed": _largest(world.picture(caption, seed + 10), theirs),
                "verdict": verdicts(ours, request),
                "pipeline's verdict": verdicts(theirs, request),
            }
        )
    return cases, verdicts


def _samplers(world, tiny, verdicts):
    scores = {}
    for sampler in SAMPLERS:
        found = [
            s for k, r in enumerate(REQUESTS) for s in verdicts(world.picture(tiny.single_shot(r), k, sampler, count=4), r)
        ]
        scores[sampler] = sum(found) / len(found)
    found = [s for k, r in enumerate(REQUESTS) for s in verdicts(world.picture("clear", k, count=4), r)]
    return {"samplers": scores, "nonsense": sum(found) / len(found)}


def _vae(world):
    import torch

    # What the world looks like: pictures that its generator made.
    picture = world.picture("large red circle top left , small blue square bottom right , black background", 3)
    latent = world.vae.encode(picture)
    found = {"round trip": _distance(world.vae.decode(latent), picture)}
    big = picture.repeat(1, 4, 4, 1)
    tiled = world.vae.decode_tiled(
        world.vae.encode_tiled(big, tile_x=64, tile_y=64, overlap=16), tile_x=16, tile_y=16, overlap=4
    )
    found["tiled"] = _distance(tiled, world.vae.decode(world.vae.encode(big)))
    found["odd size"] = list(world.vae.encode(torch.zeros(1, 38, 35, 3)).shape)
    for denoise in (0.3, 0.8, 1):
        again = world.picture("small green cross top right , white background", 4, start=latent, denoise=denoise)
        found[f"near at {denoise}"] = _distance(again, picture)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    again = world.latent("small green cross top right , white background", 4, start=latent, mask=mask)
    return found | {
        "outside the mask": _largest(again[..., :4], latent[..., :4]),
        "inside the mask": _largest(again[..., 4:], latent[..., 4:]),
    }


def _preview(world):
    import latent_preview
    import numpy
    import torch
    from comfy.cli_args import LatentPreviewMethod, args

    args.preview_method = LatentPreviewMethod.Latent2RGB
    latent = world.latent("large red circle top left , small blue square bottom right , black background", 3)
    previewer = latent_preview.get_previewer(torch.device("cpu"), world.model.model.latent_format)
    rough = numpy.asarray(previewer.decode_latent_to_preview(world.model.model.process_latent_in(latent)), dtype=float)
    picture = world.vae.decode(latent)[0].reshape(8, 4, 8, 4, 3).mean((1, 3)).numpy()
    return {"preview": float(numpy.corrcoef(rough.ravel(), picture.ravel())[0, 1])}


def _prompts(world):
    words = (
        "large red circle top left , small blue square bottom right , black background , clear row two column three , left top"
    )
    windows = world.clip.tokenize(words)["l"]
    cut = " ".join(words.split()[:20])
    skipped = world.clip.clone()
    skipped.clip_layer(-2)
    return {
        "cut": _largest(world.text(words)[0][0], world.text(cut)[0][0]),
        "windows": len(windows),
        "cut with weights": len(world.clip.tokenize("(red:1.2) (blue:1.1) " * 15)["l"][0]),
        "fit": world.clip.tokenizer.promptloop_fit(words),
        "fit, no comma": world.clip.tokenizer.promptloop_fit("red " * 30),
        "weighted": _largest(world.text("red circle")[0][0], world.text("(red:1.5) circle")[0][0]),
        "skipped layer": _largest(world.text("red circle")[0][0], world.text("red circle", skipped)[0][0]),
    }


def _lora(world):
    import comfy.lora
    import comfy.sd
    import torch

    g = torch.Generator().manual_seed(0)
    parts = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": 96,
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": 96,
    }
    file = {}
    for name, width in parts.items():
        file[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=g)
        file[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=g)
    prompt = "large red circle top left , black background"
    before = world.picture(prompt, 5)
    model, clip = comfy.sd.load_lora_for_models(world.model, world.clip, file, 1.0, 1.0)
    return {
        "lora's keys": {"model": len(model.patches), "clip": len(clip.patcher.patches)},
        "with lora": _distance(world.picture(prompt, 5, model=model), before),
        "after lora": _largest(world.picture(prompt, 5), before),
    }


def _memory(world):
    import comfy.model_management as mm

    prompt = "large red circle top left , black background"
    before = world.picture(prompt, 6)
    mm.unload_all_models()
    found = {"unloaded": len(mm.current_loaded_models), "after unloading": _largest(world.picture(prompt, 6), before)}
    found["gradients"] = any(
        p.requires_grad for p in [*world.model.model.parameters(), *world.vae.first_stage_model.parameters()]
    )
    try:
        world.model.model.diffusion_model(before, None, control={})
    except ValueError as e:
        found["control"] = str(e)
    return found


def main(base):
    import inside

    inside.setup(base, extras=False)
    import comfy.sample
    import nodes
    import torch

    from promptloop_pipeline import tiny

    node = nodes.NODE_CLASS_MAPPINGS["PromptLoopLoadEmbedded"]
    model, clip, vae, latent = node.execute(batch_size=3).result
    world = World(model, clip, vae)
    with torch.inference_mode():
        cases, verdicts = _against_the_pipeline(world, tiny)
        found = {"pipeline": cases, **_samplers(world, tiny, verdicts), **_vae(world), **_preview(world), **_prompts(world)}
        found["latent"] = list(latent["samples"].shape)
        found["picture"] = list(vae.decode(world.latent("red circle", count=3)).shape)
        four = comfy.sample.fix_empty_latent_channels(model, torch.zeros(2, 4, 8, 8))
        found["four channels"] = _largest(world.picture("red circle", start=four), world.picture("red circle"))
        found |= _lora(world) | _memory(world)
    inside.answer(json.loads(json.dumps(found)))


if __name__ == "__main__":
    main(sys.argv[1])
