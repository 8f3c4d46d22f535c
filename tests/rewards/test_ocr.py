"""The text reward: quotes, distances and both rules by hand and by property; the real reader on pictures drawn here."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from promptloop_pipeline.reward import ask_why
from promptloop_pipeline.rewards import load_reward
from promptloop_pipeline.rewards.ocr import Ocr, edit_distance, edits, fit, plain_text, quoted

needs_reader = pytest.mark.skipif(
    not importlib.util.find_spec("rapidocr") or not importlib.util.find_spec("onnxruntime"),
    reason='rapidocr is not installed: pip install "promptloop[ocr]"',
)
BLANK = Image.new("RGB", (64, 48), "white")


def drawn(text, size=44, wide=512, high=256):
    picture = Image.new("RGB", (wide, high), "white")
    ImageDraw.Draw(picture).multiline_text((20, 30), text, fill="black", font=ImageFont.load_default(size))
    return picture


def reading(*lines, **options):
    return Ocr(lambda picture: lines, **options)


# --- what is asked for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "texts"),
    [
        ('a sign that says "Hello World" at night', ["Hello World"]),
        ("a sign that says \u201cHello\u201d and \u201eGuten Tag\u201c, \uff02full\uff02", ["Hello", "Guten Tag", "full"]),
        ('\u201cmixed" kinds', ["mixed"]),
        ('"Don\'t stop" and "Rock \u2019n\u2019 Roll"', ["Don't stop", "Rock \u2019n\u2019 Roll"]),
        ("'single' and \u2018curly single\u2019 quotes, the farmer's and it's", []),
        ('a 15" laptop that shows "Press X"', ["Press X"]),
        ('"3" x 5" card', ["3"]),  # what opens a text is closed by whatever comes next
        ('"" and " " and "\n"', []),
        ('says "Hello', []),
        ('"two\nlines"', ["two\nlines"]),
        ('\u5199\u7740"\u4f60\u597d"', ["\u4f60\u597d"]),  # no space before the quote in Chinese
        ("", []),
    ],
)
def test_texts_in_quotes(request_, texts):
    assert quoted(request_) == texts


def test_what_counts_of_a_text():
    assert plain_text(" Hello \n WORLD\t") == plain_text("\uff28ello\u00a0world") == "helloworld"
    assert plain_text("Don\u2019t\u2014stop") == plain_text("don't-stop")
    assert plain_text("\u201cA\u201d") == '"a"'
    assert plain_text("Stra\u00dfe") == "strasse" and plain_text("\ufb01re") == "fire"
    assert plain_text("50%!") == "50%!"  # punctuation counts


# --- distances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0),
        ("ab", "ba", 2), ("intention", "execution", 5), ("saturday", "sunday", 3), ("a", "b", 1), ("abcd", "bcde", 2),
    ],
)  # fmt: skip
def test_edit_distance_by_hand(a, b, edits):
    assert edit_distance(a, b) == edits


text = st.text("abc", max_size=9)


@settings(deadline=None)
@given(text, text, text)
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@settings(deadline=None)
@given(text, st.lists(text, max_size=6))
def test_fit_is_the_nearest_run_of_words(wanted, words):
    runs = ["".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    assert fit(wanted, words) == min([len(wanted), *(edit_distance(wanted, run) for run in runs)])


# --- the rules ----------------------------------------------------------------------------------------------------------


def score(request_, *read, **options):
    return reading(*read, **options)([BLANK], [request_])[0]


def flow_grpo(wanted, read):
    """Flow-GRPO's rule, stated again."""
    whole = "".join(read)
    return 0 if wanted in whole else min(edit_distance(whole, wanted), len(wanted))


@pytest.mark.parametrize("first_only", [False, True])
def test_one_text_by_hand(first_only):
    def one(wanted, *read):
        return score(f'the words "{wanted}"', *read, first_only=first_only)

    assert one("Hello", "hello") == 1
    assert one("Hello", "say hello to", "everyone") == 1  # a part of what was read
    assert one("Hello World", "HELLO", "WORLD") == 1  # joined, without spaces
    assert one("Hello", "hallo") == 0.8
    assert one("Hello") == 0
    assert one("Hello", "hallo everyone out there") == 0  # never below 0
    assert one("Hello", "hallo", "ab") == 0.4


def test_anywhere_by_hand():
    def one(wanted, *read):
        return score(f'the words "{wanted}"', *read, anywhere=True)

    assert one("Hello", "hello") == one("Hello", "say hello to") == one("Hello World", "HELLO", "WORLD") == 1
    assert one("Hello", "hallo", "sale 50% off") == one("Hello", "a hallo b") == 0.8
    assert one("Hello World", "x", "Hallo", "Worl", "y") == 0.8
    assert one("Hello") == one("Hello", "xyz") == 0


@pytest.mark.parametrize("anywhere", [False, True])
def test_several_texts(anywhere):
    def both(*read):
        return score('a shop with "Open" on the door and "24 Hours" above', *read, anywhere=anywhere)

    assert both("Open", "24 hours") == both("24 HOURS", "open") == 1
    assert both("Open") == pytest.approx((5 if anywhere else 4) / 11)  # anywhere, an o of "Hours" is seen there too
    assert both("Opem", "24 hours") == both("24 hours", "opem") == pytest.approx(10 / 11)
    assert both("Opem", "24 hour") == both("24 hour", "opem") == pytest.approx(9 / 11)
    assert both() == 0
    assert score('"Stop" and "Stop"', "stop") == 0.5 and score('"Stop" and "Stop"', "stop", "stop") == 1


