"""What runs along the wires, beside ComfyUI's own types, and how a widget's value is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

REFINER = io.Custom("PROMPTLOOP_REFINER")
"""Any `promptloop_pipeline.Refiner`."""
HISTORY = io.Custom("PROMPTLOOP_HISTORY")
"""list[promptloop_pipeline.Trajectory], one for each picture of the batch."""
RUN = io.Custom("PROMPTLOOP_RUN")
"""`host.Loop`: where a sampler that is not ours leaves what happened."""


def problem(given: str | None, check: Callable[[], Any]) -> bool | str:
    """As `validate_inputs` answers: True, or what is wrong. What is linked is not known yet (None), and checked when the node runs."""
    try:
        if given is not None:
            check()
    except ValueError as e:
        return str(e)
    return True
