"""geneval-style scores: judging boxes made by hand, against a plain restatement of GenEval's rules; real detectors at tiny sizes."""

import json
import math
import random
import statistics
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import promptloop_pipeline.evaluation
from promptloop_pipeline.reward import ask_why
from promptloop_pipeline.rewards import detectors, load_reward
from promptloop_pipeline.rewards.detectors import COLOURS, ClipColours, Detection, crop, load_detector
from promptloop_pipeline.rewards.geneval import RELATIONS, GenEval, checked, class_key, counted, evaluate, relations

from . import models, reference

LINES = [
    json.loads(line)
    for line in (Path(promptloop_pipeline.evaluation.__file__).parent / "data/geneval.jsonl").read_text().splitlines()
]
NAMES = list(dict.fromkeys(c["class"] for line in LINES for c in line["include"]))
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}  # GenEval's names -> COCO's
VOC = {  # as in the configs of RT-DETR
    "airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant", "tv": "tvmonitor",
    "dining table": "diningtable", "tv remote": "remote", "computer mouse": "mouse", "computer keyboard": "keyboard",
}  # fmt: skip


def at(x, y, label="cat", score=0.95, half=20.0):
    return Detection(label, score, (x - half, y - half, x + half, y + half))


def asked(*include, exclude=(), tag="x"):
    return checked({"tag": tag, "include": list(include), "exclude": list(exclude)}, "a prompt")


def scores(meta, found, colours=()):
    verdict = evaluate(meta, found, colours)
    return verdict.strict, pytest.approx(verdict.soft), [c.score for c in verdict.clauses]


# --- counts, colours, places by hand ------------------------------------------------------------------------------------

TWO = {"class": "cat", "count": 2}
OFFSETS = {"left of": (-200, 0), "right of": (200, 0), "above": (0, -200), "below": (0, 200)}


def test_counts():
    meta = asked(TWO, exclude=[{"class": "cat", "count": 3}])
    cats = [at(50 * k, 0) for k in range(6)]
    assert scores(meta, cats[:2]) == (1, 1, [1, 1])
    assert scores(meta, cats[:1]) == (0, 0.75, [0.5, 1])
    assert scores(meta, []) == (0, 0.5, [0, 1])
    assert scores(meta, cats[:3]) == (0, (1 + 2 / 3) / 2, [1, 2 / 3])
    assert scores(meta, cats) == (0, (1 + 2 / 6) / 2, [1, 2 / 6])  # ever less, and never below 0
    assert scores(asked(TWO), cats) == (1, 1, [1])  # at least so many: too many are a fault only where that is said
    none = asked({"class": "dog", "count": 1}, exclude=[{"class": "cat", "count": 1}])
    assert scores(none, [at(0, 0, "dog")]) == (1, 1, [1, 1])
    assert scores(none, [at(0, 0, "dog"), at(0, 0)]) == (0, 0.5, [1, 0])
    clause = evaluate(meta, cats[:3]).clauses[1]
    assert (clause.kind, clause.wanted, clause.found) == ("exclude", "fewer than 3 cat", "3 cat")


def test_colours():
    meta = asked(TWO | {"color": "red"})
    three = [at(0, 0, score=0.5), at(0, 0, score=0.9), at(0, 0, score=0.7)]
    assert scores(meta, three, ["blue", "red", "red"]) == (1, 1, [1, 1])  # the two surest count
    assert scores(meta, three, ["red", "red", "blue"]) == (0, 0.75, [1, 0.5])
    assert scores(meta, three[:1], ["red"]) == (0, 0.5, [0.5, 0.5])  # what is there earns what it is worth
    assert scores(meta, [], []) == (0, 0, [0, 0])
    assert scores(meta, three) == (0, 0.5, [1, 0])
    assert evaluate(meta, three, ["red", "red", "blue"]).clauses[1].found == "red, blue"
    with pytest.raises(ValueError, match="2 colours for 3 detections; give one for each, or none"):
        evaluate(meta, three, ["red", "red"])


