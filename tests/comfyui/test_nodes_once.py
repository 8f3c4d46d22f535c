"""One question to a refiner, without ComfyUI: with the embedded refiner, and with what a text generation wrote."""

import copy

import pytest
from PIL import Image

from comfy_nodes import once
from promptloop_pipeline import FunctionRefiner, GuardedRefiner, MLLMRefiner, NoOpRefiner, Refinement, tiny
from promptloop_pipeline.chat.endpoint import EndpointChat
from promptloop_pipeline.refiners.template import load_template

RED = "a big red ball in the upper left corner, black background"


@pytest.fixture(scope="module")
def refiner():
    return tiny.load_refiner(temperature=6.0)


def test_the_embedded_refiner_rewrites():
    found = once.rewrite(tiny.load_refiner(), RED, False)
    assert "red circle" in found.prompt  # the generator's word for a ball
    assert found.request == RED and once.warning(found.turns[0]) == "" and once.shown(found.turns[0]) == found.prompt
    assert once.why(found.turns[0]) == found.turns[0].reasoning != ""


def test_another_seed_is_another_answer_and_the_shared_refiner_stays_as_it_is(refiner):
    before = copy.copy(vars(refiner))
    said = [once.rewrite(once.adjusted(refiner, seed), RED, False).turns[0].raw for seed in (1, 2, 3, 1, 2**64 - 1)]
    assert said[0] == said[3] and len(set(said)) > 2
    assert vars(refiner) == before


def test_seed_and_template_reach_a_model_inside_of_other_refiners(refiner):
    around = GuardedRefiner(GuardedRefiner(refiner), prefix=True)
    made = once.adjusted(around, 7, load_template("plain"))
    assert made.refiner.refiner.sampling.seed == 7 and made.refiner.refiner.template.name == "plain"
    assert made.refiner.refiner.chat is refiner.chat and made.prefix
    assert around.refiner.refiner is refiner and refiner.sampling.seed == 0 and refiner.template.name != "plain"


def test_a_template_brings_its_own_options_and_leaves_those_that_were_chosen(refiner):
    made = once.adjusted(refiner, None, load_template("repair"))
    assert made.sampling.temperature == 6.0  # chosen
    assert refiner.sampling.max_new_tokens == made.sampling.max_new_tokens == 96  # the loader's choice
    server = MLLMRefiner(EndpointChat("http://localhost:1/v1", "m"), "repair", num_beams=1)
    made = once.adjusted(server, None, load_template("promptist"))
    assert load_template("promptist").sampling["num_beams"] > 1 == made.sampling.num_beams
    assert made.sampling.max_new_tokens == load_template("promptist").sampling["max_new_tokens"]


def test_what_is_no_model_takes_a_seed_and_refuses_a_template():
    assert once.rewrite(once.adjusted(NoOpRefiner(), 5), RED, False).prompt == RED
    with pytest.raises(ValueError, match="NoOpRefiner is no model, and cannot be told 'plain'; choose"):
        once.adjusted(NoOpRefiner(), 5, load_template("plain"))


def test_append_keeps_the_words_in_front():
    found = once.rewrite(tiny.load_refiner(), RED, True)
    assert found.prompt.startswith(RED) and len(found.prompt) > len(RED)
    again = once.rewrite(FunctionRefiner(lambda view: f"{view.request}, at night"), RED, True)
    assert again.prompt == f"{RED}, at night"  # they are there already


def test_a_picture_is_looked_at_as_finished_and_its_prompt_is_for_the_next_one():
    seen = []

    def look(view):
        seen.append(view)
        return "another"

    picture = Image.new("RGB", (8, 8), "red")
    (turn,) = once.rewrite(FunctionRefiner(look), RED, False, picture).turns
    assert seen[0].image is picture and seen[0].source is picture and seen[0].step == seen[0].num_steps
    assert turn.image is picture and turn.applied == 0 and turn.after == "another"
    once.rewrite(FunctionRefiner(look), RED, False)
    assert seen[1].image is None and seen[1].step == 0


def test_a_failure_keeps_the_prompt_and_is_told():
    def fails(view):
        raise OSError("no server at localhost")

    found = once.rewrite(FunctionRefiner(fails), RED, False)
    assert found.prompt == RED and found.failures
    for text in (once.warning(found.turns[0]), once.why(found.turns[0]), once.shown(found.turns[0])):
        assert "WARNING" in text and "no server" in text
    assert once.shown(found.turns[0]).startswith(RED)


def test_a_cancel_gets_through():
    class Cancel(Exception):
        pass

    def cancels(view):
        raise Cancel

    with pytest.raises(Cancel):
        once.rewrite(FunctionRefiner(cancels), RED, False, cancel=Cancel)


def test_an_empty_prompt_is_refused():
    for make in (lambda: once.rewrite(NoOpRefiner(), " \n", False), lambda: once.parsed("a cat", "", False)):
        with pytest.raises(ValueError, match="the prompt is empty; say"):
            make()


@pytest.mark.parametrize(
    "text, prompt, why",
    [
        ("a black cat", "a black cat", ""),
        ("<think>cats are nice</think>a black cat", "a black cat", "cats are nice"),
        ("Here is the refined prompt: **a black cat**", None, ""),
        ("<answer>a black cat</answer>", "a black cat", ""),
        ("```\na black cat\n```", "a black cat", ""),
        ("<think>cut off in the mid", "a cat", "cut off"),
        ("KEEP", "a cat", "Your prompt is kept, as the refiner wants it."),
        ("", "a cat", "WARNING: your prompt is kept, since this failed: there is no prompt"),
    ],
)
def test_what_a_text_generation_wrote(text, prompt, why):
    (turn,) = once.parsed(text, "a cat", False).turns
    assert why in once.why(turn) and turn.raw == text
    assert "<" not in turn.after and "think" not in turn.after and "a black cat" in (prompt or turn.after) + "a black cat"
    assert prompt is None or turn.after == prompt


def test_thinking_of_its_own_goes_to_reasoning():
    (turn,) = once.parsed("a black cat", "a cat", True, "I thought").turns
    assert once.why(turn) == "I thought" and turn.after == "a cat, a black cat"


def test_notes_of_what_was_not_asked_are_told():
    quiet = FunctionRefiner(lambda view: Refinement(notes=("not asked: it needs a picture",)))
    assert once.shown(once.rewrite(quiet, RED, False).turns[0]).endswith("not asked: it needs a picture")
