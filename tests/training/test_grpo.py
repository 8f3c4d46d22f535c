"""The trainer: every number of a step against an independent computation, on real models of tiny sizes."""

import inspect
import json
import math
import random
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from promptloop_training.config import PromptLoopConfig
from promptloop_training.grpo import PromptLoopGRPOTrainer, TrainingError, _TRLChat, check_trl, last_checkpoint
from promptloop_training.objectives import deviation, group_advantages, is_flat, turn_rewards
from promptloop_training.policy import keep, load_policy
from promptloop_training.rollout import Rollout, _greedy
from transformers import TrainerCallback
from trl import GRPOTrainer, ModelConfig

from promptloop_pipeline import MLLMRefiner, tiny
from promptloop_pipeline.chat.local import TransformersChat
from promptloop_pipeline.refiner import View
from promptloop_pipeline.refiners.template import FOLDER, load_template
from promptloop_pipeline.rewards.combine import load_reward, win_rates

from ..chat import models

REWARD, MIXED = f"{__package__}.test_rollout:wordy", f"{__package__}.test_rollout:mixed"
VIEW = View("a red circle", "a red circle", 0, 4)
START = {"refine_at": "start", "turns": 1, "group_size": 3, "per_device_train_batch_size": 6}
REQUESTS = ["large red circle top left , black background", "small blue cross center , white background", "two", "green"]


def dataset(n=4, conversational=True):
    rows = [{"request": REQUESTS[k % 4], "row": k} for k in range(n)]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["request"]}] if conversational else row["request"]
    return datasets.Dataset.from_list(rows)


def config(folder, **changes):
    common = {
        "output_dir": str(folder), "num_inference_steps": 4, "turns": 2, "window": "1, 3", "group_size": 2, "prompts_per_step": 2,
        "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "temperature": 3.0, "max_completion_length": 16, "rewards": REWARD,
        "gradient_checkpointing": False, "disable_tqdm": True, "max_grad_norm": 1e9, "shuffle_dataset": False, "beta": 0.0,
    }  # fmt: skip
    return PromptLoopConfig(**common | changes)


def refiner(folder=None, template="rewrite", **options):
    if folder is None:
        return tiny.load_refiner(logprobs=True, **options)
    chat = TransformersChat.from_pretrained(folder, device="cpu", logprobs=True)
    return MLLMRefiner(chat, template, **options)


PIPES = []


def pipe():
    PIPES or PIPES.append(tiny.load_pipeline())
    return PIPES[0]


class Gradients(TrainerCallback):
    """What the optimizer is given in each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def build(folder, policy=None, peft_config=None, reward=None, conversational=True, **changes):
    """A trainer that keeps its groups, batches and gradients."""
    args = config(folder, **changes)
    policy = policy or refiner()
    rewards = {s.name: reward or load_reward(s.name) for s in args.specs}
    rollout = Rollout(
        pipe(), policy, rewards, args.specs, size=args.group_size, retained=args.retained, by_tag=args.by_tag, **args.call
    )
    kept, gradients, data = [], Gradients(), dataset(conversational=conversational)
    trainer = PromptLoopGRPOTrainer(
        policy.chat.model, args, processing_class=policy.chat.processor, rollout=rollout, train_dataset=data,
        on_groups=lambda step, groups: kept.append(groups), peft_config=peft_config, callbacks=[gradients],
    )  # fmt: skip
    trainer.kept, trainer.gradients, trainer.batches = kept, gradients, []
    real = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: trainer.batches.append(real(inputs)) or trainer.batches[-1]
    return trainer


def logps(model, chat, row, temperature):
    """Of a row's tokens, by a forward pass of their own: (T,)"""
    inputs = dict(chat._inputs([row.conversation]))
    said = torch.tensor([row.token_ids])
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model.forward(**inputs).logits[0, start - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, said[0][:, None])[:, 0]


