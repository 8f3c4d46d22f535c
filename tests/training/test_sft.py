import copy
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import promptloop_training.sft as sft
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from promptloop_training.batches import Collator, conversation_of, to_dataset, trainable
from promptloop_training.examples import Example, Selection, answer_of, gather, write_answer
from promptloop_training.record import read_log
from promptloop_training.sft import SFTLoopConfig, WordedOracle, teach, train
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import TrainerState
from trl import ModelConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from promptloop_pipeline import attach, tiny
from promptloop_pipeline.chat.local import TransformersChat
from promptloop_pipeline.chat.text import ANSWER, THINK
from promptloop_pipeline.evaluation.scoring import score_arm
from promptloop_pipeline.refiner import View
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.refiners.parsing import parse_answer
from promptloop_pipeline.refiners.template import load_template, parse_template
from promptloop_pipeline.rewards.combine import load_reward, parse_rewards
from promptloop_pipeline.tiny.verifier import verify
from promptloop_pipeline.trajectory import Trajectory, Turn, load, save

from ..chat import models

RECIPES = Path(sft.__file__).parent / "recipes"
REPAIR, REWRITE = load_template("repair"), load_template("rewrite")
TEXT = parse_template("Source: here\nanswer: text\n[user without image]\n{prompt}", "text", "here")
CONTINUE = load_template("promptist")


def picture(shade: int, edge: int = 32) -> Image.Image:
    rng = random.Random(shade)
    return Image.frombytes("RGB", (edge, edge), bytes(rng.randrange(256) for _ in range(3 * edge * edge)))


def turn(after="b", before="a", step=2, **more) -> Turn:
    return Turn(step, 10, before, after, **{"reasoning": "why", "image": picture(0)} | more)


# --- answers ------------------------------------------------------------------------------------------------------------

ANYTHING = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "KEEP", "prompt:", '"', "```", "a cat", "\n", "."]))
    .map(" ".join),
)  # fmt: skip
PLAIN = st.lists(st.text("abcdefghi0123'-", min_size=1).map(lambda w: f"x{w}x"), min_size=1, max_size=12).map(", ".join)


@settings(max_examples=2000, deadline=None)
@given(prompt=st.none() | ANYTHING, reasoning=ANYTHING, template=st.sampled_from([REPAIR, REWRITE, TEXT]))
def test_what_was_written_is_what_is_read(prompt, reasoning, template):
    written = write_answer(prompt, reasoning, template)
    if written is not None:
        said = parse_answer(written, template.tags)
        assert said.prompt == (None if prompt is None else " ".join(prompt.split()))
        assert said.format_ok and said.error is None
        assert not THINK.search(said.reasoning) and not ANSWER.search(said.reasoning)


@settings(max_examples=1000, deadline=None)
@given(prompt=st.none() | PLAIN, reasoning=PLAIN | st.just(""), template=st.sampled_from([REPAIR, REWRITE, TEXT]))
def test_plain_prompts_can_all_be_written(prompt, reasoning, template):
    said = parse_answer(write_answer(prompt, reasoning, template), template.tags)
    assert (said.prompt, said.reasoning) == (prompt, reasoning if template is REPAIR else "")


RAW = "<think> hm </think> <answer>b</answer>"
SAID = "<think>why</think>\n<answer>b</answer>"


@pytest.mark.parametrize(
    "of, expected",
    [
        (turn(raw=RAW), RAW),
        (turn(), SAID),
        (turn("a"), "<think>why</think>\n<answer>KEEP</answer>"),
        (turn(raw="hm </think> <answer>b</answer>"), "<think>hm </think> <answer>b</answer>"),  # a chat template had opened it
        (turn(raw="b"), SAID),  # not in tags
        (turn(raw="<answer>b, and much that was cut</answer>", notes=("cut",)), SAID),  # what was done counts
        (turn("a", raw="<answer>KEEP</answer>"), "<answer>KEEP</answer>"),
        (turn("a", raw="<answer>a</answer>"), "<answer>a</answer>"),
        (turn("a", raw="<answer>c</answer>", notes=("not taken",)), None),
        (turn("a", notes=("not asked: the run was cut short",)), None),
        (turn("a", raw=RAW, error="it failed"), None),
        (turn(step=10), None),
        (turn(step=10, applied=0), SAID),
        (turn('"b"'), None),  # quotes around it all are no part of a prompt
    ],
)
def test_answers(of, expected):
    answer, why = answer_of(of, REPAIR)
    assert answer == expected and bool(why) == (expected is None)


