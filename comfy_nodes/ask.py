"""The artist as refiner: sampling pauses, the browser shows the picture and a suggestion, and the artist says how to go on."""

from __future__ import annotations

import sys
from typing import Any

from comfy_api.latest import io

from . import live
from .answers import AskMe, answer, open_questions
from .pictures import data_uri
from .types import REFINER

OTHERWISE = ("accept suggestion", "keep prompt")
SIDE = 512  # pixels of the picture that is shown
ROUTE, OPEN = "/promptloop/answer", "/promptloop/questions"


class Browser:
    """`answers.Host` of ComfyUI: the browser that queued the prompt which runs."""

    def present(self) -> tuple[str, Any] | None:
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is None or server.client_id not in server.sockets:
            return None
        return server.client_id, server.sockets.get(server.client_id)

    def send(self, event: str, data: dict[str, Any]) -> None:
        live.send(event, **data)

    def where(self) -> dict[str, Any]:
        from server import PromptServer

        prompt_id, node = live.where()
        if node is None:  # a thread beside the sampler's
            server = getattr(PromptServer, "instance", None)
            prompt_id, node = getattr(server, "last_prompt_id", None), getattr(server, "last_node_id", None)
        return {"prompt_id": prompt_id, "node": node}

    def interrupted(self) -> bool:
        from comfy.model_management import processing_interrupted

        return processing_interrupted()

    def is_cancel(self, error: Exception) -> bool:
        from comfy.model_management import InterruptProcessingException

        return isinstance(error, InterruptProcessingException)

    def picture(self, image: Any) -> str:
        return data_uri(image, SIDE)


class PromptLoopAskMe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            "PromptLoopAskMe",
            "Ask Me",
            "PromptLoop",
            description="You are the refiner: at the scheduled steps sampling waits, you see the picture and a suggestion, and "
            "accept, edit or skip it.",
            inputs=[
                io.Int.Input(
                    "time_limit", default=300, min=1, max=86400, tooltip="Seconds to wait for you, for each question."
                ),
                io.Combo.Input(
                    "otherwise",
                    options=list(OTHERWISE),
                    default=OTHERWISE[0],
                    tooltip="When the time is over or no browser is there. keep prompt: goes on as before. Where there is no "
                    "suggestion, the prompt is kept.",
                ),
                REFINER.Input(
                    "refiner", optional=True, tooltip="Whose suggestion you are shown; without it you write yourself."
                ),
            ],
            outputs=[REFINER.Output("asks_me", "refiner", tooltip="For any node that takes a refiner.")],
        )

    @classmethod
    def execute(cls, time_limit: int, otherwise: str, refiner: Any = None) -> io.NodeOutput:
        if otherwise not in OTHERWISE:
            raise ValueError(f"otherwise is {otherwise!r}; use {' or '.join(OTHERWISE)}")
        return io.NodeOutput(AskMe(refiner, Browser(), time_limit, otherwise == OTHERWISE[0]))


def install() -> None:
    """The routes by which the browser answers. Only while ComfyUI loads its packs: later on, routes are fixed."""
    from aiohttp import web
    from server import PromptServer

    if (server := getattr(PromptServer, "instance", None)) is None:
        return
    if any(getattr(route, "path", None) == ROUTE for route in server.routes):  # the pack is there twice
        return

    @server.routes.post(ROUTE)
    async def _answer(request: web.Request) -> web.Response:
        try:
            status, line = answer(await request.json())
        except (ValueError, RecursionError):
            status, line = 400, "this is no JSON"
        return web.Response(status=status, text=line)

    @server.routes.get(OPEN)
    async def _open(request: web.Request) -> web.Response:
        return web.json_response(open_questions(request.query.get("client_id")))


if "server" in sys.modules:
    install()
NODES = [PromptLoopAskMe]
