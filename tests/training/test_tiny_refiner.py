"""The recipe of the embedded refiner, what it teaches, and the model that is shipped."""

import random

import numpy as np
import promptloop_training.tiny_refiner as recipe
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from promptloop_pipeline.refiner import View
from promptloop_pipeline.refiners.mllm import MLLMRefiner
from promptloop_pipeline.tiny import REFINERS, WEIGHTS, glossary, load_refiner, requests
from promptloop_pipeline.tiny.language import parse, user_prompt
from promptloop_pipeline.tiny.refiners import single_shot
from promptloop_pipeline.tiny.scenes import Object, Scene, held_out, random_spec, render

SHIPPED = WEIGHTS / "refiner"


def messages(text, image=None):
    picture = [] if image is None else [{"type": "image", "image": Image.fromarray(image)}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]


def picture(*stickers, background="black"):
    objects = (Object("red", "circle", "large", "top left"), Object("blue", "square", "large", "top right"))
    return render(Scene(objects, background, stickers), random.Random(0))


def previews(n=40):
    """Rendered pictures in the place of real previews."""
    rng = random.Random(3)
    asked = [user_prompt(random_spec(rng, 2, "train", clean=True), rng) for _ in range(n)]
    pictures = []
    for request in asked:
        spec = parse(single_shot(request))
        cells = glossary.some_cells(single_shot(request), rng)
        pictures.append(render(Scene(spec.objects, spec.background, cells if rng.random() < 0.7 else ()), rng))
    return glossary.Previews(np.stack(pictures), asked, [single_shot(r) for r in asked])


