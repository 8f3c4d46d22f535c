import os
from dataclasses import MISSING, fields

import pytest
import yaml
from promptloop_training.arguments import convert, read
from promptloop_training.config import PromptLoopConfig
from trl import GRPOConfig, ModelConfig


@pytest.mark.parametrize(
    "value, hint, wanted",
    [
        ("1e-5", float, 1e-5), (3, float, 3.0), ("3", int, 3), ("1e3", int, 1000), (2.0, int, 2), ("yes", bool, True), 
        ("0", bool, False),
        (False, str, "no"), (6, str, "6"), ("a", str | None, "a"), (None, int | None, None), ("null", str | None, None),
        ("none", str | None, "none"), ("a", list[str], ["a"]), ([1, "2"], list[int], [1, 2]), ('{"a": 1}', dict | str | None, {"a": 1}),
        ("x.json", dict | str | None, "x.json"), ("true", bool | None, True), (["a", "b"], None | str | list[str], ["a", "b"]),
        ("auto", int | str | None, "auto"), ("64", int | str | None, 64), ("[a, b]", list[str], ["a", "b"]),
    ],
)  # fmt: skip
def test_values_become_what_the_field_is(value, hint, wanted):
    got = convert(value, hint)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    "value, hint, what",
    [
        ("three", int, "a whole number"), (2.5, int, "a whole number"), (True, int, "a whole number"), ("nan", float, "a number"),
        ("perhaps", bool, "true or false"), (2, bool, "true or false"), (True, str, "text"), (["a"], str, "text"),
        ({"a": 1}, list[str], "a list"), ("{a", dict | None, "a mapping, or null"),
         (None, float, "a number"), ("x", int | None, "a whole number, or null"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_says_what_would(value, hint, what):
    with pytest.raises(ValueError) as e:
        convert(value, hint)
    assert str(e.value) == what


def test_the_command_line_wins_and_env_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMPTLOOP_TEST", raising=False)
    file = tmp_path / "x.yaml"
    file.write_text("env:\n  PROMPTLOOP_TEST: 7\nlearning_rate: 1e-5\nsave_strategy: no\nturns: 2\nlora_r: 8\n")
    argv = ["--config", str(file), "--turns=4", "--learning-rate", "2e-5", "--share_noise", "false", "--use_peft",
            "--reward_models", "a=1", "b=2", "--refine-at", "20%, 50%", "--guidance_scale", "-1"]  # fmt: skip
    given = read(argv, (PromptLoopConfig, ModelConfig))
    assert given.of(PromptLoopConfig) == {
        "learning_rate": 2e-5, "save_strategy": "no", "turns": 4, "share_noise": False, "reward_models": ["a=1", "b=2"],
        "refine_at": "20%, 50%", "guidance_scale": -1.0,
    }  # fmt: skip
    assert given.of(ModelConfig) == {"lora_r": 8, "use_peft": True}
    assert os.environ.pop("PROMPTLOOP_TEST") == "7"
    assert given.where["lora_r"] == str(file) and given.where["turns"] == "the command line"


def test_every_key_of_trl_can_be_given(tmp_path):
    """Its default, written as text, is read as its default."""
    values = {
        f.name: f.default for f in fields(GRPOConfig) if f.default not in (MISSING, None) and not isinstance(f.default, dict)
    }
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({k: str(getattr(v, "value", v)) for k, v in values.items()}))
    assert read(["--config", str(file)], (GRPOConfig,)).values == {k: getattr(v, "value", v) for k, v in values.items()}
