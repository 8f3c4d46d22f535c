"""The guard: what it measures, what it learns, what it refuses; pictures are synthetic or of the embedded generator."""

import io
import json
import math
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import load_file, save_file

from promptloop_pipeline.rewards import artifact, load_reward
from promptloop_pipeline.rewards.artifact import STATISTICS, Artifact, Head, fit, statistics

from . import models

read = partial(Artifact.from_pretrained, device="cpu")


def textured(seed, noise=2.0, size=(32, 32)):
    """A smooth picture with so much noise in it."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(40, 215, (4, 4, 3)).astype(np.uint8))
    smooth = np.asarray(rough.resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + rng.normal(0, noise, smooth.shape)).clip(0, 255).astype(np.uint8))


def half_white(seed, left):
    """Noise, bright on one side: the two sides differ in nothing that a mirror keeps."""
    a = np.random.default_rng(seed).integers(0, 100, (32, 32, 3))
    a[:, :16] += 150
    return Image.fromarray((a if left else a[:, ::-1]).astype(np.uint8))


@pytest.fixture
def folders(tmp_path):
    """Sharp pictures and noisy ones, 24 of each."""
    for name, noise, first in (("good", 1.0, 0), ("bad", 6.0, 100)):
        (tmp_path / name).mkdir()
        for k in range(24):
            textured(first + k, noise).save(tmp_path / name / f"{k:02}.png")
    return tmp_path / "good", tmp_path / "bad"


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A CLIP, the same one elsewhere in half precision, another of its width, and one of another width."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    found = [models.clip_model(folder / "first"), folder / "half", folder / "other", folder / "wide"]
    transformers.CLIPModel.from_pretrained(found[0]).half().save_pretrained(found[1])
    torch.manual_seed(1)
    for place, width in zip(found[2:], (24, 32)):
        config = transformers.CLIPConfig.from_pretrained(found[0])
        config.projection_dim = width
        transformers.CLIPModel(config).save_pretrained(place)
    return found


# --- statistics ---------------------------------------------------------------------------------------------------------


def measured(array):
    return dict(zip(STATISTICS, statistics(Image.fromarray(np.asarray(array, np.uint8))).tolist(), strict=True))


def test_statistics_of_known_pictures():
    grey = measured(np.full((16, 24, 3), 51))
    assert grey["edges 1 px"] == grey["diagonals 4 px"] == grey["noise"] == -11  # log2 of an eighth of a grey level
    assert grey["brightness"] == pytest.approx(0.2) and grey["contrast"] == pytest.approx(0, abs=1e-6)
    assert grey["colour"] == grey["black"] == grey["white"] == grey["clipped channels"] == grey["blockiness"] == 0

    board = measured(np.indices((16, 16)).sum(0)[..., None].repeat(3, 2) % 2 * 255)
    assert board["diagonals 1 px"] == pytest.approx(math.log2(0.5), abs=2e-3) and board["edges 1 px"] == -11
    assert (board["black"], board["white"], board["clipped channels"]) == (0.5, 0.5, 1)

    stripes = measured(np.indices((16, 16))[1][..., None].repeat(3, 2) // 2 % 2 * 255)
    assert stripes["edges 1 px"] == -11 and stripes["edges 2 px"] == pytest.approx(-1, abs=2e-3)

    red = np.zeros((16, 16, 3))
    red[:8, :, 0] = 255
    red = measured(red)
    assert (red["colour"], red["strongest colour"], red["black"], red["white"]) == (0.5, 1, 0.5, 0)


def test_blockiness_is_of_blocks_of_eight():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    assert measured(blocks)["blockiness"] > 2.5
    assert measured(np.roll(blocks, 4, (0, 1)))["blockiness"] < -1
    assert abs(measured(rng.integers(0, 255, (64, 64, 3)))["blockiness"]) < 0.3


def test_statistics_are_of_pixels_and_not_of_the_size(monkeypatch):
    small = textured(0, 8.0, (64, 64))
    wide = Image.fromarray(np.tile(np.asarray(small), (1, 2, 1)))
    assert torch.allclose(statistics(small), statistics(wide), atol=0.15)
    assert statistics(textured(1, size=(8, 8))).isfinite().all() and statistics(textured(1, size=(9, 35))).isfinite().all()
    monkeypatch.setattr(artifact, "LARGEST", 16)
    assert torch.equal(statistics(small), statistics(small.crop((24, 24, 40, 40))))


# --- training -----------------------------------------------------------------------------------------------------------


def test_the_optimum_is_the_optimum():
    from scipy.optimize import minimize

    torch.manual_seed(0)
    x = torch.randn(40, len(STATISTICS) + 6, dtype=torch.float64)
    y = torch.cat([torch.full((15,), 0.5 / 15), torch.full((25,), -0.5 / 25)]).double()
    head = artifact._trained(x, y, 1e-3)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    z = np.concatenate([z[:, :-6] / len(STATISTICS) ** 0.5, z[:, -6:] / 6**0.5], 1)

    def loss(w):
        margins = np.sign(y.numpy()) * (z @ w[:-1] + w[-1])
        return (abs(y.numpy()) * np.log1p(np.exp(-margins))).sum() + 1e-3 / 2 * (w[:-1] ** 2).sum()

    best = minimize(loss, np.zeros(z.shape[1] + 1), method="BFGS", options={"gtol": 1e-7})
    logits = head.parts(x).sum(1).numpy()
    assert logits == pytest.approx(z @ best.x[:-1] + best.x[-1], abs=1e-3)
    assert np.ptp(logits) > 1


def test_the_same_folders_give_the_same_weights(folders, tmp_path):
    one, two = (fit(*folders, clip=None) for _ in range(2))
    for a, b in zip(one.head, two.head, strict=True):
        assert torch.equal(a, b)
    assert one.report == two.report
    one.save(tmp_path / "a")
    two.save(tmp_path / "b")
    assert (tmp_path / "a" / artifact.FILE).read_bytes() == (tmp_path / "b" / artifact.FILE).read_bytes()
    listed = fit([str(p) for p in sorted(folders[0].iterdir())], sorted(folders[1].iterdir()), clip=None)
    assert all(map(torch.equal, listed.head, one.head))


def test_it_tells_the_classes_apart_and_says_why(folders, caplog):
    guard = fit(*folders, clip=None)
    report = guard.report
    assert (report["good"], report["bad"], report["duplicates"], report["clip"]) == (24, 24, 0, None)
    assert report["warnings"] == [] == caplog.messages
    assert report["auc"]["value"] > 0.95 > report["auc"]["low"] > 0.7
    assert json.loads(json.dumps(report)) == report
    good, bad = [textured(900 + k, 1.0) for k in range(8)], [textured(950 + k, 6.0) for k in range(8)]
    found = guard.judge(good + bad, [""] * 16)
    assert min(j.score for j in found[:8]) > 0.8 and max(j.score for j in found[8:]) < 0.2
    worst = [name for j in found[8:] for name in j.details["against"]]
    assert any("noise" in name or "diagonals" in name for name in worst)
    assert all(value < 0 for j in found for value in j.details["against"].values())


def test_chance_is_reported_as_chance(caplog):
    areas = []
    for seed in range(4):
        pictures = [textured(200 + k) for k in range(80)]
        random.Random(seed).shuffle(pictures)
        report = fit(pictures[:40], pictures[40:], clip=None).report
        areas.append(report["auc"]["value"])
        assert report["auc"]["low"] < 0.5 and "learned nothing" in report["warnings"][-1]
    assert sum(areas) / 4 == pytest.approx(0.5, abs=0.1)
    assert "learned nothing" in caplog.text


def test_figures():
    good, bad = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([-3.0, 0.5, 1.0])
    found = artifact._figures(good, bad)
    pairs = [(g > b) + 0.5 * (g == b) for g in good.tolist() for b in bad.tolist()]
    assert found["auc"]["value"] == pytest.approx(sum(pairs) / 12)
    assert (found["good_kept"]["value"], found["bad_caught"]["value"]) == (0.75, pytest.approx(1 / 3))
    sure = artifact._figures(torch.ones(10), -torch.ones(40))["auc"]
    assert (sure["value"], sure["high"]) == (1, pytest.approx(1)) and sure["low"] == pytest.approx(
        0.7225, abs=1e-4
    )  # Wilson: 10 of 10


def test_pictures_that_say_which_class_they_are(tmp_path, caplog):
    good = [textured(k) for k in range(12)]
    bad = [textured(50 + k, 6.0) for k in range(12)]
    fit([p.resize((64, 32)) for p in good], bad, clip=None)
    assert [m.partition(" alone tells")[0] for m in caplog.messages] == [
        "artifact: the number of pixels",
        "artifact: the aspect ratio",
    ]
    assert "100% right; mostly 2048 and 1024" in caplog.messages[0]
    caplog.clear()
    paths = [tmp_path / f"{k}.{'png' if k < 12 else 'JPEG'}" for k in range(24)]
    for picture, path in zip(good + bad, paths):
        picture.save(path)
    fit(paths[:12], paths[12:], clip=None)
    (message,) = caplog.messages
    assert "the file format alone tells good from bad (100% right; mostly .png and .jpg)" in message


# --- saved and loaded ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded_scores_the_same(folders, tmp_path):
    guard = fit(*folders, clip=None)
    file = guard.save(tmp_path / "guard")
    assert [p.name for p in file.parent.iterdir()] == ["artifact.safetensors"]
    pictures = [textured(k, k % 9) for k in range(9)]
    wanted = guard(pictures, ["x"] * 9)
    for place in (tmp_path / "guard", file, str(file)):
        again = load_reward("artifact", model=place, device="cpu", dtype="bfloat16", batch_size=2)
        assert again(pictures, ["x"] * 9) == wanted
        assert again.report == guard.report and again.name == "artifact"
    assert len(set(wanted)) == 9
    read(guard.save(tmp_path / "guard"))  # its own file may be replaced


def test_batch_none_and_what_cannot_be_judged(folders):
    guard = fit(*folders, clip=None, batch_size=3)
    pictures = [textured(k, k % 9) for k in range(7)]
    scores = guard([None, *pictures, None], [""] * 9)
    assert scores[0] is scores[-1] is None
    assert scores[1:-1] == [guard([p], ["any"])[0] for p in pictures]
    array = np.asarray(pictures[0])
    found = guard.judge([array, Image.new("RGB", (4, 4)), Image.new("RGB", (8, 500)), array * 2.0, None], [""] * 5)
    assert found[0].score == scores[1]
    assert [j.score for j in found[1:]] == [None] * 4
    assert "it is 4 x 4; give at least 8" in found[1].details["error"] and "8 x 500" in found[2].details["error"]
    assert "floats from" in found[3].details["error"] and found[4].details == {}
    with pytest.raises(TypeError, match="a picture is str"):
        guard(["a.png"], [""])
    with pytest.raises(ValueError, match="artifact: 1 pictures and 2 prompts"):
        guard(pictures[:1], ["a", "b"])


def test_what_is_no_guard(folders, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no published weights; train it \(promptloop artifact GOOD_DIR BAD_DIR --out DIR"
    ):
        load_reward("artifact")
    with pytest.raises(FileNotFoundError, match="no weights of artifact at /no/such"):
        read("/no/such")
    guard = fit(*folders, clip=None)
    file = guard.save(tmp_path / "guard")
    with pytest.raises(ValueError, match="uses statistics alone and no CLIP; leave clip out"):
        read(file, clip="x/y")
    tensors, other = load_file(file), tmp_path / "other" / artifact.FILE
    other.parent.mkdir()

    def saved(state, report):
        save_file(state, other, metadata=None if report is None else {artifact.MARK: json.dumps(report)})
        return other

    for state, report, match in (
        (tensors, None, "was not made by `promptloop artifact`"),
        (tensors, guard.report | {"version": 2}, "made by a newer version"),
        (tensors | {"weight": torch.zeros(3).double()}, guard.report, "made for other features"),
        (tensors, guard.report | {"statistics": ["edges"]}, "made for other features"),
        ({k: v for k, v in tensors.items() if k != "bias"}, guard.report, "made for other features"),
    ):
        with pytest.raises(ValueError, match=match):
            read(saved(state, report))
    saved(tensors, None)
    with pytest.raises(ValueError, match="not made by `promptloop artifact`, so it is neither used nor replaced"):
        guard.save(other.parent)
    assert load_file(other).keys() == tensors.keys()
    other.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="was not made by"):
        read(other)


# --- with CLIP ----------------------------------------------------------------------------------------------------------


def test_clip_sees_what_statistics_do_not(towers, tmp_path):
    first, half, other, wide = towers
    good, bad = ([half_white(100 * left + k, left) for k in range(20)] for left in (1, 0))
    blind = fit(good, bad, clip=None)
    guard = fit(good, bad, clip=first, device="cpu", batch_size=7)
    assert guard.report["clip_used"] and guard.report["auc"]["value"] > 0.9 > blind.report["auc"]["value"]
    guard.save(tmp_path)
    pictures = [half_white(500 + k, k % 2) for k in range(6)]
    wanted = guard(pictures, [""] * 6)
    assert min(wanted[1::2]) > max(wanted[::2])
    assert "what CLIP sees" in guard.judge(pictures[:1], [""])[0].details["against"]
    assert read(tmp_path)(pictures, [""] * 6) == wanted
    assert read(tmp_path, batch_size=1)(pictures, [""] * 6) == pytest.approx(wanted, abs=1e-5)
    assert read(tmp_path, clip=half)(pictures, [""] * 6) == pytest.approx(wanted, abs=0.02)
    assert read(tmp_path, clip=first, dtype="bfloat16")(pictures, [""] * 6) == pytest.approx(wanted, abs=0.1)
    with pytest.raises(ValueError, match=r"other is another CLIP \(width 24; they see one chart with a cosine of .*give clip="):
        read(tmp_path, clip=other)
    with pytest.raises(ValueError, match=r"trained with .*first \(width 24\), and .*wide is another CLIP \(width 32"):
        read(tmp_path, clip=wide)
    again = fit(good, bad, clip=first, device="cpu", batch_size=7)
    assert all(map(torch.equal, again.head, guard.head))


def test_clip_that_is_gone_or_of_no_use(towers, folders, tmp_path):
    place = tmp_path / "clip"
    shutil.copytree(towers[0], place)
    good, bad = ([half_white(100 * left + k, left) for k in range(12)] for left in (1, 0))
    fit(good, bad, clip=place, device="cpu").save(tmp_path)
    shutil.rmtree(place)
    with pytest.raises(OSError, match=r"no model for artifact at .*clip= names another place of it"):
        read(tmp_path)
    with pytest.raises(OSError, match=r"no model for artifact at /no/such.*clip=None \(--clip none\) needs none"):
        fit(*folders, clip="/no/such")
    useless = fit(*folders, clip=towers[0], device="cpu")  # statistics are enough
    assert useless.report["clip_used"] is False and useless.tower is None and len(useless.head.mean) == len(STATISTICS)


def test_numbers_that_are_none(towers, folders):
    guard = Artifact(Head(*(torch.full((n,), math.nan).double() for n in (20, 20, 20, 1))), {}, None, None, "a", 2)
    assert guard.judge([textured(0)], [""])[0].details == {"error": artifact.NO_NUMBERS}
    assert guard([textured(0)], [""]) == [None]


# --- folders ------------------------------------------------------------------------------------------------------------


def test_folders_that_will_not_do(folders, tmp_path):
    good, bad = folders
    with pytest.raises(ValueError, match="00.png is both among the good and the bad pictures"):
        fit(good, good, clip=None)
    with pytest.raises(ValueError, match="is both among"):
        fit(good, good.parent, clip=None)
    with pytest.raises(NotADirectoryError, match="no folder .*none of bad pictures"):
        fit(good, tmp_path / "none", clip=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    (empty / ".hidden.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"empty holds 0 pictures \(PNG, JPEG, WebP, ...\); give at least 10 good ones"):
        fit(empty, bad, clip=None)
    with pytest.raises(ValueError, match="3 good and 12 bad pictures that differ are too few; give at least 10 of each"):
        fit(sorted(good.iterdir())[:3], sorted(bad.iterdir())[:12], clip=None)
    shutil.copy(good / "05.png", bad / "copy.png")
    with pytest.raises(ValueError, match="same picture is both good and bad: .*05.png and .*copy.png"):
        fit(good, bad, clip=None)
    (bad / "copy.png").write_bytes((good / "05.png").read_bytes()[:200])
    with pytest.raises(OSError, match=r"cannot read the picture .*copy.png"):
        fit(good, bad, clip=None)
    (bad / "copy.png").unlink()
    textured(0, size=(4, 4)).save(bad / "tiny.png")
    with pytest.raises(ValueError, match=r"tiny.png: it is 4 x 4"):
        fit(good, bad, clip=None)


def test_duplicates_count_once(folders):
    good, bad = folders
    wanted = fit(good, bad, clip=None)
    (good / "more").mkdir()
    for k in range(5):
        shutil.copy(good / f"{k:02}.png", good / "more" / f"{k}.png")
    found = fit(good, bad, clip=None)
    assert (found.report["good"], found.report["duplicates"]) == (24, 5)
    assert found.report["auc"] == wanted.report["auc"]
    assert all(map(torch.equal, found.head, wanted.head))


# --- the embedded generator ---------------------------------------------------------------------------------------------


def compressed(picture):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=35)
    return Image.open(file).convert("RGB")


@pytest.mark.slow
def test_broken_pictures_of_a_generator():
    from promptloop_pipeline import tiny
    from promptloop_pipeline.tiny.scenes import Spec, random_scene

    pipe, rng = tiny.load_pipeline(), random.Random(0)

    def made(n, seed, guidance=3.0, steps=20):
        scenes = [random_scene(rng, split="any") for _ in range(n)]
        captions = [tiny.system_caption(Spec(s.objects, (), s.background)) for s in scenes]
        seeds = [torch.Generator().manual_seed(seed + k) for k in range(n)]
        return pipe(captions, num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images

    noise = np.random.default_rng(0)

    def noisy(picture):
        return Image.fromarray((np.asarray(picture) + noise.normal(0, 8, (32, 32, 3))).clip(0, 255).astype(np.uint8))

    def gaudy(picture):
        return ImageEnhance.Color(picture.filter(ImageFilter.GaussianBlur(0.9))).enhance(1.4)

    good, source = made(60, 0), made(20, 1000)  # every other one of each is held out
    bad = [*made(10, 2000, guidance=25.0), *map(noisy, source), *map(compressed, source), *map(gaudy, source)]
    guard = fit(good[::2], bad[::2], clip=None)
    kept, caught = guard(good[1::2], [""] * 30), guard(bad[1::2], [""] * 35)
    held_out = artifact._figures(torch.tensor(kept) - 0.5, torch.tensor(caught) - 0.5)["auc"]
    assert held_out["value"] > 0.85
    assert held_out["value"] > guard.report["auc"]["low"]  # what was promised
    assert sum(kept) / len(kept) - sum(caught) / len(caught) > 0.3
