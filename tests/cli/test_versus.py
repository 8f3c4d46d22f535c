"""`promptloop eval --versus`: other refiners beside the one under test."""

import json
import shutil

import pytest

from promptloop_pipeline.cli import named
from promptloop_pipeline.cli.versus import parse_versus
from promptloop_pipeline.evaluation.scoring import SCORES
from promptloop_pipeline.trajectory import load

from ..chat import models
from ..chat.server import Server
from ..evaluation.test_eval import ORACLE, contents, copy, cut_last_batch, finished, rendered, run, without_timings  # noqa: F401

GOLD = "promptloop_pipeline.tiny.refiners:SingleShotRefiner"
COMMON = (
    "--n",
    "3",
    "--steps",
    "4",
    "--batch",
    "2",
    "--refiner",
    ORACLE,
    "--refine-at",
    "start, 1, 2",
    "--arms",
    "single,loop",
)
OTHERS = ("--versus", f"same={ORACLE}", "--versus", f"once={ORACLE}@start", "--versus", f"gold.too={GOLD}@start, 50%")
NAMES = ["single", "loop", "same", "once", "gold.too"]
MODULE = """
import gc, weakref
from promptloop_pipeline import Refinement
alive, most = weakref.WeakSet(), []

class Large:
    word = "large"

    def __init__(self):
        self.me = self  # as in models: it goes only when the collector comes
        alive.add(self)
        most.append(len(alive))

    def refine(self, views):
        assert list(alive) == [self]
        return [Refinement(f"{self.word} red circle") for _ in views]

class Small(Large):
    word = "small"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run; not to be changed."""
    return finished(tmp_path_factory.mktemp("done") / "eval", *COMMON, *OTHERS)


def pictures(folder):
    return [(t.image.tobytes(), t.prompt, [(turn.step, turn.after, turn.raw) for turn in t.turns]) for t in load(folder)]


