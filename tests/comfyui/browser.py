"""ComfyUI's real frontend in a headless Chromium, driven from Python.

with page_at("http://127.0.0.1:8188") as page:
    load_api(page, graph)
    page.screenshot(path="graph.png")
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZE = {"width": 1600, "height": 1000}
_READY = """() => window.app?.extensionManager && window.app.graph && window.LiteGraph
  && Object.keys(LiteGraph.registered_node_types).length > 50"""


def chromium() -> str | None:
    """The browser's path: CHROMIUM in the environment, or what is installed under its usual names."""
    if named := os.environ.get("CHROMIUM"):
        return named
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


def missing() -> str | None:
    """Why no browser can be driven here, in words for a skip; None where one can."""
    if importlib.util.find_spec("playwright") is None:
        return "pip install playwright (the browser itself need not be downloaded)"
    if chromium() is None:
        return "install chromium, or set CHROMIUM to a browser's path"
    return None


@contextmanager
def page_at(url: str, *, locale: str = "en", settings: dict[str, Any] | None = None, scale: float = 1.0) -> Iterator[Any]:
    """A page of the frontend at `url`, ready, with an empty graph.

    `page.problems` collects uncaught errors and what is written to the console as an error, but for pictures and user files that
    are not there. settings: of ComfyUI, by their ids. Raises TimeoutError of playwright when the frontend is not ready in a minute.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            page = browser.new_page(viewport=SIZE, device_scale_factor=scale)
            page.problems = []
            page.on("pageerror", lambda error: page.problems.append(getattr(error, "stack", "") or str(error)))
            page.on("console", lambda message: _note(page.problems, message))
            wanted = {"Comfy.Locale": locale, "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False} | (
                settings or {}
            )
            page.request.post(f"{url}/settings", data=wanted)  # before the page loads: a first visit opens the templates
            page.goto(url, wait_until="domcontentloaded", timeout=60_000)
            page.wait_for_function(_READY, timeout=60_000)
            page.wait_for_timeout(500)
            yield page
        finally:
            browser.close()


def _note(problems: list[str], message: Any) -> None:
    if message.type == "error" and "Failed to load resource" not in message.text:
        problems.append(message.text)


def ours(problems: list[str]) -> list[str]:
    """Those that name this pack."""
    return [p for p in problems if "promptloop" in p.lower()]


def load_ui(page: Any, graph: dict[str, Any]) -> None:
    """Opens a workflow in UI format."""
    page.evaluate("graph => app.loadGraphData(graph, true, true, null)", graph)
    page.wait_for_timeout(500)


def load_api(page: Any, graph: dict[str, Any], name: str = "graph.json") -> None:
    """Opens a workflow in API format; the frontend makes the nodes, all in one place."""
    page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph, name])
    page.wait_for_timeout(500)


def serialized(page: Any) -> dict[str, Any]:
    """The graph that is open, in UI format."""
    return page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")


def to_prompt(page: Any) -> dict[str, Any]:
    """The graph that is open, in API format, as the frontend would queue it."""
    return page.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))")


def queue(page: Any) -> None:
    """Queues what is open, as the Run button does."""
    page.evaluate("""async () => {
      const { api } = window.comfyAPI.api;
      window.ended = null;
      for (const name of ["execution_success", "execution_error", "execution_interrupted"])
        api.addEventListener(name, (e) => (window.ended = { name, ...e.detail }), { once: true });
      await app.queuePrompt(0, 1);
    }""")


def ended(page: Any, timeout: float = 120) -> dict[str, Any]:
    """Waits for the end of what was queued: the event that told of it, its name under "name"."""
    page.wait_for_function("() => window.ended", timeout=timeout * 1000)
    page.wait_for_timeout(500)
    return page.evaluate("() => window.ended")


def missing_nodes(page: Any) -> list[str]:
    """Types of nodes that are open and unknown to this ComfyUI."""
    kinds = page.evaluate("() => app.graph.nodes.map(n => n.type)")
    known = set(page.evaluate("() => Object.keys(LiteGraph.registered_node_types)"))
    return sorted({kind for kind in kinds if kind not in known})


def fit(page: Any) -> None:
    """Shows the whole graph."""
    page.evaluate(
        """() => {
          const nodes = app.graph.nodes;
          if (!nodes.length) return;
          const title = LiteGraph.NODE_TITLE_HEIGHT;
          const boxes = nodes.map(n => [n.pos[0], n.pos[1] - title, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
          const [x, y] = [0, 1].map(k => Math.min(...boxes.map(b => b[k])));
          const [r, b] = [2, 3].map(k => Math.max(...boxes.map(box => box[k])));
          const box = app.canvas.canvas.getBoundingClientRect();
          const [left, top] = [box.left < 10 ? 80 : 20, box.top < 10 ? 110 : 30]; // bars may lie over the canvas
          const [w, h] = [box.width - left - 30, box.height - top - 60];
          const ds = app.canvas.ds;
          ds.scale = Math.min(w / (r - x), h / (b - y), 1.2);
          ds.offset[0] = (left + (w - (r - x) * ds.scale) / 2) / ds.scale - x;
          ds.offset[1] = (top + (h - (b - y) * ds.scale) / 2) / ds.scale - y;
          app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(400)


def shoot(page: Any, path: str | Path) -> None:
    """A picture of the page with the whole graph in sight."""
    fit(page)
    page.screenshot(path=str(path))
