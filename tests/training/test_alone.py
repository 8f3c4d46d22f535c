"""One run at a time writes to a folder. The processes are real ones."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from promptloop_training.record import LOCK, alone
from promptloop_training.sft import SFTLoopConfig
from promptloop_training.sft import train as sft
from trl import ModelConfig

from .test_main import log, small, talkative

ROOT = Path(__file__).parents[2]


def patient(images, prompts, **context):
    """From the second step on it waits until it may go on."""
    here = Path(os.environ["GO"])
    steps = len(list(here.glob("step-*")))
    (here / f"step-{steps}").touch()
    while steps and not (here / "go").exists():
        time.sleep(0.02)
    return talkative(images, prompts, **context)


def command(argv, told, go):
    """`promptloop train`, in a process of its own that writes what it says to a file."""
    import torch

    from promptloop_pipeline import cli

    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ["GO"] = str(go)
    with open(told, "w") as sys.stderr:
        sys.argv = ["promptloop", "train", *argv]
        cli.main()


def start(*args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.test_resume", "promptloop_training.watch"])
    process = context.Process(target=command, args=args)
    process.start()
    return process


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_process_is_refused_and_after_a_kill_goes_on(tmp_path):
    argv = small(tmp_path, max_steps=3, rewards=f"{__package__}.test_alone:patient")
    out, told = tmp_path / "out", tmp_path / "told"
    first = start(argv, tmp_path / "first", tmp_path)
    wait_for((tmp_path / "step-1").exists)  # it is at work on its second step
    before = state(out)
    second = start(argv, told, tmp_path)
    second.join(120)
    assert second.exitcode == 2 and first.is_alive()
    (line,) = told.read_text().splitlines()
    assert f"another run is writing to the folder {out} (process {first.pid} on " in line and "nothing was changed" in line
    assert state(out) == before
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert (out / LOCK).exists()  # which locks nobody out
    (tmp_path / "go").touch()
    third = start(argv, told, tmp_path)
    third.join(120)
    assert third.exitcode == 0, told.read_text()
    assert [row["step"] for row in log(out) if "loss" in row] == [1, 2, 3]
    assert len(list(tmp_path.glob("step-*"))) == 1 + 1 + 2 and not (out / LOCK).exists()  # the first step was not made again


def test_the_folder_is_free_again_whatever_happened(tmp_path):
    folder = tmp_path / "a" / "out"
    with pytest.raises(KeyboardInterrupt), alone(folder):
        with pytest.raises(RuntimeError, match="another run is writing"), alone(folder):
            raise AssertionError("two at a time")
        with alone(folder, main=False):  # another process of the same run
            pass
        assert (folder / LOCK).read_text().split()[0] == str(os.getpid())
        raise KeyboardInterrupt
    assert list(folder.iterdir()) == []
    with alone(folder):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="cannot write to the folder .*; choose another one with output_dir"),
        alone(tmp_path / "file"),
    ):
        pass


def test_a_warm_up_is_alone_too(tmp_path):
    config = SFTLoopConfig(output_dir=str(tmp_path / "out"), teacher="oracle", teach_prompts=2, use_cpu=True, bf16=False)
    with alone(tmp_path / "out"):
        before = state(tmp_path)
        with pytest.raises(RuntimeError, match="another run is writing to the folder"):
            sft(config, ModelConfig())
        assert state(tmp_path) == before
