"""A stand-in for an OpenAI-compatible endpoint: the one call that a judge is asked by."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL, SECRET = "wise-1", "sk-right"
Said = tuple[int, Any]


def holds(question: dict[str, Any]) -> str:
    """A judge who looks for the wanted answer's first four letters: `Par` and `parisian` say Paris, too."""
    return "Yes." if any(one.lower()[:4] in question["reply"].lower() for one in question["wanted"]) else "no"


class Judge:
    """What it was asked, and what it says. secret: the key that it wants. fails: what it answers instead, in turn."""

    def __init__(self, secret: str | None = None, say: Callable[[dict[str, Any]], str] = holds) -> None:
        self.secret, self.say = secret, say
        self.asked: list[dict[str, Any]] = []
        self.fails: list[Said] = []
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> Said:
        with self._lock:
            if self.fails:
                return self.fails.pop(0)
            if path != "/v1/chat/completions":
                return 404, {"error": "no such page"}
            if self.secret is not None and key != f"Bearer {self.secret}":
                return 401, {"error": {"message": "Incorrect API key provided"}}
            question = json.loads(body["messages"][-1]["content"])
            self.asked.append({**body, "question": question})
            return 200, {"choices": [{"message": {"role": "assistant", "content": self.say(question)}}]}

    @contextmanager
    def running(self) -> Iterator[Judge]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code, said = judge.answer(self.path, self.headers.get("Authorization"), body)
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