def expected(trainer, groups, model, reference=None):
    """(loss, gradients by name) of a whole batch, in plain torch, from the papers' formulas."""
    args, chat = trainer.args, trainer.rollout.refiner.chat
    per_row, tokens = [], 0
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # over trajectories, the retained among them
        for a, rows in zip(advantages.tolist(), group.rows):
            for row in rows:
                if row is None or is_flat(group.rewards):
                    per_row.append(torch.zeros(()))
                    continue
                lp = logps(model, chat, row, args.temperature)
                loss = -a * torch.exp(lp - lp.detach())
                if args.beta:
                    with torch.no_grad(), reference() as other:
                        ref = logps(other, chat, row, args.temperature)
                    kl = torch.exp(ref - lp) - (ref - lp) - 1  # k3
                    loss = loss + args.beta * kl * (torch.exp(lp - lp.detach()) if args.use_bias_correction_kl else 1)
                tokens += len(loss)
                per_row.append(loss.mean() if args.loss_type == "grpo" else loss.sum())
    total = sum(per_row) / (len(per_row) if args.loss_type == "grpo" else tokens)
    names, weights = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    grads = torch.autograd.grad(total, weights, allow_unused=True)
    return total.item(), {n: g for n, g in zip(names, grads) if g is not None}


def same_gradients(one, other, tolerance=1e-6):
    for name in {*one, *other}:
        a, b = (g.get(name, torch.zeros(())) for g in (one, other))
        assert torch.allclose(a, b, atol=tolerance, rtol=1e-4), (name, (a - b).abs().max(), b.abs().max())
    assert max(g.abs().max() for g in one.values()) > 1e-4  # or nothing was tested


