"""What a loop does when something happens: failures, cancels, models thrown out of memory, caches (tests/comfyui/behaviour.py)."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "behaviour.py"
A, B = "a red ball on a green lawn", "an old lighthouse in a winter storm, oil painting"
UNTOUCHED = 0.0


@pytest.fixture(scope="module")
def found(inprocess, models):
    return inprocess(SCRIPT, models)


@pytest.fixture
def of(found):
    """of(case): what came of it; an exception within is the test's own."""

    def result(case):
        if isinstance(found[case], dict) and "exception" in found[case]:
            pytest.fail(found[case]["exception"])
        return found[case]

    return result


def test_loras_are_back_after_everything_was_unloaded(of):
    differences = of("everything_unloaded")
    assert len(differences) == 12 and set(differences.values()) == {UNTOUCHED}, differences
    assert of("unloaded_with_a_control_net") == UNTOUCHED


@pytest.mark.parametrize("door", ["PromptLoop", "PromptLoopSampler"])
def test_cancel_gets_through_to_a_refiner_that_thinks(of, door):
    result = of("cancelled_while_thinking")
    assert result[door]["event"] == "execution_interrupted"
    assert result[door]["seconds"] < 1, "within a token"
    assert result[f"{door}, again"] == UNTOUCHED, "the next run is as if nothing had been"


def test_cancel_is_never_taken_for_a_failure(of):
    result = dict(of("cancelled_by_the_refiner"))
    assert result.pop("again") == UNTOUCHED
    assert len(result) == 4 and set(result.values()) == {"execution_interrupted"}, result


@pytest.mark.parametrize("kind", ["raises", "error", "empty", "surrogate"])
def test_a_failure_costs_nothing_but_its_turn(of, kind):
    result = of("failures")[kind]
    assert result["diff"] == UNTOUCHED and result["prompts"] == [A]
    assert len(result["errors"]) == 3 and all(result["errors"]), result


@pytest.mark.parametrize("kind", ["long", "brackets", "embedding", "line ends", "other scripts"])
def test_odd_text_is_used_as_comfyui_uses_it(of, kind):
    result = of("odd_prompts")[kind]
    assert result["errors"] == [] and result["diff"] < 1e-5 * result["size"]


def test_a_long_text_for_one_sample_leaves_the_other_alone(of):
    result = of("batch_with_a_long_text")
    assert result["finite"] and result["other"] == UNTOUCHED, result
    assert result["changed"] > 0 or result["errors"], "it acts, or it is said why not"


def test_an_encoder_that_splits_by_time_in_a_batch(of):
    result = of("batch_with_an_encoder_that_splits_by_time")
    assert result["other"] == UNTOUCHED, result
    if not result["errors"]:
        assert result["effect"] > 0.01 and result["changed"] < 1e-5 * result["size"], result


def test_strict_stops_with_the_refiners_words(of):
    assert "step 2" in of("strict") and "the endpoint does not answer" in of("strict")


def test_a_preview_that_cannot_be_decoded_is_a_failure_of_the_turn(of):
    result = of("wrong_vae")
    assert result["diff"] == UNTOUCHED and result["boundary"] == ["preview"] and "channels" in result["errors"][0]


def test_nobodys_randomness_is_touched(of):
    assert len(of("global_randomness")) == 8
    for sampler, (difference, state_kept) in of("global_randomness").items():
        assert difference == UNTOUCHED and state_kept, sampler


def test_one_loop_a_model(of):
    assert "has a PromptLoop already" in of("two_loops_in_one_model")


def test_a_second_run_comes_from_the_cache(of):
    result = of("caching")["CLASSIC"]
    assert result["ran"] == 0 and result["equal"] and result["same ids"] and result["apart"]
    assert result["steps"] == [[2, 4]] * 4 and result["shown"] == [f"{B}, 4"] * 2


def test_without_a_cache_a_second_run_is_equal_and_has_its_own_history(of):
    result = of("caching")["NONE"]
    assert result["ran"] == 4 and result["equal"] and not result["same ids"] and result["apart"]
    assert result["steps"] == [[2, 4]] * 4


def test_two_samplers_of_one_model_do_not_mix(of):
    result = of("caching")["one changed"]
    assert result["kept"] and result["new"] and result["steps"] == [[2, 4]] * 4


@pytest.mark.parametrize("case", ["result_added_later", "renumbered_sampler"])
def test_a_result_node_finds_a_run_that_comes_from_the_cache(of, case):
    assert of(case) == [2, 4]


def test_a_copied_sampler_has_a_result_too(of):
    assert of("copied_sampler") == [[2, 4], [2, 4]]


def test_two_loops_that_share_a_refiner_do_not_mix(of):
    result = of("one_refiner_two_loops")
    assert result["requests"] == [[A], [B]] and result["turns"] == [2, 2]
    assert result["seen"] == [[A, 2, 0], [A, 4, 1], [B, 2, 0], [B, 4, 1]]


def test_shares_are_of_the_steps_that_are_made(of):
    assert of("part_of_a_run") == {"denoise": [UNTOUCHED, [3]], "karras": [UNTOUCHED, [3]]}


def test_a_run_that_does_not_wait(of):
    result = of("in_the_background")
    assert result["early"] and result["early"][0] >= 2 and result["effect"] > 0
    assert result["late"] == UNTOUCHED and "too late" in result["notes"][0][0]


def test_which_conditioning_is_asked_for_in_words(of):
    assert "Refinement Target" in of("several_conditionings")
