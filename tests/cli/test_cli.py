"""The command, as a user runs it: in a process of its own where exit codes and speed matter, else in this one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from promptloop_pipeline import cli
from promptloop_pipeline.trajectory import load

RED = "large red circle top left , black background"


def promptloop(*args, cwd=None, **env):
    """(exit code, standard output, standard error) of the real command."""
    import os

    done = subprocess.run(
        [Path(sys.executable).with_name("promptloop"), *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | env,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_lists_the_commands():
    out = CliRunner().invoke(cli.app, ["--help"]).output
    for name in ("demo", "generate", "rewrite", "score", "artifact", "eval", "train", "doctor"):
        assert name in out


def test_demo(tmp_path):
    code, out, err = promptloop("demo", "--n", "3", "--out", str(tmp_path / "a"))
    assert code == 0, err
    for arm in ("raw", "single", "blind", "loop", "oracle"):
        assert arm in out
    assert "oracle" in out
    assert (tmp_path / "a" / "index.html").stat().st_size > 10_000
    assert (tmp_path / "a" / "overview.png").is_file()
    found = load(tmp_path / "a")
    assert len(found) == 15
    assert [t.meta["seed"] for t in found] == [0, 1, 2] * 5
    assert len({t.request for t in found}) == 3
    assert all(set(t.scores) == {"score", "strict"} for t in found)

    code, out, _ = promptloop("demo", "--n", "3", "--out", str(tmp_path / "a"), "--json")
    figures = json.loads(out)
    assert Path(figures["report"]).parent == tmp_path / "a-2"  # the first run is still there
    again = load(tmp_path / "a-2")
    assert [t.image.tobytes() for t in again] == [t.image.tobytes() for t in found]
    assert [a["arm"] for a in figures["arms"]] == ["raw", "single", "blind", "loop", "oracle"]


def test_generate(tmp_path):
    out = tmp_path / "out"
    code, text, err = promptloop(
        "generate", "a red circle on black, nothing else", "--n", "2", "--seed", "5", "--out", str(out)
    )
    assert code == 0, err
    assert (out / "5.png").is_file() and (out / "6.png").is_file() and (out / "index.html").is_file()
    found = load(out)
    assert [t.meta["seed"] for t in found] == [5, 6]
    assert found[0].turns[0].after == RED
    assert "index.html" in text


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `main` in this process; (exit code, standard output, standard error)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["promptloop", *args])
        try:
            cli.main()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_generate_with_a_refiner_of_ones_own(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from promptloop_pipeline import FunctionRefiner\n"
        "shout = FunctionRefiner(lambda view: view.prompt.replace('red', 'blue'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run(
        "generate", RED, "--refiner", "mine:shout", "--refine-at", "50%", "--steps", "4", "--out", str(tmp_path / "o"), "--json"
    )
    assert code == 0, err
    (turn,) = json.loads(out)["turns"][0]
    assert (turn["step"], turn["after"]) == (2, RED.replace("red", "blue"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", RED, "--refine-at", "sometimes"), "cannot read 'sometimes' as a refinement schedule; use"),
        (("generate", RED, "--refine-at", "120%"), "more than 100% of the run"),
        (("generate", RED, "--refine-at", "21"), "step 21 lies beyond this run of 20 steps"),
        (("generate", "  "), "the prompt is empty"),
        (("generate", "caf\udce9", "--refiner", "none"), "is not UTF-8"),
        (("generate", RED, "--refiner", "none", "--template", "plain"), "the refiner 'none' has no use for template 'plain'"),
        (("generate", "a photograph of a cat"), "cannot read 'a photograph of a cat' as a request of the shapes world"),
        (("generate", RED, "--refiner", "clever"), "unknown refiner 'clever'; use \"tiny\" (embedded), \"oracle\""),
        (("generate", RED, "--refiner", "no.such:thing"), "cannot load the refiner 'no.such:thing'"),
        (("generate", RED, "--model", "./nowhere", "--refiner", "none"), "no pipeline at ./nowhere"),
        (("generate", RED, "--model", "some/model"), "the embedded refiner reads only the shapes world"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.startswith("promptloop: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_model_that_is_nowhere(run, tmp_path):
    code, _, err = run("generate", RED, "--model", "nobody/nothing", "--refiner", "none", "--out", str(tmp_path / "out"))
    assert code == 2
    assert err.count("\n") == 1 and "cannot load the model 'nobody/nothing'" in err


@pytest.mark.parametrize("command", [("demo",), ("generate", RED)])
def test_folder_that_cannot_be_written(run, command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run(*command, "--out", str(tmp_path / "file" / "sub"))
    assert code == 2
    assert err.count("\n") == 1 and "cannot write to the folder" in err and "--out" in err


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "torch" in out and "embedded generators: sd (there)" in out
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert {p["package"] for p in facts["packages"]} >= {"torch", "diffusers", "transformers"}
