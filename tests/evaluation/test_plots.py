from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promptloop_pipeline.evaluation.measures import arm_measures
from promptloop_pipeline.evaluation.plots import Axis, grouped_plot, interval_plot, line_plot, measure_plots
from promptloop_pipeline.evaluation.style import STYLE
from promptloop_pipeline.trajectory import Trajectory, Turn

NS = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    '<script>alert(1)</script> & "q" \'',
    "\u202eabc \u0645\u0631\u062d\u0628\u0627",
    "\ud800 \x00 \x1b",
    "W" * 4000,
    "]]>",
    "",
    "a\nb\tc",
]


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg.encode("utf-8"))


def texts(root: ET.Element) -> dict[str, tuple[float, float]]:
    return {e.text or "": (float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in root.iter(f"{NS}text")}


def dots(root: ET.Element) -> list[tuple[float, float]]:
    return [(float(e.get("cx", "nan")), float(e.get("cy", "nan"))) for e in root.iter(f"{NS}circle")]


def value(mean: float | None, low: float | None = None, high: float | None = None, n: int = 9) -> dict[str, object]:
    return {"mean": mean, "low": low, "high": high, "n": n}


def paths(root: ET.Element) -> list[str]:
    return [e.get("d", "") for e in root.iter(f"{NS}path")]


def test_dots_and_whiskers_stand_where_the_axis_says() -> None:
    rows = {"raw": value(0.0, 0.0, 0.25), "single": value(0.5, 0.4, 0.6), "loop": value(1.0)}
    root = parse(interval_plot(rows, title="strict", x_label="share", reference="single", limits=(0, 1)))
    at = texts(root)
    zero, one = at["0.0"][0], at["1.0"][0]
    assert [t for t in at if re.fullmatch(r"[\d.]+", t)][:6] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [y + 4.5 for _, y in dots(root)] == [at[name][1] for name in rows]

    def place(x: float) -> object:
        return pytest.approx(zero + x * (one - zero), abs=0.011)

    assert [x for x, _ in dots(root)] == [place(0), place(0.5), place(1)]
    whiskers = [re.match(r"M([\d.]+) [\d.]+H([\d.]+)", d) for d in paths(root) if "v7" in d]
    assert [tuple(map(float, m.groups())) for m in whiskers if m] == [(place(0), place(0.25)), (place(0.4), place(0.6))]
    dashed = [e.get("d", "") for e in root.iter(f"{NS}path") if e.get("stroke-dasharray")]
    assert len(dashed) == 1 and float(dashed[0][1:].split()[0]) == pytest.approx((zero + one) / 2, abs=0.01)
    bold = [e.text for e in root.iter(f"{NS}text") if e.get("font-weight")]
    assert bold == ["single"] and {"share", "0.50", "1.00", "0.00"} <= set(at)


def test_differences_are_held_against_zero() -> None:
    root = parse(interval_plot({"a": value(0.3, 0.2, 0.4), "b": value(0.5, 0.4, 0.6)}, title="loop minus arm", reference=0))
    (dashed,) = [e.get("d", "") for e in root.iter(f"{NS}path") if e.get("stroke-dasharray")]
    zero = texts(root)["0.0"][0]
    assert float(dashed[1:].split()[0]) == zero < min(x for x, _ in dots(root)), "the axis reaches as far as the line"
    assert not [e for e in root.iter(f"{NS}text") if e.get("font-weight")]


def test_what_is_seen_is_told() -> None:
    root = parse(interval_plot({"raw": value(0.25, 0.125, 0.5), "x<y": value(None), "no n": {"mean": 2}}, title="A & B"))
    assert (
        root.get("role") == "img"
        and root.get("aria-label") == "A & B"
        and root[0].tag == f"{NS}title"
        and root[0].text == "A & B"
    )
    assert root.findtext(f"{NS}desc") == "raw: 0.25 [0.125, 0.5], n = 9; x<y: no value; no n: 2"
    assert [g.text for g in root.iter(f"{NS}title")][1:] == ["raw: 0.25 [0.125, 0.5], n = 9", "x<y: no value", "no n: 2"]
    assert len(dots(root)) == 2 and "\u2013" in texts(root)


def test_an_interval_that_is_none_is_not_drawn() -> None:
    for low, high in ((0.8, 0.2), (0.2, None), (None, 0.8), (math.nan, 0.8)):
        root = parse(interval_plot({"a": value(0.5, low, high)}, title="t"))
        assert len(dots(root)) == 1 and not [d for d in paths(root) if "v7" in d]


def test_groups() -> None:
    groups = {"colors": {"raw": value(0.2), "loop": value(0.6)}, "counting": {"raw": value(0.1), "loop": value(None)}}
    root = parse(grouped_plot(groups, title="by tag", reference="loop", limits=(0, 1)))
    headings = [e.text for e in root.iter(f"{NS}text") if e.get("font-weight") and e.text not in ("loop",)]
    assert headings == ["colors", "counting"]
    assert (root.findtext(f"{NS}desc") or "").startswith("colors, raw: 0.2, n = 9; colors, loop: 0.6")
    assert len([e for e in root.iter(f"{NS}path") if e.get("stroke-dasharray")]) == 1, (
        "no line where the reference has no value"
    )
    heights = [y for _, y in dots(root)]
    assert heights == sorted(heights) and len(heights) == 3


def test_lines() -> None:
    raw = [(0, value(1.0)), (1, value(None)), (2, value(3.0, 2.5, 3.5)), (3, value(4.0, 3.5, 4.5))]
    root = parse(line_plot({"raw": raw, "loop": [(1, value(2.0))]}, title="t", x_label="turns", y_label="words"))
    at = texts(root)
    assert {"0", "1", "2", "3", "turns", "words", "raw", "loop"} <= set(at)
    lines = [e for e in root.iter(f"{NS}path") if e.get("stroke-width") == "2"]
    assert [e.get("d", "").count("L") for e in lines] == [1], "a gap where there is no value; one point is no line"
    assert len(dots(root)) == 4
    up = [y for _, y in dots(root)[:3]]
    assert up == sorted(up, reverse=True), "more is higher"
    bands = [e for e in root.iter(f"{NS}path") if e.get("fill-opacity")]
    assert len(bands) == 1 and bands[0].get("d", "").endswith("Z")
    leads = [e for e in root.iter(f"{NS}path") if e.get("stroke-dasharray") == "1 3"]
    assert len(leads) == 1, "only the line that ends early needs leading to its name"
    assert "loop at 1: 2, n = 9" in (root.findtext(f"{NS}desc") or "")


def test_many_lines_keep_their_names_apart() -> None:
    series = {f"arm number {k}": [(0, value(1.0)), (5, value(1.0 + k % 2 / 1000, 0, 2))] for k in range(12)}
    root = parse(line_plot(series, title="t"))
    heights = sorted(y for name, (_, y) in texts(root).items() if name.startswith("arm"))
    assert (
        len(heights) == 12 and min(np.diff(heights)) >= 14.9 and heights[-1] < float(root.get("height", 0)) and heights[0] > 8
    )
    assert not [e for e in root.iter(f"{NS}path") if e.get("fill-opacity")], "no bands: they would hide each other"
    colours = {e.get("stroke") for e in root.iter(f"{NS}g")}
    assert len(colours) == 8 and len([e for e in root.iter(f"{NS}path") if e.get("stroke-dasharray") == "7 3"]) == 4
    assert "[0, 2]" in (root.findtext(f"{NS}desc") or "")


ODD = [
    {}, {"a": value(None)}, {"a": value(math.nan, 0, 1)}, {"a": value(math.inf)}, {"a": value(0.0)}, {"a": value(1.0, 1.0, 1.0)},
    {"a": value(5e-324), "b": value(0.0)}, {"a": value(1e308), "b": value(-1e308)}, {"a": value(1.0, math.nan, 2.0)},
    {"a": value(1.0, 3.0, 2.0)}, {"a": value(-7.5)}, {"a": value(12345678.9), "b": value(12345679.9)}, {"a": {}}, {"a": None},
    {"a": {"mean": "0.5"}}, {"a": {"mean": np.float32(0.5), "low": np.float64(0.25), "high": 1}},
]  # fmt: skip


@pytest.mark.parametrize("rows", ODD)
@pytest.mark.parametrize("limits", [(None, None), (0, 1), (0, None)])
def test_odd_values(rows: dict, limits: tuple) -> None:
    for svg in (
        interval_plot(rows, title="t", reference="a", limits=limits),
        line_plot({name: [(0, v), (1, v)] for name, v in rows.items()}, title="t", limits=limits),
        line_plot({name: [(3, v)] for name, v in rows.items()}, title="t", limits=limits),
    ):
        root = parse(svg)
        assert "nan" not in "".join(paths(root)) and "inf" not in "".join(paths(root))
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        assert all(0 <= x <= width and 0 <= y <= height for x, y in [*dots(root), *texts(root).values()])


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_names(evil: str) -> None:
    rows = {evil: value(0.5, 0.2, 0.7), evil + "2": value(0.1)}
    for svg in (
        interval_plot(rows, title=evil, x_label=evil, reference=evil),
        grouped_plot({evil: rows}, title=evil, x_label=evil),
        line_plot({k: [(0, v), (1, v)] for k, v in rows.items()}, title=evil, x_label=evil, y_label=evil),
    ):
        root = parse(svg)
        allowed = {"svg", "title", "desc", "g", "path", "circle", "text"}
        assert {e.tag.removeprefix(NS) for e in root.iter()} <= allowed
        assert not [a for e in root.iter() for a in e.attrib if a.startswith("on") or a in ("style", "href", "class", "id")]
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg\")|url\(|javascript", svg.replace(evil, ""))
        assert all(len(t) < 80 for t in texts(root)), "long names are cut, and whole in their <title>"


