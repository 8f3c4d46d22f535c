"""What a run leaves behind: its manifest, a log with a line for each step, and trajectories to look at."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from promptloop_pipeline import __version__
from promptloop_pipeline.cli.output import write_json
from promptloop_pipeline.evaluation.report import Arm, write_report
from promptloop_pipeline.trajectory import save

from .rollout import Group

MANIFEST, LOG, SAMPLES, LOCK, VERSION = "manifest.json", "log.jsonl", "samples", ".lock", 1
BOARD = "runs"  # TensorBoard's own name for it
TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "diffusers")
SHOWN = 4  # groups of a step that are kept
UNSCORED = 5  # batches in a row
FREE = frozenset(  # keys that may change when a run is taken up again, since no step depends on them but by rounding
    ("resume", "max_steps", "num_train_epochs", "watch_every", "watch_blind", "samples_every", "save_steps", "save_strategy",
     "save_total_limit", "report_to", "run_name", "project", "disable_tqdm", "log_level", "push_to_hub", "hub_model_id", "hub_token",
     "hub_private_repo", "hub_revision", "dataloader_num_workers", "reward_batch", "rollout_batch", "output_dir",
     "logging_first_step", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
)  # fmt: skip


# --- the folder ---------------------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path, main: bool = True) -> Iterator[None]:
    """The folder, which is made, belongs to this run until the end, or until its process dies, however that may be: the lock is the
    operating system's. main: whether this is the process that writes; of several, the others do not ask.

    Raises RuntimeError naming the process that is at work there, OSError when the folder cannot be written.
    """
    if not main:
        yield
        return
    file = folder / LOCK
    lock = FileLock(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"another run is writing to the folder {folder}{_holder(file)}; nothing was changed. Wait until it ends, stop it, or "
            "choose another output_dir"
        ) from None
    except OSError as e:
        raise OSError(f"cannot write to the folder {folder}: {e.strerror or e}; choose another one with output_dir") from e
    told = not isinstance(lock, SoftFileLock)  # what is used where a disk knows no locks, and writes the same itself
    try:
        with suppress(OSError):  # on Windows nobody can read or write what is locked
            if told:
                file.write_text(f"{os.getpid()}\n{platform.node()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            if told:
                file.unlink()  # as long as it is ours
        lock.release()


def _holder(file: Path) -> str:
    try:
        pid, host, *_ = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {pid} on {host})"


def claim(folder: Path, manifest: dict[str, Any], resume: bool, checkpoint: str | None) -> None:
    """Makes the folder this run's. A run that is there already is gone on with, if it is the same one and `resume`; one that never made
    a step is replaced.

    Raises ValueError naming what differs, OSError when it cannot be written.
    """
    file = folder / MANIFEST
    if not file.is_file():
        if folder.is_dir() and any(p.name[0] != "." for p in folder.iterdir()):
            raise ValueError(f"the folder {folder} is not empty, and holds no run of PromptLoop; choose another output_dir")
    elif checkpoint is not None or any(row["step"] for row in _lines(folder / LOG)):
        old = _read_manifest(file)
        if not resume:
            raise ValueError(
                f"the folder {folder} holds a run already; leave out `resume: false` to go on with it, or choose another output_dir"
            )
        _check_same(folder, old, manifest)
        now = {k: manifest[k] for k in ("versions", "git", "command")}
        manifest = old | {"config": manifest["config"]}
        if now != {k: old[k] for k in now}:
            again = now | {"from": checkpoint and Path(checkpoint).name}
            manifest["resumed"] = [*old.get("resumed", []), again]
    else:
        shutil.rmtree(folder / SAMPLES, ignore_errors=True)
    manifest = {"run": f"{re.sub(r'[^a-zA-Z0-9._-]', '-', folder.name)}-{time.strftime('%Y%m%d-%H%M%S')}"} | manifest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, manifest)
    except OSError as e:
        raise OSError(f"cannot write to the folder {folder}: {e.strerror or e}; choose another one with output_dir") from e


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for part in ("config", "data", "files", "processes"):
        a, b = (m[part] if isinstance(m[part], dict) else {part: m[part]} for m in (old, new))
        for key in [*b, *(k for k in a if k not in b)]:
            if a.get(key) != b.get(key) and not (part == "config" and key in FREE):
                raise ValueError(
                    f"the folder {folder} holds a run with other {part}: {key} is {_short(a.get(key))} there and "
                    f"{_short(b.get(key))} now; nothing was changed. Repeat what it was started with to "
                    "go on with it, or choose another output_dir"
                )


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{file} is no JSON ({e}); choose another output_dir") from None
    if not isinstance(found, dict) or found.get("version") != VERSION or "config" not in found:
        raise ValueError(f"{file} was not written by this version of `promptloop train`; choose another output_dir")
    return found


def versions() -> dict[str, str]:
    return {"promptloop": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


def git_commit() -> str | None:
    """Of the working copy that PromptLoop runs from, with "+" where it was changed since; None where it is none."""
    home = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(home)]
    try:
        top, commit = (
            subprocess.run([*git, "rev-parse", what], capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for what in ("--show-toplevel", "HEAD")
        )
        if Path(top).resolve() != home:  # installed somewhere inside somebody else's repository
            return None
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed.strip() else "")


# --- the log ------------------------------------------------------------------------------------------------------------


def _lines(file: Path) -> list[dict[str, Any]]:
    """Lines that are whole; one that was torn off in writing is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in found if isinstance(row, dict) and "step" in row]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run's log, in order."""
    return _lines(folder / LOG)


