"""The real server: all nodes are there, the example workflows run, wrong inputs are refused in words, cancel works."""

import json
import re
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from .server import NAME, ComfyError, version
from .test_schemas import IDS, ROOT

API = ROOT / "workflows" / "api"
NOT_HERE = {"sdxl", "flux", "video"}  # want models that nobody has for a test
CLOSED = "http://127.0.0.1:9/v1"


def api(name):
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def workflow_names():
    return sorted(f.stem for f in API.glob("*.json"))


def runnable(name):
    """Few steps; an endpoint that is certainly not there; nobody to be asked."""
    graph = api(name)
    for node in graph.values():
        if node["class_type"] == "PromptLoopEndpointRefiner":
            node["inputs"]["url"] = CLOSED
    return graph


def of_class(graph, name):
    return [n for n, node in graph.items() if node["class_type"] == name]


def outputs(comfy, graph):
    return comfy.prompt(graph)["outputs"]


def test_all_nodes_are_there(comfy):
    info = {n: node for n, node in comfy.object_info().items() if n.startswith("PromptLoop")}
    assert sorted(info) == sorted(IDS)
    starting = comfy.log.partition("Starting server")[0]  # later on other tests make errors on purpose
    assert "custom_nodes" in starting and "IMPORT FAILED" not in starting and "Traceback" not in starting
    for name, node in info.items():
        assert node["category"].split("/")[0] == "PromptLoop" and node["description"] and node["display_name"], name
        for group in ("required", "optional"):
            for input, (_, settings) in node["input"].get(group, {}).items():
                assert settings.get("tooltip"), f"{name}: {input} has no tooltip"
        assert all(node["output_tooltips"]), f"{name}: an output without a tooltip"


def test_all_nodes_are_there_where_pip_brought_the_package(comfy_installed):
    assert sorted(n for n in comfy_installed.object_info() if n.startswith("PromptLoop")) == sorted(IDS)
    assert outputs(comfy_installed, api("any-sampler"))


def test_every_workflow_is_either_run_or_known_to_want_models():
    assert set(workflow_names()) > NOT_HERE and len(workflow_names()) >= 12


@pytest.mark.parametrize("name", [n for n in workflow_names() if n not in NOT_HERE])
def test_a_workflow_runs(comfy, name):
    graph = runnable(name)
    shown = outputs(comfy, graph)
    for node in [*of_class(graph, "SaveImage"), *of_class(graph, "PreviewImage")]:
        for picture in shown[node]["images"]:
            width, height = Image.open(BytesIO(comfy.view(picture))).size
            assert min(width, height) > 0, (node, picture)
    loops = [n for kind in ("PromptLoopSampler", "PromptLoopResult") for n in of_class(graph, kind)]
    for node in loops:
        trajectories = shown[node]["promptloop"]
        assert trajectories and all(t["request"] for t in trajectories)
        turns = [turn for t in trajectories for turn in t["turns"]]
        assert turns and all(turn["num_steps"] == 20 for turn in turns)
        for turn in turns:
            if turn["image"] is not None:
                assert Image.open(BytesIO(comfy.view(turn["image"]))).format == "PNG"
        failed = [turn["error"] for turn in turns if turn["error"]]
        assert bool(failed) == (name == "endpoint-refiner"), failed
    assert loops or name in ("rewrite", "score-and-pick-best")


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_a_workflow_that_wants_models_lacks_nothing_but_these(comfy, name):
    with pytest.raises(ComfyError) as refused:
        comfy.queue(api(name))
    lacking = {(node["class_type"], e["type"]) for node in refused.value.errors.values() for e in node["errors"]}
    for kind, error in lacking:
        assert error == "value_not_in_list" or (kind, error) == ("PromptLoopLoadRefiner", "custom_validation_failed"), lacking


def test_pictures_hold_their_trajectory(comfy):
    graph = api("loop-sampler")
    shown = outputs(comfy, graph)
    (sampler,), (saved,) = of_class(graph, "PromptLoopSampler"), of_class(graph, "SaveImage")
    for picture in shown[saved]["images"]:
        text = Image.open(BytesIO(comfy.view(picture))).text
        own = json.loads(text["prompt"])
        assert {n: own[n]["inputs"] for n in own} == {n: graph[n]["inputs"] for n in graph}, (
            "ComfyUI's own metadata is as it was"
        )
        kept = json.loads(text["promptloop"])
        assert kept["version"] == 1 and list(kept["runs"]) == [sampler]
        assert [t["request"] for t in kept["runs"][sampler]["trajectories"]] == [
            t["request"] for t in shown[sampler]["promptloop"]
        ]
        assert [[turn["after"] for turn in t["turns"]] for t in kept["runs"][sampler]["trajectories"]] == [
            [turn["after"] for turn in t["turns"]] for t in shown[sampler]["promptloop"]
        ]
        assert len(text["promptloop"]) < 100_000, "no pictures in the metadata"


