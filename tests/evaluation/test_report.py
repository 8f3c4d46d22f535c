from __future__ import annotations

import base64
import io
import os
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from promptloop_pipeline.evaluation.diff import word_diff
from promptloop_pipeline.evaluation.plots import Plot, grouped_plot, interval_plot, line_plot
from promptloop_pipeline.evaluation.report import Arm, write_report
from promptloop_pipeline.trajectory import Trajectory, Turn

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = (
    """<script>alert("1")</script> & 'quoted' "double" <img src=x onerror=alert(1)> </p></details>""",
    "W" * 4000,
    "\u202eabc \u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\ud800 lone surrogate \x00 and control",
    "https://example.com/<b>",
    "",
)


class Page(HTMLParser):
    """All elements as (tag, attributes, text inside); raises where a tag is not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[e[0] for e in self.open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> names an attribute twice"
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element[2].append(data)

    def texts(self, tag: str, css: str | None = None) -> list[str]:
        return ["".join(text) for t, attrs, text in self.elements if t == tag and css in (None, attrs.get("class"))]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for t, attrs, _ in self.elements if t == tag]

    def pictures(self) -> list[Image.Image]:
        sources = [(a["src"] or "").partition(";base64,") for a in self.attributes("img")]
        found = [Image.open(io.BytesIO(base64.b64decode(data, validate=True))) for _, _, data in sources]
        assert [f"data:image/{p.format.lower()}" for p in found] == [kind for kind, _, _ in sources]
        return found


def picture(color: str = "red", size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, color).convert(mode)


def arm(name: str, *requests: str, turns: bool = True, **scores: float | None) -> Arm:
    looks = [
        Turn(0, 10, "a cat", "a black cat", None, None, "nothing to see", seconds={"refiner": 0.25}),
        Turn(4, 10, "a black cat", "a black cat", 0.5, picture("blue"), "as asked"),
        Turn(7, 10, "a black cat", "a black cat", 0.25, picture(), error="TimeoutError: <late>", boundary="refiner"),
        Turn(10, 10, "a black cat", "a white cat, asleep", 0.0, picture("green"), seconds={"preview": 1.26}),
    ]
    return Arm(name, f"note of {name}", [Trajectory(r, looks if turns else [], picture(), scores) for r in requests])


def write(tmp_path: Path, *arms: Arm, **options: object) -> tuple[str, Page]:
    file = write_report(arms, tmp_path / "index.html", **{"title": "A title", **options})  # type: ignore[arg-type]
    source = file.read_bytes().decode("utf-8")
    return source, Page(source)


def test_content(tmp_path: Path) -> None:
    arms = arm("raw", "a cat", "a dog", turns=False, overlap=0.12345), arm("loop", "a cat", "a dog", strict=1.0, overlap=1.0)
    table = [{"arm": "raw", "mean": "0.5 ± 0.1", "remark": "three words"}, {"arm": "loop", "mean": "\u2013", "late": "x"}]
    source, page = write(tmp_path, *arms, intro="An introduction.", table=table)
    assert source.startswith("<!DOCTYPE html>") and page.attributes("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.attributes("meta")
    assert any(a.get("name") == "viewport" for a in page.attributes("meta"))
    assert page.texts("title") == page.texts("h1") == ["A title"] and page.texts("p", "intro") == ["An introduction."]
    assert page.texts("th")[:4] == ["arm", "mean", "remark", "late"] and page.texts("th")[4:] == ["raw", "loop"]
    assert page.texts("td") == ["0.5 ± 0.1", "three words", "", "\u2013", "", "x"]
    assert [a.get("class") for a in page.attributes("td")] == ["number", None, None] * 2
    assert [a["scope"] for a in page.attributes("th")] == ["col"] * 4 + ["row"] * 2
    assert page.texts("h2") == ["Summary", "Prompt 1 of 2", "Prompt 2 of 2"]
    assert page.texts("p", "request") == ["a cat", "a dog"]
    assert page.texts("h3") == ["raw", "loop", "loop"] * 2
    assert page.texts("dl", "scores") == ["overlap0.123", "strict\u2713 1.000overlap1.000"] * 2
    assert page.texts("p", "small") == ["no turns", "4 turns, 1 failed"] * 2
    assert "note of raw" in page.texts("dl", "arms")[0]


def test_timeline(tmp_path: Path) -> None:
    _, page = write(tmp_path, arm("loop", "a cat"))
    assert page.texts("summary") == ["loop 4 turns, 1 failed, 2 rewrote the prompt"]
    assert page.texts("h4") == [
        "Step 0 of 10",
        "Step 4 of 10 \u03c3 0.500 prompt kept",
        "Step 7 of 10 \u03c3 0.250 prompt kept",
        "After the last step \u03c3 0.000",
    ]
    assert page.texts("div", "missing") == ["no image yet"]
    assert page.texts("div", "error") == ["Failed: refinerTimeoutError: <late>"]
    turns = page.texts("li")
    assert "Seennothing to see" in turns[0] and "Timerefiner 250 ms" in turns[0]
    assert "Timepreview 1.3 s" in turns[3] and "Time" not in turns[1] and "Seen" not in turns[3]
    assert page.texts("ins") == [" black", " white", ", asleep"] and page.texts("del") == [" black"]


def test_notes(tmp_path: Path) -> None:
    turn = Turn(1, 4, "p", "q", notes=("put back: '<b>'", "cut"), applied=3)
    _, page = write(tmp_path, Arm("a", "", [Trajectory("x", [turn])]))
    assert "Notesput back: '<b>'; cut; acted from step 3 on" in page.texts("li")[0]


def test_counts(tmp_path: Path) -> None:
    kept = Arm("a", "", [Trajectory("x", [Turn(1, 2, "p", "p")])])
    _, page = write(tmp_path, kept)
    assert page.texts("p", "small") == ["1 turn, none failed"]
    assert page.texts("summary") == ["a 1 turn, none failed, none rewrote the prompt"]


def test_only_what_a_report_is_about_is_unfolded(tmp_path: Path) -> None:
    def opened(*arms: Arm) -> list[bool]:
        return ["open" in a for a in write(tmp_path, *arms)[1].attributes("details")]

    assert opened(arm("one", "a", "b")) == [True, True]
    assert opened(arm("one", "a", "b"), arm("two", "a", "b"), arm("none", "a", "b", turns=False)) == [False, True, False, False]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("strict", 0.0, "\u2717 0.000"), ("tiny_strict", 1, "\u2713 1.000"), ("strict", 0.5, "0.500"), ("right", True, "\u2713 1.000"),
        ("overlap", 1.0, "1.000"), ("overlap", 0.0, "0.000"), ("strict", None, "not scored"), ("x", float("nan"), "nan"),
    ],
)  # fmt: skip
def test_scores(tmp_path: Path, name: str, value: float | None, shown: str) -> None:
    _, page = write(tmp_path, arm("a", "x", **{name: value}))
    assert page.texts("dl", "scores") == [name + shown]
    sign = [a["aria-label"] for a in page.attributes("span") if a.get("role") == "img"]
    assert sign == {"\u2713": ["passed"], "\u2717": ["failed"]}.get(shown[0], [])


@pytest.mark.parametrize("pixelated", [False, True])
@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text(tmp_path: Path, evil: str, pixelated: bool) -> None:
    turn = Turn(1, 2, evil, "b " + evil, 0.1, picture(), evil, error=evil, boundary=evil, seconds={evil: 0.1})
    bad = Arm(evil, evil, [Trajectory(evil, [turn], picture(), {evil: 1.0})])
    source, page = write(tmp_path, bad, title=evil, intro=evil, table=[{evil: evil, "x": evil}], pixelated=pixelated)
    shown = evil.encode("utf-8", "replace").decode("utf-8")
    assert page.texts("h1") == page.texts("p", "request") == [shown]
    assert evil == "" or escape(shown) in source
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "a", "base", "b"}
    assert page.texts("section", "prompt") and len(page.attributes("img")) == 2
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "srcset", "action", "formaction"), (tag, name)
            assert name not in ("src", "href") or (value or "").startswith("data:"), (tag, name, value)


def test_nothing_from_outside(tmp_path: Path) -> None:
    source, page = write(tmp_path, arm("a", "x"))
    assert "<script" not in source and "@import" not in source and "url(" not in source
    assert not re.search(r"https?:|src=\"//|javascript:", source)
    policy = next(a["content"] or "" for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy and "script-src" not in policy
    tags = [tag for tag, _, _ in page.elements]
    assert tags.index("style") > tags.index("meta") and "prefers-color-scheme: dark" in source


def plots(name: str = "raw") -> list[Plot]:
    value = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    return [
        Plot(
            "strict",
            interval_plot({name: value, "loop": value}, title="strict by arm", reference=name),
            f"A caption of {name}.",
        ),
        Plot(name, grouped_plot({name: {name: value}}, title=name, x_label=name)),
        Plot("words", line_plot({name: [(0, value), (1, value)]}, title="words over turns", x_label="turn", y_label=name)),
    ]


def test_tables_and_plots(tmp_path: Path) -> None:
    table, cost = [{"arm": "raw", "mean": "0.5"}], [{"arm": "raw", "s/look": "1.25", "failures": "refiner 2"}]
    tables = [("By tag", table), ("empty", []), ("What it cost", cost)]
    _, page = write(tmp_path, arm("raw", "a cat"), table=table, tables=tables, plots=plots())
    assert page.texts("h2") == ["Summary", "By tag", "What it cost", "strict", "raw", "words", "Prompt 1 of 1"]
    tags = [
        (tag, attrs.get("class") or attrs.get("aria-label"))
        for tag, attrs, _ in page.elements
        if tag in ("table", "section", "svg")
    ]
    assert [t for t, _ in tags] == [
        "section",
        "table",
        "section",
        "section",
        "table",
        "section",
        "table",
        "section",
        *["svg"] * 3,
        "section",
    ]
    assert [name for t, name in tags if t == "svg"] == ["strict by arm", "raw", "words over turns"]
    assert page.texts("figcaption")[0] == "strictA caption of raw." and page.texts("figcaption")[1] == "raw"
    assert page.texts("td") == ["0.5", "0.5", "1.25", "refiner 2"]
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) and {a["aria-labelledby"] for _, a, _ in page.elements if "aria-labelledby" in a} <= set(
        ids
    )


def test_a_page_without_a_summary_can_have_tables(tmp_path: Path) -> None:
    _, page = write(tmp_path, arm("raw", "a cat"), tables=[("By tag", [{"arm": "raw"}])])
    assert page.texts("h2") == ["By tag", "Prompt 1 of 1"] and page.texts("dl", "arms") == ["rawnote of raw"]
    assert not write(tmp_path, arm("raw", "a cat"))[1].attributes("svg")


@pytest.mark.parametrize("evil", HOSTILE)
def test_hostile_text_in_tables_and_plots(tmp_path: Path, evil: str) -> None:
    _, page = write(tmp_path, arm("a", "x", turns=False), tables=[(evil, [{evil: evil, "x": evil}])], plots=plots(evil))
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "a", "base", "b", "foreignobject", "image", "use"}
    assert evil.encode("utf-8", "replace").decode("utf-8") in page.texts("h2")
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "xlink:href"), (tag, name)
            assert name not in ("src", "href") or (value or "").startswith("data:"), (tag, name, value)


def test_a_page_with_plots_names_nothing_outside(tmp_path: Path) -> None:
    source, _ = write(tmp_path, arm("a", "x"), plots=plots(), tables=[("t", [{"a": "1"}])])
    rest = source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert source != rest and not re.search(r"https?:|=\"//|javascript:|url\(|@import|<script|<use|href=\"[^d]", rest)


def test_pictures(tmp_path: Path) -> None:
    large, wide, palette, clear = (
        picture(size=(1024, 768)), picture("blue", (2000, 10)), picture("lime", mode="P"), picture("red", mode="RGBA"),
    )  # fmt: skip
    turns = [Turn(0, 3, "p", "p"), Turn(1, 3, "p", "p", image=large), Turn(2, 3, "p", "p", image=picture("white", (40, 30)))]
    arms = [
        Arm(f"<{k}>", "", [Trajectory("p", turns if k == 0 else [], im)])
        for k, im in enumerate((large, wide, palette, clear, None))
    ]
    _, page = write(tmp_path, *arms)
    pictures = page.pictures()
    assert [p.size for p in pictures] == [(512, 384), (512, 3), (32, 32), (32, 32), (256, 192), (40, 30)]
    assert [p.format for p in pictures] == ["JPEG", "JPEG", "PNG", "PNG", "JPEG", "PNG"], (
        "large ones must not make a heavy page"
    )
    assert pictures[2].convert("RGB").getpixel((1, 1)) == (0, 255, 0)
    assert [p.mode for p in pictures[:4]] == ["RGB", "RGB", "RGB", "RGBA"]
    assert [(a["width"], a["height"]) for a in page.attributes("img")] == [tuple(map(str, p.size)) for p in pictures]
    alts = [a["alt"] for a in page.attributes("img")]
    assert alts[1] == "<1>: the finished picture for prompt 1" and alts[4] == "<0>: what was seen, step 1 of 3"
    assert page.texts("div", "missing") == ["no picture", "no image yet"]
    assert large.size == (1024, 768) and clear.mode == "RGBA", "the record's own pictures are left as they are"


def test_pixelated_is_a_matter_of_style(tmp_path: Path) -> None:
    soft, hard = (write(tmp_path, arm("a", "x"), pixelated=p)[1] for p in (False, True))
    assert (soft.attributes("body"), hard.attributes("body")) == ([{}], [{"class": "pixelated"}])
    assert soft.attributes("img") == hard.attributes("img")
    assert ".pixelated img" in hard.texts("style")[0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a <red> ball", "a <red> ball", "a &lt;red&gt; ball"),
        ("a red ball", "a blue ball", "a<del> red</del><ins> blue</ins> ball"),
        ("a red ball", "a ball", "a<del> red</del> ball"),
        ("red ball", "a red ball", "<ins>a </ins>red ball"),
        ("a ball", "a ball, on grass", "a ball<ins>, on grass</ins>"),
        ("a ball", "a ball\n", "a ball<ins>\n</ins>"),
        ("", "<b>", "<ins>&lt;b&gt;</ins>"),
        ("a & b", "a < b", "a<del> &amp;</del><ins> &lt;</ins> b"),
        ("\u4e00\u53ea\u7ea2\u732b", "\u4e00\u53ea\u84dd\u732b", "\u4e00\u53ea<del>\u7ea2</del><ins>\u84dd</ins>\u732b"),
        # one word in common is no reason to cut two unlike sentences up
        (
            "the ball is left of it",
            "large circle top left , small box",
            "<del>the ball is left of it</del><ins>large circle top left , small box</ins>",
        ),
    ],
)
def test_word_diff(before: str, after: str, expected: str) -> None:
    assert word_diff(before, after) == expected


WORDS = ["red", "ball", ", ", " ", "\n", "  ", "<", "left", "\u732b", "(x:1.2)", "é", "\u0640\u0629", "&amp;"]


@pytest.mark.parametrize("seed", range(200))
def test_both_prompts_can_be_read_off_a_diff(seed: int) -> None:
    import random

    rng = random.Random(seed)
    before, after = ("".join(rng.choices([*WORDS, " "], k=rng.randrange(14))) for _ in range(2))
    diff = word_diff(before, after)
    assert re.sub("<ins>.*?</ins>|</?del>", "", diff, flags=re.S) == escape(before)
    assert re.sub("<del>.*?</del>|</?ins>", "", diff, flags=re.S) == escape(after)


def test_same_input_same_page(tmp_path: Path) -> None:
    pages = [
        write(tmp_path / str(k), arm("a", "x", "y", strict=1.0), arm("b", "x", "y"), table=[{"a": "1"}])[0] for k in range(2)
    ]
    assert pages[0] == pages[1]
    assert pages[0] != write(tmp_path, arm("a", "x", "y", strict=0.0), arm("b", "x", "y"), table=[{"a": "1"}])[0]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "at least one arm"),
        ([arm("raw", "x", "y"), arm("loop", "x")], "'raw' has 2, 'loop' has 1"),
        ([arm("raw", "x", "y"), arm("mid", "x", "y"), arm("loop", "x", "z")],
         "trajectory 1: 'raw' has the request 'y', 'loop' has 'z'"),
    ],
)  # fmt: skip
def test_arms_that_do_not_match(tmp_path: Path, arms: list[Arm], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(arms, tmp_path / "index.html", title="t")
    assert not list(tmp_path.iterdir())


def test_where_it_is_written(tmp_path: Path) -> None:
    arms = [arm("a", "x")]
    assert write_report(arms, tmp_path / "new" / "folder", title="t") == tmp_path / "new" / "folder" / "index.html"
    assert write_report(arms, str(tmp_path / "new" / "page.HTML"), title="t") == tmp_path / "new" / "page.HTML"
    assert (
        write_report([Arm("a", "", [])], tmp_path / "new" / "folder", title="empty")
        == tmp_path / "new" / "folder" / "index.html"
    )
    assert sorted(p.name for p in (tmp_path / "new").rglob("*")) == ["folder", "index.html", "page.HTML"]
    assert '<h1 dir="auto">empty</h1>' in (tmp_path / "new" / "folder" / "index.html").read_text("utf-8")


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "index.html"
    with pytest.raises(OSError, match=re.escape(str(target))) as failure:
        write_report([arm("a", "x")], target, title="t")
    assert re.fullmatch(r"cannot write the report to [^\n\[]*", str(failure.value)), "one line, without the errno"
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError, match=r"folder\.html"):
        write_report([arm("a", "x")], tmp_path / "folder.html", title="t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.html"]


def test_a_crash_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_report([arm("a", "x")], tmp_path, title="old")
    old = target.read_bytes()

    def half(self: Path, data: bytes) -> int:
        with open(self, "wb") as f:
            f.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_report([arm("a", "x")], tmp_path, title="new")
    assert target.read_bytes() == old and os.listdir(tmp_path) == ["index.html"]


def test_the_page_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, real = [], Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: written.append(self) or real(self, data))
    target = write_report([arm("a", "x")], tmp_path, title="t")
    assert target.is_file() and len(written) == 1 and target not in written
    assert written[0].parent == target.parent, "a rename across file systems is none"
