"""What needs a real ComfyUI is skipped where COMFYUI_DIR is not set."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from .server import NAME, Comfy, checkout, copy_pack, new_base
from .server import inprocess as run_inprocess


@pytest.fixture(scope="session")
def comfyui_dir():
    return checkout() or pytest.skip("set COMFYUI_DIR")


@pytest.fixture(scope="session")
def inprocess(comfyui_dir):
    """inprocess(script, *args) -> what the script printed last, read as JSON; see server.inprocess."""
    return partial(run_inprocess, comfyui_dir)


@pytest.fixture(scope="session")
def comfy(comfyui_dir, clone, tmp_path_factory):
    """The real server, the pack in it as a clone."""
    base = new_base(tmp_path_factory.mktemp("comfy"))
    (base / "custom_nodes" / NAME).symlink_to(clone, target_is_directory=True)
    comfy = Comfy(comfyui_dir, base).start()
    yield comfy
    comfy.stop()


@pytest.fixture(scope="session")
def models(inprocess, tmp_path_factory):
    """A base directory with the tiny checkpoints, LoRAs and the ControlNet of checkpoints.py."""
    base = tmp_path_factory.mktemp("models")
    inprocess(Path(__file__).parent / "checkpoints.py", base)
    return base


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """What git clones."""
    return copy_pack(tmp_path_factory.mktemp("clone") / NAME)


@pytest.fixture(scope="session")
def nodes_only(tmp_path_factory):
    """A node folder that came without the package beside it."""
    return copy_pack(tmp_path_factory.mktemp("nodes") / NAME, without=["promptloop_pipeline", "training"])


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def installed(comfyui_dir, tmp_path_factory):
    """A folder for sys.path that holds the package as pip installs it."""
    source, target = copy_pack(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("site")
    pip("--target", target, source)
    return target


@pytest.fixture(scope="session")
def editable(comfyui_dir, tmp_path_factory):
    """A site folder with an editable installation of another clone."""
    source, prefix = copy_pack(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("prefix")
    pip("--prefix", prefix, "--editable", source)
    return next(prefix.rglob("site-packages"))


@pytest.fixture(scope="session")
def comfy_installed(comfyui_dir, installed, nodes_only, tmp_path_factory):
    """The real server with the package installed by pip, and a node folder that lacks it."""
    base = new_base(tmp_path_factory.mktemp("comfy"))
    (base / "custom_nodes" / NAME).symlink_to(nodes_only, target_is_directory=True)
    comfy = Comfy(comfyui_dir, base, paths=[installed]).start()
    yield comfy
    comfy.stop()
