"""Texts that follow from the nodes' schemas: locales/en/nodeDefs.json, and the tables of inputs and outputs in the help pages.

python -m tests.comfyui.texts http://127.0.0.1:8188

Tooltips are written in the nodes (English) and in locales/zh/nodeDefs.json (Chinese); what stands around the tables in the help pages.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCALES = ROOT / "locales"
PAGES = ROOT / "comfy_nodes" / "web" / "docs"
HEADINGS = {
    "en": ("Inputs", "Outputs", "input", "output", "what"),
    "zh": ("\u8f93\u5165", "\u8f93\u51fa", "\u8f93\u5165", "\u8f93\u51fa", "\u8bf4\u660e"),
}


def page(node: str, locale: str) -> Path:
    return PAGES / f"{node}.md" if locale == "en" else PAGES / node / f"{locale}.md"


def texts(locale: str) -> dict[str, Any]:
    return json.loads((LOCALES / locale / "nodeDefs.json").read_text(encoding="utf-8"))


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """nodeDefs.json as ComfyUI reads it, of the nodes in an answer of /object_info."""
    found = {}
    for node, info in object_info.items():
        if not node.startswith("PromptLoop"):
            continue
        inputs = {name: spec[1] for kind in ("required", "optional") for name, spec in info["input"].get(kind, {}).items()}
        outputs = zip(info["output_name"], info.get("output_tooltips") or [])
        found[node] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {name: _entry(name, spec.get("tooltip")) for name, spec in inputs.items()},
            "outputs": {str(k): _entry(name, tooltip) for k, (name, tooltip) in enumerate(outputs)},
        }
    return found


def _entry(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def tables(node: dict[str, Any], locale: str) -> str:
    """The part of a help page that follows from the schema."""
    inputs, outputs, one_input, one_output, what = HEADINGS[locale]
    lines = [f"## {inputs}", "", f"| {one_input} | {what} |", "|---|---|"]
    lines += [_row(v["name"] if v["name"] == k else f"{k} ({v['name']})", v) for k, v in node["inputs"].items()]
    lines += ["", f"## {outputs}", "", f"| {one_output} | {what} |", "|---|---|"]
    lines += [_row(v["name"], v) for v in node["outputs"].values()]
    return "\n".join(lines) + "\n"


def _row(name: str, entry: dict[str, str]) -> str:
    return f"| {name} | {entry.get('tooltip', '').replace('|', '&#124;').replace('<', '&lt;')} |"


def with_tables(text: str, node: dict[str, Any], locale: str) -> str:
    """A help page with its tables brought up to date; they stand before the next heading of the second order."""
    inputs, outputs = HEADINGS[locale][:2]
    before, _, rest = text.partition(f"## {inputs}\n")
    after = re.split(r"^(?=## )", rest.partition(f"## {outputs}\n")[2], maxsplit=1, flags=re.M)
    return before.rstrip() + "\n\n" + tables(node, locale) + "\n" + (after[1] if len(after) > 1 else "")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info") as answer:
        made = english(json.load(answer))
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    (LOCALES / "en" / "nodeDefs.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for locale in HEADINGS:
        for node, entry in texts(locale).items():
            path = page(node, locale)
            path.write_text(with_tables(path.read_text(encoding="utf-8"), entry, locale), encoding="utf-8")


if __name__ == "__main__":
    main()
