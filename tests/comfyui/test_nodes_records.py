"""Recorded runs, without ComfyUI: found, read from pictures, told in words, exported."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from comfy_nodes import records
from promptloop_pipeline import FunctionRefiner, ScheduleRefiner, Session, prompt_schedule
from promptloop_pipeline.replay import load_schedule
from promptloop_pipeline.trajectory import load, save, to_record


def played(refiner, requests=("a cat", "a cat"), schedule="start, 3, end", num_steps=8):
    """A run of the loop with pictures, in a host that is a for-loop."""
    session = Session(list(requests), refiner, schedule)
    session.start(num_steps)
    pictures = lambda: [Image.new("RGB", (8, 8), "red")] * len(requests)  # noqa: E731
    for step in range(num_steps):
        session.observe(step, 0.5, pictures if step else None)
    return session.finish(pictures())


def run(words="night"):
    return played(FunctionRefiner(lambda v: f"{v.prompt}, {words} {v.step}"))


def png(path, runs, **others):
    info = PngInfo()
    info.add_text("prompt", "{}")
    text = json.dumps({"version": 1, "runs": {n: {"trajectories": [to_record(t) for t in made]} for n, made in runs.items()}})
    info.add_text(records.KEY, others.get("text", text))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def same(a, b):
    bare = [replace(t, image=None) for t in a.turns], [replace(t, image=None) for t in b.turns]
    return (a.id, a.request) == (b.id, b.request) and bare[0] == bare[1]


def test_a_picture_gives_its_run_back(tmp_path):
    made = run()
    found = records.read(png(tmp_path / "x.png", {"7": made}))
    assert len(found) == 2 and all(same(a, b) for a, b in zip(found, made, strict=True))
    assert same(records.read(tmp_path / "x.png", "7", 2)[0], made[1])


def test_of_several_runs_one_is_chosen_by_its_node(tmp_path):
    first, second = run(), run("day")
    path = png(tmp_path / "x.png", {"7": first, "12": second})
    assert same(records.read(path, " 12 ", 1)[0], second[0])
    with pytest.raises(ValueError, match=r"x.png holds runs of several nodes; write one of these .* 7, 12"):
        records.read(path)
    with pytest.raises(ValueError, match="no run '3' in x.png.* 7, 12"):
        records.read(path, "3")
    with pytest.raises(ValueError, match="has 2 pictures of that run, and no sample 3"):
        records.read(path, "7", 3)


def test_a_saved_record_gives_its_runs_back_with_their_pictures(tmp_path):
    made = run()
    file = save(made, tmp_path)
    found = records.read(file)
    assert all(same(a, b) for a, b in zip(found, made, strict=True)) and found[0].turns[1].image.size == (8, 8)
    assert same(records.read(file, made[1].id)[0], made[1])
    save(run(), tmp_path)
    assert len(records.read(file)) == 4 and same(records.read(file, sample=2)[0], made[1])


@pytest.mark.parametrize(
    "text, said",
    [
        ("no json", "cannot be read"), ("{}", "cannot be read"), ("[]", "cannot be read"),
        ('{"runs": {}}', "before its run was finished"),
        ('{"runs": {"1": {"trajectories": [{"version": 99, "request": "x"}]}}}', "newer"),
        ('{"runs": {"1": {"trajectories": [{"version": 1, "request": 5}]}}}', "not text"),
        ('{"runs": {"1": {"trajectories": [{"version": 1, "request": "x", "turns": [{"step": 1, "num_steps": 2, '
         '"before": 3, "after": ""}]}]}}}', "before of a turn is 3"),
        ('{"runs": {"1": {"trajectories": [{"version": 1, "request": "x", "turns": [{}]}]}}}', "cannot be read"),
    ],
)  # fmt: skip
def test_broken_metadata_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as e:
        records.read(png(tmp_path / "x.png", {}, text=text))
    assert "x.png" in str(e.value)


TURN = '{"step": 1, "num_steps": 2, "before": "a", "after": "b"'


@pytest.mark.parametrize(
    "turn, said",
    [
        (TURN + ', "error": {"a": 1}}', "error of a turn"), (TURN + ', "boundary": [1]}', "boundary of a turn"),
        (TURN + ', "seconds": 3}', "seconds of a turn"), (TURN + ', "sigma": "x"}', "sigma of a turn"),
        (TURN + ', "applied": -1}', "applied of a turn is out of range"),
        (TURN.replace("1", "-3", 1) + "}", "step of a turn is out of range"),
        (TURN.replace("2", "1" + 400 * "0") + "}", "num_steps of a turn is out of range"),
        (TURN + ', "seconds": {"x": ' + 20 * "[" + 20 * "]" + "}}", "nested"),
        (TURN + '}], "id": "../x", "others": [', "id of a run"), (TURN + '}], "id": 5, "others": [', "id of a run"),
        (TURN + '}], "meta": {"x": ' + 900 * "[" + 900 * "]" + '}, "others": [', "nested"),
        (TURN + '}], "others": [{"version": 1, "request": "x", "scores": 5}], "x": [', "scores or meta"),
        (TURN + "}, " + 100_000 * "[", "nested too deeply"),
    ],
)  # fmt: skip
def test_a_record_that_would_harm_what_shows_it_is_refused(tmp_path, turn, said):
    record = '{"version": 1, "request": "x", "turns": [' + turn + "]}"
    with pytest.raises(ValueError, match=said):
        records.read(png(tmp_path / "x.png", {}, text='{"runs": {"1": {"trajectories": [' + record + "]}}}"))
    (tmp_path / "trajectories.jsonl").write_text(record + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        records.read(tmp_path / "trajectories.jsonl")


def test_numbers_that_are_none_do_not_reach_browsers(tmp_path):
    """nan and inf are no JSON: one in ComfyUI's history, and no browser can read the history any more."""
    turn = TURN + ', "sigma": NaN, "seconds": {"x": 1e999, "y": 0.5}}'
    text = '{"version": 1, "request": "x", "scores": {"a": NaN}, "meta": {"m": [-Infinity, 2.5]}, "turns": [' + turn + "]}"
    (t,) = records.read(png(tmp_path / "x.png", {}, text='{"runs": {"1": {"trajectories": [' + text + "]}}}"))
    assert (t.turns[0].sigma, t.turns[0].seconds, t.scores, t.meta) == (
        None, {"x": None, "y": 0.5}, {"a": None}, {"m": [None, 2.5]},
    )  # fmt: skip


