"""Makes workflows/*.json, for ComfyUI's template browser, from workflows/api/*.json and the notes below, in the real frontend.

python -m tests.comfyui.workflows http://127.0.0.1:8188 [NAME ...]

The API file is the source: change it, run this, and commit both. The frontend makes the nodes; here they are laid out
from left to right, as the picture grows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
GAP_X, GAP_Y, TITLE = 70, 30, 30
TEXTS = ("CLIPTextEncode", "PrimitiveStringMultiline")  # fields that the frontend makes larger than they need be
RUNS = "Runs as it is: nothing is downloaded. Press Run."

NOTES = {
    "any-sampler": (
        "The loop with any sampler",
        f"{RUNS} The *PromptLoop* node puts the loop into the model; the sampler is ComfyUI's own.\n\n"
        "Watch the timeline in *PromptLoop* while it samples: the refiner sees stickers form that nobody asked for, and forbids "
        "the place where each one forms. *PromptLoop Result* keeps the record.\n\n"
        "Try other samplers, or `start` alone in `refine_at`: nobody looks.",
    ),
    "loop-sampler": (
        "PromptLoop Sampler, a batch of two",
        f"{RUNS} One node is sampler and loop, and has all that comes of it as outputs.\n\n"
        "Each picture of the batch is refined on its own: the arrows in the timeline switch between them.\n\n"
        "Drop a saved picture on the canvas: the workflow comes back, with the timeline of that run.",
    ),
    "custom-sampling-guider": (
        "Custom sampling with a guider",
        f"{RUNS} *PromptLoop Guider* stands between any guider and *SamplerCustomAdvanced*.\n\n"
        "*Refinement Schedule* says when to look by numbers: at the start, then four looks between 15 % and 45 % of the run.\n\n"
        "The timeline is in *PromptLoop Guider* and in *PromptLoop Result*.",
    ),
    "rewrite": (
        "One rewrite before sampling",
        f"{RUNS} *Rewrite Prompt* asks the refiner once, then everything goes on as usual.\n\n"
        "New prompt and reasoning are text outputs; `append` keeps your own words in front.\n\n"
        "If the model fails, your prompt is used and the node says why.",
    ),
    "score-and-pick-best": (
        "Score six pictures, keep the best two",
        f"{RUNS} *Score Images* gives each picture marks for what *you* asked, not for the rewritten prompt.\n\n"
        "`verifier` is the exact judge of the embedded world. For photographs use `image-reward` or `pickscore`, with their "
        "weights in models/rewards.\n\n*Pick Best* passes the best ones on.",
    ),
    "do-no-harm": (
        "Refine, but do no harm",
        f"{RUNS} The same seeds twice: once with the loop, once with the same first rewrite and no looks.\n\n"
        "*Do No Harm* keeps the refined picture only where it scores higher; the report says which and why.\n\n"
        "It costs twice the time: use it where a bad rewrite would be expensive.",
    ),
    "endpoint-refiner": (
        "A refiner at an endpoint",
        "Any OpenAI-style server can refine: Ollama, LM Studio, vLLM. Set `url` and `model`; a key is named by its "
        "environment variable.\n\n"
        "Without a server the picture is made all the same, and the timeline says what failed.\n\n"
        "*Guard Refiner* keeps your words in front. The embedded generator knows few words: put your own checkpoint in its place.",
    ),
    "replay": (
        "Replay a run without its model",
        f"{RUNS} *Replay* is a refiner that says what was said before: same seed, same picture, no language model.\n\n"
        "*Export Prompt Schedule* writes the prompts by step, for other tools too; *Save History* keeps runs in the output folder.\n\n"
        "*Load History* in place of the first run replays a PNG.",
    ),
    "ask-me": (
        "Ask me: you are the refiner",
        f"{RUNS} At each look sampling waits, and a window shows the preview and a suggestion.\n\n"
        "Accept it (Ctrl+Enter), change the text and use yours, or skip (Esc).\n\n"
        "What you answer is recorded, and can train a refiner of your own later.",
    ),
    "regional-target": (
        "Regional prompts: refine one of them",
        f"{RUNS} Two prompts, one for each half of the picture.\n\n"
        "*Refinement Target* marks the left one: only that is rewritten, the right one stays as it is.\n\n"
        "The `prompt` of the sampler is the request that the marked part stands for.",
    ),
    "sdxl": (
        "SDXL with a vision-language model",
        "Files: models/checkpoints/sd_xl_base_1.0.safetensors, and the folder models/LLM/Qwen3-VL-4B-Instruct "
        "(all files of Qwen/Qwen3-VL-4B-Instruct on Hugging Face).\n\n"
        "The refiner looks at 20, 50 and 80 % and mends only what is missing or wrong.\n\n"
        "Short of memory: quantization `4bit`, or memory `unload`.",
    ),
    "flux": (
        "FLUX.1 with a vision-language model",
        "Files: models/diffusion_models/flux1-dev.safetensors, models/text_encoders/clip_l.safetensors and t5xxl_fp16.safetensors, "
        "models/vae/ae.safetensors, and the folder models/LLM/Qwen3-VL-4B-Instruct.\n\n"
        "*PromptLoop Guider* refines the prompt of the *BasicGuider*; the guidance on it stays.\n\n"
        "Short of memory: quantization `4bit`, or memory `unload`.",
    ),
    "video": (
        "Wan 2.1 text to video",
        "Files: models/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors, "
        "models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors, models/vae/wan_2.1_vae.safetensors, and the folder "
        "models/LLM/Qwen3-VL-4B-Instruct.\n\n"
        "The refiner sees one frame of the preview at 20 and 40 % of the run.\n\n"
        "A failing refiner never costs you the video: the prompt is kept and the timeline says so.",
    ),
}  # fmt: skip

# width, height of a node's least size, by type; the timeline wants room
LEAST = {
    "KSampler": (280, 640), "SamplerCustomAdvanced": (280, 420),  # they show a preview while they work
    "PreviewImage": (260, 290), "SaveImage": (280, 330), "SaveAnimatedWEBP": (280, 380), "PreviewAny": (280, 140),
    "CLIPTextEncode": (280, 110), "PrimitiveStringMultiline": (300, 120), "PromptLoopRewrite": (340, 290),
    "PromptLoopScore": (340, 330), "PromptLoopPickBest": (340, 350), "PromptLoopDoNoHarm": (340, 330), "PromptLoop": (420, 640),
    "PromptLoopSampler": (440, 980), "PromptLoopGuider": (420, 640), "PromptLoopResult": (420, 600), "PromptLoopHistory": (420, 420),
}  # fmt: skip


def names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def made(page: Any, name: str) -> dict[str, Any]:
    """The UI file of an API file, as this frontend writes it."""
    from .browser import load_api, serialized

    load_api(page, api(name), f"{name}.json")
    page.evaluate("""() => {
      for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }""")
    graph = serialized(page)
    lay_out(graph)
    add_note(graph, *NOTES[name])
    graph.pop("id", None)
    graph["extra"] = {"ds": view(graph)}
    for node in graph["nodes"]:
        node["properties"].pop("promptloop", None)
    return graph


def lay_out(graph: dict[str, Any], tall: float = 1000) -> None:
    """Columns by the longest way from a loader, in the order of what they hang on; neighbours share one while there is room."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = [(link[1], link[3]) for link in graph["links"]]
    for node in nodes.values():
        width, height = LEAST.get(node["type"], (260, 0))
        node["size"] = [width, max(height, 0 if node["type"] in TEXTS else node["size"][1])]
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for a, b in links:
            depth[b] = max(depth[b], depth[a] + 1)
    for a in sorted(nodes, key=lambda n: -depth[n]):  # a loader stands right before what it is for
        after = [depth[d] for s, d in links if s == a]
        if after and all(d != a for _, d in links):
            depth[a] = max(min(after) - 1, 0)
    columns: list[list[int]] = []
    place: dict[int, float] = {}
    for k in range(max(depth.values()) + 1):
        near = {n: [place[a] for a, b in links if b == n and a in place] for n in nodes if depth[n] == k}
        for n in sorted(near, key=lambda n: sum(near[n]) / len(near[n]) if near[n] else 0.0):
            room = columns and sum(nodes[m]["size"][1] + TITLE + GAP_Y for m in [*columns[-1], n]) <= tall
            if not room:
                columns.append([])
            place[n] = sum(nodes[m]["size"][1] for m in columns[-1])
            columns[-1].append(n)
    x = 0.0
    for column in columns:
        y = 0.0
        for n in column:
            nodes[n]["pos"] = [x, y]
            y += nodes[n]["size"][1] + TITLE + GAP_Y
        x += max(nodes[n]["size"][0] for n in column) + GAP_X
    for order, node in enumerate(sorted(nodes.values(), key=lambda n: n["pos"])):
        node["order"] = order


