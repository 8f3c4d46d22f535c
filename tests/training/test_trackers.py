"""`report_to`: what a run's figures are called there, and that a run that was resumed goes on in the same log."""

import json
import sys

import pytest
from promptloop_training.main import main
from promptloop_training.sft import SFTLoopConfig
from promptloop_training.sft import train as sft
from trl import ModelConfig

from .test_main import CALLS, here, small  # noqa: F401

HERE = f"{__package__}.test_main"
WATCHED = {"max_steps": 4, "save_steps": 2, "watch_every": 2, "watch_prompts": 3, "watch_blind": "end"}
NAMED = {f"reward/{HERE}:failing", "reward/verifier", "group/flat", "turn/changed", "loss", "num_tokens"}


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_tensorboard_has_what_the_log_has(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    argv, out = small(tmp_path, rewards=f"{HERE}:failing, verifier:0", report_to="tensorboard", **WATCHED), tmp_path / "out"
    monkeypatch.setitem(CALLS, "raise_at", 6)  # after step 3, of which there is no checkpoint
    monkeypatch.setitem(CALLS, "what", KeyboardInterrupt)
    assert main(argv) == 130
    assert max(row["step"] for row in rows(out)) == 3
    monkeypatch.setitem(CALLS, "raise_at", -1)
    assert main(argv) == 0

    board = events.EventAccumulator(str(out / "runs"))
    board.Reload()
    assert not [p for p in (out / "runs").iterdir() if p.is_dir()]  # which TensorBoard would take for another run
    shown = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}
    logged = {}
    for row in rows(out):
        for key, value in row.items():
            if key not in ("step", "epoch") and value is not None:  # an epoch comes with each of several logs of a step
                logged.setdefault(f"train/{key}", []).append((row["step"], pytest.approx(value, rel=1e-5)))
    shown.pop("train/epoch")
    assert shown == logged
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]  # the third once only
    assert [step for step, _ in shown["train/watch/total/mean"]] == [0, 2, 4]
    assert {f"train/{name}" for name in NAMED} | {"train/watch-blind/verifier/mean"} <= set(shown)


def test_a_run_keeps_its_name(tmp_path, monkeypatch):
    """By which trackers know it again."""
    argv, out = small(tmp_path, rewards=f"{HERE}:failing"), tmp_path / "out"
    monkeypatch.setitem(CALLS, "raise_at", 2)
    with pytest.raises(RuntimeError, match="on holiday"):
        main(argv)
    name = json.loads((out / "manifest.json").read_text())["run"]
    manifest = (out / "manifest.json").read_text().replace(name, "out-then")
    (out / "manifest.json").write_text(manifest)
    assert main(argv) == 0
    assert name.startswith("out-20") and json.loads((out / "manifest.json").read_text())["run"] == "out-then"


@pytest.mark.parametrize(
    ("name", "says"), [("wandbb", "report_to is 'wandbb'; use none, or some of"), ("mlflow", "pip install mlflow")]
)
def test_a_warm_up_knows_its_trackers_before_anything_is_done(tmp_path, name, says):
    if name in sys.modules:
        pytest.skip(f"{name} is there")
    config = SFTLoopConfig(
        output_dir=str(tmp_path / "out"), teacher="oracle", teach_prompts=2, report_to=name, use_cpu=True, bf16=False
    )
    with pytest.raises((ValueError, ImportError), match=says):
        sft(config, ModelConfig())
    assert not (tmp_path / "out").exists()
