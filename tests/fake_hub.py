"""A stand-in for the hub: the part of its HTTP API that commits to, and reads from, repositories of models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_right", "ada"


@dataclass
class Repo:
    """branches: {name: [(commit, {path: content})]}, the newest last."""

    private: bool = False
    branches: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit[0] == revision), None)


class Hub:
    """What it holds, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files, by sha256
        self.asked: list[str] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            @property
            def hub(self) -> Hub:
                return hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        raise NotImplementedError

    def log_message(self, *_: Any) -> None:
        pass

    # --- answers ------------------------------------------------------------------------------------------------------

    def say(self, code: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: int, error: str, why: str) -> None:
        self.say(code, {"error": why}, {"X-Error-Code": error, "X-Error-Message": why})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repo(self, name: str) -> Repo | None:
        """Refuses what is not there, or not for this reader."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.token != TOKEN):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    # --- questions ----------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = found.groups()
            if (repo := self.repo(name)) is None:
                return
            if (commit := repo.find(revision or "main")) is None:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
                return
            sha, files = commit
            if what == "tree":
                self.say(200, [self.entry(file, held) for file, held in sorted(files.items())])
                return
            about: dict[str, Any] = {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
            }
            self.say(200, {**about, "siblings": [{"rfilename": file} for file in sorted(files)]})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            if (repo := self.repo(name)) is None:
                return
            if (commit := repo.find(revision)) is None:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            elif file not in commit[1]:
                self.refuse(404, "EntryNotFound", "Entry not found")
            else:
                held = commit[1][file]
                etag = hashlib.sha256(held).hexdigest()
                self.say(200, held, {"ETag": f'"{etag}"', "X-Repo-Commit": commit[0]})
        else:
            self.say(404, {"error": "no such page"})

    do_HEAD = do_GET

    @staticmethod
    def entry(file: str, held: bytes) -> dict[str, Any]:
        return {"type": "file", "path": file, "size": len(held), "oid": hashlib.sha1(held).hexdigest()}

    # --- commits ------------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.say(200, {"errors": [], "warnings": []})
        elif self.token != TOKEN:
            self.say(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            name, what, revision = found.groups()
            if (repo := self.repo(name)) is not None:
                getattr(self, what)(repo, name, revision, body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        else:
            self.say(404, {"error": "no such page"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        if wanted["organization"] not in (None, OWNER):
            self.say(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.repos:
            self.say(409, {"error": "You already created this model repo"})
        else:
            private = wanted.get("visibility") == "private"
            self.hub.repos[name] = Repo(private, {"main": [(hashlib.sha1(name.encode()).hexdigest(), {})]})
            self.say(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, repo: Repo, name: str, branch: str, body: bytes) -> None:
        if branch in repo.branches:
            self.say(409, {"error": "Reference already exists"})
        else:
            repo.branches[branch] = list(repo.branches["main"])
            self.say(201, {})

    def preupload(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        self.say(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, wanted: dict[str, Any]) -> None:
        self.say(
            200,
            {
                "transfer": "basic",
                "objects": [
                    {**part, "actions": {"upload": {"href": f"{self.hub.url}/store/{part['oid']}"}}}
                    for part in wanted["objects"]
                ],
            },
        )

    def do_PUT(self) -> None:
        held = self.body()
        digest = hashlib.sha256(held).hexdigest()
        if self.path != f"/store/{digest}":
            self.say(400, {"error": "not what was announced"})
            return
        self.hub.stored[digest] = held
        self.say(200, {})

    def commit(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        if revision not in repo.branches:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        files = dict(repo.branches[revision][-1][1])
        for line in body.decode().splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                repo.messages.append(value["summary"])
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        sha = hashlib.sha1(repr((name, revision, len(repo.branches[revision]), sorted(files))).encode()).hexdigest()
        repo.branches[revision].append((sha, files))
        self.say(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "success": True})
