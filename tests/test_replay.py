"""What a run was made with: kept, loaded, exported."""

import itertools
import json
import re

import pytest

from promptloop_pipeline import (
    ScheduleRefiner,
    Session,
    Trajectory,
    Turn,
    View,
    load_schedule,
    prompt_editing,
    prompt_schedule,
    save_schedule,
)


def run(*changes: tuple[int, str], num_steps: int = 12, asked: str = "a cat") -> Trajectory:
    """A run in which the prompt changed at these steps."""
    prompts = [asked, *(prompt for _, prompt in changes)]
    return Trajectory(asked, [Turn(k, num_steps, a, b) for (k, b), a in zip(changes, prompts)])


def test_the_schedule_of_a_run():
    assert prompt_schedule(Trajectory("a cat")) == {0: "a cat"}
    assert prompt_schedule(run((4, "b"), (9, "c"))) == {0: "a cat", 4: "b", 9: "c"}
    assert prompt_schedule(run((0, "b"), (9, "c"))) == {0: "b", 9: "c"}, "what a turn at the start made of the request"
    assert prompt_schedule(run((4, "a cat"), (9, "c"))) == {0: "a cat", 9: "c"}, "a turn that kept the prompt is none"
    assert prompt_schedule(run((4, "b"), (9, "a cat"))) == {0: "a cat", 4: "b", 9: "a cat"}, "back again is a change"
    assert prompt_schedule(run((4, "b"), (12, "c"))) == {0: "a cat", 4: "b"}, "after the end nothing acts"
    late = Trajectory("a", [Turn(2, 9, "a", "b", applied=5), Turn(0, 9, "b", "c", applied=8), Turn(8, 9, "c", "d", applied=9)])
    assert prompt_schedule(late) == {0: "a", 5: "b", 8: "c"}, "the step from which a late answer acted counts"
    rounds = Trajectory("a", [Turn(9, 9, "a", "b", applied=0), Turn(9, 9, "b", "c", applied=0), Turn(9, 9, "c", "d")])
    assert prompt_schedule(rounds) == {0: "c"}, "looks at finished pictures led to this one's prompt"


@pytest.mark.parametrize("options", [{}, {"apriori": True}, {"asynchronous": 2}])
def test_the_schedule_tells_what_was_in_force_at_each_step(options):
    def force(refiner, refine_at, **options):
        session = Session(["a"], refiner, refine_at, **options)
        session.start(8)
        prompts = []
        for step in range(8):
            session.observe(step, None, None)
            prompts += session.prompts
        return prompts, session.finish(None)[0]

    for steps in itertools.combinations((0, 1, 3, 6, 7), 3):
        first = ScheduleRefiner({step: f"prompt {step}" for step in steps})
        prompts, trajectory = force(first, first.refine_at, **options)
        schedule = prompt_schedule(trajectory)
        assert [schedule[max(k for k in schedule if k <= step)] for step in range(8)] == prompts
        again = ScheduleRefiner(schedule)
        assert force(again, again.refine_at)[0] == prompts


def test_saved_and_loaded(tmp_path):
    trajectory = run((4, 'a "cat": \U0001f408 [1]\n'), (9, "lone \ud800 surrogate"), (11, "ein Kätzchen"))
    file = save_schedule(trajectory, tmp_path / "new" / "schedule.json")
    assert load_schedule(file) == prompt_schedule(trajectory)
    assert list(load_schedule(file)) == [0, 4, 9, 11]
    assert json.loads(file.read_bytes().decode(errors="surrogatepass"))["num_steps"] == 12
    assert "Kätzchen" in file.read_text(errors="replace"), "readable by humans"
    assert load_schedule(save_schedule(Trajectory("a"), tmp_path / "plain.json")) == {0: "a"}
    (tmp_path / "by hand.json").write_text('{"prompts": {"10": "b", "9": "a"}}')
    assert list(load_schedule(tmp_path / "by hand.json").items()) == [(9, "a"), (10, "b")]


