"""What can be said of the nodes without ComfyUI: only names of its V3 API that all supported versions have, ids that never change.

`python tests/comfyui/test_schemas.py CHECKOUT CHECKOUT ...` writes v3_names.txt anew: what is common to these checkouts.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = Path(__file__).parent / "v3_names.txt"
FILES = sorted((ROOT / "comfy_nodes").glob("*.py"))
IDS = [
    "PromptLoop", "PromptLoopAskMe", "PromptLoopDoNoHarm", "PromptLoopEndpointRefiner", "PromptLoopExportSchedule",
    "PromptLoopGuard", "PromptLoopGuider", "PromptLoopHistory", "PromptLoopLoadEmbedded", "PromptLoopLoadHistory",
    "PromptLoopLoadRefiner", "PromptLoopParse", "PromptLoopPickBest", "PromptLoopReplay", "PromptLoopResult",
    "PromptLoopRewrite", "PromptLoopSampler", "PromptLoopSaveHistory", "PromptLoopSchedule", "PromptLoopScore",
    "PromptLoopTarget",
]  # fmt: skip
"""Saved workflows name them: one may be added here, none may go."""
COMFY = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "latent_preview")
HEAVY = (
    "torch",
    "numpy",
    "PIL",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "peft",
    "typer",
    "rich",
    "scipy",
)
OURS = {"REFINER", "HISTORY", "RUN"}  # made by io.Custom in types.py


def common() -> dict[str, list[str] | None]:
    """Name -> the parameters that it takes, in order; None for what is not called, or takes any."""
    rows = (line.split() for line in NAMES.read_text(encoding="ascii").splitlines() if not line.startswith("#"))
    return {row[0]: None if row[1:] == ["-"] else row[1:] for row in rows}


def chain(node: ast.AST) -> str | None:
    """`io.String.Input` of such an expression; `io.Custom().Input` for REFINER.Input."""
    if isinstance(node, ast.Attribute):
        inner = chain(node.value)
        return None if inner is None else f"{inner}.{node.attr}"
    if isinstance(node, ast.Call) and chain(node.func) == "io.Custom":
        return "io.Custom()"
    if isinstance(node, ast.Name):
        return "io.Custom()" if node.id in OURS else node.id if node.id in ("io", "ui") else None
    return None


def uses_api(tree: ast.AST) -> bool:
    return any(isinstance(n, ast.ImportFrom) and n.module == "comfy_api.latest" for n in ast.walk(tree))


def calls(tree: ast.AST) -> list[tuple[str, ast.Call, dict[str, ast.AST]]]:
    """Name, call, and what it gives by parameter; what has no name in all versions is "?"."""
    known, found = common(), []
    for n in ast.walk(tree):
        if isinstance(n, ast.Call) and (name := chain(n.func)):
            order = known.get(name) or []
            more = next((p for p in order if p.startswith("*")), "?")
            given = {order[k] if k < len(order) and more == "?" else more: value for k, value in enumerate(n.args)}
            found.append((name, n, given | {k.arg: k.value for k in n.keywords if k.arg}))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_only_names_that_all_versions_have(file):
    tree, known = ast.parse(file.read_text(encoding="utf-8")), common()
    if not uses_api(tree):
        return
    imported = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "comfy_api.latest" for a in n.names
    }
    assert imported <= {"io", "ui", "ComfyExtension"}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        name = chain(node) if isinstance(node, ast.Attribute) and id(node) not in inner else None
        assert name is None or name in known, f"line {node.lineno}: {name} is not in all supported versions of ComfyUI"
    for name, call, given in calls(tree):
        if known[name] is not None:
            unknown = set(given) - set(known[name])
            assert not unknown, f"line {call.lineno}: {name} does not take {sorted(unknown)} in all versions"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_input_and_output_says_what_it_is(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for name, call, given in calls(tree) if uses_api(tree) else []:
        if name.endswith((".Input", ".Output")) and name.startswith("io."):
            told = given.get("tooltip")
            assert told is not None, f"line {call.lineno}: no tooltip"
            assert not isinstance(told, ast.Constant) or told.value.strip(), f"line {call.lineno}: an empty tooltip"
        if name == "io.Schema":
            missing = {"node_id", "display_name", "category", "description", "inputs"} - set(given)
            assert not missing, f"line {call.lineno}: no {', '.join(sorted(missing))}"
            assert ast.literal_eval(given["category"]).split("/")[0] == "PromptLoop"


def test_ids_stay():
    found = []
    for file in FILES:
        for name, _, given in calls(ast.parse(file.read_text(encoding="utf-8"))):
            found += [ast.literal_eval(given["node_id"])] if name == "io.Schema" else []
    assert len(found) == len(set(found)), "two nodes of one id"
    assert all(i.startswith("PromptLoop") for i in found)
    assert sorted(found) == sorted(IDS), "ids are in saved workflows and never change; a new one goes into IDS"


@pytest.mark.parametrize("file", [ROOT / "__init__.py", *FILES], ids=lambda f: f.name)
def test_nothing_heavy_at_the_top(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in inside:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not [n for n in names if n.split(".")[0] in HEAVY], f"line {node.lineno}: import it where it is used"
            for n in names if not getattr(node, "level", 0) else []:
                comfy = n.split(".")[0] in COMFY
                assert not comfy or n == "comfy_api.latest", f"line {node.lineno}: {n} belongs inside a function"


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_sources_can_be_read_on_any_windows():
    bad = {}
    for file in python_files():
        try:
            file.read_text(encoding="utf-8").encode("cp1252")
        except UnicodeEncodeError as e:
            bad[str(file.relative_to(ROOT))] = str(e)
    assert not bad, "Python on Windows may read sources as cp1252; write these characters as escapes"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_node_files_stay_small(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_committed_names_are_those_of_this_comfyui(inprocess):
    here = {line.split()[0]: set(line.split()[1:]) for line in inprocess(Path(__file__))}
    for name, parameters in common().items():
        assert name in here, f"{name} is not in this ComfyUI; write v3_names.txt anew"
        assert parameters is None or set(parameters) <= here[name] or here[name] == {"-"}, name


LOADED = """
import inside, json, sys
from pathlib import Path
inside.setup(sys.argv[1], extras=False, pack=None)
import comfy_api.latest
before = set(sys.modules)
import asyncio, nodes, time
clock = time.perf_counter()
assert asyncio.run(nodes.load_custom_node(sys.argv[2], module_parent="custom_nodes"))
seconds = time.perf_counter() - clock
new = sorted({m.split(".")[0] for m in set(sys.modules) - before})
ids = sorted(n for n in nodes.NODE_CLASS_MAPPINGS if n.startswith("PromptLoop"))
import promptloop_pipeline
inside.answer({"seconds": seconds, "new": new, "ids": ids, "from": promptloop_pipeline.__file__})
"""


@pytest.fixture
def load(inprocess, tmp_path):
    """load(folder, first) -> what came of ComfyUI's loading a node folder; first: code that is run before."""
    script = tmp_path / "load.py"

    def run(folder, first="", **settings):
        script.write_text(first + LOADED, encoding="utf-8")
        return inprocess(script, tmp_path / "base", folder, **settings)

    return run


