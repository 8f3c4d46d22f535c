"""Pictures between ComfyUI (IMAGE: float tensors [N, H, W, C] in 0..1) and the loop (PIL)."""

from __future__ import annotations

import base64
import io as buffers
import math
from collections.abc import Sequence
from typing import Any

SHEET = 4  # frames of a video on its contact sheet


def to_pil(image: Any) -> list[Any]:
    """Tensor [N, H, W, C] in 0..1 -> N RGB pictures. C is 1 (grey), 3 or 4 (alpha is dropped)."""
    import numpy
    from PIL import Image

    rows = (image.detach().float().clamp(0, 1).cpu().numpy() * 255).round().astype(numpy.uint8)
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row[..., :3]).convert("RGB") for row in rows]


def to_image(pictures: Sequence[Any]) -> Any:
    """PIL pictures -> tensor [N, H, W, 3] in 0..1; those of another size are scaled to the first one's. One black pixel for none."""
    import numpy
    import torch
    from PIL import Image

    if not pictures:
        return torch.zeros(1, 1, 1, 3)
    size = pictures[0].size
    rgb = [p.convert("RGB") for p in pictures]
    rows = [numpy.asarray(p if p.size == size else p.resize(size, Image.Resampling.LANCZOS)) for p in rgb]
    return torch.from_numpy(numpy.stack(rows)).float() / 255


def timeline(trajectories: Sequence[Any]) -> Any:
    """All that was looked at, picture by picture in the order of the steps, then the finished one, as one IMAGE batch."""
    return to_image([p for t in trajectories for p in (*(turn.image for turn in t.turns), t.image) if p is not None])


def samples_of(decoded: Any, count: int) -> list[Any]:
    """What a VAE decoded, as one PIL picture for each of `count` samples; the frames of a video go on one contact sheet.

    decoded: tensor [count, H, W, C], or [count, frames, H, W, C]. Raises ValueError for another number of pictures.
    """
    frames = decoded.reshape(-1, *decoded.shape[-3:])
    each, left = divmod(frames.shape[0], count)
    if left or not each:
        raise ValueError(f"the VAE decoded {frames.shape[0]} pictures from {count} latents; it does not go with this model")
    if each == 1:
        return to_pil(frames)
    return [contact_sheet(to_pil(frames[k * each : (k + 1) * each][spread(each, SHEET)])) for k in range(count)]


def spread(frames: int, wanted: int) -> list[int]:
    """At most `wanted` indices, evenly from the first to the last frame."""
    wanted = min(wanted, frames)
    return [round(k * (frames - 1) / max(wanted - 1, 1)) for k in range(wanted)]


def contact_sheet(frames: Sequence[Any]) -> Any:
    """Frames side by side in reading order, on a grid that is as square as can be."""
    from PIL import Image

    across = math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].size
    sheet = Image.new("RGB", (across * width, math.ceil(len(frames) / across) * height))
    for k, frame in enumerate(frames):
        sheet.paste(frame, (k % across * width, k // across * height))
    return sheet


def data_uri(picture: Any, side: int = 256) -> str:
    """A small JPEG for the browser; `side`: its longer side at most, in pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    data = buffers.BytesIO()
    small.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