class _As:
    """A context that gives a model."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        return self.model

    def __exit__(self, *_):
        pass


class _Off(_As):
    def __enter__(self):
        self.context = self.model.disable_adapter()
        self.context.__enter__()
        return self.model

    def __exit__(self, *exc):
        self.context.__exit__(*exc)


def first_step(trainer, reference=None):
    """Runs one step; compares its loss and gradients with `expected`."""
    policy, before = trainer.rollout.refiner, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    after = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    torch.set_grad_enabled(True)
    loss, gradients = expected(trainer, trainer.kept[0], model, reference and (lambda: reference(model)))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-6)
    same_gradients(gradients, trainer.gradients.steps[0])
    recorded = [row for g in trainer.kept[0] for rows in g.rows for row in rows if row]
    for row in recorded[:4]:
        own = logps(model, policy.chat, row, trainer.args.temperature).tolist()
        assert own == pytest.approx(row.logprobs, abs=1e-5)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    return loss


# --- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_loss_and_gradients_by_an_independent_forward(tmp_path, loss_type):
    trainer = build(tmp_path, loss_type=loss_type, group_size=3, retained=1)
    loss = first_step(trainer)
    assert "old_per_token_logps" not in trainer.batches[0]  # the ratio is exactly 1: the loss is the mean of -A over tokens
    batch = trainer.batches[0]
    mask = batch["completion_mask"] * batch["tool_mask"]
    minus = -batch["advantages"][:, None] * mask
    mean = (minus.sum(1) / mask.sum(1).clamp(min=1)).mean() if loss_type == "grpo" else minus.sum() / mask.sum()
    assert loss == pytest.approx(mean.item(), abs=1e-6)
    log = trainer.state.log_history[0]
    assert log["clip_ratio/region_mean"] == 0 and log["reward/retained/" + REWARD] == 0


@pytest.mark.parametrize(("loss_type", "corrected"), [("dapo", True), ("grpo", False)])
def test_kl_to_a_reference_from_disk(tmp_path, loss_type, corrected):
    policy = refiner()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.chat.model.parameters():
            p += 0.02 * p.std().nan_to_num() * torch.randn_like(p)  # away from its reference
    trainer = build(tmp_path, policy, loss_type=loss_type, beta=0.5, use_bias_correction_kl=corrected)
    other = refiner().chat.model
    first_step(trainer, lambda model: _As(other))
    assert trainer.state.log_history[0]["kl"] > 1e-4


def test_adapters_with_the_base_as_reference(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    trainer = build(tmp_path, peft_config=lora, beta=0.5)
    first_step(trainer, _Off)
    assert set(trainer.gradients.steps[0]) and all("lora" in n for n in trainer.gradients.steps[0])
    assert trainer.state.log_history[0]["kl"] > 1e-6


@pytest.mark.parametrize("maker", ["idefics3", "llava"])
def test_policies_that_see(tmp_path, maker):
    folder = models.save(getattr(models, maker), tmp_path / "model")
    first_step(build(tmp_path, refiner(folder), temperature=1.3, max_completion_length=6))


def test_a_text_policy_in_a_single_turn(tmp_path):
    policy = refiner(models.save(models.qwen2, tmp_path / "model"), "reprompt")
    trainer = build(tmp_path, policy, **START, temperature=0.7, max_completion_length=6)
    first_step(trainer)
    assert "pixel_values" not in trainer.batches[0]


def test_a_model_that_brings_a_penalty_for_repetition(tmp_path):
    folder = models.save(models.qwen2, tmp_path / "model")
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": 1.5}))
    template = load_template("reprompt")
    policy = load_policy(str(folder), template, ModelConfig(dtype="float32"), device="cpu", logprobs=True)
    trainer = build(tmp_path, policy, LoraConfig(r=2), **START, temperature=0.7, max_completion_length=6)
    first_step(trainer)
    keep(trainer, tmp_path / "final", FOLDER / "reprompt.txt", 6)
    kept = MLLMRefiner.from_pretrained(str(tmp_path / "final"), template, device="cpu", max_new_tokens=12, temperature=0.0)
    assert (tmp_path / "final" / "adapter_config.json").is_file()
    with trainer._policy():
        watched = _greedy(policy)
        watched.sampling = kept.sampling
        assert kept.refine([VIEW])[0].token_ids == watched.refine([VIEW])[0].token_ids
    kept.chat.model.generation_config.repetition_penalty = 1.5  # as its base came
    assert kept.refine([VIEW])[0].token_ids != watched.refine([VIEW])[0].token_ids


def test_a_chat_template_without_system_messages(tmp_path):
    policy = refiner(models.save(models.qwen2, tmp_path / "model"), "reprompt")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    policy.chat.processor.chat_template = refuses + models.TEMPLATE
    first_step(build(tmp_path, policy, **START, max_completion_length=4, temperature=1.0))


def test_a_model_that_continues_texts(tmp_path):
    policy = refiner(models.save(models.gpt2, tmp_path / "model"), "promptist")  # beams are for use, not for training
    trainer = build(
        tmp_path, policy, **START, max_completion_length=4, temperature=1.0, conversational=False, disable_dropout=True
    )
    first_step(trainer)
    assert trainer.batches[0]["prompt_ids"].shape[1] < 80


def test_words_that_look_like_special_tokens(tmp_path):
    """What a user wrote is seen by the loss as it was by the policy: without them."""
    policy = refiner(models.save(models.idefics3, tmp_path / "model"))
    trainer = build(tmp_path, policy, max_completion_length=4, temperature=1.0)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"request": "a <image> of <|im_end|>" + row["request"]})
    first_step(trainer)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_accumulated_gradients_are_those_of_the_whole(tmp_path, loss_type):
    found = []
    for size in (12, 4):
        trainer = build(tmp_path, prompts_per_step=2, group_size=3, per_device_train_batch_size=size, loss_type=loss_type)
        trainer.train()
        assert trainer.args.gradient_accumulation_steps == 12 // size
        found.append((trainer.gradients.steps[0], trainer.state.log_history[0]["loss"]))
    same_gradients(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


def test_whoever_draws_from_the_global_random_state_changes_nothing(tmp_path):
    found = []
    for draws in (0, 3):

        def reward(images, prompts, draws=draws, **_):
            torch.rand(draws), random.random()
            return [k / 7 for k in range(len(images))]

        trainer = build(tmp_path, reward=reward, per_device_train_batch_size=2, max_steps=2)
        trainer.train()
        found.append(trainer.gradients.steps)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in one)


# --- what carries loss ------------------------------------------------------------------------------------------------------


def only_first(images, prompts, trajectories, **_):
    """Flat for all requests but the first."""
    from .test_rollout import wordy

    return [s if p == REQUESTS[0] else 0.5 for s, p in zip(wordy(images, prompts, trajectories), prompts)]


def test_flat_groups_and_missing_turns_carry_no_gradient(tmp_path):
    trainer = build(tmp_path, reward=only_first, group_size=3, per_device_train_batch_size=12)
    policy = trainer.rollout.refiner
    real, calls = policy.refine, []

    def refine(views, seeds=None):
        calls.append(len(views))
        if len(calls) == 1:
            raise OSError("not now")
        return real(views, seeds)

    policy.refine = refine
    first_step(trainer)  # what it expects has neither in it
    missing = [row is None for g in trainer.kept[0] for rows in g.rows for row in rows]
    flat = [is_flat(g.rewards) for g in trainer.kept[0]]
    assert 0 < sum(missing) < 12 and sorted(flat) == [False, True]
    batch = trainer.batches[0]
    silent = [m or flat[i // 6] for i, m in enumerate(missing)]
    assert [not row.any() for row in (batch["tool_mask"] * batch["completion_mask"]).bool()] == silent
    assert batch["advantages"][torch.tensor(silent)].eq(0).all()


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
def test_groups_of_fewer_turns(tmp_path, credit):
    trainer = build(tmp_path, turns=3, fewest_turns=1, per_device_train_batch_size=12, credit=credit, rewards=MIXED, seed=3)
    if credit == "trajectory":
        first_step(trainer)
    else:
        trainer.train()
    turns = [len(g.rows[0]) for g in trainer.kept[0]]
    assert turns == [1, 3]
    assert [len(t.turns) for g in trainer.kept[0] for t in g.trajectories] == [1, 1, 3, 3]
    heard = trainer.batches[0]["tool_mask"].bool().any(1) & trainer.batches[0]["advantages"].ne(0)
    assert heard.tolist() == [n < k for k in turns for _ in range(2) for n in range(3)]


def test_nothing_is_learnt_from_flat_groups_alone(tmp_path):
    trainer = build(tmp_path, reward=lambda images, prompts, **_: [0.1] * len(images), beta=0.1)
    trainer.train()
    assert all(not g.any() for g in trainer.gradients.steps[0].values())
    log = trainer.state.log_history[0]
    assert log["group/flat"] == 1 and log["grad_norm"] == 0 and log["loss"] == 0


def test_advantages_of_a_batch(tmp_path):
    """Over trajectories, equal for the turns of one, and those that TRL itself would take where there is one turn."""
    trainer = build(tmp_path, turns=1, group_size=4)
    trainer.train()
    ours = trainer.batches[0]["advantages"].tolist()
    assert ours == pytest.approx([a for g in group_advantages([g.rewards for g in trainer.kept[0]]) for a in g], abs=1e-6)
    assert ours == pytest.approx(list(trainer._logs["advantages"]), abs=1e-5)
    for scale in ("batch", "none"):
        trainer = build(tmp_path, turns=2, group_size=3, retained=1, scale_rewards=scale)
        trainer.train()
        rewards = [g.rewards for g in trainer.kept[0]]
        by_group = group_advantages(rewards, scale, deviation([r for g in rewards for r in g]))
        wanted = [a for g in by_group for a in g[:2] for _ in range(2)]
        assert trainer.batches[0]["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)


def test_win_rates(tmp_path):
    trainer = build(tmp_path, win_rate=True, group_size=4, retained=1, per_device_train_batch_size=12)
    trainer.train()
    wanted = group_advantages([win_rates(g.rewards) for g in trainer.kept[0]])
    assert trainer.batches[0]["advantages"].tolist() == pytest.approx(
        [a for g in wanted for a in g[:3] for _ in range(2)], abs=1e-6
    )


def test_credit_by_turns(tmp_path):
    trainer = build(tmp_path, credit="turn", group_size=3, rewards=MIXED, per_device_train_batch_size=12)
    trainer.train()
    groups = trainer.kept[0]
    found = iter(trainer.batches[0]["advantages"].tolist())
    for group, looks in zip(groups, trainer.rollout.looks(groups), strict=True):
        brought = [turn_rewards(seen, final) for seen, final in zip(looks, group.rewards, strict=True)]
        columns = [group_advantages([[t[k] for t in brought]])[0] for k in range(2)]
        for j in range(3):
            assert [next(found), next(found)] == pytest.approx([columns[0][j], columns[1][j]], abs=1e-4)
            assert columns[0][j] and columns[1][j] and sum(brought[j]) == pytest.approx(group.rewards[j] - looks[j][0])


# --- stopping -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(tmp_path):
    trainer = build(tmp_path)
    weight = trainer.model.get_output_embeddings().weight
    trainer.on_groups = lambda step, groups: weight.data.view(-1)[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        trainer.train()
    assert trainer.gradients.steps == []  # the optimizer was never asked


def test_gradients_that_are_no_numbers(tmp_path):
    trainer = build(tmp_path, max_grad_norm=0.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    next(trainer.model.parameters()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match="step 1: the norm of the gradients is nan"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_a_reward_that_fails_leaves_the_last_checkpoint(tmp_path):
    calls = []

    def reward(images, prompts, **_):
        calls.append(len(images))
        if len(calls) == 2:
            raise ConnectionError("the judge is gone")
        return [k / 7 for k in range(len(images))]

    trainer = build(tmp_path, reward=reward, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(TrainingError, match="step 2: the reward .* failed: ConnectionError: the judge is gone"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_policy_that_always_fails(tmp_path):
    trainer = build(tmp_path)

    def refine(views, seeds=None):
        raise OSError("no model today")

    trainer.rollout.refiner.refine = refine
    with pytest.raises(TrainingError, match="step 1: the policy failed on every turn: OSError: no model today"):
        trainer.train()


def test_a_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoint-1").write_text("in the way")
    trainer = build(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingError, match=r"step 2: .*checkpoint-1 cannot be written"):
        trainer.train()


def test_checkpoints_that_are_not_whole_are_passed_over(tmp_path, caplog):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    first = tmp_path / "checkpoint-1"
    assert last_checkpoint(tmp_path) == str(first)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        data = (first / name).read_bytes()
        for rest in (None, data[: len(data) // 2], b""):
            other = tmp_path / "checkpoint-10"
            other.mkdir()
            for file in first.iterdir():
                if file.is_file() and file.name != name:
                    (other / file.name).hardlink_to(file)
            if rest is not None:
                (other / name).write_bytes(rest)
            assert last_checkpoint(tmp_path) == str(first), (name, rest and len(rest))
            assert "checkpoint-10 is not whole" in caplog.text
            caplog.clear()
            [file.unlink() for file in other.iterdir()]
            other.rmdir()
    (tmp_path / "checkpoint-2").mkdir()
    (first / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) is None


# --- against TRL ----------------------------------------------------------------------------------------------------------


def test_this_trl_is_supported():
    check_trl()
    assert list(inspect.signature(GRPOTrainer._generate).parameters) == ["self", "prompts"]


class Renamed(GRPOTrainer):
    def _generate(self, prompts, images):
        return ()


class Longer(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        a, b, c, d, e, f, g, h, i = self._generate([])
        return a, b, c, d, e, f, g, h, i


class Elsewhere(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return self.elsewhere(inputs)


@pytest.mark.parametrize("trainer", [Renamed, Longer, Elsewhere])
def test_another_trl_is_refused(trainer):
    with pytest.raises(RuntimeError, match=r"calls its trainer in another way .* install trl>=1.16,<1.17"):
        check_trl(trainer)


@pytest.mark.parametrize("maker", ["idefics3", "qwen2"])
def test_trls_own_generation_as_a_chat_model(tmp_path, maker):
    policy = refiner(models.save(getattr(models, maker), tmp_path / "model"), "rewrite" if maker == "idefics3" else "reprompt")
    trainer = build(tmp_path, policy, temperature=1.0, max_completion_length=5, **({} if maker == "idefics3" else START))
    plain = policy.chat
    policy.chat = chat = _TRLChat(trainer, plain)
    trainer.train()
    said = [row for g in trainer.kept[0] for rows in g.rows for row in rows]
    assert "sampling_per_token_logps" not in trainer.batches[0]  # TRL's plain generation records none
    conversations = [row.conversation for row in said]
    torch.manual_seed(5)
    found = chat.generate(conversations, policy.sampling)
    torch.manual_seed(5)
    ids, images, fields = trainer._tokenize_prompts([plain._messages(c) for c in conversations])
    assert [c.token_ids for c in found] == [tuple(ids) for ids in trainer._generate_single_turn(ids, images, fields, 1)[0]]
    assert [c.text for c in found] == [plain.tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in found]
    greedy = type(policy.sampling)(max_new_tokens=5)
    assert chat.generate(conversations[:2], greedy) == plain.generate(conversations[:2], greedy)
    assert chat.sees == (maker == "idefics3")


# --- misuse -----------------------------------------------------------------------------------------------------------------


def test_the_rollout_is_that_of_the_config(tmp_path):
    args, policy = config(tmp_path), refiner()
    rollout = Rollout(pipe(), policy, {}, args.specs, size=4, **args.call)
    with pytest.raises(ValueError, match="the rollout's size is 4, and the config's 2; give both the same"):
        PromptLoopGRPOTrainer(policy.chat.model, args, rollout=rollout, train_dataset=dataset())


def test_a_reference_that_cannot_be_found(tmp_path):
    policy = refiner()
    policy.chat.model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"beta is 0.1, and the model was not loaded .* train an adapter"):
        build(tmp_path, policy, beta=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit": "step"}, 'credit is \'step\'; use "trajectory" or "turn"'),
        ({"credit": "turn", "group_size": 3, "retained": 1}, 'credit is "turn", and retained is 1'),
        ({"credit": "turn", "win_rate": True}, 'credit is "turn", and win_rate is true'),
        ({"credit": "turn", "refine_at": "start", "per_device_train_batch_size": 4}, "refine_at is 'start', without a preview"),
        ({"credit": "turn", "rewards": "verifier, format"}, 'rewards has "format"'),
        (
            {"num_iterations": 2, "save_strategy": "steps", "save_steps": 3},
            "save_steps is 3, and num_iterations 2: .* multiple of 2",
        ),
        (
            {"logging_steps": 4, "save_strategy": "steps", "save_steps": 6},
            "save_steps is 6, and logging_steps 4: .* multiple of 4",
        ),
        ({"save_only_model": True, "save_strategy": "steps", "save_steps": 1}, "save_only_model is true, .*use false"),
        ({"fewest_turns": 3}, r"fewest_turns is 3; use 1 to 2 \(turns\)$"),
        ({"fewest_turns": 1, "refine_at": "50%"}, "fewest_turns is 1; .*without refine_at"),
        ({"temperature": 0.0}, "temperature is 0.0; use more than 0"),
        ({"top_k": 20}, "top_k is 20, which only vLLM knows"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, 'use "sum_then_normalize"'),
        ({"per_device_train_batch_size": 5}, "per_device_train_batch_size is 5, and a batch has 8 turns"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_one_process_with_several_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(PromptLoopConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs, .* accelerate launch"):
        config(tmp_path)


def test_evaluation_by_groups(tmp_path):
    trainer = build(tmp_path)
    trainer.evaluate(dataset(3))
    assert [len(groups) for groups in trainer.kept] == [1, 1, 1]
    assert sorted(g.sample.request for (g,) in trainer.kept) == sorted(REQUESTS[:3])


def test_what_is_logged(tmp_path):
    trainer = build(tmp_path, group_size=3, retained=1)
    trainer.train()
    log, groups = trainer.state.log_history[0], trainer.kept[0]
    refined = [t for g in groups for t in g.trajectories[:2]]
    assert log["reward/" + REWARD] == pytest.approx(sum(t.scores[REWARD] for t in refined) / 4, abs=1e-6)
    turns = [turn for t in refined for turn in t.turns]
    assert len(turns) == 8 and log["turn/tokens"] == pytest.approx(sum(turn.tokens for turn in turns) / 8)
    assert log["turn/failed"] == sum(turn.error is not None for turn in turns) / 8
    assert log["num_tokens"] == trainer.state.num_input_tokens_seen > 8 * 16
    assert log["group/deviation"] == pytest.approx(sum(deviation(g.rewards) for g in groups) / 2, abs=1e-6)
    assert not any(math.isnan(v) for v in log.values() if isinstance(v, float))
    json.dumps(trainer.state.log_history)
    assert Path(tmp_path).exists()
