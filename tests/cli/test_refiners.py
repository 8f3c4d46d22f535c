"""Refiners from the command line: models on disk, a server, a prompt schedule."""

import json

import pytest
from PIL import Image

from promptloop_pipeline.trajectory import load

from ..chat import models
from ..chat.server import Server
from .test_cli import RED, run  # noqa: F401

BLUE = "<think>bluer</think><answer>large blue circle top left , black background</answer>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: models.save(getattr(models, name), folder / name) for name in ("idefics3", "qwen2", "gpt2")}


def test_rewrite_by_a_server(run):  # noqa: F811
    with Server("well", answer=BLUE) as server:
        code, out, err = run("rewrite", "a circle", "--rewriter", server.url)
        assert (code, out.strip(), err) == (0, "large blue circle top left , black background", "")
        code, out, _ = run("rewrite", "a circle", "--rewriter", server.url, "--preset", "promptenhancer", "--json")
        assert json.loads(out)["reasoning"] == "bluer"
    said = [r["messages"][-1]["content"] for r in server.requests]
    assert "a circle" in said[0] and "containment" in said[1]  # RePrompt's words, then PromptEnhancer's key points


def test_rewrite_an_editing_instruction(run, tmp_path):  # noqa: F811
    Image.new("RGB", (40, 30), "red").save(tmp_path / "source.png")
    with Server("well", answer="<answer>Turn the red wall blue.</answer>") as server:
        args = ("rewrite", "bluer", "--rewriter", server.url, "--preset", "editing")
        code, out, err = run(*args, "--image", str(tmp_path / "source.png"))
        assert (code, out.strip(), err) == (0, "Turn the red wall blue.", "")
        assert [p["type"] for p in server.requests[0]["messages"][0]["content"]] == ["image_url", "text"]
        code, _, err = run(*args)
        assert code == 2 and "the preset 'editing' needs --image" in err
        code, _, err = run(*args, "--image", str(tmp_path / "no.png"))
        assert code == 2 and "cannot read the picture" in err and "no.png" in err


def test_rewrite_by_a_model_on_disk(run, saved):  # noqa: F811
    code, out, err = run("rewrite", "a circle", "--rewriter", str(saved["qwen2"]), "--temperature", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] > 0
    again = run("rewrite", "a circle", "--rewriter", str(saved["qwen2"]), "--temperature", "1", "--json")[1]
    assert json.loads(again)["after"] == json.loads(out)["after"]
    code, _, err = run("rewrite", "a circle", "--rewriter", str(saved["gpt2"]))
    assert code == 2 and 'such as "promptist"' in err.splitlines()[-1]  # after transformers' loading bar


def test_generate_with_a_server(run, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    with Server("well", answer=BLUE) as server:
        code, text, err = run("generate", RED, "--refiner", server.url, "--steps", "5", "--out", str(out), "--json")
    assert code == 0, err
    turns = json.loads(text)["turns"][0]
    assert [t["step"] for t in turns] == [1, 3, 4]
    assert turns[0]["after"] == "large blue circle top left , black background" and turns[0]["reasoning"] == "bluer"
    (t,) = load(out)
    again = tmp_path / "again"
    code, _, err = run("generate", RED, "--refiner", str(out / "0.prompts.json"), "--steps", "5", "--out", str(again))
    assert code == 0, err
    assert (again / "0.png").read_bytes() == (out / "0.png").read_bytes()  # the schedule replays the run
    assert "https" not in t.meta


def test_generate_with_a_model_on_disk(run, saved, tmp_path):  # noqa: F811
    code, _, err = run("generate", RED, "--refiner", str(saved["idefics3"]), "--steps", "3", "--out", str(tmp_path / "out"))
    assert code == 0, err
    assert (tmp_path / "out" / "0.png").is_file()
    assert all(t.tokens for t in load(tmp_path / "out")[0].turns)


def test_a_server_that_is_not_there_costs_no_image(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("promptloop_pipeline.chat.endpoint.TICK", 0.01)
    with Server("500") as server:
        url = server.url
        args = ("generate", RED, "--refiner", url, "--steps", "2", "--refine-at", "1", "--out", str(tmp_path / "out"))
        code, out, _ = run(*args)
    assert code == 0
    assert (tmp_path / "out" / "0.png").is_file()
    assert url in load(tmp_path / "out")[0].turns[0].error and url in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("rewrite", " "), "the prompt is empty"),
        (("rewrite", "a cat"), "cannot read 'a cat' as a request of the shapes world"),
        (("rewrite", "a cat", "--rewriter", "clever"), "unknown refiner 'clever'; use"),
        (("rewrite", "a cat", "--rewriter", "./nowhere"), "there is no model at ./nowhere"),
        (("rewrite", "a cat", "--rewriter", "nobody/nothing"), "cannot load the model 'nobody/nothing'"),
        (("rewrite", "a cat", "--rewriter", "http://127.0.0.1:9", "--preset", "nice"), "there is no template 'nice'; use one"),
        (("rewrite", "a cat", "--rewriter", "http://127.0.0.1:9", "--preset", "repair"), "needs the preview of a running generation"),
        (("rewrite", RED, "--rewriter", "tiny", "--preset", "plain"), "the refiner 'tiny' has no use for template 'plain'"),
        (("generate", RED, "--refiner", "no.json"), "no prompt schedule at no.json"),
        (("generate", RED, "--refiner", "http://127.0.0.1:9", "--template", "nice"), "there is no template 'nice'"),
        (("generate", RED, "--refiner", "127.0.0.1:9", "--apriori"), "the template 'repair' needs a preview, and no turn has one"),
        (("generate", RED, "--refiner", "127.0.0.1:9", "--refine-at", "start"), "the template 'repair' needs a preview"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(run, args, message, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("promptloop: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_url_says_what_was_tried(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr("promptloop_pipeline.chat.endpoint._jitter.uniform", lambda a, b: 0.0)
    code, out, err = run("rewrite", "a cat", "--rewriter", "http://127.0.0.1:9/v1")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "http://127.0.0.1:9/v1" in err and "connection refused" in err
