"""geneval, geneval-strict: are the objects there, so many, in that colour, in that place? (GenEval, arXiv 2310.11513)

GenEval's rules, with a detector of transformers and CLIP in place of mmdet and open_clip: call the figures geneval-style, for
they are not the leaderboard's.

An object counts when the detector is surer of it than .3 (.9 where the tag is "counting"); at most 16 of a class. Colours and
places are looked at in the surest objects of a class, as many as were asked for; so two clauses of one class look at the same
objects. A colour is CLIP's choice among ten for the object on grey.

Two scores, both always in the details. strict is GenEval's own: 1 where every clause holds, else 0; a count is "at least so
many", and too many are a fault only where `exclude` says so. soft is the mean over the clauses, each judged by itself:

    count      min(found, wanted) / wanted
    colour     surest objects in that colour / wanted
    position   pairs of objects that stand so / pairs wanted
    exclude    1 below the limit, else (limit - 1) / found

So soft is from 0 to 1, and 1 exactly where strict is. PromptRL's public soft score (arXiv 2602.01382) differs: too many objects
push a count below 0, a wrong count sets colour and place to 0, and a wrong place still earns part of its point.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image

from ..reward import Judgement
from .clip import CLIP_L, load_clip
from .detectors import COLOURS, MASK2FORMER, Box, ClipColours, Detect, Detection, NameColours, crop, load_detector
from .images import as_rgb
from .simple import needed
from .weights import first_line, load_tokenizer

logger = logging.getLogger("promptloop")
RELATIONS = ("left of", "right of", "above", "below")
MOST, MARGIN = 16, 0.1
_SAME = {  # other names of COCO's classes, in COCO itself, VOC and Objects365 -> GenEval's
    "mouse": "computermouse", "remote": "tvremote", "remotecontrol": "tvremote", "keyboard": "computerkeyboard",
    "aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv", "monitortv": "tv", "television": "tv",
    "hairdryer": "hairdrier", "doughnut": "donut", "mobilephone": "cellphone",
}  # fmt: skip


def class_key(name: str) -> str:
    """What two names of one class have in common: "TV monitor", "tvmonitor" and "tv" are the same."""
    key = re.sub(r"[\W_]", "", name.lower())
    return _SAME.get(key, key)


# --- what is asked for --------------------------------------------------------------------------------------------------


def checked(meta: Any, prompt: str | None = None) -> dict[str, Any]:
    """GenEval's metadata, {"tag", "include": [{"class", "count", "color", "position": [relation, number of another clause]}],
    "exclude": [{"class", "count"}]}, without values of None and whatever else it holds.

    Raises ValueError naming the prompt (default: its own), the clause, and what is allowed.
    """
    prompt = meta.get("prompt") if prompt is None and isinstance(meta, Mapping) else prompt

    def wrong(what: str) -> ValueError:
        return ValueError(f"the GenEval metadata of the prompt {prompt!r:.120}: {what}")

    if not isinstance(meta, Mapping):
        raise wrong(f'expected an object with "include", and found {meta!r:.60}')
    found: dict[str, Any] = {"tag": meta.get("tag")}
    for part, keys in (("include", ("class", "count", "color", "position")), ("exclude", ("class", "count"))):
        clauses = meta.get(part) or []
        if not isinstance(clauses, Sequence) or not all(isinstance(c, Mapping) for c in clauses):
            raise wrong(f"{part} is {clauses!r:.60}; give a list of objects")
        found[part] = [{k: v for k, v in clause.items() if v is not None} for clause in clauses]
        for k, clause in enumerate(found[part]):
            where = f"{part}[{k}]"
            if unknown := [key for key in clause if key not in keys]:
                raise wrong(f"{where} has {unknown[0]!r}; there are {', '.join(keys)}")
            if not isinstance(clause.get("class"), str) or not class_key(clause["class"]):
                raise wrong(f"the class of {where} is {clause.get('class')!r}; give the name of a class")
            if not _is_whole(clause.get("count"), 1):
                raise wrong(f"the count of {where} is {clause.get('count')!r}; give a whole number from 1 up")
            if clause.get("color", COLOURS[0]) not in COLOURS:
                raise wrong(f"the color of {where} is {clause['color']!r}; there are {', '.join(COLOURS)}")
            if "position" in clause and not _is_position(clause["position"], k, len(clauses)):
                raise wrong(
                    f"the position of {where} is {clause['position']!r}; give [relation, number of another "
                    f"clause of include, from 0], the relation being {', '.join(RELATIONS)}"
                )
    if not found["include"] and not found["exclude"]:
        raise wrong("nothing is included and nothing excluded, so there is nothing to judge")
    return found


def _is_position(value: Any, own: int, n: int) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        return False
    relation, other = value
    return relation in RELATIONS and _is_whole(other, 0) and other < n and other != own


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


# --- the judging: a pure function of boxes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clause:
    """One thing that was asked for. kind: count, colour, position or exclude. score: from 0 to 1; 1 where it holds."""

    kind: str
    wanted: str
    found: str
    score: float


@dataclass(frozen=True)
class Verdict:
    """strict: 0 or 1; soft: from 0 to 1, and 1 exactly where strict is."""

    strict: float
    soft: float
    clauses: tuple[Clause, ...]


def evaluate(meta: Mapping[str, Any], detections: Sequence[Detection], colours: Sequence[str | None] = ()) -> Verdict:
    """How far the detected objects are what GenEval's metadata asks for.

    detections: those that count (`counted`). colours: one for each detection; None where it does not matter (`in_question`).
    Raises ValueError for malformed metadata, and where colours are given for some detections only.
    """
    meta, named = checked(meta), list(colours) or [None] * len(detections)
    if len(named) != len(detections):
        raise ValueError(f"{len(named)} colours for {len(detections)} detections; give one for each, or none")
    clauses: list[Clause] = []
    for clause in meta["include"]:
        name, count, there = clause["class"], clause["count"], _of_class(detections, clause["class"])
        clauses.append(Clause("count", f"{count} {name}", f"{len(there)} {name}", min(len(there), count) / count))
        surest = there[:count]
        if "color" in clause:
            found = ", ".join(str(named[i]) for i in surest) or "none"
            right = sum(named[i] == clause["color"] for i in surest)
            clauses.append(Clause("colour", f"{count} {clause['color']} {name}", found, right / count))
        if "position" in clause:
            relation, k = clause["position"]
            other = meta["include"][k]
            pairs = [(i, j) for i in surest for j in _of_class(detections, other["class"])[: other["count"]]]
            seen_so = [relations(detections[i].box, detections[j].box) for i, j in pairs]
            found = "; ".join(" and ".join(sorted(r)) or "neither side" for r in seen_so) or "not both there"
            score = sum(relation in r for r in seen_so) / (count * other["count"])
            clauses.append(Clause("position", f"{name} {relation} {other['class']}", found, score))
    for clause in meta["exclude"]:
        name, limit, n = clause["class"], clause["count"], len(_of_class(detections, clause["class"]))
        clauses.append(Clause("exclude", f"fewer than {limit} {name}", f"{n} {name}", 1.0 if n < limit else (limit - 1) / n))
    strict = float(all(c.score == 1 for c in clauses))
    return Verdict(strict, math.fsum(c.score for c in clauses) / len(clauses), tuple(clauses))


def relations(box: Box, other: Box, margin: float = MARGIN) -> set[str]:
    """Where a box is, seen from another: none, one or two of `RELATIONS`.

    The centres' distance along an axis, less `margin` of both boxes' extents, must be more than half of their whole distance.
    """
    offsets = [(box[k] + box[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    extents = [abs(box[k + 2] - box[k]) + abs(other[k + 2] - other[k]) for k in (0, 1)]
    clear = [max(abs(o) - margin * e, 0.0) for o, e in zip(offsets, extents)]
    if max(clear) < 1e-3:
        return set()
    far = [c > 0.5 * math.hypot(*offsets) for c in clear]
    return {RELATIONS[2 * k + (offsets[k] > 0)] for k in (0, 1) if far[k]}


def counted(detections: Iterable[Detection], threshold: float, most: int = MOST, max_overlap: float = 1.0) -> list[Detection]:
    """The detections surer than `threshold`, surest first, at most `most` of a class, without those that overlap a surer one of
    their class by `max_overlap` (intersection over union) or more; 1: all stay."""
    found: list[Detection] = []
    taken: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        same = taken.setdefault(class_key(d.label), [])
        if d.score > threshold and len(same) < most:
            same.append(d)
            found.append(d)
    if max_overlap >= 1:
        return found
    kept: list[Detection] = []
    for d in found:
        rivals = [k for k in kept if class_key(k.label) == class_key(d.label)]
        if all(_overlap(d.box, k.box) < max_overlap for k in rivals):
            kept.append(d)
    return kept


def _overlap(a: Box, b: Box) -> float:
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - width * height
    return width * height / union if union > 0 else 0.0


def in_question(meta: Mapping[str, Any], detections: Sequence[Detection]) -> list[tuple[int, str]]:
    """Which detections' colours matter, and what GenEval calls them."""
    found: dict[int, str] = {}
    for clause in meta["include"]:
        for i in _of_class(detections, clause["class"])[: clause["count"]] if "color" in clause else ():
            found.setdefault(i, clause["class"])
    return list(found.items())


