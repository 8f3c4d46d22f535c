"""The shapes world without its generator: languages, what is held out, and the exact verifier."""

import json
import random
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from promptloop_pipeline import View, tiny
from promptloop_pipeline.evaluation.quality import NEAR_MISSES, near_miss, truth, verifier_rates
from promptloop_pipeline.tiny import language as words
from promptloop_pipeline.tiny import parse, plan, random_spec, requests, system_caption, user_prompt, verify
from promptloop_pipeline.tiny.older import readable_by_transformers_4
from promptloop_pipeline.tiny.refiners import OracleRefiner, RotationRefiner, SingleShotRefiner, YokedRefiner, single_shot
from promptloop_pipeline.tiny.scenes import CELLS, Object, Scene, Spec, free_cells, held_out, random_scene, render
from promptloop_pipeline.tiny.tokenizer import build_tokenizer
from promptloop_pipeline.tiny.verifier import read, sticker_amounts


def specs(n, seed=0, **kwargs):
    rng = random.Random(seed)
    return [random_spec(rng, split="any", clean=rng.random() < 0.5, **kwargs) for _ in range(n)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_a_user_says_is_read_back_exactly(split):
    rng = random.Random(1)
    for spec in specs(2000):
        assert parse(user_prompt(spec, rng, split)) == spec


def test_what_a_caption_says_is_read_back_exactly():
    for spec in specs(500):
        planned = plan(spec)
        caption = system_caption(planned)
        assert parse(caption) == Spec(planned.objects, (), planned.background)
        assert words.with_clear(caption, ()) == caption


def test_examples():
    spec = parse("a crimson ball to the left of a little navy box on black, nothing else")
    assert spec == Spec((Object("red", "circle"), Object("blue", "square", "small")), ((0, "left of", 1),), "black", clean=True)
    assert single_shot("two green boxes") == "large green square top left , large green square top right , black background"
    assert parse("red circle top left , clear row two column three").clear == ((1, 2),)


@pytest.mark.parametrize("text", ["", "a photograph of a cat", "red", "four red boxes and a green cross"])
def test_what_is_not_of_this_world(text):
    with pytest.raises(ValueError, match="cannot read .* as a request of the shapes world"):
        parse(text)


def test_impossible_requests():
    a, b = Object("red", "circle"), Object("blue", "circle")
    with pytest.raises(ValueError, match="no layout of four quadrants"):
        plan(Spec((a, b), ((0, "above", 1), (0, "below", 1))))
    with pytest.raises(ValueError, match="need more than the 3 clauses that fit"):
        system_caption(plan(Spec((a, b), clear=CELLS[:2])))


def test_training_never_sees_what_is_held_out():
    rng = random.Random(2)
    scenes = [random_scene(rng) for _ in range(3000)]
    assert not any(held_out(s.objects) for s in scenes)
    assert all(held_out(random_scene(rng, 2, "test").objects) for _ in range(300))
    tables = (words.COLOR_WORDS, words.SHAPE_WORDS, words.SIZE_WORDS, words.RELATION_WORDS)
    unseen = [w for table in tables for _, held in table.values() for w in held]
    unseen += [
        w.format("black").strip()
        for pair in (words.OPENINGS, words.JOINS, words.BACKGROUND_WORDS, words.CLEAN_WORDS)
        for w in pair[1]
    ]
    said = " ".join(user_prompt(random_spec(rng, clean=True), rng, "train") for _ in range(2000))
    said += " ".join(words.training_caption(s, rng) for s in scenes)
    assert [w for w in unseen if f" {w} " in f" {said} "] == []
    assert any(f" {w} " in " ".join(requests(300)) for w in unseen)


def test_requests_are_the_same_for_everybody():
    assert requests(5) == requests(9)[:5]
    assert len(set(requests(500))) == 500
    assert requests(5) != requests(5, split="train") != requests(5, seed=1)


def test_every_system_word_is_one_token_and_prompts_fit():
    tokenizer = build_tokenizer()
    for word in (*words.SYSTEM_WORDS, ","):
        assert len(tokenizer(word).input_ids) == 3, word
    assert len(tokenizer("crimson").input_ids) > 5
    rng = random.Random(3)
    longest = 0
    for _ in range(2000):
        longest = max(longest, len(tokenizer(words.training_caption(random_scene(rng), rng)).input_ids))
    assert longest == words.MAX_TOKENS == tokenizer.model_max_length
    two = plan(random_spec(rng, 2))
    over = system_caption(two) + " , " + " , ".join(map(words.clear_clause, CELLS[:2]))
    assert len(tokenizer(over).input_ids) > words.MAX_TOKENS  # the budget is the tokenizer's, not a promise


def test_verifier_is_right_about_rendered_scenes():
    rates = verifier_rates(400)
    assert rates["truth"] == 1.0
    assert {kind: rates[kind] for kind in NEAR_MISSES if rates[kind] > 0.01} == {}


def test_verifier_reads_users_requests():
    rng = random.Random(4)
    for spec in specs(200):
        planned = plan(spec, rng)
        image = render(Scene(planned.objects, planned.background), rng)
        verdict = verify(image, user_prompt(spec, rng, "test"))
        assert verdict.strict and verdict.score == 1.0, verdict.missing


def test_verdict_says_what_is_missing():
    scene = Scene((Object("red", "circle", "large", "top left"),), "black", ((3, 3),))
    image = render(scene, random.Random(0))
    assert verify(image, "a red circle on black").missing == ()
    verdict = verify(image, "a blue circle on white, nothing else")
    assert verdict.missing == ("blue circle", "white background", "nothing else")
    assert 0 < verdict.score < 0.5
    assert verify(image, "red circle bottom left , clear row four column four").missing == (
        "red circle at bottom left", "clear row 4 column 4",
    )  # fmt: skip
    assert verify(image, "a red circle and a green cross").missing == ("green cross",)
    assert verify(Image.new("RGB", (32, 32)), "a red circle").score < 0.6


def test_verifier_takes_any_size_and_kind_of_picture():
    scene = Scene((Object("cyan", "cross", "small", "bottom right"),), "white", ((0, 1),))
    array = render(scene, random.Random(0))
    for image in (
        array,
        Image.fromarray(array),
        Image.fromarray(array).resize((256, 256), 0),
        Image.fromarray(array).convert("RGBA"),
    ):
        assert verify(image, truth(scene)).strict
        assert read(image).stickers == ((0, 1),)


def test_noise_is_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not verify(noise, "a red circle").strict


def test_near_miss_is_one_attribute_away():
    rng = random.Random(5)
    scene = random_scene(rng, 2)
    for kind in ("color", "shape", "size", "quadrant"):
        miss = near_miss(scene, kind, rng)
        assert sum(a != b for a, b in zip(miss.objects, scene.objects)) == 1


def test_sticker_amounts_point_at_the_sticker_even_when_blurred():
    from PIL import ImageFilter

    rng = random.Random(6)
    for _ in range(100):
        scene = random_scene(rng, 2)
        if len(scene.stickers) != 1:
            continue
        image = Image.fromarray(render(scene, rng)).filter(ImageFilter.GaussianBlur(1.5))
        amounts = sticker_amounts(image, scene.background)
        assert max(free_cells(scene.objects), key=lambda c: amounts[c]) == scene.stickers[0]


def view(request, image=None, step=0, turns=()):
    return View(request, request, step, 20, None, image, turns)


def test_oracle_forbids_what_it_sees_and_only_that():
    request = "a large red circle and a small blue square on black, nothing else"
    gold = single_shot(request)
    spec = plan(parse(request))
    clean = render(Scene(spec.objects, "black"), random.Random(0))
    dirty = render(Scene(spec.objects, "black", ((3, 1),)), random.Random(0))
    (start, kept, repaired) = OracleRefiner().refine(
        [view(request), view(request, Image.fromarray(clean), 4), view(request, Image.fromarray(dirty), 4)]
    )
    assert start.prompt == gold
    assert kept.prompt is None and kept.reasoning == "all there"
    assert repaired.prompt == gold + " , clear row four column two"
    assert "nothing else" in repaired.reasoning
    (indifferent,) = OracleRefiner().refine(
        [view("a large red circle and a small blue square on black", Image.fromarray(dirty), 4)]
    )
    assert indifferent.prompt is None


def test_blind_controls_visit_every_free_cell_and_do_not_look():
    request = "a red circle and a blue square on black, nothing else"
    free = set(free_cells(plan(parse(request)).objects))
    for order in ("rows", "columns", "spread", "center", "random"):
        seen, turns = [], ()
        for step in range(8):
            (answer,) = RotationRefiner(order).refine([view(request, None, step, turns)])
            seen += parse(answer.prompt).clear
            turns += (answer,)
        assert set(seen) == free and len(seen) == 8
    (held,) = RotationRefiner(hold=3).refine([view(request, None, 5, (None,) * 4)])
    assert parse(held.prompt).clear == (free_cells(plan(parse(request)).objects)[3],)
    (first,) = SingleShotRefiner().refine([view(request)])
    assert first.prompt == single_shot(request)
    (played,) = YokedRefiner({request: [(), (2,)]}).refine([view(request, None, 5, (None,))])
    assert parse(played.prompt).clear == (free_cells(plan(parse(request)).objects)[2],)


def test_the_folders_are_readable_by_older_libraries(tmp_path):
    """What transformers 4.57 looks for is there. (With it, run by hand: the same words, and pictures that are equal to the bit.)"""
    for name in ("sd", "refiner", "warm-up"):
        copy, shipped = tmp_path / name, tiny.WEIGHTS / name
        shutil.copytree(shipped, copy)
        readable_by_transformers_4(copy)
        files = sorted(f.relative_to(shipped) for f in shipped.rglob("*") if f.is_file())
        assert files == sorted(f.relative_to(copy) for f in copy.rglob("*") if f.is_file())
        assert all((shipped / f).read_bytes() == (copy / f).read_bytes() for f in files)
        classes = [json.loads(f.read_text())["tokenizer_class"] for f in shipped.rglob("tokenizer_config.json")]
        assert classes and set(classes) <= {"CLIPTokenizer", "PreTrainedTokenizerFast"}
    sd = tiny.WEIGHTS / "sd"
    assert json.loads((sd / "tokenizer/vocab.json").read_text()) == build_tokenizer().get_vocab()
    assert all(name.startswith("text_model.") for name in load_file(sd / "text_encoder/model.safetensors"))
