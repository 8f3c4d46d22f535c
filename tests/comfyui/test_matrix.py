"""Samplers, guiders, model families, and all that hangs on a conditioning, in a real ComfyUI (tests/comfyui/matrix.py)."""

from pathlib import Path

import pytest

FAMILIES = ("sd15", "sd3", "flux", "wan")
TEN = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
    "ddim", "uni_pc", "lcm",
)  # fmt: skip
STAGED = ("area, target", "LoRA and area", "time range, target", "text encoder's hook LoRA")  # compared with two runs in a row
SCRIPT = Path(__file__).parent / "matrix.py"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.slow
def test_a_refinement_of_the_same_tokens_changes_nothing(inprocess, models, family):
    rows = inprocess(SCRIPT, models, "identity", family)
    assert set(TEN) <= set(rows) and {"PerpNegGuider", "sampler node", "DualCFGGuider, guider node"} <= set(rows)
    for name, row in rows.items():
        assert row["diff"] == 0 and row["finite"], (name, row)
        assert row["changed"] == row["turns"] >= 2 and not row["errors"], (name, row)
        assert row["swaps"] == row["turns"] - 2 * (name == "start and end"), (name, row)  # these two act outside of sampling
        assert row["looked"] == row["turns"] - (name == "start and end"), (name, row)


@pytest.mark.slow
def test_another_text_acts_from_its_step_on_and_only_from_there(inprocess, models, family):
    rows = inprocess(SCRIPT, models, "swap", family)
    assert set(TEN) <= set(rows)
    for name, row in rows.items():
        rounding = 1e-5 * row["size"] if name.startswith("two stages") else 0
        assert row["diff"] <= rounding and row["finite"], (name, row)
        assert row["effect"] > 100 * rounding and row["effect"] > 1e-4 * row["size"], (name, row)
        assert row["swaps"] == row["turns"] == row["changed"] == 1 and not row["errors"], (name, row)


@pytest.mark.slow
def test_what_hangs_on_a_conditioning_survives_the_swap(inprocess, models, family):
    rows = inprocess(SCRIPT, models, "survivors", family)
    other = rows["batch, one changed"]["swap"]
    assert other["other"] == 0 and len(set(other["histories"])) == 2
    for name, kinds in rows.items():
        for kind, row in kinds.items():
            rounding = 1e-5 * row["size"] if kind == "swap" and (name in STAGED or "ControlNet" in name) else 0
            assert row["diff"] <= rounding and row["finite"], (name, kind, row)
            assert not row["errors"] and row["changed"] > 0 and row["swaps"] > 0, (name, kind, row)
            assert kind == "identity" or row["effect"] > 1e-4 * row["size"], (name, kind, row)
    for name in {"LoRA", "hook LoRA", "ControlNet", "mask, the request's entry", *STAGED} & set(rows):
        assert rows[name]["identity"]["effect"] > 1e-4 * rows[name]["identity"]["size"], f"{name} does not act at all"