def test_names_that_differ_at_their_ends_can_be_told_apart() -> None:
    names = [f"Qwen3-VL-4B-Instruct with the adapter {k}" for k in "AB"]
    root = parse(interval_plot({name: value(0.5) for name in names}, title="t"))
    shown = [t for t in texts(root) if "\u2026" in t]
    assert len(shown) == 2 and [t[-1] for t in shown] == ["A", "B"] and all(t.startswith("Qwen3") for t in shown)
    assert [t.text.split(":")[0] for t in root.iter(f"{NS}title")][1:] == names  # type: ignore[union-attr]


numbers = st.floats(-1e9, 1e9) | st.floats(-1, 1) | st.integers(0, 100).map(float)


@given(st.lists(numbers, min_size=1, max_size=6))
@example([5e-324])
@example([0.0, 1e-323])
@settings(deadline=None, max_examples=400)
def test_ticks(values: list[float]) -> None:
    axis = Axis.over(values)
    slack = 1e-8 * (axis.high - axis.low)
    assert axis.low <= min(values) + slack and axis.high >= max(values) - slack
    assert 2 <= len(axis.ticks) <= 8
    step = axis.ticks[1] - axis.ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-2
    labels = [axis.label(t) for t in axis.ticks]
    assert len(set(labels)) == len(labels)
    for tick, label in zip(axis.ticks, labels):
        assert float(label.replace("\u2212", "-")) == pytest.approx(tick, abs=step / 100)
    assert not {"-0", "\u22120", "\u22120.0"} & set(labels)


