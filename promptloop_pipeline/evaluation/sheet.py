"""A contact sheet: one row an arm, one column a prompt, framed by whether everything is as asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .report import Arm

if TYPE_CHECKING:
    from PIL.Image import Image

PASSED, FAILED, PAPER, INK = (38, 132, 84), (190, 58, 58), (250, 250, 248), (40, 40, 44)


def contact_sheet(arms: Sequence[Arm], columns: int = 8, size: int = 112) -> Image:
    """The first `columns` prompts of each arm; pictures of `size` pixels, enlarged with hard edges. A broken red frame marks what
    is not as asked, so that it shows without colour too."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns, len(arms[0].trajectories))
    font = ImageFont.load_default(size=15)
    margin, frame, label = 8, 4, 130
    cell = size + 2 * (frame + margin)
    sheet = Image.new("RGB", (label + columns * cell, len(arms) * cell), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, arm in enumerate(arms):
        pen.text((margin + 2, row * cell + cell // 2), arm.name, INK, font, anchor="lm")
        for column, t in enumerate(arm.trajectories[:columns]):
            x, y = label + column * cell + margin, row * cell + margin
            passed = t.scores.get("strict") == 1
            pen.rectangle((x, y, x + size + 2 * frame - 1, y + size + 2 * frame - 1), PASSED if passed else FAILED)
            if not passed:
                for k in range(10, size, 14):
                    pen.rectangle((x + k, y, x + k + 6, y + size + 2 * frame - 1), PAPER)
                    pen.rectangle((x, y + k, x + size + 2 * frame - 1, y + k + 6), PAPER)
            if t.image is not None:
                sheet.paste(t.image.convert("RGB").resize((size, size), Image.Resampling.NEAREST), (x + frame, y + frame))
    return sheet
