"""The reward `artifact`: a guard that learns from two folders, of good and of bad pictures, what a model's broken pictures look like.

Optimising a preference reward drives models into pictures that it likes and nobody else (D2-Align, arXiv 2512.24146). A modder trains
this one on pictures of their own model, and adds it with a weight or a cap, or holds it out and only reports it:
`fit("good", "bad").save("guard")`, then `load_reward("artifact", model="guard")`.

Measured on the embedded generator (seven kinds of broken pictures at once, 120 good, 119 bad; AUC on others, 95% interval): pixel
statistics .82 [.74, .88], what a small CLIP sees .50 [.41, .58] (with crops .49, with patch tokens .51), both .82. So statistics are
always used, and CLIP, for what no statistic knows, only where cross-validation finds that it helps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..reward import Judgement
from .clip import CLIP_L, load_clip, see
from .images import FORMATS, MAX_RATIO, MIN_SIDE, as_rgb, load_image
from .weights import find_weights, first_line, read_checkpoint

logger = logging.getLogger("promptloop")
FILE, MARK, VERSION = "artifact.safetensors", "promptloop artifact", 1
LEAST = 10  # pictures of a class: of fewer, an interval says nothing
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
BEYOND = 5.0  # standard deviations: what lies further out counts as this, so that nothing unheard of decides alone
LARGEST = 2048  # pixels a side: of larger pictures, statistics are of the middle
NO_NUMBERS = 'CLIP gave no numbers, since its own are too small; give dtype="float32"'
SAME_VIEW = 0.98  # cosine of two towers' views of one chart; the same weights in half precision are above .999

STATISTICS = (
    "edges 1 px", "edges 2 px", "edges 4 px", "diagonals 1 px", "diagonals 2 px", "diagonals 4 px",
    "colour edges 1 px", "colour edges 2 px", "colour edges 4 px", "noise", "colour noise", "peakedness", "blockiness",
    "brightness", "contrast", "black", "white", "colour", "strongest colour", "clipped channels",
)  # fmt: skip
N = len(STATISTICS)


class Head(NamedTuple):
    """Logistic regression: logit = clamp((x - mean) / std) . weight + bias. All (D,) float64; bias (1,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def parts(self, x: Tensor) -> Tensor:
        """(N, D + 1): what each feature, and the bias, add to the logit."""
        z = ((x[:, : len(self.mean)] - self.mean) / self.std).clamp(-BEYOND, BEYOND)
        return torch.cat([z * self.weight, self.bias.expand(len(x), 1)], 1)


class Artifact:
    """The probability that a picture is one of the good ones, from 0 to 1, as if good and bad were equally frequent.

    None where there is no picture, or one that cannot be judged (then the details say why); the prompts are not read. Details: the
    features that speak most against the picture, in logits. There are no published weights: `fit` makes them.
    """

    def __init__(self, head: Head, report: dict[str, Any], tower: Any, view: Tensor | None, name: str, batch_size: int) -> None:
        self.head, self.report, self.tower, self.view = head, report, tower, view
        self.name, self.batch_size = name, batch_size

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[float | None]:
        return [found.score for found in self.judge(images, prompts)]

    def judge(self, images: Sequence[Any], prompts: Sequence[str], **context: Any) -> list[Judgement]:
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(f"{self.name}: {len(images)} pictures and {len(prompts)} prompts; give one prompt for each")
        found = [Judgement(None)] * len(images)
        for start in range(0, len(images), self.batch_size):
            rows: dict[int, tuple[Image.Image, Tensor]] = {}
            for i, image in enumerate(images[start : start + self.batch_size], start):
                try:
                    if image is not None:
                        rows[i] = (picture := as_rgb(image)), statistics(picture)
                except ValueError as e:
                    found[i] = Judgement(None, {"error": first_line(e)})
            if rows:
                x = torch.stack([own for _, own in rows.values()])
                if self.tower is not None:
                    x = torch.cat([x, _seen(self.tower, [picture for picture, _ in rows.values()])], 1)
                for i, parts in zip(rows, self.head.parts(x), strict=True):
                    found[i] = self._judgement(parts)
        return found

    def _judgement(self, parts: Tensor) -> Judgement:
        chance = float(parts.sum().sigmoid())
        if not math.isfinite(chance):
            return Judgement(None, {"error": NO_NUMBERS})
        worst = sorted(zip([*parts[:N].tolist(), float(parts[N:-1].sum())], (*STATISTICS, "what CLIP sees")))[:3]
        return Judgement(chance, {"against": {what: round(value, 3) for value, what in worst if value < 0}})

    def save(self, folder: str | Path) -> Path:
        """Writes the folder's artifact.safetensors, as a whole or not at all. Raises ValueError, as `check_target`."""
        file = check_target(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in self.head._asdict().items()}
        unfinished = file.with_name(f".{FILE}.{os.getpid()}.tmp")
        try:
            save_file(tensors | ({} if self.view is None else {"view": self.view}), unfinished, {MARK: json.dumps(self.report)})
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    @classmethod
    def from_pretrained(
        cls, model: str | Path | None = None, *, clip: str | Path | None = None, name: str = "artifact", dtype: Any = None,
        device: str | None = None, batch_size: int = 16,
    ) -> Artifact:  # fmt: skip
        """model: a folder or .safetensors of `save`, or a hub id. clip: where the CLIP lies that it was trained with; default: where it
        lay then. dtype: CLIP's, default float32. Raises OSError for what is not there, ValueError for another file or another CLIP."""
        if model is None:
            raise FileNotFoundError(
                f"{name} has no published weights; train it (promptloop artifact GOOD_DIR BAD_DIR --out DIR), then give model=DIR"
            )
        path = find_weights(name, model, FILE, None)
        report, tensors = read_report(path), read_checkpoint(path)
        view = tensors.pop("view", None)
        width = N if view is None else N + len(view)
        sizes = {"mean": width, "std": width, "weight": width, "bias": 1}
        if {key: len(t) for key, t in tensors.items()} != sizes or report["statistics"] != list(STATISTICS):
            raise ValueError(f"{path} was made for other features than this version computes; train it again")
        if view is None:
            if clip is not None:
                raise ValueError(f"{path} uses statistics alone and no CLIP; leave clip out")
            return cls(Head(**tensors), report, None, None, name, batch_size)
        place = str(clip or report["clip"])
        tower, seen = _load_tower(place, name, dtype, device, f"{path} was trained with it; clip= names another place of it")
        alike = float(seen @ view) if seen.shape == view.shape else 0.0
        if not alike >= SAME_VIEW:
            raise ValueError(
                f"{path} was trained with {report['clip']} (width {len(view)}), and {place} is another CLIP (width {len(seen)}; "
                f"they see one chart with a cosine of {alike:.2f}); give clip=, a place of the first"
            )
        return cls(Head(**tensors), report, tower, view, name, batch_size)


def fit(
    good: str | Path | Sequence[Any], bad: str | Path | Sequence[Any], *, clip: str | Path | None = CLIP_L, name: str = "artifact",
    dtype: Any = None, device: str | None = None, batch_size: int = 16,
) -> Artifact:  # fmt: skip
    """A guard that tells `good` from `bad`: folders (with those in them), or lists of files or pictures; at least 10 of each.

    clip: folder or hub id of a CLIPModel; None: statistics alone. Logistic regression with an L2 penalty; the penalty, and whether CLIP
    is used, are chosen by cross-validation. `report` is of an outer one: of pictures that neither weights nor choices have seen. The
    same pictures give the same weights, bit for bit (on a CPU, with the same libraries and threads).

    Raises ValueError for too few pictures or one that is in both classes, OSError for one that cannot be read.
    """
    listed = [_listed(what, given) for what, given in (("good", good), ("bad", bad))]
    if both := set.intersection(*({item.resolve() for item in items if isinstance(item, Path)} for items in listed)):
        raise ValueError(f"{min(both)} is both among the good and the bad pictures; give two folders that share none")
    tower, view = (None, None) if clip is None else _load_tower(clip, name, dtype, device, "clip=None (--clip none) needs none")
    kept, facts, rows = ([], []), ([], []), []  # type: tuple[list[Any], ...], tuple[list[Any], ...], list[Any]
    known: dict[bytes, tuple[int, str]] = {}
    todo = [(k, item) for k in (0, 1) for item in listed[k]]
    for k, item in tqdm(todo, desc="statistics", unit="picture", disable=None):
        picture = _opened(item)
        mark = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        if known.setdefault(mark, (k, str(item)))[0] != k:
            raise ValueError(f"the same picture is both good and bad: {known[mark][1]} and {item}; leave one out")
        if len(known) == len(rows):
            continue  # seen before: twice, it would be in training and held out as well
        rows.append(statistics(picture))
        kept[k].append(item)
        kind = item.suffix.lower().replace("jpeg", "jpg") if isinstance(item, Path) else "none"
        facts[k].append((picture.width * picture.height, round(picture.width / picture.height, 3), kind))
    good_n, bad_n = map(len, kept)
    if min(good_n, bad_n) < LEAST:
        raise ValueError(f"{good_n} good and {bad_n} bad pictures that differ are too few; give at least {LEAST} of each")
    x, y = torch.stack(rows), torch.tensor([0.5 / good_n] * good_n + [-0.5 / bad_n] * bad_n, dtype=torch.float64)
    if tower is not None:
        parts = [(kept[0] + kept[1])[k : k + batch_size] for k in range(0, len(rows), batch_size)]
        bar = tqdm(parts, desc="CLIP", unit_scale=batch_size, unit="picture", disable=None)
        x = torch.cat([x, torch.cat([_seen(tower, [_opened(i) for i in part]) for part in bar])], 1)
    if not x.isfinite().all():
        raise RuntimeError(NO_NUMBERS)
    held_out, fold = torch.empty_like(y), _folds(y, 5)
    for k in tqdm(range(5), desc="cross-validation", disable=None):
        held_out[fold == k] = _chosen(x[fold != k], y[fold != k])[0].parts(x[fold == k]).sum(1)
    head, penalty = _chosen(x, y)
    tower, view = (tower, view) if len(head.mean) > N else (None, None)  # nobody has to load one that does not help
    report = {
        "kind": MARK, "version": VERSION, "good": good_n, "bad": bad_n, "duplicates": len(todo) - len(rows),
        "clip": None if clip is None else str(clip), "clip_used": tower is not None, "penalty": penalty,
        "statistics": list(STATISTICS), **_figures(held_out[y > 0], held_out[y < 0]), "warnings": _shortcuts(*facts),
        "probability": "of being good, where good and bad pictures are equally frequent",
    }  # fmt: skip
    if report["auc"]["low"] <= 0.5:
        report["warnings"].append("the held-out AUC may as well be .5: it has learned nothing that holds for other pictures")
    for warning in report["warnings"]:
        logger.warning("%s: %s", name, warning)
    return Artifact(head, report, tower, view, name, batch_size)


def _chosen(x: Tensor, y: Tensor) -> tuple[Head, float]:
    """The head that does best on held-out folds of these pictures, by log loss: with or without what CLIP sees, and its penalty.

    y: above 0 for good pictures, below for bad ones; its size is a picture's weight.
    """
    fold = _folds(y, 4)
    losses = dict.fromkeys([(width, p) for width in dict.fromkeys((N, x.shape[1])) for p in PENALTIES], 0.0)
    for k in range(4):
        for width, penalty in losses:
            head = _trained(x[fold != k, :width], y[fold != k], penalty)
            losses[width, penalty] += float(_loss(head.parts(x[fold == k]).sum(1), y[fold == k]))
    width, penalty = min(losses, key=lambda how: losses[how])  # of equal ones the first: without CLIP, a larger penalty
    return _trained(x[:, :width], y, penalty), penalty


def _trained(x: Tensor, y: Tensor, penalty: float) -> Head:
    """The one minimum of the balanced log loss + penalty / 2 |weights of standardised features|^2, by Newton's method."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    weigh = torch.full_like(mean, N**-0.5)  # each of the two kinds of features weighs the same, however wide it is
    weigh[N:] = max(1, x.shape[1] - N) ** -0.5
    z = Head(mean, std, weigh, torch.ones(1)).parts(x)
    basis = torch.linalg.qr(z[:, :-1].T).Q  # the weights lie in the span of the pictures, which may be few
    z = torch.cat([z[:, :-1] @ basis, z[:, -1:]], 1)
    w, held = torch.zeros(z.shape[1], dtype=torch.float64), torch.full((z.shape[1],), penalty, dtype=torch.float64)
    held[-1] = 0

    def objective(w: Tensor) -> float:
        return float(_loss(z @ w, y) + (held * w * w).sum() / 2)

    for _ in range(100):
        wrong = torch.sigmoid(-y.sign() * (z @ w))
        slope = held * w - z.T @ (y * wrong)
        step = torch.linalg.solve((z.T * (y.abs() * wrong * (1 - wrong))) @ z + held.diag(), slope)
        now, gain = objective(w), float(slope @ step)
        size = next((2.0**-k for k in range(40) if objective(w - 2.0**-k * step) <= now - 1e-4 * 2.0**-k * gain), 0.0)
        w = w - size * step
        if size * gain < 1e-12:
            break
    return Head(mean, std, basis @ w[:-1] * weigh, w[-1:])


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return (y.abs() * torch.nn.functional.softplus(-y.sign() * logits)).sum()


def _folds(y: Tensor, n: int) -> Tensor:
    """(N,): the fold of each sample; always the same, and each class evenly over the folds."""
    fold, generator = torch.empty(len(y), dtype=torch.long), torch.Generator().manual_seed(0)
    for rows in (torch.nonzero(y > 0)[:, 0], torch.nonzero(y < 0)[:, 0]):
        fold[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % n
    return fold


def _figures(good: Tensor, bad: Tensor) -> dict[str, Any]:
    """Wilson's 95% intervals, which stay wide where all are told apart. The variance of an AUC is at most that of a share of as many
    samples as the smaller class has (Birnbaum and Klose, 1957), so its interval is rather too wide than too narrow."""
    m, n = len(good), len(bad)
    below = [torch.searchsorted(bad.sort().values, good, right=side).double().mean() / n for side in (False, True)]
    area, kept, caught = float(sum(below)) / 2, float((good > 0).double().mean()), float((bad <= 0).double().mean())
    return {"auc": _wilson(area, min(m, n)), "good_kept": _wilson(kept, m), "bad_caught": _wilson(caught, n)}


def _wilson(share: float, n: int) -> dict[str, float]:
    z2 = 1.959964**2 / n
    middle, half = (share + z2 / 2) / (1 + z2), (z2 * (share * (1 - share) + z2 / 4)) ** 0.5 / (1 + z2)
    return {"value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def _shortcuts(good: Sequence[tuple[Any, ...]], bad: Sequence[tuple[Any, ...]]) -> list[str]:
    """Warnings where the classes differ in what is no artifact; the gap is Smirnov's distance, above what chance gives (1%)."""
    least = max(0.5, 1.63 * (1 / len(good) + 1 / len(bad)) ** 0.5)
    found = []
    for what, a, b in zip(("number of pixels", "aspect ratio", "file format"), zip(*good), zip(*bad)):
        values = sorted({*a, *b})
        apart = np.array([a.count(v) / len(a) - b.count(v) / len(b) for v in values])
        gap = abs(apart).sum() / 2 if what == "file format" else abs(apart.cumsum()).max()
        if gap >= least:
            usual = " and ".join(str(max(values, key=v.count)) for v in (a, b))
            found.append(
                f"the {what} alone tells good from bad ({(1 + gap) / 2:.0%} right; mostly {usual}), and the guard may have learned "
                f"just that: give both the same {what}"
            )
    return found


def statistics(picture: Image.Image) -> Tensor:
    """(20,) float64, as in `STATISTICS`, of the pixels as they are: resizing would wipe out what they are to find.

    Edges, diagonals: log2 of the mean size of Haar details at 1, 2 and 4 pixels; their fall is the slope of the spectrum, and diagonals
    rise with noise and checkerboards. Noise: the median at 1 pixel (Donoho and Johnstone, 1994); peakedness: how uneven those are.
    Blockiness: jumps at multiples of 8 pixels against those elsewhere. The rest: brightness, colour, shares of what is cut off.
    """
    width, height = picture.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"it is {width} x {height}; give at least {MIN_SIDE} pixels a side, and no side {MAX_RATIO} times the other"
        )
    left, top = max(0, width - LARGEST) // 2, max(0, height - LARGEST) // 2
    rgb = np.asarray(picture.crop((left, top, width - left, height - top)), np.float32) / 255
    grey = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    planes, details = [grey, rgb[..., 0] - grey, rgb[..., 2] - grey], []
    for _ in range(3):
        details.append([_haar(plane) for plane in planes])
        planes = [d[0] for d in details[-1]]
    edges = [[abs(d[1]).mean() + abs(d[2]).mean() for d in level] for level in details]
    grain, red, blue = (abs(d[3]) for d in details[0])
    low, high = rgb.min(-1), rgb.max(-1)
    logs = [
        *(e[0] for e in edges), *(abs(level[0][3]).mean() for level in details), *(e[1] + e[2] for e in edges),
        np.median(grain), np.median(red) + np.median(blue),
    ]  # fmt: skip
    found = [
        *map(_log, logs), np.log2((np.square(grain).mean() + 1e-7) / (np.square(grain.mean()) + 1e-7)),
        (_jumps(grey) + _jumps(grey.T)) / 2, grey.mean(), grey.std(), (high < 1.5 / 255).mean(), (low > 253.5 / 255).mean(),
        (high - low).mean(), np.percentile(high - low, 95), ((rgb < 1.5 / 255) | (rgb > 253.5 / 255)).mean(),
    ]  # fmt: skip
    return torch.tensor(found, dtype=torch.float64)