@pytest.mark.parametrize("relation", RELATIONS)
def test_places(relation):
    meta = asked({"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]})
    x, y = OFFSETS[relation]
    assert scores(meta, [at(0, 0), at(x, y, "dog")]) == (1, 1, [1, 1, 1])
    assert scores(meta, [at(0, 0), at(-x, -y, "dog")]) == (0, 2 / 3, [1, 1, 0])  # a wrong place earns nothing
    assert scores(meta, [at(0, 0), at(0, 0, "dog")]) == (0, 2 / 3, [1, 1, 0])
    assert scores(meta, [at(x, y, "dog")]) == (0, 1 / 3, [0, 1, 0])
    surer = [at(0, 0), at(x, y, "dog", 0.8), at(-x, -y, "dog", 0.9)]
    assert scores(meta, surer)[0] == 0  # the surest dog is looked at
    later = asked({"class": "dog", "count": 1, "position": [relation, 1]}, {"class": "cat", "count": 1})
    assert scores(later, [at(0, 0), at(x, y, "dog")])[0] == 1


def test_places_of_several():
    meta = asked(TWO, {"class": "dog", "count": 2, "position": ["left of", 0]})
    cats = [at(500, 0), at(600, 0)]
    assert scores(meta, [*cats, at(0, 0, "dog"), at(100, 0, "dog")])[2] == [1, 1, 1]
    assert scores(meta, [*cats, at(0, 0, "dog"), at(550, 0, "dog")])[2] == [1, 1, 0.75]
    assert scores(meta, [*cats, at(0, 0, "dog")])[2] == [1, 0.5, 0.5]


def test_relations():
    box = (0.0, 0.0, 100.0, 100.0)

    def moved(x, y):
        return relations((x, y, x + 100, y + 100), box)

    assert moved(-100, 0) == {"left of"} and moved(100, 0) == {"right of"}
    assert moved(0, -100) == {"above"} and moved(0, 100) == {"below"}
    assert moved(0, 0) == moved(20, 0) == moved(0, -20) == set()  # a tenth of both widths: 10 + 10
    assert moved(39.9, 0) == set() and moved(40.1, 0) == {"right of"}  # what is left of it is more than half of the distance
    assert moved(-100, -100) == {"left of", "above"}  # .8 of 1/sqrt(2) along each
    assert moved(100, 65) == {"right of"}  # 45 of 119
    assert relations((0, 0, 10, 10), (1000, 5, 1010, 15)) == {"left of"}


box = st.tuples(*[st.floats(0, 500, width=16)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2] + 1, b[1] + b[3] + 1))


@settings(deadline=None)
@given(box, box)
def test_relations_turn_round(a, b):
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above")))
    assert relations(b, a) == {opposite[r] for r in relations(a, b)}
    assert len(relations(a, b)) <= 2 and relations(a, a) == set()
    turned = [(x[1], x[0], x[3], x[2]) for x in (a, b)]
    swap = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    assert relations(*turned) == {swap[r] for r in relations(a, b)}


def test_which_detections_count():
    found = [at(0, 0, score=s) for s in (0.2, 0.3, 0.31, 0.9)] + [at(3, 0, "dog", 0.8)]
    assert [d.score for d in counted(found, 0.3)] == [0.9, 0.8, 0.31]
    assert [d.score for d in counted(found, 0.0, most=2)] == [0.9, 0.8, 0.31]  # at most two of a class
    many = [at(0, 0, score=0.5 + k / 100) for k in range(20)]
    assert [d.score for d in counted(many, 0.3)] == sorted((d.score for d in many), reverse=True)[:16]
    assert [d.label for d in counted(found, 0.3, max_overlap=0.9)] == ["cat", "dog"]  # of one class only
    apart = [at(0, 0, score=0.9), at(20, 0, score=0.8)]  # they share a third
    assert len(counted(apart, 0.3, max_overlap=0.34)) == 2 and len(counted(apart, 0.3, max_overlap=0.33)) == 1


# --- GenEval's 553 lines ------------------------------------------------------------------------------------------------


def perfect(meta):
    """Detections, and their colours, that are exactly what is asked for."""
    found, colours = [], []
    for row, clause in enumerate(meta["include"]):
        x, y = 0, 300 * row
        if "position" in clause:
            assert clause["position"][1] == row - 1 == 0
            x, y = OFFSETS[clause["position"][0]]
        found += [at(x + 60 * k, y, clause["class"], 0.99 - k / 100) for k in range(clause["count"])]
        colours += [clause.get("color")] * clause["count"]
    return found, colours


def broken(meta):
    """The same with one clause broken each time."""
    found, colours = perfect(meta)
    for clause in meta["include"]:
        first = next(i for i, d in enumerate(found) if d.label == clause["class"])
        yield found[:first] + found[first + 1 :], colours[:first] + colours[first + 1 :]
        if "color" in clause:
            yield found, [*colours[:first], COLOURS[COLOURS.index(clause["color"]) - 1], *colours[first + 1 :]]
        if "position" in clause:
            x, y = OFFSETS[clause["position"][0]]
            yield [*found[:first], at(-x, -y, clause["class"]), *found[first + 1 :]], colours
    for clause in meta["exclude"]:
        yield [*found, at(900, 900, clause["class"])], [*colours, None]


def test_all_lines():
    assert len(LINES) == 553 and len(NAMES) == 80
    tried = 0
    for line in LINES:
        meta = checked(line, line["prompt"])
        verdict = evaluate(line, *perfect(meta))
        assert (verdict.strict, verdict.soft) == (1, 1), line
        for found, colours in broken(meta):
            worse = evaluate(meta, found, colours)
            assert worse.strict == 0 and 0 <= worse.soft < 1, line
            assert geneval(meta, found, colours) is False
            tried += 1
    assert tried == 852 + 294 + 100 + 80  # every count, colour, place and exclusion


# --- any metadata, any boxes --------------------------------------------------------------------------------------------


def geneval(meta, found, colours):
    """GenEval's verdict, stated again: clauses in order, and a clause that fails is no target."""
    groups = []
    for clause in meta["include"]:
        rows = sorted((i for i, d in enumerate(found) if d.label == clause["class"]), key=lambda i: -found[i].score)
        rows = rows[: clause["count"]]
        good = len(rows) == clause["count"] and all(colours[i] == clause.get("color", colours[i]) for i in rows)
        if good and "position" in clause:
            relation, k = clause["position"]
            good = groups[k] is not None and all(
                relation in direction(found[i].box, found[j].box) for i in rows for j in groups[k]
            )
        groups.append(rows if good else None)
    few = all(sum(d.label == c["class"] for d in found) < c["count"] for c in meta["exclude"])
    return None not in groups and few


def direction(a, b):
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    clear = np.maximum(np.abs(offset) - 0.1 * (a[1] - a[0] + b[1] - b[0]), 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return []
    x, y = clear / np.linalg.norm(offset)
    return [r for r, yes in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if yes]


@st.composite
def metadata(draw):
    classes = draw(st.lists(st.sampled_from(["cat", "dog", "bus"]), max_size=3, unique=True))
    include = []
    for k, name in enumerate(classes):
        clause = {"class": name, "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(["red", "blue"]))
        if k and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, k - 1))]
        include.append(clause)
    names = st.lists(st.sampled_from(["cat", "dog", "bus"]), max_size=2, unique=True)
    exclude = [{"class": name, "count": draw(st.integers(1, 4))} for name in draw(names)]
    assume(include or exclude)
    return asked(*include, exclude=exclude)


