import re
from pathlib import Path

import promptloop_training
import pytest
import torch
import yaml
from promptloop_training.arguments import RECIPES, recipes
from promptloop_training.plan import configure, plan

FILES = sorted(f for f in RECIPES.rglob("*.yaml") if "grpo --config" in f.read_text().partition("\n\n")[0])
CPU = ["--bf16", "false"] if not torch.cuda.is_available() else []  # the rest is what a GPU machine would check


def test_the_recipes_are_there():
    assert set(recipes()) >= {f.stem for f in FILES} == {
        "tiny_promptloop", "tiny_reprompt", "sd15_promptloop", "sdxl_promptloop", "sd35_promptloop", "flux_promptloop", "reprompt_flux",
        "promptenhancer",
    }  # fmt: skip
    assert Path(promptloop_training.__file__).parent / "recipes" == RECIPES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_recipe_says_what_it_takes_and_gives(file):
    head = [line for line in file.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    for what in ("command:", "hardware:", "hours:", "expected:"):
        assert sum(line.startswith(f"# {what} ") for line in head) == 1, what
    command = next(line for line in head if line.startswith("# command:"))
    assert command.endswith(f"grpo --config training/recipes/{file.name}")
    assert ("tiny" in file.stem) or "accelerate launch --num_processes" in command


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_recipe_passes_all_checks_that_need_no_model(file, tmp_path):
    config, lora = configure(["--config", str(file), *CPU])
    assert config.turns_trained == (1 if config.refine_at == "start" else config.turns)
    assert config.output_dir.startswith("promptloop-") and config.save_total_limit
    written = yaml.safe_load(file.read_text())
    assert {k: getattr(config, k) for k in ("learning_rate", "group_size", "rewards")} == {
        "learning_rate": float(written["learning_rate"]), "group_size": written["group_size"], "rewards": written["rewards"],
    }  # fmt: skip
    assert lora.lora_dropout == 0 or not lora.use_peft
    prompts = tmp_path / "prompts.jsonl"  # in place of what a user has to fetch
    prompts.write_text("".join(f'{{"prompt": "cat {i}", "include": [{{"class": "cat", "count": 1}}]}}\n' for i in range(80)))
    where = ["--output_dir", str(tmp_path / "out")] + ([] if "tiny" in file.stem else ["--train_data", str(prompts)])
    it = plan(["--config", str(file), *CPU, *where])
    assert len(it.watched) == written.get("watch_prompts", 64) and not set(it.watched.requests) & set(it.train.requests)
    assert it.template.looks == (config.refine_at is None) or config.pipeline == "tiny"


def test_no_two_recipes_write_to_the_same_folder():
    folders = [re.search(r"^output_dir: (.*)$", f.read_text(), re.M)[1] for f in FILES]
    assert len(set(folders)) == len(folders)


def test_a_recipe_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, _ = configure(["--config", "tiny_promptloop"])
    assert config.output_dir == "promptloop-tiny"
    with pytest.raises(
        FileNotFoundError, match="no config file tiny_promtloop; recipes that come with PromptLoop: .*tiny_promptloop"
    ):
        configure(["--config", "tiny_promtloop"])
