"""The loaders in the real server: what the dialog says, and that models and memory are ComfyUI's."""

import io

import pytest
from PIL import Image

from .server import ComfyError

LOADER = {
    "model": "embedded: tiny", "template": "auto", "adapter": "none", "dtype": "auto", "quantization": "none", "memory": "keep",
    "max_new_tokens": 0, "temperature": 0.0, "seed": 0,
}  # fmt: skip
ENDPOINT = {
    "url": "http://127.0.0.1:9", "model": "", "template": "repair", "key_env": "PROMPTLOOP_API_KEY", "timeout": 5.0, "sees": True,
    "check_first": True, "max_new_tokens": 0, "temperature": 0.0, "seed": 0,
}  # fmt: skip
CAPTION = "large red circle top left , small blue square bottom right , black background"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def picture(sampler="euler", seed=1):
    """ComfyUI's own nodes around ours."""
    sampling = {"seed": seed, "steps": 20, "cfg": 3.0, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}
    return {
        "1": node("PromptLoopLoadEmbedded", batch_size=2),
        "2": node("CLIPTextEncode", clip=["1", 1], text=CAPTION),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["1", 3], **sampling),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("PreviewImage", images=["5", 0]),
    }


def rewrite(kind="PromptLoopLoadRefiner", **inputs):
    refiner = node(kind, **((LOADER if kind == "PromptLoopLoadRefiner" else ENDPOINT) | inputs))
    words = {"prompt": "a crimson ball on black, nothing else", "mode": "replace", "template": "as loaded", "seed": 0}
    told = node("PromptLoopRewrite", refiner=["1", 0], **words)
    return {"1": refiner, "2": told, "3": node("PreviewAny", source=["2", 0])}


def shown(comfy, outputs):
    return [Image.open(io.BytesIO(comfy.view(image))) for image in outputs["outputs"]["6"]["images"]]


def test_stock_nodes_work_on_the_embedded_pipeline(comfy):
    first = shown(comfy, comfy.prompt(picture()))
    assert [p.size for p in first] == [(32, 32)] * 2
    comfy.free()
    again = shown(comfy, comfy.prompt(picture()))  # read anew
    assert [p.tobytes() for p in again] == [p.tobytes() for p in first]
    assert [p.tobytes() for p in shown(comfy, comfy.prompt(picture(seed=2)))] != [p.tobytes() for p in first]


@pytest.mark.parametrize(
    "workflow, told",
    [
        (rewrite(model="owner/nosuch"), ("the model 'owner/nosuch' is in none of", "models/LLM", "embedded: tiny")),
        (rewrite("PromptLoopEndpointRefiner", url="localhost"), ("url is 'localhost'", "http://host:port")),
        (rewrite("PromptLoopEndpointRefiner", url=""), ("url is ''", "http://host:port")),
    ],
)
def test_bad_input_is_refused_before_anything_runs(comfy, workflow, told):
    with pytest.raises(ComfyError) as refused:
        comfy.prompt(workflow)
    assert refused.value.status == 400 and len(refused.value.errors["1"]["errors"]) == 1
    assert all(part in str(refused.value) for part in told), str(refused.value)


@pytest.mark.parametrize(
    "workflow, told",
    [
        (rewrite("PromptLoopEndpointRefiner"), ("http://127.0.0.1:9/v1/models", "connection refused", "is the server running")),
        (rewrite("PromptLoopEndpointRefiner", key_env="sk-secret"), ("key_env takes the name",)),
        (rewrite(quantization="4bit"), ("4bit needs bitsandbytes", "pip install")),
        (rewrite(template="promptist", temperature=0.5), ("num_beams",)),
    ],
)
def test_what_is_known_only_when_the_loader_runs_is_one_line(comfy, workflow, told):
    with pytest.raises(ComfyError) as failed:
        comfy.prompt(workflow)
    assert failed.value.errors["node_id"] == "1", "the loader says it, not whoever asks the refiner later"
    assert all(part in str(failed.value) for part in told) and len(str(failed.value).splitlines()) == 1, str(failed.value)


def test_a_linked_address_is_checked_when_the_loader_runs(comfy):
    workflow = rewrite("PromptLoopEndpointRefiner", url=["4", 0]) | {"4": node("PrimitiveString", value="localhost")}
    with pytest.raises(ComfyError, match="url is 'localhost'") as failed:
        comfy.prompt(workflow)
    assert failed.value.errors["node_id"] == "1"


def test_a_refiner_is_comfyuis_to_unload(comfy):
    def loads():
        return comfy.log.count("Requested to load LanguageModel")

    comfy.prompt(rewrite())
    assert (before := loads()) > 0
    comfy.prompt(rewrite(seed=1))  # made anew, and still on its device
    assert loads() == before
    comfy.free()
    comfy.prompt(rewrite(seed=2))
    assert loads() == before + 1
