"""Prompt, reward, history and Ask Me nodes in the real server, on the embedded models."""

import http.server
import threading
import time
from io import BytesIO

import pytest
from PIL import Image

from promptloop_pipeline.trajectory import load

from .server import ComfyError, Events

RED = "a big red ball in the upper left corner, black background"
REFINER = {
    "model": "embedded: tiny", "template": "auto", "adapter": "none", "dtype": "auto", "quantization": "none", "memory": "offload",
    "max_new_tokens": 0, "temperature": 0.0, "seed": 0,
}  # fmt: skip
STEPS = {"seed": 3, "steps": 8, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "simple", "denoise": 1.0}


class Graph(dict):
    """A workflow in API format: graph("name", "ClassType", input=value); a link is ("name", output)."""

    def __call__(self, name, class_type, **inputs):
        links = {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}
        self[name] = {"class_type": class_type, "inputs": links}
        return self

    def saved(self, name, image):
        return self(name, "SaveImage", images=image, filename_prefix=name)


def graph(batch=1, **refiner):
    g = Graph()("refiner", "PromptLoopLoadRefiner", **REFINER | refiner)("tiny", "PromptLoopLoadEmbedded", batch_size=batch)
    g("none", "CLIPTextEncode", clip=("tiny", 1), text="")
    return g("words", "CLIPTextEncode", clip=("tiny", 1), text=RED)


def looped(g, refiner=("refiner", 0), refine_at="start, 30%, 60%", prompt=RED, name="loop"):
    parts = {
        "model": ("tiny", 0),
        "clip": ("tiny", 1),
        "vae": ("tiny", 2),
        "latent_image": ("tiny", 3),
        "negative": ("none", 0),
    }
    return g(name, "PromptLoopSampler", refiner=refiner, refine_at=refine_at, prompt=prompt, **parts, **STEPS)


def rewriting(g, refiner=("refiner", 0), prompt=RED, mode="replace", seed=1, **others):
    g(
        "rewrite",
        "PromptLoopRewrite",
        refiner=refiner,
        prompt=prompt,
        mode=mode,
        seed=seed,
        **{"template": "as loaded"} | others,
    )
    return g("shown", "PreviewAny", source=("rewrite", 0))("history", "PromptLoopHistory", history=("rewrite", 3))


def pixels(comfy, outputs, node):
    return [Image.open(BytesIO(comfy.view(image))).tobytes() for image in outputs[node]["images"]]


def run(comfy, g):
    return comfy.prompt(g)["outputs"]


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_rewrite(comfy):
    found = run(comfy, rewriting(graph()))
    ((text,), (trajectory,)) = found["rewrite"]["text"], found["history"]["promptloop"]
    assert text == found["shown"]["text"][0] == trajectory["prompt"] != RED == trajectory["request"]
    again = run(comfy, rewriting(graph(), mode="append"))["shown"]["text"][0]
    assert again.startswith(RED) and again.endswith(text)


def test_seeds_of_a_rewrite(comfy):
    g = graph(temperature=2.0)
    said = [
        run(comfy, rewriting(g, prompt="hmm, three of them in the dusk", seed=seed))["history"]["promptloop"][0]["turns"][0][
            "raw"
        ]
        for seed in (1, 2, 3, 2**64 - 1, 1)
    ]
    assert len(set(said[:4])) > 1 and said[4] == said[0]


def test_a_rewrite_with_a_picture_and_a_template_of_the_users_own(comfy):
    own = comfy.base / "user" / "promptloop" / "templates"
    own.mkdir(parents=True)
    (own / "mine.txt").write_text("Source: mine\n[user]\n{image}{request} | {prompt}\n[user without image]\n{request}\n")
    assert "mine" in comfy.object_info()["PromptLoopRewrite"]["input"]["required"]["template"][1]["options"]
    g = rewriting(graph(), template="mine", image=("picture", 0))
    g("picture", "EmptyImage", width=64, height=48, batch_size=2, color=0xFF0000)
    ((turn,),) = [t["turns"] for t in run(comfy, g)["history"]["promptloop"]]
    assert turn["image"] and turn["applied"] == 0 and turn["step"] == turn["num_steps"] == 1
    assert Image.open(BytesIO(comfy.view(turn["image"]))).getpixel((0, 0)) == (255, 0, 0)