def test_ticks_by_hand() -> None:
    def shown(*values: float, **options: object) -> list[str]:
        axis = Axis.over(values, **options)  # type: ignore[arg-type]
        return [axis.label(t) for t in axis.ticks]

    assert shown(0, 1) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert shown(0.13, 0.87) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert shown(3, 47) == ["0", "10", "20", "30", "40", "50"]
    assert shown(-0.23, 1.09) == ["\u22120.5", "0.0", "0.5", "1.0", "1.5"]
    assert shown(1, 1, limits=(0, 1)) == ["0.90", "0.95", "1.00"]
    assert shown(0, 5, limits=(0, 5), whole=True) == ["0", "1", "2", "3", "4", "5"]
    assert shown(0, 2, limits=(0, 2), whole=True) == ["0", "1", "2"]
    assert shown(1e6, 1.01e6)[:2] == ["1e+06", "1.002e+06"]
    assert shown(0, 0, limits=(0, 1)) == ["0.0", "0.2", "0.4", "0.6"] and Axis.over([0, 0], (0, 1)).low == 0
    assert Axis.over([0.99, 1.2], (0, 1)).high == 1.2, "what is there is shown, whatever the limits say"


def test_measures() -> None:
    turns = [Turn(0, 9, "red cube", "a red cube, soft light"), Turn(4, 9, "a red cube, soft light", "a ball")]
    arms = {"raw": [Trajectory("red cube")], "loop": [Trajectory("red cube", turns)]}
    plots = measure_plots({name: arm_measures(found) for name, found in arms.items()})
    assert [p.title for p in plots] == ["The request's words in the prompt", "Words in the prompt"]
    assert "loop at 2: 0" in plots[0].svg and "loop at 1: 5" in plots[1].svg and "turn 0 is the request" in plots[0].caption
    assert measure_plots({"raw": arm_measures([Trajectory("x")])}) == measure_plots({}) == [], "no figure of nothing"


# --- colours --------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    colour = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_can_be_read_on_both_pages() -> None:
    """WCAG AA: a contrast of 4.5 for text, on the card that figures stand on."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    )
    fallback = dict(
        re.findall(r"var\(--(series-\d), (#\w+)\)", line_plot({str(k): [(0, value(k))] for k in range(8)}, title="t"))
    )
    assert len(fallback) == 8 and set(fallback) < set(dark)
    for colours in (light | fallback, dark):
        card = luminance(colours["card"])
        for name in ("accent", "text", "quiet", *fallback):
            a, b = sorted((card, luminance(colours[name])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, name
