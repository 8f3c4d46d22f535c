"""What is where in a picture, and in what colour: by a detector of transformers, which outlines objects (Mask2Former and its kin)
or puts boxes around them (DETR, RT-DETR, D-FINE, ...), and by CLIP. Neither mmdet nor torchvision is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .clip import Similarity, see
from .images import MAX_RATIO
from .weights import best_device, first_line, is_hub_id, refuse

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of every model that outlines
SIDES = (800, 1333)  # COCO's test size: the short side is brought to the first, the long one at most to the second
_OUTLINE = ("mask2former", "maskformer", "eomt", "eomt_dinov3")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = "#999999"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object: its class in the detector's words, how sure the detector is (0 to 1), its box in pixels (left, top, right,
    bottom), and, where it was outlined, which pixels of the rounded box it covers: bool, (height, width)."""

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, repr=False, compare=False)


Detect = Callable[[Sequence[Image.Image]], Sequence[Sequence[Detection]]]  # RGB pictures of one size -> what is in each
Crops = Sequence[tuple[Image.Image, str]]  # pictures of single objects, and their classes
NameColours = Callable[[Crops], Sequence[str]]  # -> one of `COLOURS` for each


class Outlines:
    """Detects with a model for instance segmentation whose queries have a class and a mask (arXiv 2112.01527).

    As mmdet runs it: pictures at COCO's test size, masks brought back to the picture's own, the box around a mask. A score is the
    probability of the class times the mean probability within the mask. floor: lower scores are left out.
    """

    def __init__(self, model: Any, *, floor: float = 0.0) -> None:
        self.model, self.floor = model, floor
        self.labels: dict[int, str] = {int(k): str(v) for k, v in model.config.id2label.items()}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        pixels, inner = self._pixels(images)
        seen = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        classes, masks = seen.class_queries_logits.float(), seen.masks_queries_logits.float()
        check_finite(classes, masks)
        probabilities = classes.softmax(-1)[..., :-1]  # the last one is "nothing"
        size = images[0].size
        return [self._objects(p, m, pixels.shape[-2:], inner, size) for p, m in zip(probabilities, masks)]

    def _pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int]]:
        """(N, 3, H, W), and the (height, width) within it that the pictures fill; the rest is zero."""
        width, height = images[0].size
        square = getattr(self.model.config, "image_size", None) if self.model.config.model_type.startswith("eomt") else None
        short, long = (square, square) if square else SIDES
        scale = min(short / min(width, height), long / max(width, height))
        inner = max(1, round(height * scale)), max(1, round(width * scale))
        outer = (square, square) if square else tuple(-(-side // 32) * 32 for side in inner)
        rows = [np.asarray(i.resize(inner[::-1], Image.Resampling.BILINEAR), dtype=np.float32) for i in images]
        x = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return pad(x, (0, outer[1] - inner[1], 0, outer[0] - inner[0])), inner

    def _objects(
        self, probabilities: Tensor, masks: Tensor, outer: Sequence[int], inner: tuple[int, int], size: tuple[int, int]
    ) -> list[Detection]:
        """probabilities: (queries, classes); masks: (queries, h, w) of the padded picture."""
        found = []
        best, where = probabilities.flatten().topk(len(probabilities))
        for probability, k in zip(best.tolist(), where.tolist()):
            if probability <= self.floor:  # a mask only takes away from it
                break
            query, label = divmod(k, probabilities.shape[1])
            x = interpolate(masks[None, query, None], tuple(outer), mode="bilinear")[..., : inner[0], : inner[1]]
            x = interpolate(x, size[::-1], mode="bilinear")[0, 0]
            mask = x > 0
            if not mask.any():
                continue
            score = probability * x[mask].sigmoid().mean().item()
            if score > self.floor:
                (top, bottom), (left, right) = (_ends(mask.any(axis)) for axis in (1, 0))
                inside = mask[top:bottom, left:right].cpu().numpy()
                found.append(Detection(self.labels[label], score, (left, top, right, bottom), inside))
        return found


def _ends(line: Tensor) -> tuple[int, int]:
    """Where the true part of a line starts, and the place after its end."""
    places = line.nonzero()[:, 0]
    return int(places[0]), int(places[-1]) + 1


class Boxes:
    """Detects with a model for object detection and its own image processor. floor: lower scores are left out."""

    def __init__(self, model: Any, processor: Any, *, floor: float = 0.0) -> None:
        self.model, self.processor, self.floor = model, processor, floor
        self.labels: dict[int, str] = {int(k): str(v) for k, v in model.config.id2label.items()}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        width, height = images[0].size
        given = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        seen = self.model(**{k: v for k, v in given.items() if k in ("pixel_values", "pixel_mask")})
        seen.logits, seen.pred_boxes = seen.logits.float(), seen.pred_boxes.float()
        check_finite(seen.logits, seen.pred_boxes)
        sizes = [(height, width)] * len(images)
        rows = self.processor.post_process_object_detection(seen, threshold=self.floor, target_sizes=sizes)
        limits = torch.tensor([width, height, width, height])
        found: list[list[Detection]] = []
        for row in rows:
            boxes = row["boxes"].cpu().clamp(min=0).minimum(limits).tolist()
            objects = zip(row["labels"].tolist(), row["scores"].tolist(), boxes)
            found.append(
                [Detection(self.labels[k], s, (b[0], b[1], b[2], b[3])) for k, s, b in objects if b[0] < b[2] and b[1] < b[3]]
            )
        return found


def check_finite(*found: Tensor) -> None:
    """Raises RuntimeError for nan and inf: what compares false with everything would look like an empty picture."""
    if not all(bool(f.isfinite().all()) for f in found):
        raise RuntimeError('the model gave nan or inf; where it runs in half precision, give dtype="float32"')


def load_detector(
    model: str | Path = MASK2FORMER,
    reward: str = "geneval",
    *,
    device: str | None = None,
    floor: float = 0.0,
) -> Outlines | Boxes:
    """A detector of a folder or hub id, in eval mode, with all of its weights; in float32, since some fail in half precision.

    Mask2Former, MaskFormer and EoMT outline, and need scipy; an `AutoModelForObjectDetection` puts boxes (RF-DETR's image
    processor needs torchvision). Raises OSError, ValueError, or ImportError for a missing package, with one clear line.
    """
    import transformers

    folder = Path(model).expanduser()
    if not ((folder / "config.json").is_file() or is_hub_id(model)):
        raise FileNotFoundError(
            f"there is no detector for {reward} at {model}: expected a folder with config.json, or a hub id"
        )
    source = folder if folder.exists() else str(model)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (getattr(config, "architectures", None) or [config.model_type])[0]
        outlines = config.model_type in _OUTLINE
        boxes = type(config) in transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING and architecture.endswith("ForObjectDetection")
        if outlines or boxes:
            auto = transformers.AutoModelForUniversalSegmentation if outlines else transformers.AutoModelForObjectDetection
            processor = None if outlines else _processor(source)
            found, info = auto.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except ImportError as e:
        raise ImportError(
            f"the detector {str(model)!r} of {reward} needs a package that is not there; for scipy: "
            f'pip install "promptloop[eval]" ({first_line(e)})'
        ) from e
    except Exception as e:  # the libraries below agree on no kind of error
        raise OSError(f"cannot load the detector of {reward} from {str(model)!r}: {first_line(e)}") from e
    if not (outlines or boxes):
        raise ValueError(
            f"{reward}: {str(model)!r} is {architecture}; give Mask2Former, MaskFormer, EoMT, or a model for object detection"
        )
    lost = {*info["missing_keys"], *(str(entry[0]) for entry in info.get("mismatched_keys", ()))}
    refuse(str(model), lost & {name for name, _ in found.named_parameters()}, [])
    found = found.eval().requires_grad_(False).to(device or best_device())
    return Outlines(found, floor=floor) if outlines else Boxes(found, processor, floor=floor)


def _processor(source: str | Path) -> Any:
    """The one on Pillow, so that no score depends on whether torchvision is installed."""
    import transformers

    options = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    return transformers.AutoImageProcessor.from_pretrained(source, **options)


# --- colours ------------------------------------------------------------------------------------------------------------


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """The object alone: its box, and grey where its mask, if it has one, does not cover it."""
    left, top = round(found.box[0]), round(found.box[1])
    box = left, top, max(round(found.box[2]), left + 1), max(round(found.box[3]), top + 1)
    part = image.crop(box)
    if found.mask is not None:
        part = Image.composite(part, Image.new("RGB", part.size, GREY), Image.fromarray(found.mask))
    side, (width, height) = MAX_RATIO * min(part.size), part.size  # CLIP sees no more than the middle square of a strip
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return part.crop((left, top, min(width, left + side), min(height, top + side)))


class ClipColours:
    """Names the colour of objects by CLIP: the nearest of `COLOURS`, each said in `TEMPLATES` and averaged."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        self.clip, self.batch_size = Similarity("geneval", model, tokenizer), batch_size
        self._said: dict[str, Tensor] = {}

    def __call__(self, objects: Crops) -> list[str]:
        found: list[str] = []
        for k in range(0, len(objects), self.batch_size):
            part = objects[k : k + self.batch_size]
            seen = see(self.clip.model, [picture for picture, _ in part])
            near = (seen[:, None] * torch.stack([self._words(name) for _, name in part])).sum(-1)  # (objects, colours)
            check_finite(near)
            found += [COLOURS[i] for i in near.argmax(-1).tolist()]
        return found

    def _words(self, name: str) -> Tensor:
        """(colours, width): what the colours of such an object are like, of length one."""
        if name not in self._said:
            said = self.clip.read([t.format(colour=c, name=name) for c in COLOURS for t in TEMPLATES])
            mean = said.reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._said[name] = torch.nn.functional.normalize(mean, dim=-1)
        return self._said[name]