def test_loading_the_pack_costs_nothing(load):
    found = load(ROOT)
    assert found["ids"] == sorted(IDS)
    assert not {"diffusers", "transformers", "accelerate", "peft", "typer", "huggingface_hub"} & set(found["new"]), found["new"]
    assert found["seconds"] < 1, "a tenth of that, on a computer that is not busy"


HIDE = """
import sys
from pathlib import Path
def has(p): return (Path(p or ".") / "promptloop_pipeline").is_dir()
sys.path[:] = [p for p in sys.path if not has(p)]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + getattr(f, "__name__", "")]
"""  # as where nothing of ours was installed


def test_a_clone_needs_no_installation(load, clone):
    found = load(clone, HIDE)
    assert found["ids"] == sorted(IDS) and found["from"].startswith(str(clone))


def test_a_clone_wins_over_what_is_installed(load, clone, installed):
    found = load(clone, paths=[installed])
    assert found["ids"] == sorted(IDS) and found["from"].startswith(str(clone))


def test_a_clone_wins_over_what_is_imported_already(load, clone, installed):
    found = load(clone, "import promptloop_pipeline.session\n", paths=[installed])
    assert found["ids"] == sorted(IDS) and found["from"].startswith(str(clone))


def test_a_node_folder_without_the_package_uses_the_installed_one(load, nodes_only, installed):
    found = load(nodes_only, HIDE + f"sys.path.insert(0, {str(installed)!r})\n")
    assert found["ids"] == sorted(IDS) and found["from"].startswith(str(installed))


