"""`promptloop eval`: arms on the embedded pipeline, taken up again, compared; and the figures of single looks."""

import json
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from promptloop_pipeline import FunctionRefiner, NoOpRefiner, Refinement, Trajectory, Turn, View, cli, tiny
from promptloop_pipeline.cli import named
from promptloop_pipeline.evaluation import arms, figures, headroom, shapes, statistics
from promptloop_pipeline.evaluation.run import run_arm
from promptloop_pipeline.evaluation.scoring import read_scores
from promptloop_pipeline.evaluation.statistics import paired_difference
from promptloop_pipeline.reward import ask_why
from promptloop_pipeline.schedule import RefinementSchedule
from promptloop_pipeline.tiny.language import parse, with_clear
from promptloop_pipeline.tiny.refiners import OracleRefiner, RotationRefiner, single_shot
from promptloop_pipeline.tiny.scenes import Scene, free_cells, plan, render
from promptloop_pipeline.trajectory import FILE, load

NAMES = ["raw", "single", "blind", "loop", "loop-noimage", "best-of-2", "gold", "oracle"]
ORACLE = "promptloop_pipeline.tiny.refiners:OracleRefiner"
COMMON = ("--n", "3", "--steps", "4", "--batch", "2", "--refiner", ORACLE, "--refine-at", "start, 1, 2", "--seed", "7")


def call(*args, capsys, command="eval"):
    """Runs `promptloop eval` in this process; (exit code, standard output, standard error without the progress bar)."""
    argv, sys.argv = sys.argv, ["promptloop", command, *map(str, args)]
    try:
        cli.main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err[err.find("promptloop: ") :] if "promptloop: " in err else ""


@pytest.fixture
def run(capsys):
    return lambda *args: call(*args, capsys=capsys)


def without_timings(folder):
    results = json.loads((folder / "results.json").read_text())
    for row in results["arms"]:
        assert row.pop("seconds_per_image") > 0
        assert row["measures"].pop("memory")["process"] > 0
        del row["measures"]["cost"]
    return results