@st.composite
def scene(draw):
    one = st.tuples(st.sampled_from(["cat", "dog", "bus", "cow"]), st.sampled_from([0, 40, 200]), st.sampled_from([0, 40, 200]))
    rows = draw(st.lists(one, max_size=7))
    order = draw(st.permutations(range(len(rows))))
    found = [at(x, y, label, score=0.99 - k / 100) for k, (label, x, y) in zip(order, rows)]
    return found, draw(st.lists(st.sampled_from(["red", "blue"]), min_size=len(rows), max_size=len(rows)))


@settings(deadline=None, max_examples=400)
@given(metadata(), scene())
def test_strict_is_genevals_and_soft_agrees(meta, seen):
    verdict = evaluate(meta, *seen)
    assert verdict.strict == geneval(meta, *seen)
    assert all(0 <= c.score <= 1 for c in verdict.clauses) and 0 <= verdict.soft <= 1
    assert (verdict.strict == 1) == (verdict.soft == 1)
    assert verdict.soft == pytest.approx(sum(c.score for c in verdict.clauses) / len(verdict.clauses))


@settings(deadline=None)
@given(metadata(), scene(), st.randoms())
def test_the_order_of_detections_is_nothing(meta, seen, rng):
    rows = list(zip(*seen))
    rng.shuffle(rows)
    assert evaluate(meta, [d for d, _ in rows], [c for _, c in rows]) == evaluate(meta, *seen)