def _of_class(detections: Sequence[Detection], name: str) -> list[int]:
    """Which detections are of that class, surest first."""
    rows = [i for i, d in enumerate(detections) if class_key(d.label) == class_key(name)]
    return sorted(rows, key=lambda i: -detections[i].score)


# --- the reward ---------------------------------------------------------------------------------------------------------


class GenEval:
    """geneval-style: from 0 to 1, the soft score or, with `strict`, 0 or 1; see the module for both.

    It needs `geneval=`: GenEval's metadata (a line of its file) for each picture; the prompts are not read. None where there is
    no picture or no metadata. A model that fails on a picture costs it its score, and the details say why.

    detect: RGB pictures of one size -> the objects in each. name_colours: objects -> their colours. classes: what the detector
    knows; None: anything. Detectors other than Mask2Former mean something else by a score: choose the thresholds for them.
    max_overlap: see `counted`.
    """

    needs = ("geneval",)

    def __init__(
        self, detect: Detect, name_colours: NameColours, *, strict: bool = False, classes: Iterable[str] | None = None,
        threshold: float = 0.3, counting_threshold: float = 0.9, max_overlap: float = 1.0, batch_size: int = 8, name: str | None = None,
    ) -> None:  # fmt: skip
        for what, value in (("threshold", threshold), ("counting_threshold", counting_threshold), ("max_overlap", max_overlap)):
            if not 0 <= value <= 1:
                raise ValueError(f"{what} is {value!r}; give a number from 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; give a number from 1 up")
        self.detect, self.name_colours, self.strict, self.batch_size = detect, name_colours, strict, batch_size
        self.threshold, self.counting_threshold, self.max_overlap = threshold, counting_threshold, max_overlap
        self.name = name or ("geneval-strict" if strict else "geneval")
        self._known = None if classes is None else {class_key(c) for c in classes}

    @classmethod
    def from_pretrained(
        cls, model: str | Path = MASK2FORMER, clip: str | Path = CLIP_L, *, tokenizer: str | Path | None = None,
        strict: bool = False, threshold: float = 0.3, counting_threshold: float = 0.9, max_overlap: float = 1.0,
        dtype: Any = None, device: str | None = None, batch_size: int = 8, name: str | None = None,
    ) -> GenEval:  # fmt: skip
        """model: a folder or hub id of a detector (`load_detector`); default: Mask2Former, Swin-S, on COCO, of GenEval's own kind
        (it needs scipy; its weights are CC-BY-NC 4.0). clip: of CLIP ViT-L/14 (MIT). tokenizer: CLIP's; default: what lies
        beside it. dtype: CLIP's, default float32; the detector's is float32. The rest as in the class.

        Raises OSError, ValueError or ImportError with one clear line (`load_detector`).
        """
        from transformers import CLIPTokenizer

        detector = load_detector(model, device=device, floor=min(threshold, counting_threshold))
        words = load_tokenizer(CLIPTokenizer, "geneval", [tokenizer or clip])
        colours = ClipColours(load_clip(clip, "geneval", dtype, device), words)
        return cls(
            detector, colours, strict=strict, classes=detector.labels.values(), threshold=threshold,
            counting_threshold=counting_threshold, max_overlap=max_overlap, batch_size=batch_size, name=name,
        )  # fmt: skip

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return [judgement.score for judgement in self.judge(images, prompts, **context)]

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        """Details: strict, soft, tag, the clauses (kind, wanted, found, score), and the objects that count (class, score, box,
        colour).

        Raises ValueError for metadata that is missing, malformed, or asks for a class that the detector does not know.
        """
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(
                f"{self.name}: {len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture"
            )
        given = needed(self.name, context, "geneval", len(images))
        metas = [None if m is None else checked(m, prompt) for m, prompt in zip(given, prompts)]
        self._refuse_unknown(metas, prompts)
        found = [
            Judgement(None, {"skipped": "there is no picture" if i is None else "there is no GenEval metadata"}) for i in images
        ]
        sizes: dict[tuple[int, int], list[tuple[int, Image.Image, dict[str, Any]]]] = {}
        for k, (image, meta) in enumerate(zip(images, metas)):
            if image is not None and meta is not None:
                picture = as_rgb(image)
                sizes.setdefault(picture.size, []).append((k, picture, meta))
        for rows in sizes.values():  # detectors pad pictures of different sizes, and a score must not depend on its neighbours
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                for (k, _, _), judgement in zip(part, self._attempt([row[1:] for row in part]), strict=True):
                    found[k] = judgement
        lost = [found[k].details["error"] for rows in sizes.values() for k, _, _ in rows if found[k].score is None]
        if lost:
            logger.warning("%s: %d of %d pictures have no score, such as: %s", self.name, len(lost), len(found), lost[0])
        return found

    def _refuse_unknown(self, metas: Sequence[dict[str, Any] | None], prompts: Sequence[str]) -> None:
        if self._known is None:
            return
        unknown: dict[str, str] = {}
        for meta, prompt in zip(metas, prompts):
            for clause in [*meta["include"], *meta["exclude"]] if meta is not None else ():
                if class_key(clause["class"]) not in self._known:
                    unknown.setdefault(clause["class"], prompt)
        if unknown:
            first = next(iter(unknown.values()))
            raise ValueError(
                f"{self.name}: the detector does not know {', '.join(map(repr, unknown))} (asked for by the prompt "
                f"{first!r:.120}); give model=, a detector that does"
            )

    def _attempt(self, rows: list[tuple[Image.Image, dict[str, Any]]]) -> list[Judgement]:
        """A batch that fails is tried again one by one: for want of memory, and so that a picture cannot harm others."""
        try:
            return self._judged(rows)
        except Exception as e:  # models fail in many ways
            problem = f"{type(e).__name__}: {first_line(e)}"
        if len(rows) > 1:  # out of the handler, which holds on to what the failed attempt had in memory
            return [judgement for row in rows for judgement in self._attempt([row])]
        return [Judgement(None, {"error": f"it could not be judged: {problem}"})]

    def _judged(self, rows: list[tuple[Image.Image, dict[str, Any]]]) -> list[Judgement]:
        objects, tasks = [], []
        for n, ((picture, meta), found) in enumerate(zip(rows, self.detect([picture for picture, _ in rows]), strict=True)):
            limit = self.counting_threshold if meta["tag"] == "counting" else self.threshold
            objects.append(counted(found, limit, max_overlap=self.max_overlap))
            tasks += [(n, i, (crop(picture, objects[n][i]), name)) for i, name in in_question(meta, objects[n])]
        colours: list[list[str | None]] = [[None] * len(found) for found in objects]
        for (n, i, _), colour in zip(tasks, self.name_colours([task for _, _, task in tasks]) if tasks else (), strict=True):
            colours[n][i] = colour
        return [self._judgement(meta, found, named) for (_, meta), found, named in zip(rows, objects, colours)]

    def _judgement(self, meta: dict[str, Any], objects: list[Detection], colours: list[str | None]) -> Judgement:
        verdict = evaluate(meta, objects, colours)
        seen = [
            {"class": d.label, "score": round(float(d.score), 4), "box": [round(float(x), 1) for x in d.box], "colour": c}
            for d, c in zip(objects, colours)
        ]
        details = {
            "strict": verdict.strict, "soft": verdict.soft, "tag": meta["tag"], "clauses": [asdict(c) for c in verdict.clauses],
            "objects": seen,
        }  # fmt: skip
        return Judgement(verdict.strict if self.strict else verdict.soft, details)