def test_a_node_folder_without_any_package_says_what_to_do(load, nodes_only):
    with pytest.raises(AssertionError, match="pip install promptloop"):
        load(nodes_only, HIDE)


@pytest.mark.parametrize("linked", [False, True])
def test_an_editable_installation_elsewhere(load, clone, editable, linked, tmp_path):
    folder = clone
    if linked:
        folder = tmp_path / "promptloop"
        folder.symlink_to(clone, target_is_directory=True)
    found = load(folder, f"import site\nsite.addsitedir({str(editable)!r})\n")
    assert found["ids"] == sorted(IDS) and Path(found["from"]).resolve().is_relative_to(clone)


def public_names() -> list[str]:
    """Runs inside ComfyUI: one line a name, with the parameters that it takes, or "-" """
    import inspect

    from comfy_api.latest import io, ui

    found: dict[str, str] = {}

    def look(name: str, value: object, depth: int) -> None:
        try:
            parameters = inspect.signature(value).parameters if callable(value) else {}
        except (TypeError, ValueError):
            parameters = {}
        open_ended = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        stars = {p.name: "*" * (p.kind is p.VAR_POSITIONAL) + p.name for p in parameters.values()} if parameters else {}
        found[name] = "-" if open_ended else " ".join(stars[p] for p in parameters if p != "self")
        members = getattr(value, "__members__", None)
        for inner in (members or dir(value)) if isinstance(value, type) and depth else ():
            if not inner.startswith("_"):
                look(f"{name}.{inner}", inspect.getattr_static(value, inner), depth - 1)

    for prefix, module in (("io", io), ("ui", ui)):
        for name in dir(module):
            if not name.startswith("_"):
                look(f"{prefix}.{name}", getattr(module, name), 1)
    look("io.Custom()", io.Custom("SOMETHING"), 1)
    return [f"{name} {parameters}" for name, parameters in sorted(found.items())]


def write_names(folders: list[Path]) -> None:
    from tests.comfyui.server import inprocess, version

    each = [{line.split()[0]: line.split()[1:] for line in inprocess(folder, Path(__file__))} for folder in folders]
    rows = [
        f"# V3 API of ComfyUI {', '.join('.'.join(map(str, version(f))) for f in folders)}: common names, common parameters"
    ]
    for name, parameters in each[0].items():
        others = [other.get(name) for other in each]
        if None not in others:
            called = [set(o) for o in others if o != ["-"]]
            rows.append(f"{name} {' '.join(p for p in parameters if all(p in c for c in called)) or '-'}")
    NAMES.write_text("\n".join(rows) + "\n", encoding="ascii")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.path.insert(0, str(ROOT))
        write_names([Path(a).resolve() for a in sys.argv[1:]])
    else:
        import inside

        inside.setup(__import__("tempfile").mkdtemp(), extras=False, pack=None)
        inside.answer(public_names())