# --- metadata -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "problem"),
    [
        ("x", "expected an object with"),
        ({}, "nothing is included and nothing excluded"),
        ({"include": "cat"}, "include is 'cat'; give a list"),
        ({"include": ["cat"]}, "include is .*; give a list of objects"),
        ({"include": [{"count": 1}]}, r"the class of include\[0\] is None"),
        ({"include": [{"class": " ", "count": 1}]}, "the class of"),
        ({"include": [{"class": "cat"}]}, r"the count of include\[0\] is None; give a whole number from 1"),
        ({"include": [{"class": "cat", "count": 0}]}, "the count of .* is 0"),
        ({"include": [{"class": "cat", "count": True}]}, "the count of .* is True"),
        ({"include": [{"class": "cat", "count": 1.5}]}, "the count of .* is 1.5"),
        ({"include": [TWO, {"class": "cat", "count": 1, "color": "teal"}]}, r"color of include\[1\] is 'teal'; there are red, or"),
        ({"include": [TWO | {"color": ["red"]}]}, r"color of include\[0\] is \['red'\]"),
        ({"include": [TWO | {"colour": "red"}]}, r"include\[0\] has 'colour'; there are class, count, color, position"),
        ({"include": [TWO], "exclude": [TWO | {"color": "red"}]}, r"exclude\[0\] has 'color'; there are class, count"),
        ({"include": [TWO, TWO | {"position": ["beside", 0]}]}, r"position of include\[1\] is \['beside', 0\]; give \[relation"),
        ({"include": [TWO, TWO | {"position": ["above", 1]}]}, "number of another clause"),
        ({"include": [TWO, TWO | {"position": ["above", 2]}]}, "number of another clause"),
        ({"include": [TWO, TWO | {"position": ["above", -1]}]}, "number of another clause"),
        ({"include": [TWO, TWO | {"position": "above"}]}, "number of another clause"),
        ({"include": [TWO, TWO | {"position": [["above"], 0]}]}, "number of another clause"),
    ],
)  # fmt: skip
def test_bad_metadata(meta, problem):
    with pytest.raises(ValueError, match=f"^the GenEval metadata of the prompt 'two cats': .*{problem}"):
        checked(meta, "two cats")


def test_metadata_as_tables_have_it():
    """Columns that a row does not use are None there; positions may be tuples."""
    row = {
        "tag": "x",
        "include": [TWO | {"color": None, "position": None}],
        "exclude": None,
        "prompt": "two cats",
        "source": "a.png",
    }
    assert checked(row, "two cats") == {"tag": "x", "include": [TWO], "exclude": []}
    assert checked({"include": [TWO, TWO | {"position": ("above", 0)}]}, "")["tag"] is None
    assert evaluate(row, [at(0, 0)] * np.int64(2)).strict == 1  # a line as it is
    assert checked({"include": [TWO | {"count": np.int64(2)}]}) == {"tag": None, "include": [TWO], "exclude": []}
    with pytest.raises(ValueError, match="of the prompt 'its own': nothing is included"):
        evaluate({"prompt": "its own"}, [])


def test_names_of_classes():
    assert len({class_key(n) for n in NAMES}) == 80
    for other in (COCO, VOC):
        assert all(class_key(own) == class_key(label) for own, label in other.items())
    assert class_key("TV monitor") == class_key("tv") and class_key("teddy_bear") == class_key("Teddy-Bear")
    assert scores(asked({"class": "computer mouse", "count": 1}), [at(0, 0, "mouse")])[0] == 1