def test_what_a_text_generation_wrote(comfy):
    g = Graph()("text", "PrimitiveStringMultiline", value="<think>hm</think> Prompt: a black cat")
    g("parse", "PromptLoopParse", text=("text", 0), prompt="a cat", mode="append")
    found = run(comfy, g("shown", "PreviewAny", source=("parse", 0))("why", "PreviewAny", source=("parse", 1)))
    assert found["shown"]["text"] == ["a cat, a black cat"] and found["why"]["text"] == ["hm"]


@pytest.mark.parametrize("node", ["rewrite", "parse"])
def test_an_empty_prompt_is_refused_before_anything_runs(comfy, node):
    g = rewriting(graph(), prompt=" ")
    if node == "parse":
        g = Graph()("t", "PrimitiveString", value="x")("p", "PromptLoopParse", text=("t", 0), prompt="", mode="replace")
        g("shown", "PreviewAny", source=("p", 0))
    with pytest.raises(ComfyError, match="the prompt is empty; say what you want to see") as e:
        comfy.prompt(g)
    assert e.value.status == 400 and str(e.value).count("the prompt is empty") == 1


# --- rewards ------------------------------------------------------------------------------------------------------------


def compared(batch=2, refiner=("refiner", 0), reward="verifier"):
    g = looped(graph(batch), refiner)
    g(
        "untouched",
        "KSampler",
        model=("tiny", 0),
        positive=("words", 0),
        negative=("none", 0),
        latent_image=("tiny", 3),
        **STEPS,
    )
    g(
        "gate",
        "PromptLoopDoNoHarm",
        refined=("loop", 0),
        untouched=("untouched", 0),
        vae=("tiny", 2),
        prompt=RED,
        rewards=reward,
    )
    for name, latent in (("a", ("loop", 0)), ("b", ("untouched", 0)), ("c", ("gate", 0))):
        g(f"decoded {name}", "VAEDecode", samples=latent, vae=("tiny", 2)).saved(f"image {name}", (f"decoded {name}", 0))
    return g.saved("image", ("gate", 1))("report", "PreviewAny", source=("gate", 2))


def test_do_no_harm_keeps_the_better_one_of_each_pair(comfy):
    found = run(comfy, compared())
    refined, untouched, kept, shown = (pixels(comfy, found, name) for name in ("image a", "image b", "image c", "image"))
    assert kept == shown and refined != untouched
    lines = found["report"]["text"][0].splitlines()[:2]
    for k, line in enumerate(lines):
        new, old = (
            float(line.split(f"{arm} ")[1].rstrip(",;").split(";")[0].split(",")[0]) for arm in ("refined", "untouched")
        )
        assert kept[k] == (refined if new > old else untouched)[k] and line.endswith(
            f"the {'refined' if new > old else 'untouched'} one is kept"
        )


def test_do_no_harm_keeps_the_untouched_one_where_the_reward_fails(comfy):
    found = run(comfy, compared(1, reward="aesthetic"))  # no weights
    assert pixels(comfy, found, "image") == pixels(comfy, found, "image b") != pixels(comfy, found, "image a")
    assert "a reward failed; the untouched one is kept" in found["report"]["text"][0]
    assert "allow the download" in found["report"]["text"][0]


def test_latents_that_do_not_belong_together(comfy):
    g = compared()
    g("other", "EmptyLatentImage", width=64, height=64, batch_size=3)
    g["gate"]["inputs"]["untouched"] = ["other", 0]
    with pytest.raises(
        ComfyError, match=r"the latents do not belong together: refined is 2 x 8 x 8 x 8, untouched is 3 x 4 x 8 x 8; make"
    ):
        comfy.prompt(g)