def test_the_first_text_alone():
    assert score('"Open" and "Sale"', "Sale") == 0.5
    assert score('"Open" and "Sale"', "Sale", first_only=True) == 0
    assert score('"Open" and "Sale"', "Open", first_only=True) == 1


words = st.lists(text.filter(bool), min_size=1, max_size=6)


@settings(deadline=None)
@given(text.filter(bool), words)
def test_one_text_by_property(wanted, read):
    assert edits([wanted], read) == flow_grpo(wanted, read)
    assert 0 <= edits([wanted], read, anywhere=True) <= edits([wanted], read)


@pytest.mark.parametrize("anywhere", [False, True])
@settings(deadline=None)
@given(wanted=words, read=words)
def test_several_texts_by_property(anywhere, wanted, read):
    assert 0 <= edits(wanted, read, anywhere) <= len("".join(wanted))
    assert edits(wanted, wanted[::-1], anywhere) <= edits(wanted, [], anywhere) == len("".join(wanted))


def test_texts_that_stand_in_each_other():
    assert score('"Open" and "Open House"', "open house") == pytest.approx(9 / 13)  # one place is not read twice
    assert score('"Open" and "Open House"', "open house", "open") == 1


# --- the reward ---------------------------------------------------------------------------------------------------------


def test_none_stays_and_details_say_why():
    reward = reading("Hello")
    found = ask_why(reward, [None, BLANK, BLANK], ['"Hello"', "no text", 'the word "Hello."'], other=[1, 2, 3])
    assert [j.score for j in found] == [None, None, pytest.approx(5 / 6)]
    assert found[0].details == {"skipped": "there is no picture"}
    assert "nothing in double quotes" in found[1].details["skipped"]
    assert found[2].details == {"wanted": ["Hello."], "read": ["Hello"], "edits": 1, "letters": 6}
    json.dumps([j.details for j in found])
    with pytest.raises(ValueError, match="ocr: 2 pictures and 1 prompts"):
        reward([None, None], ["a"])
    with pytest.raises(TypeError, match="a picture is str"):
        reward(["x.png"], ['"a"'])


def test_a_reader_of_ones_own(caplog):
    seen = []

    def read(picture):
        seen.append((picture.mode, picture.size))
        if picture.size == (9, 9):
            raise RuntimeError("no memory\nand more")
        return ["Hello"]

    reward = load_reward("ocr", recognise=read)
    array = np.zeros((48, 64, 3), np.uint8)
    images = [array, torch.zeros(3, 48, 64), Image.new("RGBA", (64, 48)), Image.new("L", (9, 9))]
    found = reward.judge(images, ['"Hello"'] * 4)
    assert [j.score for j in found] == [1, 1, 1, None]  # one that fails takes no other with it
    assert seen == [("RGB", (64, 48))] * 3 + [("RGB", (9, 9))]
    assert found[3].details == {"error": "the text could not be read: RuntimeError: no memory", "wanted": ["Hello"]}
    assert [r.getMessage() for r in caplog.records] == [
        "ocr: 1 of 4 pictures could not be read, such as: the text could not be read: RuntimeError: no memory"
    ]
    assert (reward.name, Ocr(read, name="mine").name) == ("ocr", "mine")
    with pytest.raises(KeyboardInterrupt):
        Ocr(lambda picture: (_ for _ in ()).throw(KeyboardInterrupt))([BLANK], ['"a"'])


def test_without_the_reader(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r'pip install "promptloop\[ocr\]", or give recognise='):
        load_reward("ocr")
    assert reading("a")([BLANK], ['"a"']) == [1]


@pytest.fixture(scope="module")
def reward():
    return load_reward("ocr")


@needs_reader
def test_reads_what_is_drawn(reward):
    texts = ["Hello World", "Safe Harbor\nAhead", "Don't stop 50%", "Fresh Eggs 3Dozen"]
    pictures = [drawn(t) for t in texts]
    prompts = [f'a sign with the words "{t}" in black' for t in texts]
    found = ask_why(reward, pictures, prompts)
    assert [j.score for j in found] == pytest.approx([1] * 4, abs=0.1)
    assert "".join(found[0].details["read"]).replace(" ", "").lower() == "helloworld"
    others = [score(prompt, *j.details["read"]) for prompt, j in zip(prompts[1:] + prompts[:1], found)]
    assert max(others) < 0.5
    assert reward([drawn("")], prompts[:1]) == [0]
    assert reward(pictures[1:2], prompts[1:2]) == [found[1].score]
    json.dumps([j.details for j in found])


@needs_reader
def test_nearer_text_scores_higher(reward):
    prompt = ['the title "PLANETARIUM"']
    scores = [reward([drawn(t)], prompt)[0] for t in ("PLANETARIUM", "PLNATARIM", "WOODEN SHOE")]
    assert scores[0] > scores[1] > scores[2]


@needs_reader
@pytest.mark.parametrize("size", [(8, 8), (256, 8), (1, 1)])
def test_odd_sizes(reward, size):
    assert reward([Image.new("RGB", size, "gray")], ['"Hello"']) == [0]
