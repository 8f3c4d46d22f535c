"""The model card: what was trained from what, by which reward, on which prompts, and what came of it, with its intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from promptloop_pipeline import tiny

PAPERS = {
    "loop": "PromptLoop ([arXiv 2510.00430](https://arxiv.org/abs/2510.00430))",
    "single": "single-turn GRPO as in RePrompt ([arXiv 2505.17540](https://arxiv.org/abs/2505.17540)) and PromptEnhancer "
    "([arXiv 2509.04545](https://arxiv.org/abs/2509.04545))",
}
SHOWN = (  # of the config; the manifest has the rest
    "num_inference_steps", "guidance_scale", "width", "height", "turns", "window", "start_turn", "refine_at", "group_size", "retained",
    "prompts_per_step", "rewards", "by_tag", "learning_rate", "lr_scheduler_type", "beta", "epsilon", "loss_type", "scale_rewards",
    "temperature", "max_completion_length", "use_peft", "lora_r", "lora_alpha", "seed",
)  # fmt: skip
LOOKS = "looks at the running generation and rewrites the prompt for the remaining steps"
ONCE = "rewrites a prompt before the generation"
MOST = 40  # rows of the curve


def model_card(
    manifest: Mapping[str, Any], log: Sequence[Mapping[str, Any]], step: int, turns: Sequence[int], best: int | None,
    adapter: bool,
) -> str:  # fmt: skip
    """manifest: of the run. log: its rows. step: how many were trained. turns: the
    steps of its turns at test. best: the step whose model is kept as the best, if any."""
    config, data = manifest["config"], manifest["data"]
    hours = sum(row.get("step_time") or 0.0 for row in log) / 3600
    processes = f"{manifest['processes']} process" + ("es" if manifest["processes"] > 1 else "")
    looks = any(turns)
    base = (
        f'the embedded refiner of PromptLoop ("{config["refiner"]}")'
        if config["refiner"] in tiny.REFINERS
        else config["refiner"]
    )
    image = "the embedded generator of PromptLoop" if config["pipeline"] == "tiny" else config["pipeline"]
    watched = f", {data['watched']['n']} prompts of {data['watched']['name']} held out" if data.get("watched") else ""
    rows = {
        "method": f"{PAPERS['loop' if looks else 'single']}, GRPO on TRL {manifest['versions']['trl']}",
        "base model": base, "text-to-image model": f"{image}, not trained",
        "reward": f"`{config['rewards']}`, against the user's own words",
        "data": f"{data['train']['name']}, {data['train']['n']} prompts (hash {data['train']['digest']}){watched}",
        "trained": f"{step} steps in {hours:.2f} h, {processes}",
        "code": f"promptloop {manifest['versions']['promptloop']}, commit {manifest['git'] or 'unknown'}",
    }  # fmt: skip
    named = {k: config[k] for k in SHOWN if config.get(k) is not None}
    command = " ".join(["promptloop train", *manifest["command"]])
    return "\n".join([
        *_head(config, base, adapter), "", f"# {_title(config)}", "",
        f"A refiner for text-to-image prompts: it {LOOKS if looks else ONCE}.",
        "", *_table(["", ""], [[k, v] for k, v in rows.items()]), "", "## Use", "", *_use(config, turns), "", "## Figures", "",
        *_figures(log, best), "", "## Settings", "", "```", command, "```", "", "```yaml",
        *(f"{k}: {json.dumps(v)}" for k, v in named.items()), "```", "",
    ])  # fmt: skip


def _title(config: Mapping[str, Any]) -> str:
    return (config.get("hub_model_id") or "").rpartition("/")[2] or "A refiner trained with PromptLoop"


def _head(config: Mapping[str, Any], base: str, adapter: bool) -> list[str]:
    """The hub's own lines."""
    found = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if config["refiner"] not in tiny.REFINERS and not Path(config["refiner"]).expanduser().exists():
        found.append(f"base_model: {base}")
    return [
        *found,
        "tags:",
        *(f"- {tag}" for tag in ("promptloop", "grpo", "trl", "text-to-image", "prompt-refinement")),
        "---",
    ]


def _use(config: Mapping[str, Any], turns: Sequence[int]) -> list[str]:
    when = ", ".join("start" if step == 0 else str(step) for step in turns)
    pipe = (
        "pipe = tiny.load_pipeline()" if config["pipeline"] == "tiny"
        else f'pipe = DiffusionPipeline.from_pretrained("{config["pipeline"]}")'
    )  # fmt: skip
    hub = config.get("hub_model_id")
    folder = f'folder = huggingface_hub.snapshot_download("{hub}")' if hub else 'folder = "final"  # where this file is'
    return [
        "```python",
        "from promptloop_pipeline import tiny" if config["pipeline"] == "tiny" else "from diffusers import DiffusionPipeline",
        "from promptloop_pipeline import MLLMRefiner, attach", *(["import huggingface_hub"] if hub else []), "", pipe,
        folder, 'refiner = MLLMRefiner.from_pretrained(folder, f"{folder}/template.txt")  # with what it is told',
        f'loop = attach(pipe, refiner=refiner, refine_at="{when}")',
        f'out = loop("...", num_inference_steps={config["num_inference_steps"]})',
        "```",
    ]  # fmt: skip


def _figures(log: Sequence[Mapping[str, Any]], best: int | None) -> list[str]:
    watched = [row for row in log if "watch/n" in row]
    if not watched:
        return ["The run was not watched on held-out prompts: nothing is known of how good it is."]
    names = [k.split("/", 1)[1].removesuffix("/mean") for k in watched[0] if k.startswith("watch/") and k.endswith("/mean")]
    rewards = {row["step"]: row.get("reward") for row in log if row.get("reward") is not None}
    table = [
        [str(row["step"]), *(_interval(row, f"watch/{name}") for name in names), _number(rewards.get(row["step"]))]
        for row in _thinned(watched)
    ]
    n = watched[-1]["watch/n"]
    lines = [
        f"Greedy, at equally spaced turns, on {n} prompts that it was not trained on, from the same noise every time; brackets are 95% "
        "intervals over prompts. Step 0 is the model that training began with. The figures were also used to choose the best step, so "
        "that of the best one is a little too good: measure with `promptloop eval` on other prompts.",
        "", *_table(["step", *names, "reward in training"], table),
    ]  # fmt: skip
    if blind := [row for row in log if "watch-blind/n" in row]:
        last = blind[-1]
        figures = ", ".join(f"{name} {_interval(last, f'watch-blind/{name}')}" for name in names)
        lines += [
            "",
            f"The same policy at step {last['step']}, shown a flat grey picture instead: {figures} (n = {last['watch-blind/n']}).",
        ]
    kept = "no step was better than the first model" if best is None else f"the best is that of step {best}"
    return [*lines, "", f"Of the steps that were watched, {kept}."]


def _thinned(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(rows) <= MOST:
        return list(rows)
    return [rows[k * (len(rows) - 1) // (MOST - 1)] for k in range(MOST)]


def _interval(row: Mapping[str, Any], name: str) -> str:
    mean, low, high = (row.get(f"{name}/{part}") for part in ("mean", "low", "high"))
    return "-" if mean is None else f"{mean:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(cells)} |"
        for cells in (head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows))
    ]