def test_scores_and_the_best_of_a_batch_and_of_a_list(comfy):
    g = looped(graph(3), refine_at="none")("images", "VAEDecode", samples=("loop", 0), vae=("tiny", 2))
    rewards = "verifier, verifier-strict:0, clip-score:0.5"  # no weights of the last one
    g("score", "PromptLoopScore", images=("images", 0), prompt=RED, rewards=rewards)
    g("best", "PromptLoopPickBest", images=("score", 2), prompt=RED, rewards="verifier", count=2)
    g("places", "PreviewAny", source=("best", 2)).saved("all", ("images", 0)).saved("two", ("best", 0))
    found = run(comfy, g)
    (table,) = found["score"]["text"]
    head, *rows = table.splitlines()
    assert head.split()[::3][:1] == ["picture"] and "clip-score (weight 0.5)" in head
    totals = [float(row.split()[-1]) for row in rows[:3]]
    assert [row.split()[3] for row in rows[:3]] == ["-"] * 3 and "WARNING: clip-score gave no score" in rows[3]
    every, two = pixels(comfy, found, "all"), pixels(comfy, found, "two")
    order = sorted(range(3), key=lambda k: -totals[k])
    assert two == [every[k] for k in order[:2]]


def test_pictures_that_come_as_a_list(comfy):
    g = Graph()("rows", "EmptyImage", width=64, height=64, batch_size=3, color=0)
    g("split", "RebatchImages", images=("rows", 0), batch_size=2)  # a list of two batches
    g("score", "PromptLoopScore", images=("split", 0), prompt=RED, rewards="verifier")
    g("best", "PromptLoopPickBest", images=("score", 2), prompt=RED, rewards="verifier", count=9).saved("kept", ("best", 0))
    found = run(comfy, g.saved("passed", ("score", 2)))
    assert len(pixels(comfy, found, "kept")) == len(pixels(comfy, found, "passed")) == 3
    assert len(found["score"]["text"][0].splitlines()) == 4


@pytest.mark.parametrize(
    "rewards, said",
    [("imagereward", "unknown reward 'imagereward'"), ("verifier:0", "weight 0"), ("os:system", "code of your own")],
)
def test_bad_rewards_are_refused_before_anything_runs(comfy, rewards, said):
    g = Graph()("image", "EmptyImage", width=8, height=8, batch_size=1, color=0)
    g("score", "PromptLoopScore", images=("image", 0), prompt=RED, rewards=rewards)
    with pytest.raises(ComfyError, match=said) as e:
        comfy.prompt(g)
    assert e.value.status == 400 and str(e.value).count(said) == 1


# --- history ------------------------------------------------------------------------------------------------------------


def test_a_run_is_saved_loaded_and_played_again(comfy):
    g = looped(graph(2))("images", "VAEDecode", samples=("loop", 0), vae=("tiny", 2)).saved("made", ("images", 0))
    g("save", "PromptLoopSaveHistory", history=("loop", 4), folder="runs/first")
    first = run(comfy, g)
    (path,) = first["save"]["text"]
    made = load(path)
    assert len(made) == 2 and all(t.request == RED and len(t.turns) == 3 for t in made) and made[0].turns[1].image is not None
    comfy.upload("run.png", comfy.view(first["made"]["images"][0]))
    files = comfy.object_info()["PromptLoopLoadHistory"]["input"]["required"]["file"][1]["options"]
    record = "runs/first/trajectories.jsonl [output]"
    assert record in files and "run.png" in files
    for file in ("run.png", record):
        g = graph(2)("load", "PromptLoopLoadHistory", file=file)("replay", "PromptLoopReplay", history=("load", 0))
        looped(g, ("replay", 0), ("replay", 1), ("replay", 2))(
            "export", "PromptLoopExportSchedule", history=("load", 0), form="json"
        )
        g("images", "VAEDecode", samples=("loop", 0), vae=("tiny", 2)).saved("again", ("images", 0))
        found = run(comfy, g("show", "PromptLoopHistory", history=("load", 0)))
        assert pixels(comfy, found, "again") == pixels(comfy, first, "made"), file
        assert [t["id"] for t in found["show"]["promptloop"]] == [t.id for t in made]
        assert '"0": "large red circle' in found["export"]["text"][0] and len(found["export"]["text"]) == 2


