"""Every node has its texts: help pages and locale files in both languages, that name what there is and nothing else."""

import ast
import json
import re

import pytest

from . import workflows
from .texts import HEADINGS, ROOT, english, page, texts, with_tables

NODES = ROOT / "comfy_nodes"
TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(NODES.glob("*.py"))]
CALLS = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Call)]


def first_text(call, keyword):
    named = [k.value for k in call.keywords if k.arg == keyword]
    value = (named or call.args or [None])[0]
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


IDS = {first_text(c, "node_id") for c in CALLS if ast.unparse(c.func).endswith("Schema")}
INPUTS = {first_text(c, "id") for c in CALLS if ast.unparse(c.func).endswith(".Input")}


def all_texts(value):
    if isinstance(value, str):
        yield value
    else:
        for inner in value.values():
            yield from all_texts(inner)


def test_the_nodes_were_found():
    assert len(IDS) > 15 and None not in IDS and all(name.startswith("PromptLoop") for name in IDS)


@pytest.mark.parametrize("locale", HEADINGS)
def test_each_node_has_texts_and_a_help_page(locale):
    assert set(texts(locale)) == IDS
    assert {node for node in IDS if page(node, locale).is_file()} == IDS
    pages = {path.stem for path in (NODES / "web/docs").glob("*.md")} | {
        p.parent.name for p in (NODES / "web/docs").glob("*/*.md")
    }
    assert pages == IDS


def test_no_text_names_an_input_that_is_not_there():
    named = {name for node in texts("en").values() for name in node["inputs"]}
    assert named <= INPUTS


def test_both_languages_say_something_about_the_same_things():
    english_texts, chinese = texts("en"), texts("zh")
    for node, entry in english_texts.items():
        for part in ("inputs", "outputs"):
            assert list(entry[part]) == list(chinese[node][part]), f"{node}: {part}"
        assert all(v.get("tooltip") and v["name"] for v in chinese[node]["inputs"].values()), node
        assert entry["description"] and re.search(r"[\u4e00-\u9fff]", chinese[node]["description"]), node


@pytest.mark.parametrize("locale", HEADINGS)
def test_the_tables_of_the_help_pages_are_up_to_date(locale):
    for node, entry in texts(locale).items():
        text = page(node, locale).read_text(encoding="utf-8")
        assert with_tables(text, entry, locale) == text, f"{node}: run python -m tests.comfyui.texts URL"


@pytest.mark.parametrize("locale", HEADINGS)
def test_no_text_has_signs_that_the_frontend_reads_as_commands(locale):
    """vue-i18n, which shows them, takes braces for variables, @ for references and | for plurals."""
    assert [text for text in all_texts(texts(locale)) if re.search(r"[{}@|]", text)] == []


@pytest.mark.parametrize("locale", HEADINGS)
def test_help_pages_name_templates_that_exist(locale):
    word = {"en": "Templates?:", "zh": "\u6a21\u677f\uff1a"}[locale]
    named = set()
    for node in IDS:
        for line in re.findall(word + r"(.*)", page(node, locale).read_text(encoding="utf-8")):
            named |= set(re.findall(r"\*([\w-]+)\*", line))
    assert named and named <= set(workflows.names())


def test_each_workflow_is_there_in_both_forms_with_a_note_and_a_picture():
    names = set(workflows.names())
    assert names == set(workflows.NOTES)
    assert {path.stem for path in workflows.FOLDER.glob("*.json")} == names
    assert {path.stem for path in workflows.FOLDER.glob("*.jpg")} == names


@pytest.mark.parametrize("name", workflows.names())
def test_workflows_name_inputs_that_exist(name):
    known = texts("en")
    for number, node in workflows.api(name).items():
        if node["class_type"] in known:
            assert set(node["inputs"]) <= set(known[node["class_type"]]["inputs"]), f"{name}: node {number}"
        assert not node["class_type"].startswith("PromptLoop") or node["class_type"] in known, f"{name}: node {number}"


@pytest.mark.parametrize("name", workflows.names())
def test_both_forms_of_a_workflow_have_the_same_nodes(name):
    graph = json.loads((workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    shown = {str(node["id"]): node["type"] for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    assert shown == {number: node["class_type"] for number, node in workflows.api(name).items()}
    notes = [(node["title"], node["widgets_values"][0]) for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert notes == [workflows.NOTES[name]], "run python -m tests.comfyui.workflows URL"
    assert all("promptloop" not in node["properties"] for node in graph["nodes"]), "a timeline was saved with it"


def test_the_locale_file_is_what_the_server_says(comfy):
    assert texts("en") == english(comfy.object_info()), "run python -m tests.comfyui.texts URL"


def test_the_server_serves_help_pages_and_locales(comfy):
    assert comfy.get("/i18n")["zh"]["nodeDefs"]["PromptLoop"] == texts("zh")["PromptLoop"]
    for node in sorted(IDS):
        for path in (f"{node}.md", f"{node}/zh.md"):
            status, body = comfy.request(f"/extensions/promptloop/docs/{path}")
            assert status == 200 and body.decode() == (NODES / "web/docs" / path).read_text(encoding="utf-8")
