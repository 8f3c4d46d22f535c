"""Load Refiner and its place in ComfyUI's memory, with tiny models of real classes, in one process."""

import gc
import json
import os
import sys
import time
from pathlib import Path

import pytest

REQUEST = "a crimson ball to the left of a little navy box on black, nothing else"
OWN = "Source: mine\n[user]\n{image} {request}\n[user without image]\nNo picture: {request}\n"


@pytest.fixture(scope="module")
def found(inprocess, tmp_path_factory):
    return inprocess(Path(__file__), tmp_path_factory.mktemp("base"))


def test_models_of_all_registered_folders_are_listed(found):
    assert found["models"] == [
        "embedded: tiny",
        "embedded: tiny-warm-up",
        "flat",
        "owner/sees",
        "owner/text",
        "else/where",
        "half",
    ]
    assert found["adapters"] == ["none", "owner/lora"]
    assert found["paths kept"]


def test_a_missing_model_is_named_with_the_folders_searched(found):
    text = found["missing model"]
    assert "'owner/nosuch'" in text and "LLM" in text and "elsewhere" in text and "owner/sees" in text
    assert found["known model"] is True and "adapter" in found["missing adapter"]


def test_what_cannot_work_is_told_before_weights_are_read(found):
    assert "takes text only" in found["blind"] and "reprompt" in found["blind"]
    assert "no weights" in found["no weights"]
    assert "num_beams" in found["beams"]
    assert found["unread"] is True  # execute reads none
    assert "bitsandbytes" in found["quantized"]


def test_a_folder_brings_its_own_template(found):
    assert found["templates"] == {
        "embedded: tiny": "refiner",
        "owner/sees": "repair",
        "flat": "template",
        "adapter": "template",
    }


def test_the_answer_is_that_of_the_library(found):
    assert found["answer"] == found["library's answer"] and found["answer"]


@pytest.mark.parametrize("afterwards, loaded, there", [("offload", 0, True), ("keep", 1, True), ("unload", 0, False)])
def test_where_the_weights_are_after_an_answer(found, afterwards, loaded, there):
    case = found["memory"][afterwards]
    assert case["loaded while asked"] == 1 and case["device while asked"] == "cpu:0"
    assert (case["loaded"], case["there"]) == (loaded, there)
    assert case["device"] == ("cpu:0" if loaded else "cpu" if there else None)
    assert case["again"] is True


def test_comfyui_evicts_and_brings_back(found):
    assert found["evicted"] == {"loaded": 0, "device": "cpu", "again": True}
    assert found["partly"] == {"freed": 0, "loaded": 0}  # as a whole, never in part
    assert found["dead"] == 0  # nothing is left in ComfyUI's list by a refiner that is gone


def test_weights_that_cannot_be_moved_are_given_up_and_read_again(found):
    assert found["given up"] == {
        "size": 1000, "read": [["cpu:0"], ["cpu:0"], ["cpu:0", "cpu:0"]], "kept": True, "evicted": None, "again": True, "loaded": 0
    }  # fmt: skip


def test_weights_are_shared_and_let_go(found):
    assert found["shared"] == {"another seed": True, "another dtype": False, "after free": 0, "two at a time": 1, "unload": 0}
    assert (
        found["rewritten"] is True and found["edited"] is True
    )  # weights, and what a model is told, are not taken from a cache


def test_nothing_is_loaded_where_there_is_nothing_to_ask(found):
    assert found["not asked"]["notes"] and found["not asked"]["read"] == 0


def test_cancel_stops_within_a_token(found):
    assert found["cancel"]["raised"] == "InterruptProcessingException" and found["cancel"]["tokens"] <= 4
    assert found["cancel"]["loaded"] == 0 and found["cancel"]["before reading"] == "InterruptProcessingException"
    assert found["cancel"]["own"] == "KeyError"  # the host's on_token is asked instead, and gets through