@pytest.mark.parametrize("folder", ["../out", "/tmp/out", " ", "a/../..", "C:\\x"])
def test_histories_are_saved_in_the_output_folder_only(comfy, folder):
    g = rewriting(graph())("save", "PromptLoopSaveHistory", history=("rewrite", 3), folder=folder)
    del g["shown"], g["history"]
    with pytest.raises(ComfyError, match="is not inside of ComfyUI's output folder; use a name") as e:
        comfy.prompt(g)
    assert e.value.status == 400


@pytest.mark.parametrize(
    "file", ["gone.png", "../../secret.png", "/etc/passwd", "gone/trajectories.jsonl [output]", "plain.png"]
)
def test_files_without_a_run_are_refused_before_anything_runs(comfy, file):
    data = BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    comfy.upload("plain.png", data.getvalue())
    g = Graph()("load", "PromptLoopLoadHistory", file=file)("show", "PromptLoopHistory", history=("load", 0))
    with pytest.raises(ComfyError, match="holds no run of PromptLoop" if file == "plain.png" else "there is no file") as e:
        comfy.prompt(g)
    assert e.value.status == 400


# --- Ask Me -------------------------------------------------------------------------------------------------------------


def asking(batch=1, time_limit=60, otherwise="accept suggestion", refine_at="start, 60%", suggest=True, seed=3):
    g = graph(batch)("ask", "PromptLoopAskMe", time_limit=time_limit, otherwise=otherwise)
    if suggest:
        g["ask"]["inputs"]["refiner"] = ["refiner", 0]
    looped(g, ("ask", 0), refine_at)["loop"]["inputs"]["seed"] = seed
    return g("history", "PromptLoopHistory", history=("loop", 4))


def post(comfy, **body):
    return comfy.request("/promptloop/answer", body)


def test_the_artist_accepts_edits_and_skips(comfy):
    with comfy.events() as events:
        prompt_id = comfy.queue(asking(2))
        said = []
        for k, action in enumerate(("accept", "edit", "skip", "edit")):  # two questions, of two pictures each
            question = events.until("promptloop.ask", lambda q, k=k: len(events.named("promptloop.ask")) > k and q not in said)
            said.append(question)
            assert question["node"] == "loop" and question["request"] == RED and question["sample"] == k % 2
            assert question["suggestion"] and bool(question["image"]) == (k > 1)
            body = {"prompt": f"a blue square {k}"} if action == "edit" else {}
            assert post(comfy, id=question["id"], action=action, **body)[0] == 200
            assert post(comfy, id=question["id"], action=action, **body)[0] == 404  # once only
        first, second = comfy.wait(prompt_id)["outputs"]["history"]["promptloop"]
        assert [d["outcome"] for d in events.named("promptloop.asked")] == ["accept", "edit", "skip", "edit"]
    assert [t["after"] for t in first["turns"]] == [said[0]["suggestion"]] * 2
    assert [t["after"] for t in second["turns"]] == ["a blue square 1", "a blue square 3"]
    assert first["turns"][0]["notes"][-1].startswith("the artist accepted the suggestion")
    assert second["turns"][1]["notes"][-1].startswith("the artist edited the suggestion")


def test_nobody_there_is_not_waited_for(comfy):
    clock = time.monotonic()
    (made,) = run(comfy, asking(seed=11))["history"]["promptloop"]  # no websocket is open
    assert time.monotonic() - clock < 20 and made["turns"][0]["notes"][-1].startswith("nobody was there to be asked: accepted")
    assert made["prompt"] != RED
    (made,) = run(comfy, asking(seed=11, otherwise="keep prompt"))["history"]["promptloop"]
    assert made["prompt"] == RED


def test_a_time_limit_ends_the_waiting(comfy):
    with comfy.events() as events:
        (made,) = run(comfy, asking(time_limit=1, refine_at="60%", otherwise="keep prompt"))["history"]["promptloop"]
        assert [d["outcome"] for d in events.named("promptloop.asked")] == ["timeout"]
    assert made["prompt"] == RED and "nobody answered within 1 s: skipped" in made["turns"][0]["notes"][-1]