def test_nothing_is_written_over(tmp_path):
    file = save_schedule(run((4, "b")), tmp_path / "s.json")
    with pytest.raises(FileExistsError, match=r"s\.json is there already and is not written over; choose another name"):
        save_schedule(run((4, "c")), file)
    assert load_schedule(file)[4] == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{'0': 1}", "is not JSON"),
        ("[1]", "has no prompts by step; it should look like"),
        ('{"0": "a"}', "has no prompts by step"),
        ('{"prompts": ["a"]}', "has no prompts by step"),
        ('{"prompts": {"-1": "a"}}', "the step '-1' is not a number from 0 on"),
        ('{"prompts": {"start": "a"}}', "the step 'start' is not a number"),
        ('{"prompts": {"\u0663": "a"}}', "is not a number"),
        ('{"prompts": {"1": 7}}', "the prompt of step 1 is int, not text"),
        ('{"prompts": {"1": null}}', "the prompt of step 1 is NoneType, not text"),
        ('{"num_steps": "8", "prompts": {}}', "num_steps is '8'"),
        ('{"num_steps": true, "prompts": {}}', "num_steps is True"),
        ('{"num_steps": 8, "prompts": {"8": "a"}}', "step 8 lies beyond a run of 8 steps; use steps from 0 to 7"),
    ],
)
def test_files_that_are_no_schedules(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"s\.json.*{message}"):
        load_schedule(tmp_path / "s.json")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(FileNotFoundError, match="no prompt schedule at .*expected a JSON file"):
            load_schedule(path)
    (tmp_path / "latin").write_bytes(b'{"prompts": {"0": "K\xe4tzchen"}}')
    with pytest.raises(ValueError, match="latin is not JSON"):
        load_schedule(tmp_path / "latin")


def test_schedules_of_a_batch():
    refiner = ScheduleRefiner([{0: "a", 12: "b"}, {6: "c"}, {}])
    assert refiner.refine_at == "start, 6, 12"
    assert ScheduleRefiner({2: "a", 1: "b"}).refine_at == "1, 2"
    assert ScheduleRefiner({}).refine_at == ScheduleRefiner([{}]).refine_at == "none"
    views = [View("x", "x", step=6, num_steps=20)] * 3
    assert [a.prompt for a in refiner.refine(views)] == [None, "c", None]
    with pytest.raises(ValueError, match="ScheduleRefiner has 3 schedules for a batch of 2 samples; give one"):
        refiner.refine(views[:2])


# --- prompt editing -----------------------------------------------------------------------------------------------------


def interpreted(text: str, num_steps: int) -> dict[int, str]:
    """{step: prompt} of an editing text, read as its documentation says; refuses what would weight, alternate or divide it."""
    assert not re.search(r"\b(AND|BREAK)\b", text)
    assert not re.search(r":\s*[-+]?[\d.]+\s*$", text), "a weight of the whole"
    position = 0

    def plain() -> str:
        nonlocal position
        found = ""
        while position < len(text) and text[position] not in "[]:":
            assert text[position] not in "()|"
            position += text[position] == "\\"
            found += text[position]
            position += 1
        return found

    def until(end: str) -> str:
        nonlocal position
        assert text[position] == end, text[position:]
        position += 1
        return end

    def prompt() -> dict[int, str]:
        nonlocal position
        if position == len(text) or text[position] != "[":
            return {0: plain()}
        until("[")
        before = prompt()
        until(":")
        after = plain()
        until(":")
        number = plain()
        when = int(float(number) * num_steps) if "." in number else int(number)
        until("]")
        return before | {when: after}

    found = prompt()
    assert position == len(text)
    return found


def test_prompt_editing():
    assert prompt_editing(Trajectory("a cat")) == "a cat"
    assert prompt_editing(run((4, "b"))) == "[a cat:b:4]"
    assert prompt_editing(run((4, "b"), (9, "c"))) == "[[a cat:b:4]:c:9]"
    assert prompt_editing(run((3, "b"), (6, "c")), shares=True) == "[[a cat:b:0.2500]:c:0.5000]"
    assert prompt_editing(run((4, "(big:1.2) [dog]"))) == r"[a cat:\(big\:1.2\) \[dog\]:4]"


ODD = [
    "a cat", "a [red:blue:3] cat", "(big:1.2) dog|cat", "back\\(slash\\)", "\\", "this AND that, then a BREAK", "AND", "ratio 16:9",
    "time: -2.5 ", "]][[ ::", "LAND, ANDES, BREAKFAST", "two\nlines", " led and trailed ", "<lora:x:1> {a|b}", "\U0001f408: 4",
]  # fmt: skip


@pytest.mark.parametrize("shares", [False, True])
def test_prompt_editing_reads_back_whatever_stands_in_the_prompts(shares):
    for a, b, c in itertools.product(ODD, repeat=3):
        trajectory = run((1, b), (7, c), num_steps=30, asked=a)
        assert interpreted(prompt_editing(trajectory, shares=shares), 30) == prompt_schedule(trajectory)
    for num_steps in (3, 7, 28, 50, 999):
        for step in range(1, num_steps):
            trajectory = run((step, "b"), num_steps=num_steps)
            assert interpreted(prompt_editing(trajectory, shares=shares), num_steps) == {0: "a cat", step: "b"}