def test_pictures_without_a_run_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.jpg")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name, said in (
        ("plain.png", "holds no run"),
        ("other.jpg", "holds no run"),
        ("bad.png", "cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=f"{name} {said}"):
            records.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file gone.png any more"):
        records.read(tmp_path / "gone.png")


@given(st.text(alphabet="ab./\\ ~:\0", max_size=12))
@settings(max_examples=300, deadline=None)
def test_no_name_leads_out_of_the_folder(tmp_path_factory, name):
    output = tmp_path_factory.getbasetemp() / "output"
    try:
        found = records.folder_in(output, name)
    except ValueError as e:
        assert "output folder" in str(e)
    else:
        assert found != output.resolve() and found.is_relative_to(output.resolve())


def test_good_names_of_folders(tmp_path):
    assert records.folder_in(tmp_path, " cats/monday ") == tmp_path / "cats" / "monday"
    assert records.folder_in(tmp_path, "cats\\monday") == tmp_path / "cats" / "monday"


def test_saved_records_are_found_and_nothing_else(tmp_path):
    for name in ("a", "b/c", ".hidden", "b/c/d/e"):
        save(run(), tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert records.saved(tmp_path) == ["a/trajectories.jsonl", "b/c/trajectories.jsonl"]
    assert records.saved(tmp_path / "gone") == []
    before = records.stamp(tmp_path / "a" / "trajectories.jsonl")
    save(run(), tmp_path / "a")
    assert records.stamp(tmp_path / "a" / "trajectories.jsonl") != before


def test_a_run_played_again_has_the_prompts_it_had():
    made = run()
    again = ScheduleRefiner(records.schedules(made))
    for batch in (("a cat",), ("a cat",) * 3):  # all samples had the same: one schedule does for any batch
        for t in played(again, batch, again.refine_at):
            assert prompt_schedule(t) == prompt_schedule(made[0])
    differing = [run("night")[0], run("day")[0]]
    again = ScheduleRefiner(records.schedules(differing))
    found = played(again, ("a cat", "a cat"), again.refine_at)
    assert [prompt_schedule(t) for t in found] == [prompt_schedule(t) for t in differing]
    with pytest.raises(ValueError, match="history is empty"):
        records.schedules([])


def test_exports(tmp_path):
    t = run()[0]
    (tmp_path / "s.json").write_text(records.exported(t, "json"), encoding="utf-8")
    assert load_schedule(tmp_path / "s.json") == prompt_schedule(t)
    assert records.exported(t, "prompt editing") == "[a cat, night 0:a cat, night 0, night 3:3]"
    head, *rows = records.exported(t, "table").splitlines()
    assert (
        head.split() == ["step", "share", "prompt"]
        and len(rows) == 2
        and rows[1].split(None, 2)[1:] == ["38%", "a cat, night 0, night 3"]
    )
    with pytest.raises(ValueError, match="form is 'xml'; use json, prompt editing, table"):
        records.exported(t, "xml")


def test_words():
    text = records.text_of(run())
    assert (
        text.count("request: a cat") == 2 and text.startswith("picture 0\n") and "step 3 of 8: a cat, night 0, night 3" in text
    )
    assert records.text_of(run()[:1]).startswith("request: a cat")

    def fails(view):
        raise OSError("no server")

    told = records.text_of(played(FunctionRefiner(fails)))
    assert "failed (refiner): OSError: no server" in told and "kept" in told and records.text_of([]) == ""


def test_a_picture_of_a_save_without_metadata_of_ours_after_a_load(tmp_path):
    """What `load` reads and what metadata hold are the same records."""
    made = run()
    save(made, tmp_path)
    assert all(same(a, b) for a, b in zip(load(tmp_path), records.read(png(tmp_path / "x.png", {"1": made})), strict=True))
