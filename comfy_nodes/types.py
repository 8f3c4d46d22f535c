"""What runs along the wires, beside ComfyUI's own types."""

from __future__ import annotations

from comfy_api.latest import io

REFINER = io.Custom("PROMPTLOOP_REFINER")
"""Any `promptloop_pipeline.Refiner`."""
HISTORY = io.Custom("PROMPTLOOP_HISTORY")
"""list[promptloop_pipeline.Trajectory], one for each picture of the batch."""
RUN = io.Custom("PROMPTLOOP_RUN")
"""`host.Loop`: where a sampler that is not ours leaves what happened."""
