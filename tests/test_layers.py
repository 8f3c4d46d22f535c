"""Arrows go one way, and the core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ("schedule", "refiner", "reward", "trajectory", "dotted", "look", "replay")
MAY_IMPORT = {  # folder or file of promptloop_pipeline -> what of promptloop_pipeline it may import
    **{name: set(CORE) for name in CORE},
    "session": {*CORE, "session"},
    "chat": {*CORE, "chat"},
    "pipelines": {*CORE, "session", "pipelines"},
    "refiners": {*CORE, "session", "chat", "refiners"},
    "rewards": {*CORE, "session", "chat", "rewards"},
    "tiny": {*CORE, "session", "chat", "pipelines", "refiners", "rewards", "tiny"},
    "evaluation": {*CORE, "session", "chat", "pipelines", "refiners", "rewards", "tiny", "evaluation"},
    "cli": {*CORE, "session", "chat", "pipelines", "refiners", "rewards", "tiny", "evaluation", "cli"},
}


def imports(file: Path) -> set[str]:
    """Absolute dotted names of everything that a file imports, wherever in it."""
    package = file.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(p for p in (base, node.module) if p)
            found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", files("promptloop_pipeline"), ids=lambda f: str(f.relative_to(ROOT)))
def test_arrows_of_the_package(file):
    parts = file.relative_to(ROOT / "promptloop_pipeline").parts
    layer = parts[0].removesuffix(".py")
    wanted = imports(file)
    assert not [w for w in wanted if w.split(".")[0] in ("training", "promptloop_training", "comfy_nodes")]
    if layer == "__init__":
        return
    inner = {w.split(".")[1] for w in wanted if w.startswith("promptloop_pipeline.")}
    inner &= {p.stem for p in (ROOT / "promptloop_pipeline").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert inner <= MAY_IMPORT[layer], f"{file} imports {inner - MAY_IMPORT[layer]}"


LIGHT = (
    "", ".schedule", ".refiner", ".reward", ".trajectory", ".look", ".replay", ".session", ".chat", ".refiners.scripted", ".tiny",
    ".cli",
)  # fmt: skip


@pytest.mark.parametrize("module", [f"promptloop_pipeline{m}" for m in LIGHT])
def test_import_is_light(module):
    heavy = ("torch", "diffusers", "transformers", "numpy", "trl", "accelerate")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_public_names_exist():
    import promptloop_pipeline

    for name in promptloop_pipeline.__all__:
        assert getattr(promptloop_pipeline, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = promptloop_pipeline.Nothing


@pytest.mark.parametrize("file", [*files("promptloop_pipeline"), *files("training")], ids=lambda f: str(f.relative_to(ROOT)))
def test_files_stay_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
