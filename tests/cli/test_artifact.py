"""`promptloop artifact`, from two folders to a score."""

import json
import sys

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from promptloop_pipeline import cli
from promptloop_pipeline.cli import artifact as command

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command.artifact)


def run(*args, of=app):
    """What the command prints."""
    result = CliRunner().invoke(of, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, noise in (("good", 1), ("bad", 8)):
        (tmp_path / name).mkdir()
        for k in range(12):
            smooth = Image.fromarray(rng.integers(40, 215, (4, 4, 3)).astype(np.uint8)).resize((32, 32))
            rough = np.asarray(smooth) + rng.normal(0, noise, (32, 32, 3))
            Image.fromarray(rough.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{k}.png")
    return tmp_path / "good", tmp_path / "bad"


def test_from_two_folders_to_a_score(folders, tmp_path):
    out = tmp_path / "new" / "guard"
    text = run(*folders, "--out", out, "--clip", "none")
    assert "12 good and 12 bad pictures. On pictures held out" in text and f"--model artifact={out}" in text
    assert sorted(p.name for p in out.iterdir()) == ["artifact.safetensors", "report.json"]
    report = json.loads((out / "report.json").read_text())
    line = next(line for line in text.splitlines() if line.startswith("AUC"))
    assert line.split()[1] == f"{report['auc']['value']:.3f}" and f"[{report['auc']['low']:.3f}," in line
    assert report["auc"]["value"] > 0.9 and report["clip"] is None

    before = (out / "artifact.safetensors").read_bytes()
    again = json.loads(run(*folders, "--out", out, "--clip", "none", "--json"))  # its own may be replaced
    assert again == {"folder": str(out), **report}
    assert (out / "artifact.safetensors").read_bytes() == before

    pictures = [folders[0] / "0.png", folders[1] / "0.png"]
    for place in (out, out / "artifact.safetensors"):
        asked = ("--prompt", "x", "--reward", "artifact", "--model", f"artifact={place}", "--json")
        rows = json.loads(run("score", *pictures, *asked, of=cli.app))["images"]
        kept, caught = (row["scores"]["artifact"] for row in rows)
        assert 0 <= caught < 0.3 and 0.7 < kept <= 1


def test_nothing_of_others_is_written_over(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("promptloop_pipeline.rewards.artifact.fit", lambda *a, **k: pytest.fail("it began to work"))
    for name in ("artifact.safetensors", "report.json"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        if name == "report.json":
            (out / name).write_text('{"kind": "sales"}')
        else:
            import torch

            save_file({"x": torch.zeros(1)}, out / name)
        before = (out / name).read_bytes()
        with pytest.raises((ValueError, FileExistsError), match=f"{name} .*was not (made|written) by"):
            run(*folders, "--out", out, "--clip", "none")
        assert [p.read_bytes() for p in out.iterdir()] == [before]


def test_bad_input_is_one_clear_line(folders, tmp_path):
    good, bad = folders
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "out", "--clip", "none")
    for args, match in (
        ((good, tmp_path / "nowhere", *out), "there is no folder .*nowhere of bad pictures"),
        ((tmp_path / "file", bad, *out), "there is no folder .*file of good pictures"),
        ((good, tmp_path / "empty", *out), "empty holds 0 pictures"),
        ((good, good, *out), "is both among the good and the bad pictures"),
        ((good, bad, "--out", tmp_path / "file", "--clip", "none"), "cannot write to the folder .*file; choose another one with --out"),
        ((good, bad, *out, "--dtype", "int8"), "--dtype int8: use float32, float16, bfloat16"),
        ((good, bad, *out, "--batch", "0"), "--batch 0: give a number from 1 up"),
        ((good, bad, "--out", tmp_path / "out", "--clip", "/no/such"), "no model for artifact at /no/such.*--clip none"),
    ):  # fmt: skip
        with pytest.raises((OSError, ValueError), match=match) as caught:
            run(*args)
        assert "\n" not in str(caught.value)
    (bad / "3.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"cannot read the picture .*bad/3.png"):
        run(good, bad, *out)
    assert not (tmp_path / "out").exists()


def test_score_without_a_guard_says_how_to_make_one(folders, capsys, monkeypatch):
    picture = str(folders[0] / "0.png")
    monkeypatch.setattr(sys, "argv", ["promptloop", "score", picture, "--prompt", "x", "--reward", "artifact"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "artifact has no published weights; train it (promptloop artifact GOOD_DIR BAD_DIR --out DIR)" in error