def test_too_small_a_device_says_what_to_do(found):
    assert found["too small"]["kind"] == "MemoryError" and "4bit" in found["too small"]["text"]
    assert found["too small"]["cause"] is None and found["too small"]["loaded"] == 0


def test_random_state_is_left_alone(found):
    assert found["random"] is True


# --- inside ComfyUI ---------------------------------------------------------------------------------------------------


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as e:
        return f"{type(e).__name__}: {e}".removeprefix("ValueError: ")
    return "no error"


def file_of(name):
    """A module of this repository's tests by its path: ComfyUI has a folder of that name too."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def view(**kwargs):
    from PIL import Image

    from promptloop_pipeline import View

    return View(
        **({"request": REQUEST, "prompt": REQUEST, "step": 5, "num_steps": 20, "image": Image.new("RGB", (32, 32))} | kwargs)
    )


WIDGETS = {
    "template": "auto", "adapter": "none", "dtype": "auto", "quantization": "none", "memory": "offload", "max_new_tokens": 24,
    "temperature": 0.0, "seed": 0,
}  # fmt: skip


class Inside:
    def __init__(self, base):
        import comfy.model_management as mm
        import folder_paths
        import nodes

        self.base, self.mm, self.folder_paths = Path(base), mm, folder_paths
        self.node = nodes.NODE_CLASS_MAPPINGS["PromptLoopLoadRefiner"]
        self.endpoint = nodes.NODE_CLASS_MAPPINGS["PromptLoopEndpointRefiner"]
        self.loaders = sys.modules[self.node.__module__]
        self.memory = sys.modules[self.loaders.ManagedRefiner.__module__]
        self.presets_module = sys.modules[self.loaders.load_preset.__module__]

    def load(self, model, **kwargs):
        return self.node.execute(**(WIDGETS | {"model": model} | kwargs)).result[0]

    def loaded(self):
        return sum(type(entry.model.model).__name__ == "LanguageModel" for entry in self.mm.current_loaded_models)

    def preset(self, name, text):
        folder = self.presets_module.user_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    def folders(self):
        models = file_of("chat/models")
        llm, elsewhere = self.base / "models" / "LLM", self.base / "elsewhere"
        models.save(models.idefics3, llm / "owner" / "sees")
        models.save(models.qwen2, llm / "owner" / "text")
        models.save(models.idefics3, llm / "flat")
        (llm / "flat" / "template.txt").write_text(OWN, encoding="utf-8")
        models.save(models.qwen2, elsewhere / "else" / "where")
        models.save(models.idefics3, elsewhere / "owner" / "sees")  # the first of a name counts
        (elsewhere / "half").mkdir()
        (elsewhere / "half" / "config.json").write_text(
            (llm / "flat" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
        self._adapter(llm / "owner" / "sees", llm / "owner" / "lora")
        self.folder_paths.folder_names_and_paths["LLM"] = ([str(llm), str(elsewhere)], set())  # as extra_model_paths.yaml does
        schema = {i.id: i.options for i in self.node.GET_SCHEMA().inputs if hasattr(i, "options")}
        check = self.node.validate_inputs
        return {
            "models": schema["model"], "adapters": schema["adapter"],
            "paths kept": self.folder_paths.get_folder_paths("LLM") == [str(llm), str(elsewhere)],
            "missing model": check(model="owner/nosuch"), "known model": check(model="else/where"),
            "missing adapter": error_of(self.load, "flat", adapter="nosuch"),
            "blind": error_of(self.load, "owner/text"), "no weights": error_of(self.load, "half"),
            "quantized": error_of(self.load, "flat", quantization="4bit"),
            "beams": error_of(self.load, "owner/text", template="promptist", temperature=0.5),
            "unread": all(self.load(m).weights.patcher is None for m in ("flat", "owner/sees")),
            "templates": {m: self.load(m).template.name for m in ("embedded: tiny", "owner/sees", "flat")}
            | {"adapter": self.load("owner/sees", adapter="owner/lora").template.name},
        }  # fmt: skip

    @staticmethod
    def _adapter(model, folder):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText

        tuned = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
        tuned.save_pretrained(folder)
        (folder / "template.txt").write_text(OWN, encoding="utf-8")

    def answers(self):
        import torch

        from promptloop_pipeline import MLLMRefiner, tiny

        views = [view(image=None, step=0), view(image=None, step=0, request="a big jade cross on white alone")]
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        drawn = self.load("owner/sees", adapter="owner/lora", temperature=1.0, seed=5, dtype="float32")
        found = {"answer": [a.prompt for a in self.load("embedded: tiny", max_new_tokens=0).refine(views)]}
        found["answer"] += [a.raw for a in drawn.refine([view()])]
        found["random"] = bool((torch.random.get_rng_state() == before).all())
        found["library's answer"] = [a.prompt for a in tiny.load_refiner().refine(views)]
        folder = self.base / "models" / "LLM" / "owner"
        options = {"adapter": str(folder / "lora"), "temperature": 1.0, "seed": 5, "max_new_tokens": 24, "device": "cpu"}
        theirs = MLLMRefiner.from_pretrained(str(folder / "sees"), folder / "lora" / "template.txt", **options)
        found["library's answer"] += [a.raw for a in theirs.refine([view()])]
        return found

    def policies(self):
        """With a device of another name, so that ComfyUI has two places to keep books about."""
        import torch

        found = {}
        self.memory._last.clear()
        gc.collect()
        self.mm.get_torch_device = lambda: torch.device("cpu", 0)
        for afterwards in self.memory.AFTERWARDS:
            refiner = self.load("embedded: tiny", memory=afterwards)
            case, weights = {}, refiner.weights

            def look(case=case, weights=weights):
                case["loaded while asked"], case["device while asked"] = (
                    self.loaded(),
                    str(weights.patcher.current_loaded_device()),
                )

            refiner.on_token = lambda look=look: look() if weights.patcher is not None else None
            first = refiner.refine([view()])
            holder = weights.patcher
            case |= {
                "loaded": self.loaded(),
                "there": holder is not None,
                "device": holder and str(holder.current_loaded_device()),
            }
            case["again"] = refiner.refine([view()]) == first
            found[afterwards] = case
        return {"memory": found}

    def eviction(self):
        self.mm.unload_all_models()
        self.memory._last.clear()
        mm, refiner = self.mm, self.load("embedded: tiny", memory="keep")
        first, patcher = refiner.refine([view()]), refiner.weights.patcher
        mm.unload_all_models()
        evicted = {"loaded": self.loaded(), "device": str(patcher.current_loaded_device())}
        evicted["again"] = refiner.refine([view()]) == first
        entry = next(e for e in mm.current_loaded_models if e.model is patcher)
        partly = {"freed": patcher.partially_unload(patcher.offload_device, 10)}
        entry.model_unload(10)  # of some megabytes: as ComfyUI asks where a little is missing
        partly["loaded"] = patcher.loaded_size()
        mm.current_loaded_models.remove(entry)
        refiner.refine([view()])
        self.memory._last.clear()
        del refiner, patcher, entry
        gc.collect()
        return {"evicted": evicted, "partly": partly, "dead": self.loaded()}

    def given_up(self):
        from promptloop_pipeline.tiny import load_refiner

        read = []

        def reading(device):
            read.append(str(device))
            return load_refiner().chat

        weights, told = self.memory.Weights("bits", reading, 1000), load_refiner().template
        kept, once = self.memory.ManagedRefiner(weights, told, "keep"), self.memory.ManagedRefiner(weights, told, "offload")
        first = kept.refine([view()])
        found = {"size": weights.patcher.model_size(), "read": [list(read)], "kept": kept.refine([view()]) == first}
        found["read"].append(list(read))
        self.mm.unload_all_models()
        found["evicted"] = weights.patcher.model.chat
        found["again"] = once.refine([view()]) == first
        found["read"].append(list(read))
        return {"given up": found | {"loaded": self.loaded()}}

    def sharing(self):
        memory = self.memory
        self.preset("mine", OWN)
        first = self.load("flat")
        found = {"another seed": self.load("flat", seed=7, template="mine").weights is first.weights}
        found["another dtype"] = self.load("flat", dtype="bfloat16").weights is first.weights
        found["two at a time"] = len(memory._last)
        self._free()
        found["after free"] = len(memory._last)
        self.load("flat", memory="unload")
        found["unload"] = len(memory._last)
        file = self.base / "models" / "LLM" / "flat" / "model.safetensors"
        before = self.node.fingerprint_inputs(**(WIDGETS | {"model": "flat"}))
        os.utime(file, ns=(time.time_ns() + 10**9,) * 2)
        after = self.node.fingerprint_inputs(**(WIDGETS | {"model": "flat"}))
        rewritten = after != before and self.load("flat").weights is not first.weights
        mine = {"template": "mine", "model": "flat"}
        before = self.node.fingerprint_inputs(**(WIDGETS | mine)), self.endpoint.fingerprint_inputs(url="", template="mine")
        os.utime(self.presets_module.user_folder() / "mine.txt", ns=(time.time_ns() + 10**9,) * 2)
        after = self.node.fingerprint_inputs(**(WIDGETS | mine)), self.endpoint.fingerprint_inputs(url="", template="mine")
        return {"shared": found, "rewritten": rewritten, "edited": all(a != b for a, b in zip(after, before))}

    def _free(self):
        """What aiohttp does with an answer to POST /free."""
        import asyncio

        from aiohttp.test_utils import make_mocked_request
        from aiohttp.web import Response
        from server import PromptServer

        async def send():
            for watch in PromptServer.instance.app.on_response_prepare:
                await watch(make_mocked_request("POST", "/api/free"), Response())

        asyncio.run(send())

    def asking(self):
        import comfy.model_management as mm
        import torch

        reads = []
        weights = self.memory.Weights("never", lambda device: reads.append(device))
        unasked = self.memory.ManagedRefiner(weights, self.presets_module.load_preset("repair"))
        notes = unasked.refine([view(image=None, step=0)])[0].notes
        refiner, tokens = self.load("owner/sees", max_new_tokens=200), []

        def count():
            tokens.append(1)
            if len(tokens) == 3:
                mm.interrupt_current_processing()
            mm.throw_exception_if_processing_interrupted()

        refiner.on_token = count
        cancel = {"raised": error_of(refiner.refine, [view()]).split(":")[0], "tokens": len(tokens), "loaded": self.loaded()}
        refiner.on_token = None
        mm.interrupt_current_processing()
        cancel["before reading"] = error_of(unasked.refine, [view()]).split(":")[0]

        def own():
            raise KeyError

        refiner.on_token = own
        cancel["own"] = error_of(refiner.refine, [view()]).split(":")[0]
        refiner.on_token = None

        def full(device):
            raise mm.OOM_EXCEPTION("Tried to allocate 20 GiB\nand more")

        small = {}
        try:
            self.memory.ManagedRefiner(self.memory.Weights("large", full), refiner.template).refine([view()])
        except MemoryError as e:
            small = {"kind": type(e).__name__, "text": str(e), "cause": e.__cause__ or e.__context__, "loaded": self.loaded()}
        assert torch.is_grad_enabled()
        return {"not asked": {"notes": notes, "read": len(reads)}, "cancel": cancel, "too small": small}


def main(base):
    import inside

    inside.setup(base, extras=False)
    here, found = Inside(base), {}
    for part in (here.folders, here.answers, here.policies, here.eviction, here.given_up, here.sharing, here.asking):
        found |= part()
    inside.answer(json.loads(json.dumps(found, default=str)))


if __name__ == "__main__":
    main(sys.argv[1])
