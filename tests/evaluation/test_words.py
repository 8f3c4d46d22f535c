from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptloop_pipeline.evaluation.words import content_words, lexical_recall, prompt_self_similarity, words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cubes", "cube"), ("boxes", "box"), ("houses", "house"), ("glasses", "glass"), ("buses", "bus"), ("lenses", "lens"),
        ("ponies", "pony"), ("skies", "sky"), ("pies", "pie"), ("movies", "movie"), ("shoes", "shoe"), ("heroes", "hero"),
        ("prizes", "prize"), ("axes", "axe"), ("women", "woman"), ("children", "child"), ("wolves", "wolf"), ("leaves", "leaf"),
        ("cat's", "cat"), ("cats'", "cat"), ("cat\u2019s", "cats"), ("two", "2"), ("Twenty", "20"), ("\uff12", "two"),
        ("\u0663", "three"), ("007", "seven"),
        ("00", "zero"), ("GREY", "gray"), ("colours", "color"), ("don't", "not"), ("cafe\u0301", "caf\u00e9"),
        ("(red:1.3)", "red"), ("high-resolution", "high resolution"), ("Stra\u00dfe", "STRASSE"), ("so\u00adfa", "sofa"),
    ],
)  # fmt: skip
def test_forms_that_are_the_same_word(one: str, other: str) -> None:
    assert words(one) == words(other) != []


@pytest.mark.parametrize(
    ("one", "other"),
    [("cube", "cub"), ("plane", "plan"), ("glass", "glas"), ("cat", "car"), ("left", "right"), ("2", "20"), ("bus", "bu")],
)
def test_forms_that_are_not(one: str, other: str) -> None:
    assert words(one) != words(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, and a dog!", ["cat", "dog"]),
        ("no text; without people", ["no", "text", "without", "person"]),
        ("left of it", ["left"]),
        ("\u4e00\u53ea\u7ea2\u732b\u3002", ["\u4e00", "\u53ea", "\u7ea2", "\u732b"]),
        ("\u7ea2\u8272\u7684car", ["\u7ea2", "\u8272", "car"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u0936\u092c\u094d\u0926",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0936\u092c\u094d\u0926"],
        ),  # vowel signs are marks, not letters
        ("\u0645\u0643\u0639\u0628 \u0623\u062d\u0645\u0631", ["\u0645\u0643\u0639\u0628", "\u0623\u062d\u0645\u0631"]),
        ("\ud800 \x00 -- ()", []),
    ],
)
def test_content_words(text: str, expected: list[str]) -> None:
    assert [w for w in content_words(text) if w.isprintable() or w.strip()] == expected


@pytest.mark.parametrize(
    ("request_", "prompt", "expected"),
    [
        ("two red cubes", "2 red cube, cinematic", 1.0),
        ("two red cubes", "two blue balls", 1 / 3),
        ("a red cube and a red ball", "a red cube beside a ball", 3 / 4),  # red is asked for twice
        ("a red cube", "red red red cube", 1.0),
        ("a cat on a dog", "a dog on a cat", 1.0),
        ("a cat", "", 0.0),
        ("cats", "CAT'S", 1.0),
        ("\u4e00\u53ea\u7ea2\u732b", "\u4e00\u53ea\u84dd\u732b", 3 / 4),
        ("the of", "anything", None),
        ("", "anything", None),
        ("?!", "?!", None),
    ],
)
def test_lexical_recall(request_: str, prompt: str, expected: float | None) -> None:
    assert lexical_recall(request_, prompt) == (None if expected is None else pytest.approx(expected))


some_text = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["red", "Red", "cubes", "cube's", "two", "2", "\u4e0d", "\u7ea2", "the", "of", "no", ",", "(", "x:1.2)", "\u0301", "'s"]
    )
).map(" ".join)


@given(some_text, some_text)
@settings(max_examples=300, deadline=None)
def test_recall_is_a_share(request_: str, prompt: str) -> None:
    recall = lexical_recall(request_, prompt)
    if recall is None:
        assert not content_words(request_)
        return
    assert 0 <= recall <= 1 and lexical_recall(request_, request_) == 1 and lexical_recall(request_, "") == 0
    assert lexical_recall(request_, f"{prompt} {request_}") == 1, "what is added costs nothing"
    assert lexical_recall(request_.upper(), request_.lower()) == pytest.approx(1) or not request_.isascii()


@given(st.lists(st.sampled_from(["red", "two", "cubes", "the", "\u732b", "no", "2"]), min_size=1), st.randoms())
@settings(deadline=None)
def test_order_does_not_matter(parts: list[str], rng: random.Random) -> None:
    mixed = rng.sample(parts, len(parts))
    assert lexical_recall(" ".join(parts), "two red cubes") == lexical_recall(" ".join(mixed), "cubes red two")


def test_self_similarity() -> None:
    assert prompt_self_similarity(["red ball", "red ball"]) == {"mean": 1.0, "n": 1}
    assert prompt_self_similarity(["red ball", "blue cube"]) == {"mean": 0.0, "n": 1}
    assert prompt_self_similarity(["red ball", "red cube"]) == {"mean": 1 / 5, "n": 1}  # red of: red, ball, cube, and two pairs
    assert prompt_self_similarity(["red ball", "ball red"]) == {"mean": 2 / 4, "n": 1}
    assert prompt_self_similarity(["red ball"] * 2 + ["x"], ["a", "a", "b"]) == {"mean": 0.0, "n": 2}
    for none in ([], ["x"]):
        assert prompt_self_similarity(none) == {"mean": None, "n": 0}
    assert prompt_self_similarity(["x", "y"], ["same", "same"]) == {"mean": None, "n": 0}
    with pytest.raises(ValueError, match="2 prompts and 1 requests"):
        prompt_self_similarity(["x", "y"], ["a"])


def test_self_similarity_of_many_is_drawn() -> None:
    rng = random.Random(3)
    prompts = [" ".join(rng.choices(["red", "blue", "ball", "cube", "cat", "dog"], k=6)) for _ in range(120)]
    whole, part = prompt_self_similarity(prompts, most=10**6), prompt_self_similarity(prompts, most=2000)
    assert whole["n"] == 120 * 119 // 2 and part["n"] == 2000
    assert part == prompt_self_similarity(prompts, most=2000) and part["mean"] == pytest.approx(whole["mean"], abs=0.01)
    two = prompt_self_similarity(["x", "y"] * 60, ["a", "b"] * 60, most=2000)
    assert two["mean"] == 0 and 800 < two["n"] < 1200, "pairs with the same request are left out of what was drawn"