# --- what is asked for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=tiny", ("tiny", None)),
        (" a = tiny @ start , 20% ", ("tiny", "start, 20%")),
        ("a=owner/model@every 4", ("owner/model", "every 4")),
        ("a=http://localhost:8000/v1?x=1@20%, 50%", ("http://localhost:8000/v1?x=1", "20%, 50%")),
        ("a=localhost:8000@start", ("localhost:8000", "start")),
        ("a=https://me:k@y@host/v1", ("https://me:k@y@host/v1", None)),  # whatever it is, it is no schedule
        ("a=m.n:Mine@none", ("m.n:Mine", "none")),
        ("a=there@v2", ("there@v2", None)),  # a folder
        ("a=there@v2@start", ("there@v2", "start")),
        ("a=b=c@6", ("b=c", "6")),
        ("a=run@6/", ("run@6/", None)),
        ("a=run/@6", ("run/", "6")),
        ("a=runs@home/run", ("runs@home/run", None)),
        ("a=runs@home/run@6", ("runs@home/run", "6")),
    ],
)
def test_what_can_be_written(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there@v2", "run@6", "run"):
        (tmp_path / name).mkdir()
    assert parse_versus([text], ["raw"]) == {"a": expected}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tiny"], "cannot read --versus 'tiny'; write NAME=REFINER or NAME=REFINER@SCHEDULE"),
        (["a="], "cannot read --versus 'a='"),
        (["http://me:secret@host/v1"], r"cannot read --versus 'http://\*\*\*@host/v1'"),
        (["=tiny"], "'' cannot be an arm's name"),
        (["a/b=tiny"], "'a/b' cannot be an arm's name, which is a folder's too"),
        (["..=tiny"], "'..' cannot be an arm's name"),
        (["a.=tiny"], "'a.' cannot be an arm's name"),
        (["Results.json=tiny"], "'Results.json' cannot be an arm's name"),
        ([f"{'a' * 65}=tiny"], "cannot be an arm's name"),
        (["Raw=tiny"], "this benchmark has an arm raw of its own; choose another name"),
        (["a=tiny", "A=none"], "--versus names 'A' twice; give each arm a name of its own"),
        (["a=tiny@often"], "--versus a: what follows the last @ is its schedule, and cannot read 'often'"),
        (["a=tiny@"], "--versus a: what follows the last @ is its schedule, and cannot read ''"),
        (["a=http://me:secret@host"], "--versus a: what follows the last @ is its schedule, and cannot read 'host'"),
        (["a=@start"], "--versus a: there is no refiner before the @; write a=REFINER@start"),
        (["a=run@6"], "a=run@6: this is a folder, and could be run at 6 too; write run@6/ for the folder, or run/@6 for the schedule"),
    ],
)  # fmt: skip
def test_what_cannot(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run@6").mkdir()
    with pytest.raises(ValueError, match=message) as caught:
        parse_versus(given, ["raw"])
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--versus", "loop=tiny"), "this benchmark has an arm loop of its own"),
        (("--versus", "a=clever"), "unknown refiner 'clever'; use"),
        (("--versus", "a=./nowhere"), "there is no model at"),
        (("--versus", "a=empty"), "empty"),
        (("--versus", "a=no.json@start"), "no prompt schedule at no.json"),
        (("--versus", "a=no.such:thing"), "cannot load the refiner 'no.such:thing'"),
        (("--versus", "a=owner/model", "--template", "nice"), "there is no template 'nice'"),
        (("--versus", "a=tiny@21"), "step 21 lies beyond this run of 20 steps"),
        (("--versus", "a=127.0.0.1:9"), "--versus a=127.0.0.1:9: give --server-model too"),
        (("--refiner", "127.0.0.1:9"), "--refiner 127.0.0.1:9: give --server-model too"),
        (("--versus", "a=http://me:secret@host/v1", "--server-model", "x"), "url is 'http://***@host/v1'"),
    ],
)
def test_told_before_anything_loads(run, args, message, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(named, "load_model", None)
    monkeypatch.setattr("promptloop_pipeline.tiny.load_refiner", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1 and "secret" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


# --- the run ------------------------------------------------------------------------------------------------------------


def test_an_arm_is_its_refiner_at_its_schedule(done):
    assert pictures(done / "same") == pictures(done / "loop") and pictures(done / "once") == pictures(done / "single")
    assert [turn.step for turn in load(done / "gold.too")[0].turns] == [0, 2]
    results = without_timings(done)
    rows = {row["arm"]: row for row in results["arms"]}
    assert list(rows) == list(results["scores"]) == NAMES and results["reference"] == "loop"
    assert results["scores"]["same"] == results["scores"]["loop"]
    assert rows["once"]["reference_minus_arm"] == rows["single"]["reference_minus_arm"]
    assert rows["same"]["note"] == f"the refiner {ORACLE} at the schedule of loop"
    assert rows["once"]["note"] == f"the refiner {ORACLE} at start"
    assert [of["refine_at"] for of in results["versus"].values()] == ["start, 1, 2", "start", "start, 50%"]
    page = (done / "index.html").read_text()
    assert all(f"<dt dir=\"auto\">{name}</dt>" in page for name in NAMES)  # fmt: skip


def test_arms_come_and_go(run, done, tmp_path, rendered):  # noqa: F811
    """One after the other, in any order, makes what all at once make."""
    folder, later = tmp_path / "b", {}
    for k, others in enumerate((("--versus", f"same={ORACLE}"), OTHERS[4:], (), OTHERS)):
        rendered.clear()
        code, _, err = run(*COMMON, *others, "--report", folder)
        assert code == 0, err
        assert len(rendered) == (6, 2, 0, 2)[k]  # of two batches each
        now = {p: c for p, c in contents(folder).items() if len(p.parts) > 1}
        assert {p: now[p] for p in later} == later  # nothing is lost, or written again
        later = now
    a, b = without_timings(folder), without_timings(done)
    assert a == b and [pictures(folder / name) for name in NAMES] == [pictures(done / name) for name in NAMES]
    manifests = [json.loads((f / "manifest.json").read_text()) for f in (folder, done)]
    assert manifests[0] == manifests[1]


def test_taken_up_where_it_stopped(run, copy, done, rendered):  # noqa: F811
    cut_last_batch(copy / "gold.too")
    assert run(*COMMON, *OTHERS, "--report", copy)[0] == 0
    assert len(rendered) == 1 and without_timings(copy) == without_timings(done)
    assert pictures(copy / "gold.too") == pictures(done / "gold.too")


def test_a_refiner_is_loaded_to_render_only(run, copy, done, monkeypatch):  # noqa: F811
    (copy / "same" / SCORES).unlink()
    monkeypatch.setattr(named, "load_refiner", lambda *args: pytest.fail("it was loaded"))
    code, _, err = run(*COMMON, *OTHERS, "--report", copy)
    assert code == 0, err
    assert without_timings(copy) == without_timings(done)


def test_of_arms_alone(run, tmp_path, rendered):  # noqa: F811
    args = ("--n", "1", "--steps", "2", "--arms", "raw", "--versus", f"a={GOLD}@start", "--report", tmp_path / "b")
    code, _, err = run(*args, "--refine-at", "1")
    assert code == 0, err
    results = without_timings(tmp_path / "b")
    assert results["settings"]["refiner"] is None and results["reference"] == "a"
    rendered.clear()
    (tmp_path / "t.txt").write_text("Source: here\n[user]\n{image}\n")
    assert run(*args, "--refine-at", "2", "--template", tmp_path / "t.txt")[0] == 0  # what no arm reads does not matter
    assert run(*args, "--arms", "raw")[0] == 0 and not rendered
    assert run(*args, "--arms", "raw,loop", "--refiner", ORACLE, "--refine-at", "1")[0] == 0  # it has a refiner now
    assert len(rendered) == 1
    assert run(*args, "--refine-at", "1", "--template", tmp_path / "t.txt")[0] == 0 and len(rendered) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (f"once={GOLD}@start", f"the settings of once differ: refiner is {ORACLE} there and {GOLD} now"),
        (f"once={ORACLE}", "the settings of once differ: refine_at is start there and start, 1, 2 now"),
    ],
)
def test_an_arm_made_of_something_else_is_refused(run, copy, change, message):  # noqa: F811
    before = contents(copy)
    code, out, err = run(*COMMON, "--versus", change, "--report", copy)
    assert (code, out) == (2, "") and message in err and "nothing was changed" in err and err.count("\n") == 1
    assert contents(copy) == before


