import json

import numpy as np
import pytest
from PIL import Image

from promptloop_pipeline import Trajectory, Turn
from promptloop_pipeline.trajectory import FILE, VERSION, load, save


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def same(a: Image.Image | None, b: Image.Image | None) -> bool:
    return (a is None and b is None) or (a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes())


def example() -> Trajectory:
    turns = [
        Turn(0, 8, "a cat", "a black cat", raw="\u2028<answer>a black cat</answer>\n"),
        Turn(
            3, 8, "a black cat", "a black cat, \U0001f408 'quoted' \"text\"", 0.12345678901234567, picture(1), "no tail", "raw",
            (1, 2, 3), (-0.1, -1e-17, -2.5), None, None, {"refiner": 0.25},
        ),
        Turn(6, 8, "x", "x", 0.5, picture(2), error="TimeoutError: no answer", boundary="refiner"),
    ]  # fmt: skip
    return Trajectory("a cat", turns, picture(3), {"verifier": 0.5, "ocr": None}, {"seed": 7, "pipeline": "X"})


def test_read_back_without_loss(tmp_path):
    written = [example(), Trajectory("no turns")]
    save(written[:1], tmp_path)
    save(written[1:], tmp_path)  # appends
    for path in (tmp_path, tmp_path / FILE):
        read = load(path)
        assert len(read) == 2
        for a, b in zip(written, read, strict=True):
            assert (a.request, a.scores, a.meta, a.id, len(a.turns)) == (b.request, b.scores, b.meta, b.id, len(b.turns))
            assert same(a.image, b.image)
            for s, t in zip(a.turns, b.turns, strict=True):
                assert same(s.image, t.image)
                assert {k: v for k, v in vars(s).items() if k != "image"} == {k: v for k, v in vars(t).items() if k != "image"}


def test_properties():
    t = example()
    assert [turn.changed for turn in t.turns] == [True, True, False]
    assert t.failures == [t.turns[2]]
    assert t.prompt == "x"
    assert Trajectory("request").prompt == "request"


def test_a_record_that_lacks_fields_gets_their_defaults(tmp_path):
    turn = {"step": 1, "num_steps": 4, "before": "a", "after": "b"}
    (tmp_path / FILE).write_text(json.dumps({"version": 1, "request": "a", "turns": [turn]}) + "\n")
    (read,) = load(tmp_path)
    assert read.turns == [Turn(1, 4, "a", "b")]
    assert (read.scores, read.meta, read.image) == ({}, {}, None)


def test_newer_version_is_refused_by_name(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"version": VERSION + 1, "request": "a"}) + "\n")
    with pytest.raises(ValueError, match=rf"line 1: trajectory version {VERSION + 1} is newer than {VERSION}.*upgrade"):
        load(tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"version": 1}', '{"version": 1, "request": "a", "turns": [{"step": 1}]}'])
def test_broken_line_is_named(tmp_path, line):
    save([Trajectory("fine")], tmp_path)
    with open(tmp_path / FILE, "a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2: not a trajectory"):
        load(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trajectories at .*nowhere: expected a folder with trajectories.jsonl"):
        load(tmp_path / "nowhere")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write trajectories to .*file.*choose a folder"):
        save([example()], tmp_path / "file")


def test_nothing_is_written_over(tmp_path):
    save([Trajectory("a", image=picture(1), id="x")], tmp_path)
    save([Trajectory("b", image=picture(2), id="x")], tmp_path)
    assert [same(t.image, picture(k)) for k, t in enumerate(load(tmp_path), 1)] == [True, True]


def test_what_json_does_not_know(tmp_path):
    odd = Trajectory("lone \ud800 surrogate", scores={"s": np.float32(0.5), "n": float("nan")}, meta={"path": tmp_path})
    save([Trajectory("before"), odd, Trajectory("after")], tmp_path)
    before, read, after = load(tmp_path)
    assert (before.request, read.request, after.request) == ("before", odd.request, "after")
    assert read.scores["s"] == 0.5 and read.scores["n"] != read.scores["n"]
    assert read.meta == {"path": str(tmp_path)}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "F"])
def test_pictures_of_any_mode(tmp_path, mode):
    image = picture(1).convert("L").convert(mode) if mode == "F" else picture(1).convert(mode)
    save([Trajectory("a", image=image)], tmp_path)
    (read,) = load(tmp_path)
    assert same(read.image, image if mode in ("L", "RGBA", "P") else image.convert("RGB"))


def test_a_line_torn_off_in_writing_costs_only_itself(tmp_path, caplog):
    file = save([Trajectory("whole"), Trajectory("torn")], tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    assert [t.request for t in load(tmp_path)] == ["whole"]
    assert "line 2 was torn off" in caplog.text
    save([Trajectory("next")], tmp_path)
    file.write_text("\n".join(line for line in file.read_text().split("\n") if "torn" not in line))
    assert [t.request for t in load(tmp_path)] == ["whole", "next"]


def test_a_record_reaches_no_other_files(tmp_path):
    picture(1).save(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="cannot name files"):
        save([Trajectory("a", image=picture(1), id="../../escaped")], tmp_path / "run")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / FILE).write_text(json.dumps({"version": 1, "request": "a", "image": name}) + "\n")
        with pytest.raises(ValueError, match="line 1: the picture .* lies outside"):
            load(tmp_path / "run")


def test_a_picture_that_is_gone_is_named_with_its_line(tmp_path):
    t = Trajectory("a", image=picture(1))
    save([t], tmp_path)
    (tmp_path / "images" / f"{t.id}.png").unlink()
    with pytest.raises(ValueError, match=rf"line 1: .*{t.id}"):
        load(tmp_path)


def test_all_fields_of_a_turn_and_other_runs_are_read_back(tmp_path):
    fields = {"tokens": 17, "format_ok": False, "notes": ("cut", "kept \u2028 as it was"), "applied": 5}
    turns = [Turn(3, 8, "a", "b", **fields), Turn(8, 8, "b", "b", format_ok=True, applied=0), Turn(4, 8, "b", "c")]
    other = Trajectory("a", [Turn(1, 8, "a", "d", image=picture(1), notes=("x",))], picture(2), {"r": 0.5}, {"round": 1})
    nested = Trajectory("a", image=picture(3), others=[Trajectory("a", image=picture(4)), other])
    written = Trajectory("a", turns, picture(5), {"r": 1.0}, {"round": 2}, [nested, Trajectory("a")])
    save([written, written], tmp_path)
    for read in load(tmp_path):
        assert read.turns == turns
        assert [type(t.notes) for t in read.turns] == [tuple] * 3
        for a, b in zip(_all(written), _all(read), strict=True):
            assert (a.request, a.scores, a.meta, a.id, len(a.turns)) == (b.request, b.scores, b.meta, b.id, len(b.turns))
            assert same(a.image, b.image)
            assert all(same(s.image, t.image) and s.notes == t.notes for s, t in zip(a.turns, b.turns, strict=True))


def _all(t: Trajectory) -> list[Trajectory]:
    return [t, *(found for other in t.others for found in _all(other))]