class Log(TrainerCallback):
    """Every metric of every step, one JSON line each. What was logged after the checkpoint that a run goes on from is cut off, for
    it will come again."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            step = state.global_step
            there = [row.keys() for row in state.log_history if row["step"] == step]  # what came after will come again
            kept = [row for row in _lines(self.file) if row["step"] < step or (row["step"] == step and row.keys() in there)]
            unfinished = self.file.with_suffix(".tmp")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            unfinished.replace(self.file)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step} | {k: _json(v) for k, v in logs.items()}
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")


def _json(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- trackers -----------------------------------------------------------------------------------------------------------


def check_trackers(names: Sequence[str]) -> None:
    """names: `report_to`. Raises ValueError for one that nobody knows, ImportError for one that is not there."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to is {name!r}; use none, or some of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name in TRACKERS and name not in get_available_reporting_integrations():
            raise ImportError(f"report_to is {name}, which is not installed or is switched off: pip install {name}")


def same_logs(trainer: Any, folder: Path, checkpoint: str | None) -> None:
    """A run that goes on from a checkpoint goes on in the same logs of its trackers: under the name that its manifest keeps, if it has
    no `run_name`. What was logged after the checkpoint, and will come again, TensorBoard takes back; others show it twice."""
    config = trainer.args
    name = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"]
    config.run_name = config.run_name or name
    if "wandb" in config.report_to:
        os.environ.setdefault("WANDB_RUN_ID", name)
        os.environ.setdefault("WANDB_RESUME", "allow")
    if not trainer.is_world_process_zero():
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            first = int(checkpoint.rpartition("-")[2]) + 1 if checkpoint else 0
            callback.logging_dir = str(folder / BOARD)
            callback.tb_writer = callback._SummaryWriter(callback.logging_dir, purge_step=first)


# --- what there is to look at -------------------------------------------------------------------------------------------


class Samples:
    """Told of each batch of groups (`on_groups`): every `every` steps it keeps the trajectories of the first groups, which `load`
    reads, and a page that shows them.

    Raises RuntimeError when the last batches had no reward at all, as when a judge's server is gone.
    """

    def __init__(self, folder: Path, every: int, retained: int, *, iterations: int = 1, pixelated: bool = False) -> None:
        self.folder, self.every, self.retained, self.iterations, self.pixelated = folder, every, retained, iterations, pixelated
        self.unscored = 0

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        self.unscored = self.unscored + 1 if all(r is None for g in groups for r in g.rewards) else 0
        if self.unscored == UNSCORED:
            raise RuntimeError(f"no picture of the last {UNSCORED} steps had a reward; is a judge's server gone?")
        if not self.every or step % self.every >= self.iterations:  # a batch may serve several steps
            return
        shown = groups[:SHOWN]
        folder = self.folder / SAMPLES / f"step-{step:06d}"
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for group in shown:
            for k, (t, total) in enumerate(zip(group.trajectories, group.rewards, strict=True)):
                t.meta |= {"training_step": step, "trajectory": k, "reward": total}
        save([t for group in shown for t in group.trajectories], unfinished)
        write_report(
            list(self._arms(shown)), unfinished / "index.html", title=f"Training step {step}", pixelated=self.pixelated,
            intro=f"{len(shown)} of the {len(groups)} groups of this step; each shows one prompt, and what the policy made of it in "
            "every trajectory.",
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed after this step and has come here again
        unfinished.replace(folder)

    def _arms(self, groups: Sequence[Group]) -> Iterator[Arm]:
        size = len(groups[0].trajectories)
        for k in range(size):
            own = k >= size - self.retained
            note = "the user's own words, untouched" if own else ""
            yield Arm(
                f"retained {k + 1 - size + self.retained}" if own else f"trajectory {k + 1}",
                note,
                [g.trajectories[k] for g in groups],
            )


class Bar(TrainerCallback):
    """One progress bar, with the rewards of the last step and of the last watch."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="train", disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for key, value in (logs or {}).items():
            name = key.removeprefix("reward/")
            watched = key.startswith("watch/") and key.endswith("/mean")
            if value is not None and (watched or key == "reward" or (name != key and "/" not in name)):
                self.shown[key.removesuffix("/mean")] = f"{value:.3f}"
        if self.bar is not None and self.shown:
            self.bar.set_postfix(self.shown)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