def test_an_edited_refiner_is_refused_even_after_it_was_left_out(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited.py").write_text(MODULE)
    args = ("--n", "1", "--steps", "2", "--refine-at", "1", "--arms", "raw", "--report", tmp_path / "b")
    assert run(*args, "--versus", "a=edited:Large")[0] == 0
    assert run(*args)[0] == 0
    (tmp_path / "edited.py").write_text(MODULE + "\n")
    assert "the settings of a differ: refiner files is" in run(*args, "--versus", "a=edited:Large")[2]


def test_what_never_rendered_may_be_corrected(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks.py").write_text("def Mine():\n    pass\nclass Broken:\n    def __init__(self):\n        1 / 0\n")
    args = ("--n", "1", "--steps", "2", "--refine-at", "1", "--arms", "raw", "--report", tmp_path / "b")
    code, _, err = run(*args, "--versus", "a=breaks:Mine")
    assert code == 2 and "is no refiner" in err
    code, _, err = run(*args, "--versus", f"a={GOLD}")
    assert code == 0, err


def test_one_refiner_in_memory_at_a_time(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "counted.py").write_text(MODULE)
    args = ("--n", "2", "--steps", "2", "--batch", "1", "--refine-at", "1", "--report", tmp_path / "b")
    others = ("--versus", "a=counted:Small", "--versus", "b=counted:Large@start")
    code, _, err = run(*args, "--arms", "best-of-2,loop", "--refiner", "counted:Large", *others)  # and single, for best-of-2
    assert code == 0, err
    import counted

    assert counted.most == [1, 1, 1]
    said = {arm: load(tmp_path / "b" / arm)[0].prompt for arm in ("single", "loop", "best-of-2", "a", "b")}
    assert said == {arm: "small red circle" if arm == "a" else "large red circle" for arm in said}
    assert all(not t.failures for arm in said for t in load(tmp_path / "b" / arm))


# --- what they are told -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model as `promptloop train` keeps it, with its template, and the same one without."""
    folder = models.save(models.idefics3, tmp_path_factory.mktemp("models") / "bare")
    kept = shutil.copytree(folder, folder.with_name("kept"))
    (kept / named.TEMPLATE).write_text(
        "Source: here\nmax_new_tokens: 5\n[user]\n{image} {request}\n[user without image]\nSay {request}\n"
    )
    return folder, kept


def test_what_a_model_is_told(run, saved, tmp_path, monkeypatch):  # noqa: F811
    bare, kept = saved
    (tmp_path / "other.txt").write_text("Source: there\nmax_new_tokens: 3\n[user]\n{prompt}\n")
    args = ("--n", "1", "--steps", "2", "--refine-at", "start, 1", "--arms", "loop", "--report")
    own, nothing = ("--versus", f"kept={kept}"), ("--versus", f"told.nothing={GOLD}")
    given = ("--template", tmp_path / "other.txt", "--versus", f"bare={bare}", *own, *nothing)
    for name, more in (
        ("own", ("--refiner", kept, *own)),
        ("given", ("--refiner", kept, *given)),
        ("gold", ("--refiner", GOLD, *given)),
    ):
        code, _, err = run(*args, tmp_path / name, *more)
        assert code == 0, err
    said = {(f.parent.name, f.name): pictures(f) for f in tmp_path.glob("*/*") if f.is_dir()}
    tokens = {key: [turn.tokens for turn in load(tmp_path / "/".join(key))[0].turns] for key in said}
    assert said["own", "loop"] == said["own", "kept"] == said["given", "kept"] == said["gold", "kept"]  # its own words
    assert said["given", "loop"] == said["given", "bare"] == said["gold", "bare"]  # those that are given
    assert tokens["own", "loop"] == [5, 5] and tokens["given", "loop"] == [3, 3]
    assert said["given", "told.nothing"] == said["gold", "loop"]
    monkeypatch.chdir(kept.parent)
    code, _, err = run(*args, tmp_path / "own", "--refiner", "kept", "--template", f"kept/{named.TEMPLATE}", *own)
    assert code == 0, err  # its own, by name
    made_of = json.loads((tmp_path / "given" / "manifest.json").read_text())["versus"]
    assert made_of["kept"]["template"] == str(kept / named.TEMPLATE) and "template file" not in made_of["told.nothing"]
    (tmp_path / "other.txt").write_text("Source: there\nmax_new_tokens: 3\n[user]\nnow {prompt}\n")
    code, _, err = run(*args, tmp_path / "gold", "--refiner", GOLD, *given)
    assert code == 2 and "the settings of bare differ: template file is" in err


def test_a_server(run, tmp_path):  # noqa: F811
    with Server("well", answer="<answer>large blue circle top left , black background</answer>") as server:
        args = ("--n", "1", "--steps", "2", "--arms", "raw", "--report", tmp_path / "b")
        code, _, err = run(*args, "--versus", f"asked={server.url}@1", "--server-model", "tiny-vlm")
        assert code == 0, err
        bare = server.url.removeprefix("http://")
        code, _, err = run(*args[:-1], tmp_path / "c", "--versus", f"asked={bare}@1", "--server-model", "tiny-vlm")
    assert code == 0, err
    assert load(tmp_path / "c" / "asked")[0].prompt == load(tmp_path / "b" / "asked")[0].prompt
    (t,) = load(tmp_path / "b" / "asked")
    assert t.prompt == "large blue circle top left , black background" and server.requests[0]["model"] == "tiny-vlm"


def test_two_results_say_which_refiners(run, done, tmp_path):  # noqa: F811
    assert run(*COMMON, "--versus", f"once={GOLD}@start", "--report", tmp_path / "b")[0] == 0
    out = run("--compare", done, tmp_path / "b")[1]
    assert f"once, refiner: {ORACLE} / {GOLD}" in out and "once, refine_at" not in out and "same, refiner: " in out
