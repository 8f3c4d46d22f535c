"""Whatever a model says, a prompt or the reason for none comes out; its reasoning never does."""
# ruff: noqa: RUF001

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptloop_pipeline.refiners.parsing import LONGEST, Parsed, clean, parse_answer

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # three people, joined by zero-width joiners
NOTHING = "there is no prompt in what the model said"

# (what the model said, the prompt or None, the reasoning, format_ok, whether it is an error)
CASES = {
    "answer tag": ("<answer>a cat</answer>", "a cat", "", True),
    "words around it": ("Sure! <answer>a cat</answer> Enjoy.", "a cat", "Sure!", True),
    "last of several": ("<answer>a</answer> or <answer>b</answer>", "b", "", True),
    "last complete one": ("<answer>a</answer> or <answer>b", "a", "", True),
    "unclosed": ("<answer>a cat", "a cat", "", False),
    "only closed": ("a cat</answer>", "a cat", "", False),
    "nested": ("<answer>x <answer>a cat</answer> y</answer>", "a cat", "", True),
    "upper case": ("<ANSWER>a cat</Answer>", "a cat", "", True),
    "attributes and spaces": ('< answer  lang="en" >a cat< / answer >', "a cat", "", True),
    "another tag": ("<answers>a cat</answers>", "<answers>a cat</answers>", "", False),
    "several lines": ("<answer>\n a cat,\r\n\ton a mat \n</answer>", "a cat, on a mat", "", True),
    "no tag": ("a cat", "a cat", "", False),
    "think, then answer": ("<think>legs</think><answer>a cat</answer>", "a cat", "legs", True),
    "answers in both": ("<think>or <answer>x</answer></think><answer>a cat</answer>", "a cat", "or  x", True),
    "answer in the reasoning only": ("<think>or <answer>x</answer></think>", NOTHING, "or  x", False),
    "think, then text": ("<think>legs</think>\n\na cat", "a cat", "legs", False),
    "think in the midst": ("a cat<think>hm</think>on a mat", "a cat on a mat", "hm", False),
    "think in the answer": ("<answer><think>hm</think>a cat</answer>", "a cat", "hm", True),
    "think unclosed": ("<think>legs are", NOTHING, "legs are", False),
    "think unclosed, answer in full": ("<think>legs <answer>a cat</answer>", "a cat", "legs", True),
    "think unclosed, then a stop token": ("<think>legs <answer>a cat</answer><|im_end|>", "a cat", "legs", True),
    "think unclosed, answer mentioned": ("<think>I use <answer> tags. Now", NOTHING, "I use   tags. Now", False),
    "think unclosed, answer discussed": ("<think>so <answer>x</answer>? No, it", NOTHING, "so  x ? No, it", False),
    "think after the answer": ("<answer>a cat</answer><think>was that good", "a cat", "was that good", True),
    "think nested": ("<think>a<think>b</think>c</think><answer>d</answer>", "d", "a\nb\nc", True),
    "opened by the template": ("legs</think><answer>a cat</answer>", "a cat", "legs", True),
    "closed again and again": ("a</think>b</think>c</think><answer>d</answer>", "d", "a\nb\nc", True),
    "closed once too often": ("<think>a</think>b</think><answer>d</answer>", "d", "a\nb", True),
    "other names": ("<Reasoning>a</reasoning><thought>b</thought>c", "c", "a\nb", False),
    "a tag made of two": ("<thi<think>x</think>nk>a cat", "<thi nk>a cat", "x", False),
    "a word like it": ("<answer>a <thinker> statue</answer>", "a <thinker> statue", "", True),
    "fence": ("<answer>```\na cat\n```</answer>", "a cat", "", True),
    "fence with a language": ("```text\na cat\n```", "a cat", "", False),
    "fence in a line": ("```a red cat```", "a red cat", "", False),
    "fence after a word": ("Here is the prompt:\n```\na cat\n```\nEnjoy!", "a cat", "", False),
    "fence unclosed": ("```\na cat", "a cat", "", False),
    "empty fence": ("``````", NOTHING, "", False),
    "label": ("<answer>New prompt: a cat</answer>", "a cat", "", True),
    "bold label": ("**Prompt:** a cat", "a cat", "", False),
    "bold label, colon outside": ("**Refined prompt**: a cat", "a cat", "", False),
    "chatty label": ("Here's the enhanced prompt:\n\na cat", "a cat", "", False),
    "heading": ("### Final image prompt:\na cat", "a cat", "", False),
    "label before quotes": ('Prompt: "a cat"', "a cat", "", False),
    "label in quotes": ('"Prompt: a cat"', "a cat", "", False),
    "no label": ("a prompt: delivery at the door", "a prompt: delivery at the door", "", False),
    "quotes of parts": ('"a" and "b"', '"a" and "b"', "", False),
    "quote in the prompt": ('a sign that says "STOP"', 'a sign that says "STOP"', "", False),
    "apostrophe": ("a cat's hat'", "a cat's hat'", "", False),
    "keep calm": ("<answer>keep calm and carry on, poster</answer>", "keep calm and carry on, poster", "", True),
    "KEEP OUT": ("<answer>KEEP OUT sign on a fence</answer>", "KEEP OUT sign on a fence", "", True),
    "quoted KEEP OUT": ('"KEEP OUT!" on a door', '"KEEP OUT!" on a door', "", False),
    "a castle keep": ("Keep, a castle tower", "Keep, a castle tower", "", False),
    "keeping": ("keeping bees", "keeping bees", "", False),
    "no change": ("<answer>no changes, unchanged light</answer>", "no changes, unchanged light", "", True),
    "nothing": ("<answer>nothing but sky</answer>", "nothing but sky", "", True),
    "keep the cat": ("keep the cat", "keep the cat", "", False),
    "ends with keep": ("a castle with a keep", "a castle with a keep", "", False),
    "in the midst KEEP": ("<answer>a stone KEEP</answer>", "a stone KEEP", "", True),
    "Chinese": ("<answer>\u4e00\u53ea\u7ea2\u8272\u7684\u732b\uff0c\u5750\u5728\u57ab\u5b50\u4e0a</answer>", "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\uff0c\u5750\u5728\u57ab\u5b50\u4e0a", "", True),  # noqa: E501
    "Arabic": ("<answer>\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 \u0639\u0644\u0649 \u0633\u062c\u0627\u062f\u0629</answer>", "\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621 \u0639\u0644\u0649 \u0633\u062c\u0627\u062f\u0629", "", True),  # noqa: E501
    "Persian": ("<answer>\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645</answer>", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "", True),  # with a zero-width non-joiner  # noqa: E501
    "Hindi": ("<answer>\u090f\u0915 \u0932\u093e\u0932 \u092c\u093f\u0932\u094d\u0932\u0940</answer>", "\u090f\u0915 \u0932\u093e\u0932 \u092c\u093f\u0932\u094d\u0932\u0940", "", True),  # noqa: E501
    "emoji": (f"<answer>{FAMILY} at the sea</answer>", f"{FAMILY} at the sea", "", True),
    "nothing but emoji": (f"<answer>{FAMILY}</answer>", FAMILY, "", True),
    "lone surrogates": ("<answer>a\ud800 cat\udfff</answer>", "a cat", "", True),
    "surrogates in a tag": ("<ans\udc80wer>a cat</answer>", "a cat", "", True),
    "NUL and control characters": ("<answer>a\x00cat\x07\x1b[31m\x7f</answer>", "a cat [31m", "", True),
    "direction overrides": ("<answer>\ufeffa \u202ecat\u202c\u2066!\u2069</answer>", "a cat!", "", True),
    "cut off within a character": ("<answer>a \u7ea2\ufffd", "a \u7ea2", "", False),
    "control characters only": ("\x00\x01\x02", NOTHING, "", False),
    "empty": ("", NOTHING, "", False),
    "whitespace": (" \n\t\u3000\u2028 ", NOTHING, "", False),
    "empty answer": ("I see. <answer> </answer>", NOTHING, "I see.", False),
    "dots": ("<answer>...</answer>", NOTHING, "", False),
    "special tokens": ("<s><answer>a cat<|im_end|></answer></s><|endoftext|>", "a cat", "", True),
    "special token of DeepSeek": ("a cat<\uff5cend\u2581of\u2581sentence\uff5c>", "a cat", "", False),
    "HTML": ("<answer><b>a cat</b> &amp; <img src=x></answer>", "<b>a cat</b> &amp; <img src=x>", "", True),
    "placeholders": ("<answer>{request} {image} {}</answer>", "{request} {image} {}", "", True),
    "too long": (f"<answer>{'a' * (LONGEST + 1)}</answer>", "the model's prompt is 10001 characters long, more than 10000", "", False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    text, prompt, reasoning, format_ok = CASES[name]
    if prompt == NOTHING or prompt.startswith("the model's"):
        expected = Parsed(None, reasoning, format_ok, prompt)
    else:
        expected = Parsed(prompt, reasoning, format_ok)
    assert parse_answer(text) == expected


def test_a_closing_tag_that_is_cut_off_is_none_of_the_prompt():
    for tag in ("</answer>", "</ANSWER >", "< / answer >"):
        for length in range(len(tag)):
            assert parse_answer(f"<answer>a cat{tag[:length]}") == Parsed("a cat", "", False)
    assert parse_answer("<answer>a cat, 3 < 4").prompt == "a cat, 3 < 4"
    assert parse_answer("<answer>a cat with <an</answer>").prompt == "a cat with <an"  # that one was not cut off


KEPT = (
    "KEEP", "keep", " Keep. ", "**KEEP**", "[KEEP]", '"KEEP"', "`KEEP`", "```\nKEEP\n```", "KEEP!", "keep the prompt", "keep it as is",
    "Keep the current prompt unchanged.", "keep the prompt in use", "KEEP. Nothing is missing.", "KEEP (it is all there)",
    "KEEP: all there", "KEEP, all there", "KEEP\nbecause it is all there", "KEEP - all there", "**KEEP** \u2014 all there",
    "New prompt: KEEP", "No changes needed.", "no further changes are necessary", "Nothing to change", "unchanged",
    "No changes.", "No modifications needed.", "The current prompt is unchanged.", "N/A",
    "The prompt remains unchanged.",
)  # fmt: skip


@pytest.mark.parametrize("said", KEPT)
def test_keep(said):
    assert parse_answer(f"<think>fine</think><answer>{said}</answer>") == Parsed(None, "fine", True)
    assert parse_answer(f"<answer>{said}").error is None
    assert parse_answer(said) == Parsed(None, "", False)
    assert parse_answer(said, tags=False) == Parsed(None, "", True)


@pytest.mark.parametrize("said", ["Nothing is missing. KEEP", "Is anything missing? No!\n\n**KEEP**", "My answer: KEEP."])
def test_keep_at_the_end_of_what_was_said_without_a_tag(said):
    assert parse_answer(said).prompt is None
    assert parse_answer(said).error is None


@pytest.mark.parametrize("pair", ["''", '""', "``", "“”", "„“", "‘’", "«»", "\u300c\u300d", "\u300e\u300f"])
def test_quotes_around_it_all(pair):
    for inside in ("a cat", "KEEP OUT sign", "\u4e00\u53ea\u732b"):
        assert parse_answer(f"<answer>{pair[0]}{inside}{pair[1]}</answer>").prompt == inside
    parts = f"{pair[0]}a{pair[1]} and {pair[0]}b{pair[1]}"
    assert parse_answer(parts).prompt == parts
    assert parse_answer(pair).error == NOTHING


def test_without_tags_the_text_is_the_answer():
    assert parse_answer("a cat, 4k", tags=False) == Parsed("a cat, 4k", "", True)
    assert parse_answer("<think>legs</think>a cat", tags=False) == Parsed("a cat", "legs", True)
    assert parse_answer("<answer>a cat</answer>", tags=False) == Parsed("a cat", "", True)  # though nobody asked
    assert not parse_answer("", tags=False).format_ok
    assert not parse_answer("a" * (LONGEST + 1), tags=False).format_ok


def test_longest_prompt():
    assert parse_answer(f"<answer>{'a' * LONGEST}</answer>").prompt == "a" * LONGEST
    assert parse_answer(f"<think>{'a ' * LONGEST}</think><answer>a cat</answer>").prompt == "a cat"  # reasoning may be longer


MEGA = 1_000_000
LONG = {
    "text": "a red cat ", "one word": "x", "spaces": " ", "newlines": "\n", "less than": "<", "closings": "</think>",
    "openings": "<think>", "answers": "<answer>", "answers closed": "</answer>", "pairs": "<answer>a</answer>",
    "thoughts": "<think>a</think>b", "halves": "<think ", "less than, spaces": "<" + " " * 200, "slashes": "</", "half specials": "<|a",
    "specials": "<|im_end|>", "fences": "```", "fence lines": "```\n`\n", "quotes": '"', "stars": "*", "keep": "keep the ", "NUL": "\0",
    "surrogates": "\udc80", "emoji": FAMILY, "Arabic": "\u0642\u0637\u0629 ", "returns": "\r", "labels": "prompt: ", "colons": ":",
    "mixed": "<think><answer></think>", "ends KEEP": ". KEEP",
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_takes_no_time(name):
    unit = LONG[name]
    clock = time.process_time()
    parse_answer(unit * (MEGA // len(unit)))
    assert time.process_time() - clock < 2
    body = unit * (MEGA // 10 // len(unit))
    for text in (f"<{body}", f"keep{body}x", f"prompt{body}:", f"<answer{body}>", f"```{body}", f"<think>{body}</think>a"):
        clock = time.process_time()
        parse_answer(text)
        assert time.process_time() - clock < 0.5, text[:40]


def test_a_megabyte_of_nested_reasoning_takes_no_time():
    text = "<think>" * 60_000 + "secret" + "</think>" * 60_000 + "<answer>a cat</answer>"
    clock = time.process_time()
    assert parse_answer(text).prompt == "a cat"
    assert time.process_time() - clock < 2


# --- reasoning never leaks ----------------------------------------------------------------------------------------------

think = st.sampled_from(["think", "THINK", "thinking", "Thought", "reasoning", "reason", 'think mode="deep"'])
SECRETS = (
    "SECRET",
    "the SECRET legs",
    "SECRET.\nSECRET",
    "`SECRET`",
    "KEEP? SECRET",
    'prompt: "SECRET"',
    "{SECRET}",
    "SE<b> SECRET",
)
MENTIONS = (
    "",
    "<answer>SECRET</answer>",
    "<answer> SECRET",
    "SECRET</answer>",
    "<answer>SECRET</answer> no",
    "<think>SECRET</think>",
)
CUT = ("", "<think>SECRET", "<think>SECRET <answer>SECRET", "<think>\nSECRET <answer> and")
secret, mention = st.sampled_from(SECRETS), st.sampled_from(MENTIONS)
prompt = st.sampled_from(
    ["PUBLIC", "a PUBLIC cat", '"PUBLIC"', "Prompt: PUBLIC", "```\nPUBLIC\n```", "PUBLIC <b>", "PUBLIC\nhat"]
)


@st.composite
def reasonings(draw):
    name = draw(think)
    inner = "".join(draw(st.lists(st.one_of(secret, mention), min_size=1, max_size=4)))
    return f"<{name}>{inner}</{name.split()[0]}>"


@settings(max_examples=800, deadline=None)
@given(
    before=st.lists(reasonings(), max_size=3), after=st.lists(reasonings(), max_size=2), said=prompt, closed=st.booleans(),
    opened=st.booleans(), tags=st.booleans(), cut=st.sampled_from(CUT),
)  # fmt: skip
def test_reasoning_never_leaks(before, after, said, closed, opened, tags, cut):
    start = "SECRET</think>" if opened else ""
    if tags:
        said = f"<answer>{said}</answer>" if closed else f"<answer>{said}"
    found = parse_answer(start + "\n".join(before) + said + "".join(after) + cut)
    assert found.prompt is not None
    assert "PUBLIC" in found.prompt
    assert "SECRET" not in found.prompt
    assert "PUBLIC" not in found.reasoning
    assert not (start or cut) or "SECRET" in found.reasoning
    assert found.format_ok == (tags and closed)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(secret, st.just("<think>"), st.just("<answer>"), st.just("a <answer> tag SECRET")), max_size=8))
def test_reasoning_that_is_cut_off_never_leaks(pieces):
    found = parse_answer("<think>" + "".join(pieces))
    assert found.prompt is None
    assert found.error == NOTHING
    assert not found.format_ok


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_clean_text_can_be_encoded_and_has_no_control_characters(text):
    cleaned = clean(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert not [c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert clean(cleaned) == cleaned or "|" in text or "<" in text  # what is left may form a token once more


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=80))
def test_words_of_any_script_come_through(text):
    if text.casefold() == "keep":
        return
    assert parse_answer(f"<think>x</think><answer>{text}</answer>") == Parsed(text, "x", True)
