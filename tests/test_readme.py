"""What the README shows, runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_first_screen_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS[0].splitlines()) <= 11
    names = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert (tmp_path / "ball.png").is_file()
    assert "-> large red circle top left , large blue square top right , black background" in capsys.readouterr().out
    assert [t.error for t in names["out"].trajectories[0].turns] == [None] * 5


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_python(block):
    compile(block, "README.md", "exec")


def test_two_commands():
    commands = re.findall(r"^python3 -m venv .*$", TEXT, re.M)
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && .venv/bin/promptloop demo",
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]" && .venv/bin/pytest',
    ]


@pytest.mark.parametrize("page", ["README.md", "promptloop_pipeline/tiny/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target