def test_a_picture_saved_in_a_later_prompt_holds_it_too(comfy):
    """The sampler then comes from the cache."""
    graph = api("any-sampler")
    first = outputs(comfy, graph)
    (saved,) = of_class(graph, "SaveImage")
    graph[saved]["inputs"]["filename_prefix"] = "again"
    again = outputs(comfy, graph)
    texts = [Image.open(BytesIO(comfy.view(shown[saved]["images"][0]))).text for shown in (first, again)]
    assert json.loads(texts[0]["promptloop"])["runs"] == json.loads(texts[1]["promptloop"])["runs"] != {}


def test_what_the_browser_hears(comfy):
    graph = api("any-sampler")
    (owner,), (sampler,), (told,) = (of_class(graph, k) for k in ("PromptLoop", "KSampler", "PromptLoopResult"))
    graph[sampler]["inputs"]["seed"] = 77
    with comfy.events() as events:
        shown = outputs(comfy, graph)
        end = events.until("promptloop.end")
    (begin,) = events.named("promptloop.begin")
    turns = events.named("promptloop.turn")
    assert {(e["node"], e["owner"]) for e in (begin, end, *turns)} == {(sampler, owner)}
    assert begin["num_steps"] == 20 and begin["due"] == [0, 3, 5, 7, 9] == [t["turn"]["step"] for t in turns]
    (trajectory,) = shown[told]["promptloop"]
    assert end == end | {"prompts": [trajectory["prompt"]], "failures": 0}
    for event, turn in zip(turns, trajectory["turns"], strict=True):
        assert {k: v for k, v in event["turn"].items() if k != "image"} == {k: v for k, v in turn.items() if k != "image"}
        assert (event["turn"]["image"] or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert [t["turn"]["image"] is None for t in turns] == [True, False, False, False, False]


def test_cancel_while_somebody_is_asked_and_the_next_run(comfy):
    graph = api("ask-me")
    (asks,), (sampler,) = of_class(graph, "PromptLoopAskMe"), of_class(graph, "PromptLoopSampler")
    graph[sampler]["inputs"]["seed"] = 901
    with comfy.events() as events:
        prompt_id = comfy.queue(graph)
        question = events.until("promptloop.ask")
        assert question["seconds"] <= graph[asks]["inputs"]["time_limit"]
        clock = time.monotonic()
        comfy.interrupt()
        with pytest.raises(ComfyError) as stopped:
            comfy.wait(prompt_id)
        assert stopped.value.interrupted and time.monotonic() - clock < 2
        assert events.until("promptloop.asked")["id"] == question["id"]
        assert comfy.request("/promptloop/answer", {"id": question["id"], "action": "skip"})[0] == 404
    graph = api("loop-sampler")
    assert outputs(comfy, graph)


def test_free_and_then_again(comfy):
    graph = api("any-sampler")
    (told,), (sampler,) = of_class(graph, "PromptLoopResult"), of_class(graph, "KSampler")
    graph[sampler]["inputs"]["seed"] = 5
    first = outputs(comfy, graph)[told]["promptloop"][0]
    comfy.free()
    time.sleep(0.5)
    again = outputs(comfy, graph)[told]["promptloop"][0]
    assert [t["after"] for t in first["turns"]] == [t["after"] for t in again["turns"]]


def test_help_and_texts_are_served(comfy):
    for name in IDS:
        status, body = comfy.request(f"/extensions/{NAME}/docs/{name}.md")
        assert status == 200 and len(body) > 100, name
    texts = comfy.get("/i18n")
    for language in ("en", "zh"):
        assert set(IDS) <= set(texts[language]["nodeDefs"]), language
    assert [e for e in comfy.get("/extensions") if e.startswith(f"/extensions/{NAME}/") and e.endswith(".js")]


# --- wrong inputs -------------------------------------------------------------------------------------------------------

BEFORE, LATER, CHOICE = "before", "later", "choice"
"""The workflow is refused before anything runs (HTTP 400), or fails in the node, before anything was sampled. A choice that is none is
refused before by ComfyUI itself; old ones do not look."""
WRONG = [  # workflow, class, input, value, when, what the message says
    ("any-sampler", "PromptLoop", "refine_at", "20%, then 50%", BEFORE, "then 50%"),
    ("any-sampler", "PromptLoop", "refine_at", "120%", BEFORE, "more than 100%"),
    ("any-sampler", "PromptLoop", "refine_at", "40", LATER, "20 steps"),
    ("any-sampler", "PromptLoop", "prompt", "", LATER, "prompt is empty"),
    ("any-sampler", "PromptLoop", "wait", False, LATER, "wait"),
    ("any-sampler", "PromptLoop", "preview", "full", CHOICE, "full"),
    ("loop-sampler", "PromptLoopSampler", "refine_at", "sometimes", BEFORE, "sometimes"),
    ("loop-sampler", "PromptLoopSampler", "refine_at", "21", LATER, "20 steps"),
    ("loop-sampler", "PromptLoopSampler", "prompt", "  \n", LATER, "prompt is empty"),
    ("custom-sampling-guider", "PromptLoopSchedule", "more", "every 0", BEFORE, "every 0"),
    ("any-sampler", "PromptLoopLoadRefiner", "model", "Qwen/not-there", BEFORE, "not-there"),
    ("any-sampler", "PromptLoopLoadRefiner", "template", "not there", CHOICE, "not there"),
    ("any-sampler", "PromptLoopLoadRefiner", "adapter", "not there", CHOICE, "not there"),
    ("endpoint-refiner", "PromptLoopEndpointRefiner", "url", "not a url", BEFORE, "not a url"),
    ("endpoint-refiner", "PromptLoopEndpointRefiner", "url", "http://127.0.0.1:9/v1?key=abc", BEFORE, "key"),
    ("endpoint-refiner", "PromptLoopEndpointRefiner", "key_env", "sk-secret/123", LATER, "environment variable"),
    ("endpoint-refiner", "PromptLoopEndpointRefiner", "check_first", True, LATER, "127.0.0.1:9"),
    ("rewrite", "PromptLoopRewrite", "prompt", "", BEFORE, "empty"),
    ("rewrite", "PromptLoopRewrite", "mode", "prepend", CHOICE, "prepend"),
    ("score-and-pick-best", "PromptLoopScore", "rewards", "beauty", BEFORE, "beauty"),
    ("score-and-pick-best", "PromptLoopScore", "rewards", "", BEFORE, "reward"),
    ("score-and-pick-best", "PromptLoopScore", "rewards", "verifier:much", BEFORE, "much"),
    ("score-and-pick-best", "PromptLoopPickBest", "rewards", "clip-score:x", BEFORE, "x"),
    ("score-and-pick-best", "PromptLoopPickBest", "count", 0, BEFORE, "count"),
    ("do-no-harm", "PromptLoopDoNoHarm", "rewards", "nonsense", BEFORE, "nonsense"),
    ("replay", "PromptLoopSaveHistory", "folder", "../outside", BEFORE, "outside"),
    ("replay", "PromptLoopSaveHistory", "folder", "/tmp/elsewhere", BEFORE, "output"),
    ("any-sampler", "PromptLoopLoadEmbedded", "batch_size", 0, BEFORE, "batch_size"),
    ("ask-me", "PromptLoopAskMe", "time_limit", -1, BEFORE, "time_limit"),
]


@pytest.mark.parametrize(("name", "kind", "input", "value", "when", "words"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_input_is_refused_in_words(comfy, name, kind, input, value, when, words):
    if when is CHOICE and version(comfy.folder) < (0, 4):
        pytest.skip("this ComfyUI does not check choices")
    graph = runnable(name)
    (node,) = of_class(graph, kind)
    graph[node]["inputs"][input] = value
    with comfy.events() as events, pytest.raises(ComfyError) as refused:
        comfy.prompt(graph)
    error = refused.value
    assert (error.status is None) == (when is LATER), error
    if error.status == 200:  # other outputs of this workflow do not need the node
        comfy.interrupt()
    else:
        assert "promptloop.turn" not in {e["type"] for e in events}, "nothing was sampled"
    if when is not LATER:
        told = error.errors[node]["errors"]
        assert len(told) == 1, "said once"
        message = f"{told[0]['message']}: {told[0]['details']}"
    else:
        message = str(error)
        assert error.errors["node_type"] in (kind, "KSampler", "SamplerCustomAdvanced")
    assert words in message, message
    assert len(message) < 700 and "\n" not in message.strip(), message
    assert not re.search(r"Traceback|object at 0x|<class", message), message


def test_history_without_a_file_or_of_a_foreign_picture(comfy):
    data = BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    comfy.upload("plain.png", data.getvalue())
    graph = {"1": {"class_type": "PromptLoopLoadHistory", "inputs": {"file": "plain.png", "node": "", "sample": 0}}}
    graph["2"] = {"class_type": "PromptLoopHistory", "inputs": {"history": ["1", 0]}}
    known = comfy.object_info()["PromptLoopLoadHistory"]["input"]
    wanted = {**known.get("required", {}), **known.get("optional", {})}
    graph["1"]["inputs"] = {k: v for k, v in graph["1"]["inputs"].items() if k in wanted}
    with pytest.raises(ComfyError, match=r"plain\.png") as refused:
        comfy.prompt(graph)
    assert refused.value.status == 400 and "PromptLoop" in str(refused.value)


def test_readme_says_how_to_run_these():
    assert "COMFYUI_DIR" in Path(ROOT / "README.md").read_text(encoding="utf-8")
