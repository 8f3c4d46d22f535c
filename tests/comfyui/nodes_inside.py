"""Run by test_nodes_inside.py within a ComfyUI whose base directory is the first argument: reward nodes with what no node of the server
gives. models/rewards holds a tiny clip-score.
"""

import sys

import inside

inside.setup(sys.argv[1])

import comfy.model_management as mm  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402

SCORE, BEST, GATE = (nodes.NODE_CLASS_MAPPINGS[f"PromptLoop{n}"] for n in ("Score", "PickBest", "DoNoHarm"))
PACK = sys.modules[SCORE.__module__]
RED = "a big red ball"


class Width:
    """A reward of one's own, as `promptloop_pipeline.reward` describes it."""

    name = "width"

    def __call__(self, images, prompts, **context):
        return [float(i.width) + sum(i.getpixel((0, 0))) for i in images]


def memory():
    """A model is ComfyUI's to unload, and comes back."""
    images = [torch.rand(2, 64, 64, 3)]
    scores, held = [], []
    for device in ("gpu", "gpu", "cpu"):
        scores.append(SCORE.execute(images=images, prompt=[RED], rewards=["clip-score"], device=[device]).result[0])
        patchers = [patcher for _, patcher in PACK._loaded.values() if patcher is not None]
        held.append([any(m.model is p for m in mm.current_loaded_models) for p in patchers])
        mm.unload_all_models()
    return {"scores": scores, "held": held, "kept": len(PACK._loaded)}


MEMORY = memory()
PACK._loaded.clear()
PACK.scoring.load = lambda name, options, device, allow: Width()  # the node's own way of loading is tested elsewhere


def sizes():
    """Pictures of several sizes stay as they are, best first."""
    images = [torch.zeros(1, 8, w, 3) for w in (8, 24, 16)]
    found = BEST.execute(images=images, prompt=[RED], rewards=["verifier"], count=[2]).result
    return {"shapes": [list(i.shape) for i in found[0]], "scores": found[1], "places": found[2]}


def prompts():
    """One for each picture, and a wrong number."""
    images = [torch.zeros(2, 8, 8, 3), torch.zeros(1, 8, 8, 4)]
    found = SCORE.execute(images=images, prompt=["a", "b", "c"], rewards=["verifier"]).result
    try:
        SCORE.execute(images=images, prompt=["a"] * 4, rewards=["verifier"])
    except ValueError as e:
        return {"scores": found[0], "passed": [list(i.shape) for i in found[2]], "said": str(e)}


class Bright:
    """A VAE that shows a latent as it is: [N, C, ...] -> [N, ..., 3]."""

    def decode(self, samples):
        return samples.movedim(1, -1)[..., :3]


def latents():
    """Videos, and latents with sound beside them: for each sample what scores higher."""
    new, old = torch.zeros(3, 4, 2, 8, 8), torch.zeros(3, 4, 2, 8, 8)
    new[0], old[1] = 1, 1
    found = GATE.execute(
        refined=[{"samples": new, "noise_mask": "kept"}],
        untouched=[{"samples": old}],
        vae=[Bright()],
        prompt=[RED],
        rewards=["verifier"],
    ).result
    samples = found[0][0]["samples"]
    result = {
        "image": list(found[1][0].shape), "mask": found[0][0]["noise_mask"], "first": torch.equal(samples[0], new[0]),
        "second": torch.equal(samples[1], old[1]), "third": torch.equal(samples[2], old[2]), "report": found[2].splitlines()[:3],
    }  # fmt: skip
    try:
        from comfy.nested_tensor import NestedTensor
    except ImportError:
        return result
    sound = [torch.full((3, 2, 5), k) for k in (1.0, 2.0)]
    arms = [NestedTensor([video, beside]) for video, beside in zip((new, old), sound, strict=True)]
    found = GATE.execute(
        refined=[{"samples": arms[0]}], untouched=[{"samples": arms[1]}], vae=[Bright()], prompt=[RED], rewards=["verifier"]
    ).result
    video, beside = found[0][0]["samples"].unbind()
    return result | {"sound": beside[:, 0, 0].tolist(), "video": torch.equal(video, samples)}


def cancel():
    """Between pictures."""
    mm.interrupt_current_processing()
    import comfy.utils

    comfy.utils.set_progress_bar_global_hook(lambda *args, **kwargs: mm.throw_exception_if_processing_interrupted())
    try:
        SCORE.execute(images=[torch.zeros(9, 8, 8, 3)], prompt=[RED], rewards=["verifier"])
    except mm.InterruptProcessingException:
        return "interrupted"
    finally:
        comfy.utils.PROGRESS_BAR_HOOK = None


inside.answer({"memory": MEMORY, "sizes": sizes(), "prompts": prompts(), "latents": latents(), "cancel": cancel()})