# --- pictures of objects ------------------------------------------------------------------------------------------------


def test_crop():
    picture = Image.new("RGB", (40, 30), "red")
    picture.paste("blue", (20, 0, 40, 30))
    part = crop(picture, Detection("x", 1, (9.6, 5.2, 30.4, 25.4)))
    assert part.size == (20, 20) and part.getpixel((9, 0)) == (255, 0, 0) and part.getpixel((10, 0)) == (0, 0, 255)
    mask = np.zeros((20, 20), bool)
    mask[:, :5] = True
    part = crop(picture, Detection("x", 1, (10, 5, 30, 25), mask))
    assert part.getpixel((4, 19)) == (255, 0, 0) and part.getpixel((5, 0)) == (153, 153, 153)
    assert crop(picture, Detection("x", 1, (3, 3, 3.2, 3.2))).size == (1, 1)
    assert crop(Image.new("RGB", (900, 2)), Detection("x", 1, (0, 0, 900, 2))).size == (64, 2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return models.clip_model(tmp_path_factory.mktemp("clip") / "m", legacy_eos=True)


def test_colours_are_clips_nearest(clip):
    from promptloop_pipeline.rewards.clip import load_clip

    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    namer = ClipColours(load_clip(clip, "x", device="cpu"), tokenizer, batch_size=4)
    state = reference.as_open_clip(load_file(clip / "model.safetensors"))
    pictures = reference.pictures(12)
    names = [("cow", "bed")[k % 2] for k in range(12)]
    wanted = []
    for picture, name in zip(pictures, names):
        seen = reference.clip_image(state, reference.cropped(picture, 56), 4, reference.quick_gelu)
        near = []
        for colour in COLOURS:
            texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"]
            ids = [tokenizer(t, truncation=True, max_length=30)["input_ids"] for t in texts]
            ids = [i[: i.index(tokenizer.eos_token_id) + 1] for i in ids]  # this one has no hyphen, and ends there
            said = torch.stack([reference.clip_text(state, i, 4, reference.quick_gelu) for i in ids]).mean(0)
            near.append(float(seen @ said / said.norm()))
        wanted.append(COLOURS[int(np.argmax(near))])
    assert namer(list(zip(pictures, names))) == wanted
    assert len(set(wanted)) > 1


# --- detectors ----------------------------------------------------------------------------------------------------------

LABELS = dict(enumerate(COCO.get(n, n) for n in NAMES))
WORDS = {"id2label": LABELS, "label2id": {n: k for k, n in LABELS.items()}}
WIDTHS = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 8, "layer_type": "basic"}
ATTENTION = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def mask2former(folder):
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=[f"stage{k}" for k in (1, 2, 3, 4)]
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10, **WORDS,
    )  # fmt: skip
    return saved(folder, transformers.Mask2FormerForUniversalSegmentation(config), transformers.Mask2FormerImageProcessorPil())


def detr(folder):
    backbone = transformers.ResNetConfig(**WIDTHS, out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, use_pretrained_backbone=False, backbone=None, d_model=16,
        encoder_layers=1, decoder_layers=1, num_queries=10, **ATTENTION, **WORDS,
    )  # fmt: skip
    processor = transformers.DetrImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 256})
    return saved(folder, transformers.DetrForObjectDetection(config), processor)


def rt_detr(folder):
    labels = {k: VOC.get(NAMES[k], NAMES[k]) for k in range(80)}
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(**WIDTHS, out_features=["stage2", "stage3", "stage4"]), d_model=16,
        encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], decoder_in_channels=[16] * 3, decoder_layers=2, num_denoising=0,
        num_queries=10, hidden_expansion=0.5, **ATTENTION, id2label=labels, label2id={n: k for k, n in labels.items()},
    )  # fmt: skip
    processor = transformers.RTDetrImageProcessorPil(size={"height": 128, "width": 128})
    return saved(folder, transformers.RTDetrForObjectDetection(config), processor)