def test_a_text_template_gets_the_bare_prompt():
    assert answer_of(turn(raw=RAW), TEXT) == ("b", "")


# --- examples -----------------------------------------------------------------------------------------------------------


def trajectory(request: str, k: int, score: float | None = None, seed: int = 0, turns=None) -> Trajectory:
    turns = (
        [turn(f"{request} {k}", request, image=picture(k)), turn(request, request, 5, image=picture(k + 1000))]
        if turns is None
        else turns
    )
    return Trajectory(request, turns, scores={} if score is None else {"verifier": score}, meta={"seed": seed}, id=f"t{k}")


def counts(tally) -> Counter:
    return sum(tally.values(), Counter())


def chosen(folders, **select) -> tuple[list[str], Counter]:
    specs = parse_rewards("verifier, length:0")
    examples, tally = gather(folders, REPAIR, Selection(specs, **select))
    turns = sum(len(t.turns) for folder in folders for t in load(folder))
    assert sum(counts(tally).values()) == turns  # each turn is accounted for, once
    assert counts(tally)["examples"] == len(examples)
    return [e.answer.partition("<answer>")[2].removesuffix("</answer>") for e in examples if not e.kept], counts(tally)


def test_only_what_is_good_enough(tmp_path):
    arm = tmp_path / "loop"
    save([trajectory("x", 0, 0.2), trajectory("x", 1, 0.9, 1), trajectory("y", 2, 0.6, 2), trajectory("z", 3, None, 3)], arm)
    assert chosen([arm])[0] == ["x 0", "x 1", "y 2", "z 3"]
    assert chosen([arm], min_score=0.6) == (["x 1", "y 2"], {"examples": 4, "no score": 2, "score below min_score": 2})
    assert chosen([arm], best_of_request=1)[0] == ["x 1", "y 2"]
    row = {"id": "t3", "reward": "verifier", "score": 0.8, "details": {}}
    (arm / "scores.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "t1", "score": 0.1}) + "\n")
    assert chosen([arm], min_score=0.6)[0] == ["y 2", "z 3"]  # what lies beside counts


def test_only_what_is_better_than_the_untouched(tmp_path):
    arm = tmp_path / "loop"
    save([trajectory("x", 0, 0.5), trajectory("y", 1, 0.5, 1), trajectory("y", 2, 0.9, 2)], arm)
    untouched = [trajectory("x", 0, 0.1, turns=[]), trajectory("y", 1, 0.4, 1, turns=[]), trajectory("x", 2, 0.0, 2, turns=[])]
    assert chosen([arm], min_gain=0.2)[1]["nothing untouched to compare with"] == 6
    save(untouched, tmp_path / "raw")
    expected = ["x 0"], {"examples": 2, "gain below min_gain": 2, "nothing untouched to compare with": 2}
    assert chosen([arm], min_gain=0.2) == expected
    assert chosen([arm / "trajectories.jsonl"], min_gain=0.2) == expected
    assert chosen([arm, tmp_path / "raw"], min_gain=0.2) == expected


def test_each_once_and_not_too_many_that_keep(tmp_path):
    turns = (
        [turn("a", image=picture(k)) for k in range(20)]
        + [turn(f"b {k}") for k in range(4)]
        + [turn("b 1"), turn("a", error="e")]
    )
    save([Trajectory("a", turns)], tmp_path)
    for share, kept in ((1, 20), (0.5, 4), (0.2, 1), (0, 0)):
        examples, tally = gather([tmp_path], REPAIR, Selection(keep_share=share))
        assert sum(e.kept for e in examples) == kept and sum(not e.kept for e in examples) == 4
        assert counts(tally) == Counter({
            "examples": 4 + kept, "there already": 1, "failed": 1, "more than keep_share allows": 20 - kept,
        })  # fmt: skip
    some = [{e.key() for e in gather([tmp_path], REPAIR, Selection(keep_share=0.5, seed=seed))[0]} for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


def test_turns_that_the_template_does_not_ask_about(tmp_path):
    save([Trajectory("a", [turn(step=0, image=None), turn()])], tmp_path)
    examples, tally = gather([tmp_path], REPAIR)
    assert len(examples) == 1 and counts(tally)["the template 'repair' asks nothing there"] == 1
    assert [len(e.pictures) for e in gather([tmp_path], REWRITE)[0]] == [0, 1]


class Recorder(TransformersChat):
    def generate(self, conversations, sampling):
        said = super().generate(conversations, sampling)
        self.heard += [(c, s.text) for c, s in zip(conversations, said)]
        return said


def flat(conversation):
    """With pictures as plain data."""
    return json.loads(json.dumps(conversation, default=lambda p: [p.size, p.tobytes().hex()]))


def test_examples_are_what_was_asked_in_use(tmp_path):
    used = tiny.load_refiner()
    used.chat = Recorder(used.chat.model, used.chat.processor)
    used.chat.heard = []
    out = attach(tiny.load_pipeline())(
        tiny.requests(2, "train"), refiner=used, refine_at="start, 3, 5", num_inference_steps=8, guidance_scale=3.0
    )
    save(out.trajectories, tmp_path)
    examples, _ = gather([tmp_path], used.template)
    assert {json.dumps([flat(c), s.strip()]) for c, s in used.chat.heard} == {
        json.dumps([flat(e.asked), e.answer]) for e in examples
    }
    rows = to_dataset(examples)
    assert [flat(conversation_of(row)) for row in rows] == [flat(e.asked) for e in examples]


# --- batches ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    made = {}

    def get(name: str) -> TransformersChat:
        if name not in made:
            folder = models.save(getattr(models, name), tmp_path_factory.mktemp(name))
            made[name] = TransformersChat.from_pretrained(folder, device="cpu")
        return made[name]

    return get


def lessons(template, n: int = 4, pictures: bool = True) -> list[Example]:
    found = []
    for k in range(n):
        shown = picture(k) if pictures and k % 2 else None
        view = View("x" * (k + 1), "y" * k, 2 * k, 10, image=shown)
        asked = template.conversation(view, shown, None)
        found.append(Example(asked, f"<answer>{'abcdefgh'[k] * (5 - k % 3)}</answer>", view.request, False, "here"))
    return found


@pytest.mark.parametrize("name", ["idefics3", "llava"])
@pytest.mark.parametrize("seen", [True, False])
def test_labels_are_those_of_trl_without_what_follows_the_end(chats, name, seen):
    """TRL's own collator renders the whole conversation and cuts the prompt off, which is another way than ours."""
    chat = chats(name)
    rows = list(to_dataset([e for e in lessons(REWRITE) if bool(e.pictures) is seen]))
    ours = Collator(chat)(rows)
    processor = copy.deepcopy(chat.processor)
    theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)(
        [copy.deepcopy(row) | {"images": row.get("images") or []} for row in rows]
    )
    newline = chat.tokenizer("\n")["input_ids"]
    for k in range(len(rows)):
        mask, mine = theirs["attention_mask"][k].bool(), ours["attention_mask"][k].bool()
        ids, labels = theirs["input_ids"][k][mask].tolist(), theirs["labels"][k][mask].tolist()
        assert ids[-1:] == newline  # after the end, where nobody generates
        assert ours["input_ids"][k][mine].tolist() == ids[:-1]
        assert ours["labels"][k][mine].tolist() == labels[:-1]
        assert (ours["labels"][k][~mine] == -100).all()
    assert ("pixel_values" in ours) is seen
    if seen:
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("name, template", [("qwen2", "plain"), ("gpt2", "promptist")])
def test_labels_of_texts(chats, name, template):
    chat = chats(name)
    examples = lessons(load_template(template), pictures=False)
    batch = Collator(chat)(list(to_dataset(examples)))
    for e, ids, labels in zip(examples, batch["input_ids"], batch["labels"]):
        end, said = chat.tokenizer.eos_token, e.answer if name == "qwen2" else f" {e.answer}"
        asked = (
            e.asked
            if name == "gpt2"
            else f"<|im_start|>user\n{e.asked[0]['content'][0]['text']}<|im_end|>\n<|im_start|>assistant\n"
        )
        there = labels != -100
        assert chat.tokenizer.decode(labels[there]) == said + end
        assert chat.tokenizer.decode(ids).startswith(asked + said + end)
        assert there.sum() == len(said) + 1  # bytes


@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen2", "gpt2"])
def test_a_batch_equals_its_singles(chats, name):
    """Rows with pictures and without, short and long."""
    chat = chats(name)
    examples = lessons({"qwen2": load_template("plain"), "gpt2": CONTINUE}.get(name, REWRITE), pictures=chat.sees)
    rows, collator = list(to_dataset(examples)), Collator(chat)
    whole = logprobs(chat.model, collator(rows))
    singles = [logprobs(chat.model, collator([row]))[0] for row in rows]
    assert all(len(s) > 3 for s in singles)
    for a, b in zip(whole, singles, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@torch.no_grad()
def logprobs(model, batch) -> list[torch.Tensor]:
    labels = batch.pop("labels")[:, 1:]
    logp = model(**batch).logits[:, :-1].log_softmax(-1)
    return [row.gather(-1, of.clamp(min=0)[:, None])[of != -100, 0] for row, of in zip(logp, labels)]


def test_a_think_that_the_chat_template_opens_is_not_opened_twice(chats):
    chat = copy.copy(chats("qwen2"))
    chat.processor = chat.tokenizer = copy.deepcopy(chat.tokenizer)
    row = to_dataset([replace(lessons(load_template("plain"), 1, False)[0], answer=SAID)])[0]
    said = []
    for opening in ("assistant\n", "assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n"):
        chat.processor.chat_template = models.TEMPLATE.replace("<|im_start|>assistant\n", f"<|im_start|>{opening}")
        batch = Collator(chat)([row])
        said.append(chat.tokenizer.decode(batch["input_ids"][0]).partition("assistant\n")[2])
    assert said == [f"{SAID}<|im_end|>", f"<think>\n{SAID[7:]}<|im_end|>", f"<think>\n\n</think>\n\n{SAID}<|im_end|>"]


def test_what_the_model_cannot_say_or_hold_is_left_out(chats):
    collator = Collator(tiny.load_refiner().chat)
    known, unknown = (
        Example(lessons(REWRITE)[0].asked, f"<answer> {w} </answer>", "x", False, "here") for w in ("red circle", "dog")
    )
    tally = {"here": Counter({"examples": 2})}
    assert trainable([known, unknown], collator, tally) == [known]
    assert tally["here"] == Counter({"examples": 1, "words that the model has no token for": 1})
    examples, collator, tally = lessons(REWRITE), Collator(chats("idefics3")), {"here": Counter({"examples": 4})}
    lengths = [collator(list(to_dataset([e])))["input_ids"].shape[1] for e in examples]
    assert trainable(examples, collator, tally, sorted(lengths)[1]) == [
        e for e, n in zip(examples, lengths) if n <= sorted(lengths)[1]
    ]
    assert tally["here"]["longer than max_length"] == 2


# --- training -----------------------------------------------------------------------------------------------------------


def config(out: Path, **more) -> SFTLoopConfig:
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
    quick = {"logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    return SFTLoopConfig(output_dir=str(out), **plain | quick | more)


@pytest.fixture
def taught(tmp_path) -> Path:
    """Eight turns, four of them with a picture; what is right depends on the request, and on the picture where there is one."""
    turns = [
        turn("nopqrstu"[k], "a", k % 2 * 3, image=picture(k) if k % 2 else None, raw=f"<answer>{'nopqrstu'[k]}</answer>")
        for k in range(8)
    ]
    return save([Trajectory("cd"[k // 4] * (k // 2 % 2 + 1), [turns[k]]) for k in range(8)], tmp_path / "taught").parent


@pytest.mark.parametrize("name, lora", [("idefics3", False), ("llava", True), ("qwen2", False)])
def test_eight_answers_are_learnt_and_said(tmp_path, taught, chats, name, lora):
    folder, template = chats(name).model.config._name_or_path, tmp_path / "short.txt"
    template.write_text("Source: here\n[user]\n{image}{request}\n[user without image]\n{request}\n")
    if name == "qwen2":
        template.write_text("Source: here\n[user without image]\n{request} {step}\n")
    options = {"use_peft": True, "lora_target_modules": ["all-linear"], "lora_r": 32, "lora_dropout": 0.0} if lora else {}
    made = config(
        tmp_path / "out", refiner=folder, template=str(template), trajectories=[str(taught)], learning_rate=1e-2,
        max_steps=200 if lora else 100,
    )  # fmt: skip
    out = train(made, ModelConfig(**options))
    refiner = MLLMRefiner.from_pretrained(out, template, device="cpu", max_new_tokens=30)
    views, want = [], []
    for t in load(taught):
        (of,) = t.turns
        views.append(View(t.request, of.before, of.step, of.num_steps, image=of.image))
        want.append(of.raw)
    assert [a.raw for a in refiner.refine(views)] == want
    log = [row for row in read_log(out.parent) if "loss" in row]
    assert log[-1]["mean_token_accuracy"] == 1
    assert log[-1]["loss"] < (0.9 if lora else 0.02) * log[0]["loss"]  # a random head that stays as it is cannot be sure


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path, taught, chats, monkeypatch):
    """With what is random in training: the order of the rows, and dropout."""

    class Stops(sft.Finite):
        at = 0

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    def run(name: str):
        out = train(config(tmp_path / name, **of), ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.2))
        timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
        rows = [{k: v for k, v in row.items() if k not in timed} for row in read_log(out.parent)]
        return rows, load_file(out / "adapter_model.safetensors")

    of = {
        "refiner": chats("idefics3").model.config._name_or_path,
        "trajectories": [str(taught)],
        "max_steps": 7,
        "save_steps": 2,
    }
    of |= {"save_strategy": "steps", "per_device_train_batch_size": 3, "learning_rate": 1e-2, "lr_scheduler_type": "cosine"}
    log, weights = run("whole")
    assert any(weights[k].abs().max() > 0 for k in weights if "lora_B" in k)
    for stop, whole in ((1, []), (5, [2, 4])):
        with monkeypatch.context() as m:
            m.setattr(sft, "Finite", Stops)
            m.setattr(Stops, "at", stop)
            with pytest.raises(KeyboardInterrupt):
                run(f"out {stop}")
        assert sorted(p.name for p in (tmp_path / f"out {stop}").glob("checkpoint-*")) == [f"checkpoint-{k}" for k in whole]
        again, resumed = run(f"out {stop}")
        assert resumed.keys() == weights.keys() and all(torch.equal(resumed[k], weights[k]) for k in weights)
        assert again == log


def test_some_requests_are_held_out(tmp_path, taught, chats):
    of = {"refiner": chats("idefics3").model.config._name_or_path, "trajectories": [str(taught)], "max_steps": 1}
    out = train(config(tmp_path / "out", eval_share=0.25, eval_strategy="steps", eval_steps=1, **of), ModelConfig())
    assert [row["eval_loss"] > 0 for row in read_log(out.parent) if "eval_loss" in row] == [True]
    report = json.loads((out.parent / "examples.json").read_text())
    assert (report["learnt"], report["held_out"], report["folders"]) == (
        6,
        2,
        {str(taught): {"examples": 8}},
    )  # one of four requests


def test_a_gradient_that_is_no_number_stops_before_the_weights_take_it():
    layer = Linear(2, 1)
    layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    state, args = TrainerState(global_step=4), SFTLoopConfig.__new__(SFTLoopConfig)
    args.output_dir = "nowhere"
    sft.Finite().on_pre_optimizer_step(args, state, None, model=layer)
    layer.weight.grad[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="the gradient of step 5 is not finite"):
        sft.Finite().on_pre_optimizer_step(args, state, None, model=layer)


def test_other_examples_do_not_go_on_with_a_run(tmp_path, taught, chats):
    of = {"refiner": chats("idefics3").model.config._name_or_path, "trajectories": [str(taught)], "max_steps": 1}
    train(config(tmp_path / "out", save_strategy="steps", save_steps=1, **of), ModelConfig())
    with pytest.raises(ValueError, match="holds a run with other config: keep_share"):
        train(config(tmp_path / "out", save_strategy="steps", save_steps=1, keep_share=0.1, **of), ModelConfig())
    save([Trajectory("more", [turn()])], taught)
    with pytest.raises(ValueError, match="a run on other examples, which cannot go on with these"):
        train(config(tmp_path / "out", save_strategy="steps", save_steps=1, **of), ModelConfig())


# --- a teacher ----------------------------------------------------------------------------------------------------------

CALL = {"num_inference_steps": 8, "guidance_scale": 3.0}


def test_lessons_are_taken_up_where_they_stopped(tmp_path):
    asked = tiny.requests(4, "train", objects=None)
    pipe, bar = tiny.load_pipeline(), []
    given = dict(refine_at="start, 2, 4", seed=5, batch=2, untouched=True, **CALL)
    folder = teach(pipe, WordedOracle(), asked, tmp_path / "whole", **given)
    whole = load(folder)
    assert [(t.request, t.meta["seed"]) for t in whole] == list(zip(asked, range(5, 9)))
    assert all(t.turns[0].after == tiny.single_shot(t.request) for t in whole)
    untouched = load(folder.parent / "raw")
    assert [t.request for t in untouched] == asked and not any(t.turns for t in untouched)

    def dies(n):
        bar.append(n)
        if len(bar) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(pipe, WordedOracle(), asked, tmp_path / "again", **given, progress=dies)
    again = load(teach(pipe, WordedOracle(), asked, tmp_path / "again", **given))
    assert [[t.after for t in one.turns] for one in again] == [[t.after for t in one.turns] for one in whole]
    for arm in ("teacher", "raw"):
        score_arm(folder.parent / arm, "verifier", load_reward("verifier"), {}, batch=4)
    specs = parse_rewards("verifier")
    for min_gain in (-2.0, 0.3):
        gained = [verify(t.image, t.request).score - verify(u.image, u.request).score for t, u in zip(whole, untouched)]
        tally = gather([folder], tiny.load_refiner().template, Selection(specs, min_gain=min_gain))[1]
        assert counts(tally)["gain below min_gain"] == 3 * sum(g < min_gain for g in gained)


def test_the_worded_oracle_does_what_the_oracle_does():
    """In the words of the embedded refiner: each is a token of its own."""
    asked, oracle = tiny.requests(6, "train", objects=None), tiny.OracleRefiner()
    found = attach(tiny.load_pipeline())(
        asked, refiner=WordedOracle(), refine_at="start, 3, 5, 7", **CALL | {"num_inference_steps": 20}
    )
    spoken = Collator(tiny.load_refiner().chat).spoken
    repaired = 0
    for t in found.trajectories:
        for k, of in enumerate(t.turns):
            assert not t.failures and answer_of(of, REPAIR) == (of.raw, "")
            assert tiny.load_refiner().chat.tokenizer.unk_token_id not in spoken(of.raw)
            view = View(t.request, of.before, of.step, 20, image=of.image, turns=tuple(t.turns[:k]))
            repaired += "sticker" in of.raw
            if "sticker" in of.raw or of.image is None:
                told = oracle.refine([view])[0].prompt
                assert sorted(of.after.split(" , ")) == sorted(told.split(" , "))
    assert repaired


def test_one_command_teaches_and_trains_the_embedded_refiner(tmp_path):
    recipe = yaml.safe_load((RECIPES / "tiny_sft.yaml").read_text())
    small = {
        "teach_prompts": 6,
        "max_steps": 2,
        "output_dir": str(tmp_path / "out"),
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    made = SFTLoopConfig(**recipe | small | {"num_train_epochs": 1})
    out = train(made, ModelConfig())
    assert (out / "template.txt").read_text() == (Path(tiny.__file__).parent / "refiner.txt").read_text()
    refiner = MLLMRefiner.from_pretrained(out, out / "template.txt", device="cpu", max_new_tokens=96)
    request = tiny.requests(1, "train")[0]
    assert refiner.refine([View(request, request, 0, 20)])[0].prompt == tiny.single_shot(request)
    again = SFTLoopConfig(**recipe | small | {"num_train_epochs": 1, "teach_prompts": 7})
    (tmp_path / "out" / "log.jsonl").unlink()  # it never made a step
    with pytest.raises(ValueError, match="lessons of other settings; delete them, .*requests is"):
        train(again, ModelConfig())


def test_it_learns_from_its_own_best(tmp_path, chats):
    """Rejection sampling: two pictures of each request, what the policy says drawn at random; the better one teaches."""
    made = config(
        tmp_path / "out", refiner="tiny", teacher="tiny", teacher_temperature=2.0, teach_prompts=3, teach_per_prompt=2, keep_share=1,
        teach_at="start, 4", rewards="verifier", best_of_request=1, max_steps=1, num_inference_steps=8,
    )  # fmt: skip
    out = train(made, ModelConfig()).parent
    pairs = load(out / "lessons" / "teacher")
    assert [a.request == b.request for a, b in zip(pairs[::2], pairs[1::2])] == [True] * 3
    assert any(a.turns[0].raw != b.turns[0].raw for a, b in zip(pairs[::2], pairs[1::2]))
    worse = [min(pair, key=lambda t: verify(t.image, t.request).score) for pair in zip(pairs[::2], pairs[1::2])]
    tally = json.loads((out / "examples.json").read_text())["folders"][str(out / "lessons" / "teacher")]
    assert tally["not among the best of its request"] == sum(len(t.turns) for t in worse) == 6


def test_recipes_are_read():
    assert {f.name for f in RECIPES.glob("*sft*.yaml")} >= {"tiny_sft.yaml", "sft_vlm.yaml"}
    for file in RECIPES.glob("*sft*.yaml"):
        keys = yaml.safe_load(file.read_text())
        lora = {k: keys.pop(k) for k in list(keys) if k in ModelConfig.__dataclass_fields__}
        ModelConfig(**lora)
        here = {"refiner": "tiny", "pipeline": "tiny", "teach_data": "shapes:train", "use_cpu": True, "bf16": False}
        assert SFTLoopConfig(**keys | here).teacher


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, says",
    [
        ({}, "nothing to learn from: name folders of `trajectories`, or a `teacher`"),
        ({"trajectories": ["nowhere"]}, "no trajectories at nowhere: expected a folder with trajectories.jsonl"),
        ({"trajectories": ["."]}, "it has loop: name one of them, such as loop"),
        ({"trajectories": ["loop"], "min_score": 0.5}, "go by `rewards`: name one with a weight"),
        ({"trajectories": ["loop"], "min_gain": 0.5, "rewards": "verifier:0"}, "go by `rewards`: name one with a weight"),
        ({"trajectories": ["loop"], "rewards": "verifer"}, "unknown reward 'verifer'"),
        ({"trajectories": ["loop"], "keep_share": 1.5}, "keep_share is 1.5; use 0 to 1"),
        ({"trajectories": ["loop"], "best_of_request": 0}, "best_of_request is 0; use 1 or more"),
        ({"trajectories": ["loop"], "template": "repare"}, "there is no template 'repare'; use one of editing"),
        ({"trajectories": ["loop"], "template": "editing"}, "shows the picture that a run starts from"),
        ({"trajectories": ["loop"], "refiner": "./nowhere"}, "there is no refiner at ./nowhere"),
        ({"trajectories": ["loop"], "packing": True}, "packing is True, which has no place here"),
        ({"trajectories": ["loop"], "eval_strategy": "epoch"}, "eval_strategy is 'epoch', and eval_share is 0"),
        ({"teacher": "oracle", "teach_at": "sometimes"}, "sometimes"),
        ({"teacher": "oracle", "teach_data": "nothing.txt"}, "there is no file of prompts at nothing.txt"),
        ({"teacher": "oracle", "pipeline": "./nowhere"}, "no pipeline at ./nowhere"),
        ({"teacher": "oracel"}, "unknown refiner 'oracel'"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    save([trajectory("x", 0, 0.5)], "loop")
    monkeypatch.setattr(sft, "load_policy", None)
    monkeypatch.setattr(sft, "load_model", None)
    with pytest.raises((ValueError, OSError)) as e:
        train(config(tmp_path / "out", **given), ModelConfig())
    assert says in str(e.value)


def test_no_examples_left_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_policy", None)
    save([trajectory("x", 0, 0.5), Trajectory("y", [turn(error="e")], scores={"verifier": 1.0}, id="y")], tmp_path / "loop")
    made = config(tmp_path / "out", trajectories=[str(tmp_path / "loop")], rewards="verifier", min_score=0.9)
    with pytest.raises(
        ValueError, match=r"no examples are left .*\n.*/loop: 0 examples; left out: 2 score below min_score, 1 failed"
    ):
        train(made, ModelConfig())
