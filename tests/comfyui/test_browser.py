"""The real frontend in a real browser: workflows, the timeline, the dialog of Ask Me."""

import base64
import json

import pytest

from . import browser, workflows

FOLDER = workflows.FOLDER
ROWS = ".promptloop-row"


@pytest.fixture(scope="module")
def page(comfy):
    if why := browser.missing():
        pytest.skip(why)
    with browser.page_at(f"http://127.0.0.1:{comfy.port}") as page:
        yield page


def ui(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def event(page, name, **detail):
    """As if the server had sent it."""
    page.evaluate("([n, d]) => window.comfyAPI.api.api.dispatchEvent(new CustomEvent(n, {detail: d}))", [name, detail])


def run(page):
    """Queues what is open, and waits for its good end."""
    browser.queue(page)
    end = browser.ended(page)
    assert end["name"] == "execution_success", end


def panel(page, kind):
    """The text of the timeline in the first node of that type."""
    return page.evaluate(
        "kind => app.graph.nodes.find(n => n.type === kind).widgets.find(w => w.name === 'promptloop_timeline').element.innerText",
        kind,
    )


@pytest.mark.parametrize("name", workflows.names())
def test_a_workflow_opens_and_is_what_its_api_file_says(page, name):
    before = len(page.problems)
    browser.load_ui(page, ui(name))
    assert browser.missing_nodes(page) == []
    assert browser.ours(page.problems[before:]) == []
    expected, found = workflows.api(name), browser.to_prompt(page)
    assert {k: v["class_type"] for k, v in found.items()} == {k: v["class_type"] for k, v in expected.items()}
    for number, node in expected.items():  # some frontends add fields of their own to Preview Any
        assert {k: found[number]["inputs"].get(k) for k in node["inputs"]} == node["inputs"], f"node {number}"


def test_the_frontend_knows_templates_and_help(page, comfy):
    assert set(comfy.get("/workflow_templates")["promptloop"]) == set(workflows.names())
    assert (
        page.evaluate("() => Object.keys(LiteGraph.registered_node_types).filter(n => n.startsWith('PromptLoop')).length") > 15
    )


def test_both_languages_of_the_panel_have_the_same_texts(page):
    keys = page.evaluate("""() => import("/extensions/promptloop/js/common.js").then(
      ({ TEXT }) => Object.fromEntries(Object.entries(TEXT).map(([k, v]) => [k, Object.keys(v)])))""")
    assert keys["en"] == keys["zh"] and len(keys["en"]) > 30


def test_a_word_diff_gives_both_texts_back(page):
    pairs = [
        ("", "a b"), ("a b", ""), ("a b c", "a x c"), ("red ball, left", "red ball , right"),
        ("\u4e00\u4e2a\u7ea2\u7403", "\u4e00\u4e2a\u84dd\u7403"),
        ("the cat sat left of the dog", "one left word in another sentence"), ("same", "same"),
    ]  # fmt: skip
    for before, after in pairs:
        parts = page.evaluate(
            "([a, b]) => import('/extensions/promptloop/js/common.js').then(m => m.wordDiff(a, b))", [before, after]
        )
        assert "".join(words for kind, words in parts if kind != "del") == after
        assert "".join("".join(words for kind, words in parts if kind != "ins").split()) == "".join(before.split())
    assert parts == [["same", "same"]]


def test_a_finished_run_shows_its_timeline_and_keeps_it(page):
    browser.load_ui(page, ui("loop-sampler"))
    run(page)
    final = page.evaluate(
        "() => app.graph.nodes.find(n => n.type === 'PromptLoopSampler').properties.promptloop.runs[0].prompt"
    )
    shown = panel(page, "PromptLoopSampler")
    assert final in shown and "Picture 1 of 2" in shown and "step 3 / 20 (15 %)" in shown
    rows = page.locator(ROWS)
    assert rows.count() == 5 and page.locator(f"{ROWS} ins").count() > 0 and page.locator(f"{ROWS} del").count() > 0
    page.wait_for_function(
        "() => [...document.querySelectorAll('.promptloop-row img')].filter(i => i.naturalWidth === 32).length === 4"
    )
    saved = browser.serialized(page)
    assert "data:image" not in json.dumps(saved) and len(json.dumps(saved)) < 60_000
    page.get_by_role("button", name="Next picture").click()
    assert "Picture 2 of 2" in panel(page, "PromptLoopSampler")
    browser.load_ui(page, saved)  # as a reloaded page does
    assert final in panel(page, "PromptLoopSampler") and page.locator(ROWS).count() == 5
    assert set(browser.to_prompt(page)["4"]["inputs"]) == set(workflows.api("loop-sampler")["4"]["inputs"]), (
        "the panel is no input"
    )


def test_a_node_inside_of_a_subgraph_shows_its_timeline(page):
    browser.load_ui(page, ui("any-sampler"))
    page.evaluate("""() => {
      const inner = app.graph.nodes.filter((n) => ["PromptLoop", "KSampler"].includes(n.type));
      inner.find((n) => n.type === "KSampler").widgets[0].value = 5;
      app.graph.convertToSubgraph(new Set(inner));
    }""")
    assert any(":" in number for number in browser.to_prompt(page))
    run(page)
    shown = page.evaluate("""() => {
      const inner = app.graph.nodes.find((n) => n.subgraph).subgraph.nodes.find((n) => n.type === "PromptLoop");
      return inner.widgets.find((w) => w.name === "promptloop_timeline").element.innerText;
    }""")
    assert "Final prompt" in shown and "step" in shown


def test_two_nodes_alike_show_their_own_runs(page, comfy):
    graph = workflows.api("any-sampler")
    graph["20"] = {"class_type": "PromptLoop", "inputs": dict(graph["6"]["inputs"])}
    graph["21"] = {"class_type": "KSampler", "inputs": {**graph["7"]["inputs"], "model": ["20", 0], "seed": 4}}
    graph["22"] = {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0], "vae": ["1", 2]}}
    graph["23"] = {"class_type": "PreviewImage", "inputs": {"images": ["22", 0]}}
    graph["7"]["inputs"]["seed"] = 3
    browser.load_api(page, graph)
    run(page)
    last = "id => app.graph.getNodeById(id).properties.promptloop?.runs[0].prompt"
    assert page.evaluate(last, 6) and page.evaluate(last, 20)