def contents(folder):
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def finished(folder, *args):
    """The folder, with a run that went through."""
    argv, sys.argv = sys.argv, ["promptloop", "eval", *args, "--report", str(folder)]
    try:
        cli.main()
    except SystemExit as e:
        assert not e.code
    finally:
        sys.argv = argv
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of all arms; not to be changed."""
    return finished(tmp_path_factory.mktemp("done") / "eval", *COMMON)


@pytest.fixture
def copy(done, tmp_path):
    import shutil

    return shutil.copytree(done, tmp_path / "eval")


# --- the run ------------------------------------------------------------------------------------------------------------


def test_arms_share_requests_and_seeds(done):
    results = without_timings(done)
    assert [row["arm"] for row in results["arms"]] == NAMES == list(results["scores"])
    assert results["requests"] == tiny.requests(3) and results["seeds"] == [7, 8, 9]
    found = {name: load(done / name) for name in NAMES}
    for name, arm in found.items():
        assert [t.request for t in arm] == results["requests"]
        assert [t.meta["seed"] for t in arm] == [s + 10**6 * (name == "best-of-2") for s in results["seeds"]]
        assert {t.meta["arm"] for t in arm} == {name}
        if name != "best-of-2":
            said = read_scores(done / name)["verifier"]
            assert [said[t.id].score for t in arm] == results["scores"][name]["verifier"]
    pictures = {name: [t.image.tobytes() for t in arm] for name, arm in found.items()}
    assert pictures["single"] == pictures["gold"] and pictures["loop"] == pictures["oracle"]  # the refiner here is the oracle
    assert pictures["loop"] != pictures["single"] != pictures["best-of-2"]
    assert [t.prompt for t in found["raw"]] == results["requests"]
    assert all("clear row" in t.prompt for t in found["loop-noimage"])  # grey looks like stickers everywhere


def test_figures(done):
    results = without_timings(done)
    rows = {row["arm"]: row for row in results["arms"]}
    assert [name for name in NAMES if "reference_minus_arm" in rows[name]] == [name for name in NAMES if name != "loop"]
    assert [name for name in NAMES if "looks" in rows[name]] == ["loop", "loop-noimage", "oracle"]
    for name in NAMES:
        for metric in ("verifier-strict", "verifier"):
            values = results["scores"][name][metric]
            assert rows[name][metric]["mean"] == pytest.approx(np.mean(values)) and rows[name]["n"] == len(values) == 3
    gain = rows["gold"]["reference_minus_arm"]["verifier"]
    expected = paired_difference(results["scores"]["loop"]["verifier"], results["scores"]["gold"]["verifier"])
    assert {k: gain[k] for k in ("mean", "low", "high", "better", "worse", "n")} == vars(expected)
    assert rows["loop"]["turns"] == 9 and rows["loop"]["failed_turns"] == 0
    assert rows["loop"]["looks"]["as the oracle"]["mean"] == 1 and rows["loop"]["looks"]["change needed"]["of"] == 6
    assert rows["single"]["changes_per_image"] == 1 and rows["raw"]["changes_per_image"] == 0
    assert rows["blind"]["changes_per_image"] == 3  # 40% to 75% of four steps are two of them


def test_memory_of_each_look(done):
    for t in load(done / "loop"):
        assert len(t.meta["memory_by_turn"]) == len(t.turns) == 3
        assert all(0 < peak["process"] <= t.meta["memory"]["process"]["peak"] for peak in t.meta["memory_by_turn"])
    rows = {row["arm"]: row for row in json.loads((done / "results.json").read_text())["arms"]}
    by_turn = rows["loop"]["measures"]["cost"]["by_turn"]
    assert [row["turn"] for row in by_turn] == [1, 2, 3] and all(row["memory"]["process"] > 0 for row in by_turn)
    assert "preview" in by_turn[1]["seconds"] and "preview" not in by_turn[0]["seconds"]


def test_a_refiner_that_is_none_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_refiner.py").write_text("def Mine():\n    return 1\n")
    code, _, err = run("--arms", "single", *COMMON, "--refiner", "no_refiner:Mine", "--report", tmp_path / "b")
    assert code == 2 and "is no refiner: give an object with a method refine" in err


def test_best_of_2_takes_the_better_by_score(done):
    one, two = ([replace(t, scores={"score": said[t.id].score}) for t in load(done / arm)]
                for arm in ("single", "best-of-2") for said in [read_scores(done / arm)["verifier"]])  # fmt: skip
    scores = json.loads((done / "results.json").read_text())["scores"]["best-of-2"]["verifier"]
    assert scores == [max(a.scores["score"], b.scores["score"]) for a, b in zip(one, two)]
    better = arms.better(one[0], two[0], "score")
    assert better.meta["seconds"] == one[0].meta["seconds"] + two[0].meta["seconds"]  # it costs twice as much
    none = replace(two[0], scores={"score": None})
    assert arms.better(none, one[0], "score").id == one[0].id
    assert arms.better(one[0], none, "score").request == one[0].request
    assert arms.better(one[0], replace(one[0], image=None), "score").image is not None  # equal: the first


def test_page_and_printout(done, run):
    page = (done / "index.html").read_text()
    assert page.count('class="prompt"') == 3 and "right when needed" in page and "Shown are" not in page
    code, out, _ = run(*COMMON, "--report", done)
    assert code == 0 and all(re.search(rf"^{name} ", out, re.M) for name in NAMES)
    assert "loop minus arm, verifier-strict" in out and "better, " in out and str(done / "index.html") in out


def test_json_and_many_requests(done, run, tmp_path):
    code, out, _ = run(*COMMON, "--report", done, "--json")
    assert code == 0
    printed, written = json.loads(out), json.loads((done / "results.json").read_text())
    assert printed["arms"] == written["arms"] and printed["settings"]["n"] == 3 and "requests" not in printed
    code, out, err = run("--arms", "raw", "--n", "14", "--steps", "1", "--report", tmp_path / "b", "--json")
    assert code == 0, err
    row = json.loads(out)["arms"][0]
    assert row["n"] == 14 and "reference_minus_arm" not in row
    page = (tmp_path / "b" / "index.html").read_text()
    assert page.count('class="prompt"') == 12 and "the first 12 of 14 requests; the figures are of all" in page
    assert not (tmp_path / "b" / "single").exists()


def test_rivals_are_rendered_too(run, tmp_path):
    code, out, err = run("--arms", "best-of-2", *COMMON, "--n", "1", "--report", tmp_path / "b", "--json")
    assert code == 0, err
    assert [row["arm"] for row in json.loads(out)["arms"]] == ["best-of-2"]
    assert sorted(p.name for p in (tmp_path / "b").iterdir() if p.is_dir()) == ["best-of-2", "single"]


# --- taken up again -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(monkeypatch):
    """(arm's first turn schedule, requests) of everything that is rendered from now on."""
    calls = []

    def counting(pipe, requests, *args, **kwargs):
        calls.append(list(requests))
        return run_arm(pipe, requests, *args, **kwargs)

    monkeypatch.setattr(arms, "run_arm", counting)
    return calls


def cut_last_batch(folder):
    lines = (folder / FILE).read_bytes().splitlines(keepends=True)
    (folder / FILE).write_bytes(b"".join(lines[:2]))


def tear(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-300])