def add_note(graph: dict[str, Any], title: str, text: str) -> None:
    """Above the first columns."""
    graph["last_node_id"] += 1
    size = [640, 150]
    note = {
        "id": graph["last_node_id"], "type": "MarkdownNote", "pos": [0, -size[1] - TITLE - GAP_Y], "size": size, "flags": {},
        "order": len(graph["nodes"]), "mode": 0, "inputs": [], "outputs": [], "title": title, "properties": {},
        "widgets_values": [text], "color": "#432", "bgcolor": "#653",
    }  # fmt: skip
    graph["nodes"].append(note)


def view(graph: dict[str, Any], width: float = 1480, height: float = 800) -> dict[str, Any]:
    """Scale and offset at which a usual screen shows the whole graph."""
    left, top = (min(n["pos"][k] for n in graph["nodes"]) for k in (0, 1))
    right, bottom = (max(n["pos"][k] + n["size"][k] for n in graph["nodes"]) for k in (0, 1))
    scale = round(min(width / (right - left), height / (bottom - top + TITLE), 1.0), 3)
    return {"scale": scale, "offset": [round(80 / scale - left), round(120 / scale + TITLE - top)]}


def thumbnail(page: Any, url: str, name: str, side: int = 400) -> Any:
    """For the template browser: what a run of the open workflow looked at, above what it made; the graph, where it cannot run."""
    import io

    from PIL import Image

    from .browser import ended, fit, queue

    def opened(image: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(page.request.get(f"{url}/view", params=image).body())).convert("RGB")

    queue(page)
    refused = page.evaluate("() => Boolean(app.lastNodeErrors && Object.keys(app.lastNodeErrors).length)")
    if refused or ended(page)["name"] != "execution_success":
        page.keyboard.press("Escape")
        fit(page)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB").crop((70, 85, 1600, 935))
        shot = shot.resize((2 * side, 2 * side * shot.height // shot.width), Image.Resampling.LANCZOS)
        sheet = Image.new("RGB", (2 * side, 2 * side), shot.getpixel((shot.width - 5, 5)))
        sheet.paste(shot, (0, side - shot.height // 2))
        return sheet
    found = page.evaluate("() => Object.values(app.nodeOutputs)")
    turns = next((output["promptloop"][0]["turns"] for output in found if output.get("promptloop")), [])
    made = [opened(image) for output in found for image in output.get("images", []) if image["type"] == "output"]
    made = made or [opened(image) for output in found for image in output.get("images", [])]
    sheet = Image.new("RGB", (side, side), "#2b2b2b")
    top = 0
    for k, image in enumerate([opened(turn["image"]) for turn in turns if turn["image"]][:4]):
        top = side // 4
        sheet.paste(image.resize((top - 4, top - 4), Image.Resampling.NEAREST), (k * top + 2, 2))
    across = 1 if len(made) == 1 else 2 if len(made) < 5 else 3
    part = min(side // across, (side - top) // -(-len(made) // across))
    for k, image in enumerate(made):
        left, free = (side - part * across) // 2, side - top - part * -(-len(made) // across)
        place = (left + k % across * part + 2, top + free // 2 + k // across * part + 2)
        sheet.paste(image.resize((part - 4, part - 4), Image.Resampling.NEAREST), place)
    return sheet


def main() -> None:
    from .browser import load_ui, missing, page_at

    if why := missing():
        raise SystemExit(f"no browser: {why}")
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with page_at(sys.argv[1]) as page:
        chosen = sys.argv[2:] or names()
        for name in chosen:
            (FOLDER / f"{name}.json").write_text(json.dumps(made(page, name), indent=1) + "\n", encoding="utf-8")
        for name in chosen:  # after the graphs: pictures of a run make the nodes of that number larger in the next graph
            load_ui(page, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
            page.evaluate(
                "() => app.graph.nodes.filter(n => n.type === 'PromptLoopAskMe').forEach(n => n.widgets[0].value = 1)"
            )
            thumbnail(page, sys.argv[1], name).save(FOLDER / f"{name}.jpg", quality=88)
            print(name)


if __name__ == "__main__":
    main()
