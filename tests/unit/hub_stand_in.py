"""The part of the Hub's HTTP API that its client uses to upload a folder and to download it, over repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-of-jane"


class Hub:
    """`repositories` by name: private or not, and by branch the files and commit messages. `refuse` maps the beginning of
    `METHOD path` to the status that it is answered with."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.refuse: dict[str, int] = {}
        self.account = {"name": "jane", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
        self.objects: dict[str, bytes] = {}
        self.endpoint = ""

    def branch(self, repository: str, branch: str) -> dict[str, Any]:
        return self.repositories[repository]["branches"][branch]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for start, status in self.hub.refuse.items():
            if f"{self.command} {path}".startswith(start):
                return self._answer({"error": "refused"}, status)
        signed = path.startswith("/objects/")  # uploads go to addresses that hold their permission
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not signed:
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *found.groups())
        return self._answer({"error": f"no route for {self.command} {path}"}, 404)

    def _answer(self, tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _whoami(self, _: bytes) -> None:
        self._answer(self.hub.account)

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.account['name']}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            return self._answer({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        branches = {"main": {"files": {}, "messages": []}}
        self.hub.repositories[name] = {"private": bool(private), "branches": branches}
        return self._answer({"url": url, "name": name, "id": name})

    def _info(self, _: bytes, name: str, branch: str | None = None) -> None:
        if name not in self.hub.repositories or (branch or "main") not in self.hub.repositories[name]["branches"]:
            return self._answer(
                {"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound" if branch else "RepoNotFound"}
            )
        files = self.hub.branch(name, branch or "main")["files"]
        info = {"id": name, "private": self.hub.repositories[name]["private"], "sha": _sha(name, branch or "main")}
        return self._answer({**info, "siblings": [{"rfilename": file} for file in files]})

    def _branch(self, _: bytes, name: str, branch: str) -> None:
        branches = self.hub.repositories[name]["branches"]
        if branch in branches:
            return self._answer({"error": "Reference already exists"}, 409)
        branches[branch] = {"files": dict(branches["main"]["files"]), "messages": []}
        return self._answer({})

    def _validate(self, _: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str, branch: str) -> None:
        self.hub.branch(name, branch)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": modes})

    def _batch(self, body: bytes, _: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{entry['oid']}"}}}
            for entry in json.loads(body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects}, 200, {"Content-Type": "application/vnd.git-lfs+json"})

    def _put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer({})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        target = self.hub.branch(name, branch)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                target["messages"].append(value["summary"])
            elif entry["key"] == "lfsFile":
                target["files"][value["path"]] = self.hub.objects[value["oid"]]
            else:
                target["files"][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.hub.endpoint}/{name}/commit/{_sha(name, branch)}"
        self._answer({"success": True, "commitUrl": url, "commitOid": _sha(name, branch)})

    def _at(self, name: str, sha: str) -> dict[str, bytes]:
        branches = self.hub.repositories[name]["branches"]
        return next(found["files"] for branch, found in branches.items() if _sha(name, branch) == sha)

    def _tree(self, _: bytes, name: str, sha: str) -> None:
        files = self._at(name, sha).items()
        self._answer([{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files])

    def _resolve(self, _: bytes, name: str, sha: str, file: str) -> None:
        content = self._at(name, sha)[file]
        self._answer(content, 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha})


def _sha(name: str, branch: str) -> str:
    return hashlib.sha1(f"{name} {branch}".encode()).hexdigest()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


REPOSITORY = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    ("GET /api/whoami-v2", _Handler._whoami),
    ("POST /api/repos/create", _Handler._create),
    (f"GET /api/models/{REPOSITORY}", _Handler._info),
    (f"GET /api/models/{REPOSITORY}/revision/(.+)", _Handler._info),
    (f"POST /api/models/{REPOSITORY}/branch/(.+)", _Handler._branch),
    ("POST /api/validate-yaml", _Handler._validate),
    (f"POST /api/models/{REPOSITORY}/preupload/(.+)", _Handler._preupload),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", _Handler._batch),
    (f"GET /api/models/{REPOSITORY}/tree/(.+)", _Handler._tree),
    ("PUT /objects/(.+)", _Handler._put),
    (f"POST /api/models/{REPOSITORY}/commit/(.+)", _Handler._commit),
    (f"(?:GET|HEAD) /{REPOSITORY}/resolve/([0-9a-f]+)/(.+)", _Handler._resolve),
]