@pytest.mark.parametrize("damage", [cut_last_batch, tear])
def test_taken_up_where_it_stopped(run, copy, rendered, damage):
    before, pictures = without_timings(copy), [t.image.tobytes() for t in load(copy / "loop")]
    damage(copy / "loop")
    others = {p: c for p, c in contents(copy).items() if p.parts[0] in NAMES and p.parts[0] != "loop"}
    (copy / "results.json").unlink()
    code, _, err = run(*COMMON, "--report", copy)
    assert code == 0, err
    assert rendered == [[before["requests"][2]]]
    assert without_timings(copy) == before
    assert [t.image.tobytes() for t in load(copy / "loop")] == pictures  # as a whole: nothing torn is left in the file
    now = contents(copy)
    assert {p: now[p] for p in others} == others


def test_a_finished_run_loads_nothing(run, copy, monkeypatch):
    monkeypatch.setattr(named, "load_model", None)
    before = without_timings(copy)
    assert run(*COMMON, "--report", copy)[0] == 0
    assert without_timings(copy) == before


def test_stopped_midway(run, done, tmp_path, monkeypatch):
    calls = []

    def stop_at_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_arm(*args, **kwargs)

    options = ("--arms", "single,loop", *COMMON, "--report", tmp_path / "b")
    monkeypatch.setattr(arms, "run_arm", stop_at_third)
    assert run(*options)[0] == 130
    assert len(load(tmp_path / "b" / "single")) == 3 and not (tmp_path / "b" / "results.json").exists()
    code, _, err = run(*options)
    assert code == 0, err
    assert len(calls) == 5  # two batches of single, the one that was stopped, two of loop
    both, all_of_it = without_timings(tmp_path / "b"), without_timings(done)
    assert both["scores"] == {name: all_of_it["scores"][name] for name in ("single", "loop")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--n", "4"), "the settings differ: n is 3 there and 4 now"),
        (("--steps", "5"), "the settings differ: steps is 4 there and 5 now"),
        (("--refine-at", "start, 1"), "the settings differ: refine_at is start, 1, 2 there and start, 1 now"),
        (("--refiner", "none"), f"the settings differ: refiner is {ORACLE} there and none now"),
        (("--guidance-scale", "2"), "the settings differ: guidance_scale is 3.0 there and 2.0 now"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(run, copy, change, message):
    before = contents(copy)
    code, out, err = run(*COMMON, *change, "--report", copy)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert message in err and "nothing was changed" in err and "--report" in err
    assert contents(copy) == before


def test_other_versions_and_files_are_refused(run, copy, tmp_path, monkeypatch):
    manifest = json.loads((copy / "manifest.json").read_text())
    for part, key in (("versions", "torch"), ("files", "refiner files"), ("files", "embedded weights")):
        other = manifest | {part: manifest[part] | {key: "0"}}
        (copy / "manifest.json").write_text(json.dumps(other))
        code, _, err = run(*COMMON, "--report", copy)
        assert code == 2 and f"the {part} differ: {key} is 0 there and {manifest[part][key]} now" in err
    (copy / "manifest.json").write_text("{")
    assert "manifest.json is no JSON" in run(*COMMON, "--report", copy)[2]
    (copy / "manifest.json").unlink()
    assert "holds something, but no evaluation" in run(*COMMON, "--report", copy)[2]


def test_an_edited_refiner_is_another_one(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_refiner.py").write_text("from promptloop_pipeline import NoOpRefiner as Mine\n")
    options = ("--arms", "single", *COMMON, "--n", "1", "--refiner", "my_refiner:Mine", "--report", tmp_path / "b")
    assert run(*options)[0] == 0
    (tmp_path / "my_refiner.py").write_text("from promptloop_pipeline.tiny import OracleRefiner as Mine\n")
    assert "the files differ: refiner files is" in run(*options)[2]


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--benchmark", "cats"), "unknown benchmark 'cats'; there are: shapes"),
        (("--arms", "raw,lop"), f"unknown arm 'lop'; shapes has: {', '.join(NAMES)}"),
        (("--arms", " , "), "names no arm; shapes has: raw"),
        (("--arms", "raw,loop,raw"), "--arms names 'raw' twice; name each arm once"),
        (("--n", "0"), "--n 0: give a number from 1 up"),
        (("--n", "10001"), "--n 10001: the shapes benchmark has at most 10000 requests"),
        (("--steps", "0"), "--steps 0: give a number from 1 up"),
        (("--batch", "-1"), "--batch -1: give a number from 1 up"),
        (("--seed", "-1"), "--seed -1: give a number from 0 up"),
        (("--objects", "4"), "--objects 4: a request of the shapes benchmark names 1, 2 or 3 objects"),
        (("--refine-at", "often"), "cannot read 'often' as a refinement schedule"),
        (("--refine-at", "21"), "step 21 lies beyond this run of 20 steps"),
        (("--refiner", "no.such:thing"), "no.such"),
        (("--report", "file/sub"), "cannot write to the folder"),
        (("--report", "full"), "holds something, but no evaluation; choose another one with --report"),
        (("--compare", "a/results.json", "file"), "no results at a/results.json: --compare takes two results.json of"),
        (("--compare", "file", "file"), "file is no JSON"),
        (("--compare", "full/list.json", "full/list.json"), "list.json was not written by this version of `promptloop eval`"),
        (("--compare", "full/empty.json", "full/empty.json"), "empty.json holds no results of `promptloop eval`: it lacks settings"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(run, args, message, tmp_path, monkeypatch):
    monkeypatch.setattr(named, "load_model", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "list.json").write_text("[]")
    (tmp_path / "full" / "empty.json").write_text('{"version": 1}')
    (tmp_path / "file").write_text("in the way")
    before = contents(tmp_path)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


# --- comparison ---------------------------------------------------------------------------------------------------------


def test_compare_the_same_samples(run, done, tmp_path):
    options = ("--arms", "loop,gold", *COMMON, "--refiner", "promptloop_pipeline.tiny.refiners:SingleShotRefiner")
    assert run(*options, "--report", tmp_path / "b")[0] == 0
    code, out, _ = run("--compare", done / "results.json", tmp_path / "b")
    assert code == 0 and "differences are paired" in out and f"refiner: {ORACLE} / " in out
    code, out, _ = run("--compare", done, tmp_path / "b", "--json")
    found = json.loads(out)
    assert found["paired"] and set(found["differs"]) == {"refiner"}
    rows = {(row["arm"], row["figure"]): row for row in found["rows"]}
    assert rows["gold", "verifier"]["second_minus_first"] | {"paired": 0} == {
        "paired": 0, "mean": 0, "low": 0, "high": 0, "better": 0, "worse": 0, "n": 3,
    }  # fmt: skip
    scores = [json.loads((f / "results.json").read_text())["scores"]["loop"]["verifier"] for f in (done, tmp_path / "b")]
    assert rows["loop", "verifier"]["second_minus_first"]["mean"] == pytest.approx(np.mean(scores[1]) - np.mean(scores[0]))
    assert "second" not in rows["raw", "verifier-strict"] and "second_minus_first" not in rows["raw", "verifier-strict"]
    assert "second" not in rows["loop", "right when needed"]  # that refiner does not look


def results_of(requests, **scores):
    rows = [{"arm": name} for name in scores]
    return {
        "settings": {"n": len(requests)}, "requests": requests, "seeds": list(range(len(requests))), "arms": rows,
        "scores": {name: {"strict": values} for name, values in scores.items()},
    }  # fmt: skip


def test_compare_other_samples():
    rng = np.random.default_rng(0)
    one = results_of([f"a{k}" for k in range(400)], loop=rng.normal(0, 1, 400))
    two = results_of([f"b{k}" for k in range(300)], loop=rng.normal(1, 1, 300))
    found = figures.compare(one, two)
    d = found["rows"][0]["second_minus_first"]
    assert not found["paired"] and not d["paired"] and found["differs"] == {"n": [400, 300]}
    assert d["low"] < 1 < d["high"] and d["high"] - d["low"] == pytest.approx(2 * 1.96 * np.sqrt(1 / 400 + 1 / 300), rel=0.15)
    assert figures.compare(one, one)["rows"][0]["second_minus_first"]["high"] == 0
    nothing = results_of(["b"], loop=[None])
    assert figures.compare(one, nothing)["rows"][0]["second_minus_first"] is None


def test_means():
    for hits, n, low, high in ((0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1)):  # Wilson's, from a table
        found = statistics.mean([1.0] * hits + [0.0] * (n - hits))
        assert (found["mean"], found["n"]) == (hits / n, n)
        assert (found["low"], found["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert statistics.mean([0.25, 0.75, None])["n"] == 2 and statistics.mean([None])["mean"] is None
    assert statistics.difference([None, 1.0, 3.0], [1.0, None, 2.0], paired=True)["n"] == 1
    assert statistics.difference([None], [1.0], paired=True) is None


# --- the arms -----------------------------------------------------------------------------------------------------------

REQUEST = "a large red circle left of a large blue square on black, nothing else"
GOLD = single_shot(REQUEST)
SPEC = plan(parse(REQUEST))
FREE = free_cells(SPEC.objects)


def test_schedules_are_those_of_the_headroom_measurement():
    for ours, theirs in ((shapes.LATE, headroom.ROTATIONS["late"]), (shapes.EARLY, headroom.LOOKS["look 2..11"])):
        assert RefinementSchedule.parse(ours).steps(20) == RefinementSchedule.parse(theirs).steps(20)
    assert OracleRefiner().threshold == shapes.THRESHOLD


def test_grey_hides_the_picture_and_the_record_keeps_it():
    seen = []

    def spy(view):
        seen.append([view.image, *(t.image for t in view.turns)])

    pipe = tiny.load_pipeline("sd")
    kept = []
    for refiner in (arms.GreyRefiner(FunctionRefiner(spy)), FunctionRefiner(lambda view: None)):
        (t,) = run_arm(pipe, [GOLD], [0], refiner, "start, 2, 3", score=lambda t: {}, num_inference_steps=4)
        kept.append([turn.image and turn.image.tobytes() for turn in t.turns])
    pictures = [image for images in seen for image in images if image is not None]
    assert [len(images) for images in seen] == [1, 2, 3] and len(pictures) == 3  # none at the start
    assert all(image.getcolors() == [(32 * 32, (128, 128, 128))] for image in pictures)
    assert kept[0] == kept[1] and kept[0][0] is None
    assert all(len(set(image)) > 50 for image in kept[0][1:])
    assert arms.GreyRefiner(NoOpRefiner()).looks is False


def blind_prompts(caption, steps=5):
    """What the blind arm says, turn by turn, after a refiner that says `caption` at the start."""
    refiner, turns = shapes.BlindRefiner(FunctionRefiner(lambda view: caption)), ()
    for step in range(steps):
        prompt = turns[-1].after if turns else REQUEST
        (answer,) = refiner.refine([View(REQUEST, prompt, step, steps, turns=turns)])
        turns += (Turn(step, steps, prompt, answer.prompt or prompt),)
    return [t.after for t in turns]


def test_blind_forbids_the_free_cells_of_the_refiners_own_caption_in_turn():
    assert shapes.BlindRefiner(NoOpRefiner()).looks is False
    said = blind_prompts(GOLD, 10)
    assert said[0] == GOLD and [parse(p).clear for p in said[1:9]] == [(FREE[k],) for k in (0, 3, 6, 1, 4, 7, 2, 5)]
    rotation, turns = RotationRefiner("spread", from_start=False), ()
    for step in range(10):  # with the gold caption it is headroom's own
        (answer,) = rotation.refine([View(REQUEST, REQUEST, step, 10, turns=turns)])
        assert answer.prompt == said[step]
        turns += (Turn(step, 10, "", answer.prompt),)
    own = "small green cross bottom left , white background"
    spoken = [parse(p) for p in blind_prompts(own)]
    assert all(s.objects == parse(own).objects and s.background == "white" for s in spoken)
    assert all(len(s.clear) == 2 and set(s.clear) <= set(free_cells(s.objects)) for s in spoken[1:])


@pytest.mark.parametrize(
    "caption",
    [
        "a lovely sunset", "a red circle , black background", None,
        " , ".join(f"large red circle {q}" for q in ("top left", "top right", "bottom left", "bottom right")),
    ],
)  # fmt: skip
def test_blind_keeps_what_it_cannot_read(caption):
    assert blind_prompts(caption) == [caption or REQUEST] * 5


def test_blind_hands_the_first_answer_on_whole():
    said = Refinement(None, "why", "raw", (1,), (-0.5,), "failed")
    assert shapes.BlindRefiner(FunctionRefiner(lambda view: said)).refine([View(REQUEST, REQUEST, 0, 4)]) == [said]


# --- single looks -------------------------------------------------------------------------------------------------------

A, B = FREE[0], FREE[5]


def look(after, before=GOLD, stickers=(A,), request=REQUEST, **more):
    picture = Image.fromarray(render(Scene(SPEC.objects, SPEC.background, stickers), random.Random(0)))
    return shapes.judge_look(request, Turn(4, 20, before, after, 1.0, picture, **more))


def test_single_looks():
    to_a, to_b = with_clear(GOLD, (A,)), with_clear(GOLD, (B,))
    taken = next(c for c in shapes.free_cells(()) if c not in FREE)
    moved = to_a.replace("red", "green")
    judged = {
        "right, and the oracle's": (look(to_a), (True, True, True, True)),
        "kept": (look(GOLD), (True, False, False, False)),
        "an empty cell": (look(to_b), (True, True, False, False)),
        "an object's cell": (look(with_clear(GOLD, (taken,))), (True, True, False, False)),
        "an object changed": (look(moved), (True, True, False, False)),
        "background changed": (look(to_a.replace("black", "white")), (True, True, False, False)),
        "more than the language has": (look(to_a + " , please"), (True, True, False, False)),
        "nonsense": (look("what a picture"), (True, True, False, False)),
        "forbidden before": (look(to_a, before=to_a), (False, False, False, True)),
        "taken back while it is there": (look(GOLD, before=to_a), (False, True, False, False)),
        "taken back": (look(GOLD, before=to_a, stickers=(B,)), (True, True, False, False)),
        "nothing to see": (look(GOLD, stickers=()), (False, False, False, True)),
        "a change with nothing to see": (look(to_a, stickers=()), (False, True, False, False)),
        "stickers welcome": (look(GOLD, request=REQUEST.removesuffix(", nothing else")), (False, False, False, True)),
    }
    for name, (found, expected) in judged.items():
        assert (found.needed, found.changed, found.right, found.agrees) == expected, name
    both = [look(with_clear(GOLD, (cell,)), stickers=(A, B)) for cell in (A, B)]
    assert all(x.needed and x.right for x in both) and [x.agrees for x in both].count(True) == 1  # one is the larger


def test_the_oracle_is_the_oracle(done):
    turns = [
        (t.request, turn) for name in ("loop", "loop-noimage") for t in load(done / name) for turn in t.turns if turn.image
    ]
    assert len(turns) == 12
    for request, turn in turns:
        (answer,) = OracleRefiner().refine([View(request, turn.before, turn.step, 4, turn.sigma, turn.image)])
        assert shapes.oracle_prompt(request, turn.image) == answer.prompt


def look_figures(*trajectories):
    said = ask_why(shapes.looks, [None] * len(trajectories), [REQUEST] * len(trajectories), trajectories=trajectories)
    return shapes.look_figures([json.loads(json.dumps(j.details)) for j in said])


def test_turn_figures():
    to_a = with_clear(GOLD, (A,))
    sticker, clean = (Image.fromarray(render(Scene(SPEC.objects, "black", s), random.Random(0))) for s in ((A,), ()))
    start = Turn(0, 20, REQUEST, GOLD)
    good = Trajectory(REQUEST, [start, Turn(2, 20, GOLD, to_a, 1.0, sticker), Turn(3, 20, to_a, to_a, 1.0, clean)])
    bad = Trajectory(REQUEST, [start, Turn(2, 20, GOLD, GOLD, 1.0, sticker, error="late"), Turn(3, 20, GOLD, to_a, 1.0, clean)])
    found = look_figures(good, bad)
    counts = {name: (f["count"], f["of"], f["mean"]) for name, f in found.items()}
    assert counts == {
        "change needed": (2, 4, 0.5), "right when needed": (1, 2, 0.5),
        "changed without need": (1, 2, 0.5), "as the oracle": (2, 4, 0.5),
    }  # fmt: skip
    assert (found["right when needed"]["low"], found["right when needed"]["high"]) == (0, 1)
    assert look_figures(Trajectory(REQUEST, [start]), Trajectory(REQUEST)) == {}
    nothing = look_figures(Trajectory(REQUEST, [Turn(3, 20, GOLD, GOLD, 1.0, clean)]))
    assert nothing["right when needed"] == {"mean": None, "low": None, "high": None, "count": 0, "of": 0}


def test_intervals_are_over_samples_not_turns():
    """Ten turns of a sample that all go one way say no more than one of them."""
    alike = statistics.share([10, 0] * 20, [10] * 40)
    single = statistics.share([1, 0] * 20, [1] * 40)
    assert (alike["low"], alike["high"]) == (single["low"], single["high"]) and alike["of"] == 400
    assert 0.3 < alike["low"] < 0.4 and 0.6 < alike["high"] < 0.7


@pytest.mark.parametrize("around", [arms.GreyRefiner, arms.UnseeingRefiner, shapes.BlindRefiner])
def test_a_host_stops_the_refiner_within(around):
    class Thinking(NoOpRefiner):
        on_token = None

    inner = Thinking()
    outer = around(inner)
    outer.on_token = print
    assert inner.on_token is print is outer.on_token
    assert outer.looks == (around is arms.GreyRefiner and inner.looks)