def test_a_cancel_closes_the_question_at_once(comfy):
    with comfy.events() as events:
        prompt_id = comfy.queue(asking(seed=12, suggest=False))
        question = events.until("promptloop.ask")
        assert question["suggestion"] is None and post(comfy, id=question["id"], action="accept")[0] == 400
        clock = time.monotonic()
        comfy.interrupt()
        assert events.until("promptloop.asked")["outcome"] == "interrupted"
        with pytest.raises(ComfyError) as e:
            comfy.wait(prompt_id)
        assert e.value.interrupted and time.monotonic() - clock < 3
    assert post(comfy, id=question["id"], action="skip")[0] == 404


def test_a_page_that_is_loaded_again_finds_its_question(comfy):
    with comfy.events() as events:
        prompt_id = comfy.queue(asking(seed=13, refine_at="start"))
        question = events.until("promptloop.ask")
    later = Events(f"ws://127.0.0.1:{comfy.port}/ws?clientId={comfy.client}")
    assert later.until("promptloop.ask")["id"] == question["id"]
    (found,) = comfy.get(f"/promptloop/questions?client_id={comfy.client}")
    assert found["id"] == question["id"] and comfy.get("/promptloop/questions?client_id=another") == []
    assert post(comfy, id=found["id"], action="edit", prompt="a green ball")[0] == 200
    assert comfy.wait(prompt_id)["outputs"]["history"]["promptloop"][0]["prompt"] == "a green ball"
    later.close()


def test_bad_posts(comfy):
    status, line = comfy.request("/promptloop/answer", b"no json")
    assert status == 400 and line == b"this is no JSON"
    for body in ({}, [], {"id": "x", "action": "fly"}, {"id": "x", "action": "edit"}):
        status, line = comfy.request("/promptloop/answer", body)
        assert status == 400 and line and b"\n" not in line
    assert comfy.request("/promptloop/answer", {"id": "x", "action": "skip"})[0] == 404


def test_a_rewrite_asks_the_artist_too(comfy):
    g = rewriting(graph()("ask", "PromptLoopAskMe", time_limit=60, otherwise="keep prompt", refiner=("refiner", 0)), ("ask", 0))
    with comfy.events() as events:
        prompt_id = comfy.queue(g)
        question = events.until("promptloop.ask")
        assert question["node"] == "rewrite" and question["step"] == 0
        threading.Timer(0.2, post, [comfy], {"id": question["id"], "action": "edit", "prompt": "mine"}).start()
        assert comfy.wait(prompt_id)["outputs"]["shown"]["text"] == ["mine"]


def test_a_run_that_does_not_wait_closes_the_question_at_its_end(comfy):
    g = asking(seed=14, refine_at="start", suggest=False)
    g["loop"]["inputs"]["wait"] = False
    with comfy.events() as events:
        (made,) = run(comfy, g)["history"]["promptloop"]
        question = events.until("promptloop.ask")
        assert question["node"] == "loop" and events.until("promptloop.asked")["outcome"] == "interrupted"
    assert made["prompt"] == RED and "too late" in made["turns"][0]["notes"][0]
    assert post(comfy, id=question["id"], action="skip")[0] == 404


def test_a_rewrite_is_cancelled_while_a_server_thinks(comfy):
    asked = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.set()
            time.sleep(20)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inputs = {"model": "m", "template": "reprompt", "key_env": "", "timeout": 60, "sees": False, "check_first": False}
    inputs |= {"max_new_tokens": 0, "temperature": 0.0, "seed": 0, "url": f"http://127.0.0.1:{server.server_port}/v1"}
    known = comfy.object_info()["PromptLoopEndpointRefiner"]["input"]["required"]
    g = Graph()("far", "PromptLoopEndpointRefiner", **{k: v for k, v in inputs.items() if k in known})
    prompt_id = comfy.queue(rewriting(g, ("far", 0)))
    assert asked.wait(20)
    clock = time.monotonic()
    comfy.interrupt()
    with pytest.raises(ComfyError) as e:
        comfy.wait(prompt_id)
    server.shutdown()
    assert e.value.interrupted and time.monotonic() - clock < 3