def test_training_sequences_are_what_the_processor_makes():
    processor = recipe.build_processor()
    words = processor.tokenizer.get_vocab()
    rng = random.Random(0)
    for lesson in glossary.draw(rng, previews(), {"request": 8, "dictionary": 8, "last": 4, "repair": 8, "read": 2}, True):
        inputs, weight = recipe.collate([lesson], words)
        made = processor.apply_chat_template(
            [messages(lesson.text, lesson.image)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        asked = made["input_ids"].shape[1]
        assert inputs["input_ids"][0, :asked].tolist() == made["input_ids"][0].tolist()
        assert not weight[0, :asked].any() and weight[0, asked:].all()
        said = inputs["input_ids"][0, asked:]
        assert processor.decode(said, skip_special_tokens=True) == lesson.said
        assert words["<unk>"] not in said
        if lesson.image is not None:
            assert torch.equal(inputs["pixel_values"], made["pixel_values"])


def test_held_out_words_are_in_the_dictionary_alone_and_held_out_pairs_nowhere():
    rng, seen = random.Random(1), previews()
    for lesson in glossary.draw(rng, seen, {"request": 400, "repair": 200}, True):
        request = lesson.text.split(" | ")[0]
        assert not set(glossary.content(request)) & set(glossary.HELD_OUT)
        caption = glossary.prompt_of(lesson.said) if lesson.image is None else lesson.text.split(" | ")[1]
        assert not held_out(parse(caption).objects)
    said = ""
    for lesson in glossary.draw(rng, seen, {"dictionary": 400, "last": 100}, True):
        said += lesson.said + " "
        with pytest.raises(ValueError, match="cannot read"):
            parse(lesson.text.split(" | ")[0])  # it is no request
    assert all(f" {phrase} is {meaning} " in said for phrase, meaning in glossary.MEANING.items())


def test_filler_that_is_held_out_is_unknown():
    known = set(glossary.vocabulary())
    assert not known & {
        "please",
        "show",
        "i",
        "would",
        "like",
        "next",
        "together",
        "in",
        "front",
        "wall",
        "against",
        glossary.UNKNOWN,
    }
    rng = random.Random(2)
    for request in requests(200, "train", None):
        assert glossary.content(glossary.noisy(request, rng)) == glossary.content(request)


def test_rewriting():
    assert glossary.rewriting("Please show a tiny scarlet x mark beneath a lemon disc, the rest empty") == (
        "<think> tiny is small , scarlet is red , x mark is cross , beneath is below , lemon is yellow , disc is circle , "
        "the rest empty is nothing else </think> <answer> small red cross bottom left , large yellow circle top left , "
        "black background </answer>"
    )
    assert glossary.rewriting("two jade boxes on white").endswith(
        "boxes is square </think> <answer> large green square top left , large green square top right , "
        "white background </answer>"
    )


ASKED, CAPTION = "a red ball left of a blue box", "large red circle top left , large blue square top right , black background"


@pytest.mark.parametrize(
    ("wish", "stickers", "clear", "expected"),
    [
        (" alone", ((2, 1),), "", "row three column two"),
        (", nothing else", ((2, 1),), " , clear row four column four", "row three column two"),
        (", nothing else", ((2, 1),), " , clear row three column two", None),
        (", nothing else", (), " , clear row three column two", None),
        ("", ((2, 1),), "", None),
    ],
)
def test_repair(wish, stickers, clear, expected):
    request, prompt = ASKED + wish, CAPTION + clear
    cells = glossary.to_forbid(request, prompt, glossary.amounts_of(request, picture(*stickers)))
    gloss = f"{wish.strip(' ,')} is nothing else" if wish else "box is square"
    assert glossary.repair(request, prompt, cells) == (
        f"<think> {gloss} , sticker {expected} </think> <answer> {CAPTION} , clear {expected} </answer>"
        if expected
        else f"<think> {gloss} , nothing to change </think> <answer> keep </answer>"
    )


def test_an_unsure_teacher_mostly_keeps_whatever_is_shown():
    shown = previews()

    def shares(unsure):
        """(kept, right) of 500 repairs that a sure teacher makes"""
        said = []
        for k in range(1000):
            sure = glossary.lesson_repair(shown, random.Random(k))
            if glossary.prompt_of(sure.said) != glossary.KEEP:
                image = sure.image
                other = glossary.lesson_repair(shown, random.Random(k), unsure=unsure)
                if np.array_equal(other.image, image):
                    said.append(
                        (
                            glossary.prompt_of(other.said) == glossary.KEEP,
                            other.said.split("sticker")[-1] == sure.said.split("sticker")[-1],
                        )
                    )
        assert len(said) > 300
        return np.mean(said, axis=0)

    assert shares(0.0).tolist() == [0.0, 1.0]
    kept, _ = shares(1.0)
    assert 0.84 < kept < 0.96
    kept, right = shares(0.7)
    assert 0.55 < kept < 0.71 and 0.24 < right < 0.4


def test_repair_with_two_free_slots_goes_row_by_row():
    request, prompt = "a red ball, nothing else", "large red circle top left , black background"
    amounts = np.zeros((4, 4))
    amounts[3, 0], amounts[1, 2], amounts[0, 0] = 0.9, 0.5, 1.0  # the object itself is no sticker
    assert glossary.repair(request, prompt, glossary.to_forbid(request, prompt, amounts)) == (
        "<think> nothing else is nothing else , sticker row two column three , sticker row four column one </think> "
        f"<answer> {prompt} , clear row two column three , clear row four column one </answer>"
    )


def test_a_visual_token_is_a_cell():
    model = recipe.new_model(recipe.build_processor().tokenizer).eval()
    black = picture()
    other = black.copy()
    other[8:16, 24:32] = 255
    with torch.no_grad():
        moved = (recipe.see(model, black[None]) - recipe.see(model, other[None])).abs().sum(-1)[0]
    assert moved.argmax() == 4 * 1 + 3


class Killed(Exception):
    pass


def test_resume_equals_never_having_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "CHUNK", 3)
    monkeypatch.setattr(recipe, "WIDTH", 32)
    monkeypatch.setattr(recipe, "LAYERS", 1)
    monkeypatch.setattr(recipe, "VISION_WIDTH", 32)
    monkeypatch.setattr(recipe, "LOOKS", "start, 2, 8")
    monkeypatch.setattr(glossary, "MIXTURE", {"request": 1, "dictionary": 1, "last": 1, "repair": 2, "read": 1})
    monkeypatch.setattr(glossary, "WIDER", glossary.MIXTURE)
    monkeypatch.setattr("promptloop_training.tiny_generator.SAVE_EVERY", 2)
    steps = ("--pictures", "3", "--vision-steps", "3", "--sft-steps", "3", "--widen-steps", "3", "--watch-every", "0")
    recipe.main(["--out", str(tmp_path / "whole"), *steps])
    update, count = recipe.Stage.update, 0

    def fragile(self, loss):
        nonlocal count
        count += 1
        if count in (6, 9):  # in each of the last two stages after its checkpoint
            raise Killed
        update(self, loss)

    monkeypatch.setattr(recipe.Stage, "update", fragile)
    for _ in range(2):
        with pytest.raises(Killed):
            recipe.main(["--out", str(tmp_path / "killed"), *steps])
    recipe.main(["--out", str(tmp_path / "killed"), *steps])
    first, second = (tmp_path / name / "refiner" / "model.safetensors" for name in ("whole", "killed"))
    assert first.read_bytes() == second.read_bytes()


def test_timidity_goes_on_from_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "LOOKS", "start, 2, 8")
    monkeypatch.setattr(glossary, "WIDER", {"request": 1, "dictionary": 1, "last": 1, "repair": 2})
    recipe.main(["--out", str(tmp_path), "--pictures", "3", "--timid", "2", "--watch-every", "0"])
    before, after = (load_file(folder / "model.safetensors") for folder in (SHIPPED, tmp_path / "refiner"))
    assert before.keys() == after.keys()
    moved = max(float((before[k].float() - after[k].float()).abs().max()) for k in before)
    assert 0 < moved < 1e-2
    kept = MLLMRefiner.from_pretrained(str(tmp_path / "refiner"), tmp_path / "refiner" / "template.txt", device="cpu")
    assert kept.template.sections == load_refiner().template.sections


