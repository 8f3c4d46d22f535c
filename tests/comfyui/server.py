"""A real ComfyUI for tests: `Comfy` is a server in a process of its own, `inprocess` a script inside a ComfyUI that serves nothing.

COMFYUI_DIR names a checkout; its requirements are installed beside pytest. COMFYUI_FRONTEND, optional, names the unpacked frontend
(the folder `static` of comfyui-frontend-package) that an older checkout wants.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside.py"
NAME = "promptloop"  # of the pack's folder


class ComfyError(Exception):
    """A workflow was refused (status 400, `errors` by node id) or failed (`errors` holds the failing node's event)."""

    def __init__(self, message: str, errors: dict[str, Any] | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.errors, self.status = errors or {}, status

    @property
    def interrupted(self) -> bool:
        return self.errors.get("event") == "execution_interrupted"


def checkout() -> Path | None:
    """None where COMFYUI_DIR is not set. Raises FileNotFoundError where it names no checkout."""
    if not os.environ.get("COMFYUI_DIR"):
        return None
    folder = Path(os.environ["COMFYUI_DIR"]).resolve()
    if not (folder / "comfyui_version.py").is_file():
        raise FileNotFoundError(f"COMFYUI_DIR is {folder}, which is no checkout of ComfyUI: it has no comfyui_version.py")
    return folder


def version(folder: Path) -> tuple[int, ...]:
    text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    return tuple(int(part) for part in text.split('"')[1].split("."))


def copy_pack(target: Path, without: Iterable[str] = ()) -> Path:
    """What a clone holds: everything that git tracks or would, but for the top-level names in `without`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    left_out = {".github", *without}
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] not in left_out and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def new_base(base: Path) -> Path:
    """An empty base directory: ComfyUI makes some of these folders itself, and stumbles over others that are missing."""
    for name in ("user", "custom_nodes", "models/checkpoints", "models/loras", "models/controlnet", "input", "output", "temp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    return base


def environment(*paths: Path) -> dict[str, str]:
    """One thread, no network for models, and `paths` in front of everything that is installed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}


def inprocess(folder: Path, script: Path, *args: object, paths: Iterable[Path] = (), timeout: float = 600) -> Any:
    """Runs a script with the checkout `folder` as working directory and first on sys.path, and `inside` importable.
    Returns what it printed last, read as JSON. Raises AssertionError with its stderr where it fails."""
    command = [sys.executable, "-P", str(script), *map(str, args)]  # -P: this folder has a server.py as well
    env = environment(folder, INSIDE.parent, *paths) | {"COMFYUI_DIR": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise AssertionError(f"{script.name} {args} ended with {done.returncode}:\n{done.stderr[-6000:]}")
    return json.loads(lines[-1])


class Comfy:
    """A running server. Started with `start`, stopped with `stop`; `base` is its base directory, `log` what it printed."""

    def __init__(self, folder: Path, base: Path, *flags: str, paths: Iterable[Path] = ()) -> None:
        self.folder, self.base, self.flags, self.paths = folder, base, flags, tuple(paths)
        self.log_file = base / "server.log"
        self.client = uuid.uuid4().hex

    def start(self, timeout: float = 120) -> Comfy:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [sys.executable, "main.py", "--cpu", "--base-directory", str(self.base), "--port", str(self.port)]
        command += ["--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:", *self.flags]
        if frontend := os.environ.get("COMFYUI_FRONTEND"):
            command += ["--front-end-root", frontend]
        with open(self.log_file, "w", encoding="utf-8") as log:
            env = environment(*self.paths)
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def request(self, path: str, data: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """(status, body) of a GET, or of a POST where there is data: bytes as they are, everything else as JSON."""
        body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    def get(self, path: str) -> Any:
        """The JSON of a page that must be there."""
        status, body = self.request(path)
        assert status == 200, f"{path}: {status} {body[:200]!r}"
        return json.loads(body)

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def queue(self, workflow: dict[str, Any], extra: dict[str, Any] | None = None) -> str:
        """The prompt's id. Raises ComfyError where the workflow is refused, be it (status 200) only a part of it that leads to one
        of its outputs."""
        data = {"prompt": workflow, "client_id": self.client, "extra_data": extra or {}}
        status, body = self.request("/prompt", data)
        answer = json.loads(body)
        errors = answer.get("node_errors") or {}
        if status != 200 or errors:
            details = [e["details"] for node in errors.values() for e in node["errors"]] or [str(answer.get("error"))]
            raise ComfyError("; ".join(details), errors, status)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """The history's entry: outputs, status. Raises ComfyError where the run failed or was interrupted."""
        until = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            assert time.monotonic() < until and self.process.poll() is None, f"no end of {prompt_id}:\n{self.log[-3000:]}"
            time.sleep(0.05)
        for event, data in entry["status"]["messages"]:
            if event in ("execution_error", "execution_interrupted"):
                raise ComfyError(data.get("exception_message", event).strip(), {"event": event, **data})
        return entry

    def prompt(self, workflow: dict[str, Any], timeout: float = 120, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.wait(self.queue(workflow, extra), timeout)

    def interrupt(self) -> None:
        assert self.request("/interrupt", {})[0] == 200

    def free(self) -> None:
        """What "Unload models" and "Free memory" of the menu do."""
        assert self.request("/free", {"unload_models": True, "free_memory": True})[0] == 200

    def view(self, image: dict[str, str]) -> bytes:
        """A picture named in an output: {filename, subfolder, type}."""
        status, body = self.request("/view?" + urllib.parse.urlencode(image))
        assert status == 200, f"{image}: {status}"
        return body

    def upload(self, name: str, data: bytes) -> dict[str, str]:
        """Puts a picture into the input folder."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{mark}--\r\n".encode()
        status, answer = self.request("/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={mark}"})
        assert status == 200, answer
        return json.loads(answer)

    @contextmanager
    def events(self, client: str | None = None) -> Iterator[Events]:
        """What the server tells a browser meanwhile."""
        events = Events(f"ws://127.0.0.1:{self.port}/ws?clientId={client or self.client}")
        try:
            yield events
        finally:
            events.close()


class Events(list):
    """A websocket's messages as they come in: {"type", "data"}; binary ones as {"type": number, "data": bytes}."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(url,), daemon=True)
        self._thread.start()
        self.until("status", timeout=20)  # the server greets: from now on nothing is missed

    def _listen(self, url: str) -> None:
        import asyncio

        asyncio.run(self._receive(url))

    async def _receive(self, url: str) -> None:

        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            while not self._stop.is_set():
                try:
                    message = await socket.receive(timeout=0.1)
                except TimeoutError:
                    continue
                if message.type is aiohttp.WSMsgType.TEXT:
                    self.append(json.loads(message.data))
                elif message.type is aiohttp.WSMsgType.BINARY:
                    self.append({"type": int.from_bytes(message.data[:4], "big"), "data": message.data[4:]})
                else:
                    return

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def named(self, name: str | int) -> list[Any]:
        """The data of all messages of that type so far."""
        return [m["data"] for m in list(self) if m["type"] == name]

    def until(self, name: str | int, when: Callable[[Any], Any] = lambda data: True, timeout: float = 60) -> Any:
        """Waits for a message of that type and returns its data."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for data in self.named(name):
                if when(data):
                    return data
            time.sleep(0.02)
        raise AssertionError(f"no {name!r} within {timeout} s; there were {[m['type'] for m in self]}")
