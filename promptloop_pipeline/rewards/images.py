"""The one way in which pictures come to rewards: from files, from whatever a host hands over, and into a model's pixels.

Pixels are made as the published scorers make them, without torchvision. Colour profiles are not applied, as no published scorer does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")  # not EPS, for which Pillow starts a program
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
MAX_RATIO = 32  # longer strips would grow beyond memory when their short side is brought to 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, and BLIP's too


class _Unfit(ValueError):
    """A picture that is sound, and that no reward can judge."""


def load_image(path: str | Path) -> Image.Image:
    """The picture in a file, as RGB, as a viewer shows it: turned as its EXIF says, transparency on white, 16 bits scaled to 8.

    Raises FileNotFoundError or IsADirectoryError, OSError for what cannot be read, ValueError for what no reward can judge (animated,
    tiny, huge); each names the file in one line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the pictures in it, such as {path}/*.png")
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on large and odd files; what matters is checked here
            Image.init()  # AVIF is not in every Pillow
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as picture:
                problem = _unfit(picture)
                if not problem:
                    return as_rgb(ImageOps.exif_transpose(picture))
    except _Unfit as e:
        problem = str(e)
    except Image.DecompressionBombError:
        problem = f"more than {MAX_PIXELS // 10**6} megapixels; make it smaller"
    except Exception as e:  # a damaged file may raise anything in Pillow
        reason = getattr(e, "strerror", None) or next(iter(str(e).splitlines()), type(e).__name__)
        raise OSError(f"cannot read the picture {path}: it is no picture, or a damaged one ({reason})") from e
    raise ValueError(f"cannot use the picture {path}: {problem}")


def _unfit(picture: Image.Image) -> str:
    """Why no reward can judge the opened picture, "" if one can. Only its header has been read."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} is more than {MAX_PIXELS // 10**6} megapixels; make it smaller"
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        return f"it is {width} x {height}; give at least {MIN_SIDE} pixels a side, and no side {MAX_RATIO} times the other"
    if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a camera's picture with its own thumbnails
        return f"it is animated ({getattr(picture, 'n_frames', 'several')} frames); save one frame as PNG"
    return ""


def as_rgb(image: Any) -> Image.Image:
    """RGB from a PIL image, a numpy array or a torch tensor: uint8, or floats from 0 to 1; (H, W), or with 1, 3 or 4 channels first
    or last.

    Raises TypeError for anything else, ValueError for floats beyond 0 to 1.
    """
    if isinstance(image, Image.Image):
        return _rgb(image)
    import numpy as np

    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"a picture is {type(image).__name__} {image!r:.40}; give a PIL image, a numpy array or a torch tensor")
    return _rgb(Image.fromarray(_eight_bit(_channels_last(image))))


def _channels_last(a: np.ndarray) -> np.ndarray:
    if a.ndim == 3 and a.shape[-1] not in (1, 3, 4) and a.shape[0] in (1, 3, 4):
        a = a.transpose(1, 2, 0)
    if a.ndim == 3 and a.shape[-1] == 1:
        a = a[..., 0]
    if a.ndim != 2 and not (a.ndim == 3 and a.shape[-1] in (3, 4)):
        raise TypeError(f"a picture has the shape {a.shape}; give (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    return a


def _eight_bit(a: np.ndarray) -> np.ndarray:
    import numpy as np

    if a.dtype == np.uint8:
        return np.ascontiguousarray(a)
    if a.dtype.kind != "f":
        raise TypeError(f"a picture holds {a.dtype}; give uint8, or floats from 0 to 1")
    low, high = float(a.min()), float(a.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true of nan
        raise ValueError(f"a picture holds floats from {low:.3g} to {high:.3g}; give 0 to 1, or uint8")
    return np.ascontiguousarray((a.clip(0, 1) * 255).round().astype(np.uint8))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise _Unfit("its pixels are floating-point numbers of unknown range; save it as PNG")
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut everything above 255
        import numpy as np

        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _Unfit("its pixels are 32-bit numbers; save it as PNG")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def crop_pixels(images: Sequence[Image.Image], size: int, half: Callable[[float], int] = round) -> Tensor:
    """(N, 3, size, size): the short side brought to `size`, bicubic, and the middle cut out, as OpenAI's CLIP and ImageReward do it.

    half: where the cut starts when the rest is odd: `round` as torchvision does it, `math.floor` as transformers does it.
    """
    import numpy as np
    import torch

    rows = []
    for image in images:
        width, height = image.size
        short = min(width, height)
        width, height = (size if side == short else int(size * side / short) for side in (width, height))
        left, top = half((width - size) / 2), half((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        rows.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return _standardised(torch.stack(rows).float() / 255)


def pad_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """(N, 3, size, size): the long side brought to `size`, bicubic with antialiasing and without rounding, and black around it, as
    HPSv2 does it (arXiv 2306.09341)."""
    import numpy as np
    import torch
    from torch.nn.functional import interpolate, pad

    rows = []
    for image in images:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if scale != 1:
            x = interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True)
        left, top = (size - width) // 2, (size - height) // 2
        rows.append(pad(x, (left, size - width - left, top, size - height - top))[0])
    return _standardised(torch.stack(rows))


def _standardised(x: Tensor) -> Tensor:
    import torch

    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def in_batches(
    name: str, score: Callable[[list[Image.Image], list[str]], Tensor], images: Sequence[Any], prompts: Sequence[str],
    batch_size: int, blind: bool = False,
) -> list[float | None]:  # fmt: skip
    """`score` on `batch_size` pictures at a time. None where there is no picture, or nothing was asked for (unless `blind`: no prompt
    is read).

    Raises ValueError when there are not as many prompts as pictures, RuntimeError for a score that is no number.
    """
    if isinstance(prompts, str) or len(images) != len(prompts):
        raise ValueError(f"{name}: {len(images)} pictures and {len(prompts)} prompts; give one prompt for each picture")
    found: list[float | None] = [None] * len(images)
    rows = [i for i, image in enumerate(images) if image is not None and (blind or prompts[i].strip())]
    for part in (rows[k : k + batch_size] for k in range(0, len(rows), batch_size)):
        values = score([as_rgb(images[i]) for i in part], [prompts[i] for i in part]).tolist()
        for i, value in zip(part, values, strict=True):
            if not math.isfinite(value):
                raise RuntimeError(f'{name} gave {value} for picture {i + 1}; its numbers are too small: give dtype="float32"')
            found[i] = value
    return found