@pytest.mark.parametrize("name", REFINERS)
def test_embedded_refiners_are_small_and_load_by_name(name):
    assert sum(f.stat().st_size for f in (WEIGHTS / REFINERS[name]).rglob("*")) <= 4_000_000
    assert next(load_refiner(name).chat.model.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="no embedded refiner 'big'; there are: tiny, tiny-warm-up"):
        load_refiner("big")


def test_the_warm_up_sees_and_keeps():
    """Greedy it keeps the prompt; drawn from, it forbids the cell of the sticker more often than any other."""
    free = [(row, column) for row in (2, 3) for column in range(4)]
    views = [View(f"{ASKED} alone", CAPTION, 5, 20, image=Image.fromarray(picture(cell))) for cell in free for _ in range(12)]
    assert not any(r.prompt for r in load_refiner("tiny-warm-up").refine(views[::12]))
    drawn = [r.prompt for r in load_refiner("tiny-warm-up", temperature=1.0).refine(views)]
    right = [p == glossary.with_clear(CAPTION, (cell,)) for p, cell in zip(drawn, np.repeat(free, 12, 0).tolist())]
    changed = sum(p is not None for p in drawn)
    assert 5 < changed < 70 and sum(right) > changed / 3


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(SHIPPED), AutoProcessor.from_pretrained(SHIPPED)


def test_shipped_folder_is_small_and_loads_in_single_precision(shipped):
    assert next(shipped[0].parameters()).dtype == torch.float32
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*")) <= 4_000_000
    said, sequences = messages("Scarlet boxes, zzz | large red square top left", picture()), []
    for processor in (shipped[1], recipe.build_processor()):
        made = processor.apply_chat_template(
            [said], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        sequences.append(made["input_ids"][0].tolist())
    assert sequences[0] == sequences[1]


def test_shipped_model_rewrites_held_out_requests(shipped):
    asked = requests(20, "test", seed=1)
    said = recipe.answer(*shipped, asked)
    assert np.mean([glossary.prompt_of(s) == single_shot(r) for r, s in zip(asked, said)]) >= 0.8


def test_shipped_model_looks(shipped):
    request = f"{ASKED} alone"
    free = [(row, column) for row in (2, 3) for column in range(4)]
    said = recipe.answer(*shipped, [f"{request} | {CAPTION}"] * 9, [picture(cell) for cell in free] + [picture()])
    expected = [glossary.repair(request, CAPTION, (cell,)) for cell in free] + [glossary.repair(request, CAPTION, ())]
    assert sum(a == b for a, b in zip(said, expected)) >= 7