def saved(folder, model, processor):
    """Every weight of its own, larger than at a start, so that the detector sees this and that, and something else elsewhere."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            gain = 0.4 if "class_embed" in name else 2 if "class" in name else 1.5
            p.data = gain * torch.randn(p.shape, generator=g) / math.sqrt(p[0].numel())
        elif "class" in name:
            p.data = 0 * p.data
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for biases
        return {make.__name__: make(folder / make.__name__) for make in (mask2former, detr, rt_detr)}


def alike(found, wanted):
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted):
        assert (a.label, a.score) == (b.label, pytest.approx(b.score, abs=1e-4))
        assert a.box == pytest.approx(b.box, abs=1e-2)


def test_outlines_equal_the_librarys_where_it_is_exact(folders, monkeypatch):
    """Its own processor brings every mask to 384 x 384 first; at that size nothing is lost by it."""
    monkeypatch.setattr(detectors, "SIDES", (384, 384))
    detector = load_detector(folders["mask2former"], device="cpu", floor=0.05)
    picture = reference.pictures(1)[0].resize((384, 384))
    processor = transformers.Mask2FormerImageProcessorPil(size={"height": 384, "width": 384})
    with torch.no_grad():
        seen = detector.model(**processor(images=picture, return_tensors="pt"))
    row = processor.post_process_instance_segmentation(seen, 0.05, target_sizes=[(384, 384)], return_binary_maps=True)[0]
    wanted = []
    for info, mask in zip(row["segments_info"], row["segmentation"].numpy().astype(bool), strict=True):
        y, x = np.nonzero(mask)
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
        wanted.append((Detection(LABELS[info["label_id"]], info["score"], box), mask[box[1] : box[3], box[0] : box[2]]))
    found = sorted(detector([picture])[0], key=lambda d: -d.score)
    wanted = sorted(wanted, key=lambda pair: -pair[0].score)
    alike(found, [d for d, _ in wanted])
    assert all((f.mask == mask).mean() > 0.999 for f, (_, mask) in zip(found, wanted))
    assert not all(mask.all() for _, mask in wanted)


def test_outlines_lie_where_the_picture_has_them(folders):
    """A picture of 300 x 200 is brought to 1200 x 800 and padded to 1216 x 800; masks come at a quarter of that."""
    detector = load_detector(folders["mask2former"], device="cpu", floor=0.1)
    pixels, inner = detector._pixels([Image.new("RGB", (300, 200), "white")] * 2)
    assert (pixels.shape, inner) == ((2, 3, 800, 1216), (800, 1200))
    assert (pixels[..., 1200:] == 0).all() and (pixels[..., :1200] > 2).all()
    assert detector._pixels([Image.new("RGB", (100, 300))])[1] == (1333, 444)  # the long side is the limit
    masks = torch.full((2, 200, 304), -8.0)
    masks[0, 40:100, 100:200] = 8.0
    masks[1, :, 300:] = 8.0  # in the padding alone
    probabilities = torch.tensor([[0.0, 0.5], [0.9, 0.0]])
    (found,) = detector._objects(probabilities, masks, (800, 1216), inner, (300, 200))
    assert found.label == LABELS[1] and found.box == pytest.approx((100, 40, 200, 100), abs=1)
    assert found.score == pytest.approx(0.5, abs=0.01) and found.mask.mean() > 0.98


@pytest.mark.parametrize("size", [(384, 384), (300, 200), (97, 161)])
def test_outlines_fill_their_boxes(folders, size):
    found = load_detector(folders["mask2former"], device="cpu", floor=0.02)([reference.pictures(1)[0].resize(size)])[0]
    assert found
    for d in found:
        left, top, right, bottom = d.box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] and 0.02 < d.score <= 1
        assert d.mask.shape == (bottom - top, right - left)
        assert d.mask[0].any() and d.mask[-1].any() and d.mask[:, 0].any() and d.mask[:, -1].any()


def test_boxes_are_those_of_the_model(folders):
    picture = reference.pictures(1)[0].resize((120, 90))
    for kind in ("detr", "rt_detr"):
        detector = load_detector(folders[kind], device="cpu", floor=0.02)
        with torch.no_grad():
            seen = detector.model(**detector.processor(images=picture, return_tensors="pt"))
        if kind == "detr":
            best, label = seen.logits[0].softmax(-1)[:, :-1].max(-1)
            rows = zip(best.tolist(), label.tolist(), range(10))
        else:
            best, where = seen.logits[0].sigmoid().flatten().topk(10)
            rows = zip(best.tolist(), (where % 80).tolist(), (where // 80).tolist())
        wanted = []
        for score, label, query in rows:
            x, y, w, h = (seen.pred_boxes[0, query] * torch.tensor([120, 90, 120, 90])).tolist()
            box = (max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, 120), min(y + h / 2, 90))
            wanted += [Detection(detector.labels[label], score, box)] if score > 0.02 else []
        alike(detector([picture])[0], wanted)


def test_what_is_no_detector(folders, clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="no detector for geneval at /no/such: expected a folder with config.json"):
        load_reward("geneval", model="/no/such")
    with pytest.raises(
        OSError, match="cannot load the detector of geneval from 'facebook/mask2former-swin-small-coco-instance'"
    ):
        load_reward("geneval")
    with pytest.raises(ValueError, match="is CLIPModel; give Mask2Former, MaskFormer, EoMT, or a model for object detection"):
        load_reward("geneval", model=clip)
    gone = "class_predictor.weight"
    less = models.damaged_copy(folders["mask2former"], tmp_path / "less", drop=gone)
    with pytest.raises(ValueError, match=f"less.*missing {gone}"):
        load_reward("geneval", model=less)
    with pytest.raises(OSError, match="no tokenizer for geneval|cannot load the tokenizer of geneval"):
        load_reward("geneval", model=folders["detr"], clip=folders["detr"])
    with pytest.raises(ValueError, match="threshold is 30; give a number from 0 to 1"):
        GenEval(None, None, threshold=30)


# --- the reward ---------------------------------------------------------------------------------------------------------

PICTURES = [p.resize(((96, 64), (64, 96))[k % 2]) for k, p in enumerate(reference.pictures(5))]


def wishes(detector):
    """Metadata that what a random detector sees meets in part: asked for its own finds, and for more."""
    rng = random.Random(0)
    found = []
    for picture in PICTURES:
        labels = list(dict.fromkeys(d.label for d in sorted(detector([picture])[0], key=lambda d: -d.score)))
        names = [next(n for n in NAMES if class_key(n) == class_key(label)) for label in labels[:2]] or ["cat"]
        include = [{"class": n, "count": rng.randint(1, 2), "color": rng.choice(COLOURS)} for n in names]
        include.append({"class": "zebra", "count": 1, "position": [rng.choice(RELATIONS), 0]})
        found.append({"tag": "x", "include": include, "exclude": [{"class": names[0], "count": 2}], "prompt": "p"})
    return found


@pytest.mark.parametrize("kind", ["mask2former", "detr", "rt_detr"])
def test_end_to_end(kind, folders, clip, monkeypatch):
    monkeypatch.setattr(detectors, "SIDES", (128, 213))  # for the time it takes
    detector = load_detector(folders[kind], device="cpu", floor=0.03)
    seen_scores = [d.score for picture in PICTURES for d in detector([picture])[0]]
    middle = statistics.median(seen_scores)
    options = {"model": folders[kind], "clip": clip, "device": "cpu", "threshold": 0.03, "counting_threshold": middle}
    reward = load_reward("geneval", **options, batch_size=2)
    metas = wishes(detector)
    images, lines = [*PICTURES, None, PICTURES[0]], [*metas, metas[0], None]
    found = ask_why(reward, images, ["p"] * 7, geneval=lines, other=[1] * 7)
    assert [j.score for j in found[5:]] == [None, None]
    assert [j.details["skipped"] for j in found[5:]] == ["there is no picture", "there is no GenEval metadata"]
    assert json.loads(json.dumps([j.details for j in found])) == [j.details for j in found]
    strict = load_reward("geneval-strict", **options)
    assert (reward.name, strict.name, reward.needs) == ("geneval", "geneval-strict", ("geneval",))
    assert strict(images, ["p"] * 7, geneval=lines) == [j.details.get("strict") for j in found]
    for picture, meta, judgement in zip(PICTURES, metas, found):
        alone = reward.judge([picture], ["p"], geneval=[meta])[0]
        assert alone.score == pytest.approx(judgement.score) and judgement.score == judgement.details["soft"]
        seen = judgement.details["objects"]
        boxes = [Detection(o["class"], o["score"], tuple(o["box"])) for o in seen]
        assert evaluate(checked(meta, "p"), boxes, [o["colour"] for o in seen]).soft == pytest.approx(judgement.score)
        first = class_key(meta["include"][0]["class"])
        assert all(o["score"] > 0.029 for o in seen)
        assert all(o["colour"] in COLOURS for o in seen[:1] if class_key(o["class"]) == first)
    assert len({json.dumps(j.details) for j in found[:5]}) == 5  # else the pictures would count for nothing
    counting = reward.judge(PICTURES, ["p"] * 5, geneval=[m | {"tag": "counting"} for m in metas])
    assert sum(len(j.details["objects"]) for j in counting) == sum(s > middle for s in seen_scores) < len(seen_scores)
    assert sum(len(j.details["objects"]) for j in found[:5]) == len(seen_scores)


def test_a_model_that_fails_costs_one_picture(caplog):
    def detect(pictures):
        if any(p.getpixel((0, 0)) == (255, 0, 0) for p in pictures):
            raise RuntimeError("no memory\nmore")
        return [[Detection("dog", np.float32(0.9), tuple(np.array([1, 2, 9.5, 9])))] for _ in pictures]

    reward = GenEval(detect, lambda objects: ["red"] * len(objects))
    images = [Image.new("RGB", (30, 30), colour) for colour in ("blue", "red", "blue")]
    lines = [{"include": [{"class": "dog", "count": 1, "color": "red"}]}] * 3
    found = reward.judge(images, ["a red dog"] * 3, geneval=lines)
    assert [j.score for j in found] == [1, None, 1]
    assert found[1].details == {"error": "it could not be judged: RuntimeError: no memory"}
    assert "geneval: 1 of 3 pictures have no score, such as: it could not be judged: RuntimeError: no memory" in caplog.text
    assert json.loads(json.dumps(found[0].details["objects"])) == [
        {"class": "dog", "score": 0.9, "box": [1, 2, 9.5, 9], "colour": "red"}
    ]


def test_no_numbers_are_no_empty_picture(folders, clip, tmp_path):
    folder = models.damaged_copy(folders["mask2former"], tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    save_file({k: v * float("nan") for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    reward = load_reward("geneval", model=folder, clip=clip, device="cpu")
    found = reward.judge(PICTURES[:1], ["p"], geneval=[{"include": [TWO]}])[0]
    assert found.score is None and "nan or inf" in found.details["error"]


def test_what_the_reward_is_told(folders, clip):
    reward = GenEval(lambda pictures: [[]] * len(pictures), lambda objects: [], classes=LABELS.values())
    one = {"include": [{"class": "computer mouse", "count": 1}]}
    assert reward(PICTURES[:1], ["a mouse"], geneval=[one]) == [0]
    with pytest.raises(ValueError, match="the reward geneval needs geneval=, a list"):
        reward(PICTURES[:1], ["p"])
    with pytest.raises(ValueError, match="2 values of geneval for 1 pictures"):
        reward(PICTURES[:1], ["p"], geneval=[one, one])
    with pytest.raises(ValueError, match="geneval: 1 pictures and 2 prompts"):
        reward(PICTURES[:1], ["p", "q"], geneval=[one])
    other = {"include": [{"class": "unicorn", "count": 1}], "exclude": [{"class": "elf", "count": 1}]}
    with pytest.raises(ValueError, match="geneval: the detector does not know 'unicorn', 'elf' .*the prompt 'a unicorn'"):
        reward(PICTURES[:2], ["a mouse", "a unicorn"], geneval=[one, other])
    reward.judge(PICTURES[:2] * 200, [line["prompt"] for line in LINES[:400]], geneval=LINES[:400])  # all its classes are known
    assert replace(at(0, 0), mask=np.ones((1, 1), bool)) == at(0, 0)  # compared and shown without pixels