def _haar(plane: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means and details across, down and diagonal of 2 x 2 pixels; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in plane.shape)
    a, b, c, d = (plane[i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    return (a + b + c + d) / 4, (a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4


def _jumps(plane: np.ndarray) -> float:
    """log2 of third differences across columns at multiples of 8 over those elsewhere."""
    sizes = abs(plane[:, 3:] - 3 * plane[:, 2:-1] + 3 * plane[:, 1:-2] - plane[:, :-3]).mean(0)
    at = np.arange(2, 2 + len(sizes)) % 8 == 0
    return _log(sizes[at].mean()) - _log(sizes[~at].mean()) if at.any() else 0.0


def _log(value: Any) -> float:
    return float(np.log2(value + 1 / 2048))  # an eighth of a grey level


def _seen(tower: Any, pictures: Sequence[Image.Image]) -> Tensor:
    return see(tower, pictures).cpu().double()


def _listed(what: str, given: str | Path | Sequence[Any]) -> list[Any]:
    """Files of a folder in a fixed order, or what is given."""
    if not isinstance(given, (str, Path)):
        return [Path(item) if isinstance(item, str) else item for item in given]
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder} of {what} pictures")
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and not p.name.startswith(".") and p.is_file())
    if len(files) < LEAST:
        raise ValueError(f"{folder} holds {len(files)} pictures (PNG, JPEG, WebP, ...); give at least {LEAST} {what} ones")
    return files


def _opened(item: Any) -> Image.Image:
    return load_image(item) if isinstance(item, Path) else as_rgb(item)


def _load_tower(clip: str | Path, name: str, dtype: Any, device: str | None, hint: str) -> tuple[Any, Tensor]:
    """A tower and how it sees (width,) a chart that is always the same, by which one knows it again wherever its weights lie."""
    try:
        tower = load_clip(clip, name, dtype, device)
    except OSError as e:
        raise OSError(f"{e}; {hint}") from e
    x, y = np.meshgrid(np.arange(224), np.arange(224))
    chart = np.stack([x * y // 32, x * x // 64 + y, 3 * y + x // 2], -1).astype(np.uint8)
    return tower, _seen(tower, [Image.fromarray(chart)])[0]


def check_target(folder: str | Path) -> Path:
    """The file that `Artifact.save` writes. Raises ValueError where something of that name is there that it did not make."""
    file = Path(folder).expanduser() / FILE
    if file.exists():
        read_report(file)
    return file


def read_report(path: Path) -> dict[str, Any]:
    """What `fit` reported of a saved guard. Raises ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            report = json.loads((file.metadata() or {})[MARK])
    except Exception as e:
        raise ValueError(f"{path} was not made by `promptloop artifact`, so it is neither used nor replaced") from e
    if report["version"] > VERSION:
        raise ValueError(f"{path} was made by a newer version; update PromptLoop, or train it again")
    return dict(report)
