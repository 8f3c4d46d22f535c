"""A real HTTP server on this machine that takes models as the Hugging Face Hub does: repositories, branches, git LFS, commits.

with Hub() as hub: ...

`hub.repos` are its repositories: {name: {branch: {path: content}}}. refuses: paths that are answered with status 403.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = (".safetensors",)  # what goes by LFS, as on the hub


class Hub:
    def __init__(self, *refuses: str, token: str = "hf_secret") -> None:
        self.refuses, self.token = refuses, token
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.calls.append(path)
        parts = path.strip("/").split("/")
        if self.headers["Authorization"] != f"Bearer {hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif any(word in path for word in hub.refuses):
            self.answer(403, {"error": "You have no quota left"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            self.answer(200 if isinstance(yaml.safe_load(head), dict) else 400, {"errors": [], "warnings": []})
        elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
            known = [{"oid": f["oid"], "size": f["size"]} for f in json.loads(body)["objects"]]
            upload = [{"actions": {"upload": {"href": f"{hub.url}/large/{f['oid']}"}}} for f in known]
            self.answer(200, {"transfer": "basic", "objects": [f | u for f, u in zip(known, upload, strict=True)]})
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in hub.repos:
            self.model("/".join(parts[2:4]), *parts[4:6], body)
        else:
            self.answer(404, {"error": "Repository not found"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name], self.hub.private[name] = {"main": {}}, asked.get("visibility") == "private"
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def model(self, name: str, what: str, branch: str, body: bytes) -> None:
        branches = self.hub.repos[name]
        if what == "branch":
            new = branch not in branches
            branches.setdefault(branch, dict(branches["main"]))
            return self.answer(200 if new else 409, {})
        if branch not in branches:
            return self.answer(404, {"error": f"Invalid rev id: {branch}"})
        if what == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            mode = {f: "lfs" if f.endswith(LARGE) else "regular" for f in files}
            return self.answer(200, {"files": [{"path": f, "uploadMode": mode[f], "shouldIgnore": False} for f in files]})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self.hub.large[value["oid"]]
        commit = {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40}
        self.answer(200, commit)

    def do_PUT(self) -> None:
        """Of LFS: a place that needs no token."""
        self.hub.calls.append("/large")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "another content"})
        self.hub.large[oid] = content
        self.answer(200, {})

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