def test_a_dropped_picture_shows_the_run_that_made_it(page, comfy):
    browser.load_ui(page, ui("any-sampler"))
    page.evaluate("""() => app.graph.nodes.find((n) => n.type === "PromptLoop").widgets
      .find((w) => w.name === "refine_at").value = "start, 4, 6" """)  # no other test's run
    run(page)
    name = page.evaluate("() => Object.values(app.nodeOutputs).flatMap(o => o.images ?? []).find(i => i.type === 'output')")
    data = base64.b64encode(comfy.view(name)).decode()
    final = page.evaluate("() => app.graph.nodes.find(n => n.type === 'PromptLoop').properties.promptloop.runs[0].prompt")
    browser.load_ui(page, ui("rewrite"))
    page.evaluate(
        """async (data) => {
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
          app.canvas.canvas.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        data,
    )
    page.wait_for_function("() => app.graph.nodes.some((n) => n.type === 'PromptLoop')")
    page.wait_for_timeout(1000)
    assert final in panel(page, "PromptLoop") and final in panel(page, "PromptLoopResult")


def test_a_failing_refiner_is_shown_on_the_node(page):
    browser.load_ui(page, ui("endpoint-refiner"))
    page.evaluate(
        "() => app.graph.nodes.find(n => n.type === 'PromptLoopEndpointRefiner').widgets[0].value = 'http://127.0.0.1:9/v1'"
    )
    run(page)
    assert "2 looks failed" in panel(page, "PromptLoopSampler") and "connection refused" in panel(page, "PromptLoopSampler")


def test_prompts_are_never_read_as_html_and_a_stopped_run_is_not_shown_as_running(page):
    browser.load_ui(page, ui("any-sampler"))
    owner = page.evaluate("() => app.graph.nodes.find(n => n.type === 'PromptLoop').id")
    bad = "<img src=x onerror='window.broken = 1'><b>bold</b>"
    ids = {"prompt_id": "p", "node": "99:1", "owner": str(owner)}
    event(page, "promptloop.begin", requests=[bad], num_steps=10, due=[0, 5, 8], **ids)
    turn = {
        "step": 0,
        "num_steps": 10,
        "before": bad,
        "after": bad + " more",
        "reasoning": bad,
        "error": bad,
        "notes": [bad],
        "image": "javascript:0",
    }
    event(page, "promptloop.turn", sample=0, turn=turn, **ids)
    shown = panel(page, "PromptLoop")
    assert "<b>bold</b>" in shown and "Next look at step 5 (50 %)" in shown and page.evaluate("() => window.broken") is None
    event(page, "execution_interrupted")
    assert "Next look" not in panel(page, "PromptLoop") and "Final prompt" in panel(page, "PromptLoop")


def question(number, **more):
    return {
        "id": f"q{number}", "node": "1", "sample": 0, "request": "a ball", "before": "a ball", "suggestion": "a red ball",
        "reasoning": "it is grey", "step": 3, "num_steps": 20, "image": None, "seconds": 60, **more,
    }  # fmt: skip


def test_questions_queue_and_unsent_text_is_never_lost(page):
    focus = page.evaluate("() => { document.activeElement?.blur(); return document.activeElement.tagName }")
    dialog = page.get_by_role("dialog", name="Your turn")
    for number in (1, 2, 2):
        event(page, "promptloop.ask", **question(number))
    assert dialog.count() == 1 and "1 more waiting" in dialog.inner_text() and "60 s left" in dialog.inner_text()
    area = dialog.get_by_role("textbox")
    assert area.input_value() == "a red ball" and dialog.locator("ins").inner_text().strip() == "red"
    area.fill("my own ball")
    event(page, "promptloop.asked", id="q1", outcome="timeout")
    assert "timeout" in dialog.inner_text() and area.input_value() == "my own ball"
    page.keyboard.press("Escape")
    area = dialog.get_by_role("textbox")
    assert area.input_value() == "a red ball", "the second question"
    area.fill("again my own")
    page.keyboard.press("Escape")
    assert dialog.count() == 1 and "Press Esc again" in dialog.inner_text()
    page.keyboard.press("Control+Enter")  # nobody asks this on the server
    page.wait_for_function(
        "() => document.querySelector('.promptloop-ask-status')?.textContent.includes('Your text was not used')"
    )
    assert dialog.get_by_role("textbox").input_value() == "again my own"
    page.keyboard.press("Escape")
    assert dialog.count() == 0 and page.evaluate("() => document.activeElement.tagName") == focus


def test_ask_me_is_answered_by_keyboard(page):
    browser.load_ui(page, ui("ask-me"))
    page.evaluate(
        "() => app.graph.nodes.find(n => n.type === 'PromptLoopSampler').widgets.find(w => w.name === 'refine_at').value = '3, 5, 7'"
    )
    browser.queue(page)
    dialog = page.get_by_role("dialog", name="Your turn")
    for step, keys in ((3, "accept"), (5, "edit"), (7, "skip")):
        page.wait_for_function(
            "step => document.querySelector('.promptloop-ask')?.innerText.includes(`after step ${step} of`)", arg=step
        )
        inside = "() => document.querySelector('.promptloop-ask').contains(document.activeElement)"
        for _ in range(6):  # the focus goes round, and not behind the dialog
            page.keyboard.press("Tab")
            assert page.evaluate(inside)
        if keys == "edit":
            dialog.get_by_role("textbox").fill("large red circle top left , black background")
        page.keyboard.press("Escape" if keys == "skip" else "Control+Enter")
    assert browser.ended(page)["name"] == "execution_success"
    turns = page.evaluate("() => app.graph.nodes.find(n => n.type === 'PromptLoopSampler').properties.promptloop.runs[0].turns")
    assert [turn["notes"][-1].split(" the suggestion")[0] for turn in turns] == [
        "the artist accepted",
        "the artist edited",
        "the artist skipped",
    ]
    assert turns[1]["after"] == turns[2]["after"] == "large red circle top left , black background"


def test_cancel_closes_the_question(page, comfy):
    browser.load_ui(page, ui("ask-me"))
    page.evaluate(
        "() => app.graph.nodes.find(n => n.type === 'PromptLoopSampler').widgets.find(w => w.name === 'seed').value = 77"
    )
    browser.queue(page)
    page.wait_for_selector(".promptloop-ask", timeout=60_000)
    comfy.interrupt()
    assert browser.ended(page)["name"] == "execution_interrupted"
    page.wait_for_selector(".promptloop-ask", state="detached", timeout=5_000)


def test_nothing_of_ours_has_gone_wrong(page):
    assert browser.ours(page.problems) == []
