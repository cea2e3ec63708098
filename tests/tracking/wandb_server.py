"""As much of a W&B server as an upload needs, on loopback: it keeps what it is sent.

Requests that it does not know are answered with an error, as an older server would, and kept in `unknown`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Run:
    """`history`: line number -> row, as a server lays it out; `sent` counts lines, so that what is sent twice shows."""

    upserts: list[dict[str, Any]] = field(default_factory=list)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    sent: int = 0
    exit_codes: list[int] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[number] for number in sorted(self.history)]


@dataclass
class Server:
    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refusing: bool = False

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """What GraphQL's `data` is to hold; None for an operation that is not known."""
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "e", "username": "u", "email": "", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {
                "model": {"id": "p", "name": variables["project"], "entity": {"id": "1", "name": "e"}, "bucket": self._bucket(variables)}
            }
        if operation == "UpsertBucket" and not self.refusing:
            run = self.runs.setdefault(variables["name"], Run())
            run.upserts.append(variables)
            project = {"id": "p", "name": variables["project"], "entity": {"id": "1", "name": "e"}}
            name = {"id": "1", "name": variables["name"], "displayName": variables.get("displayName") or "", "description": None}
            bucket = {**name, "config": "{}", "sweepName": None, "project": project, "historyLineCount": len(run.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": len(run.upserts) == 1}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return None

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run = self.runs.get(variables["name"])
        if run is None:
            return None
        rows = run.rows()
        # The tails are lists of lines, as JSON within JSON; only the last line of the history matters for going on.
        tail = json.dumps([json.dumps(rows[-1])] if rows else [])
        empty = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}", "tags": []}
        return {"id": "1", "name": variables["name"], "historyLineCount": len(rows), "historyTail": tail, "wandbConfig": "{}", **empty}

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.runs.setdefault(run_id, Run())
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        for number, line in enumerate(part["content"] if part else ()):
            run.history[part["offset"] + number] = json.loads(line)
            run.sent += 1
        if body.get("complete"):
            run.exit_codes.append(body["exitcode"])


@contextmanager
def wandb_server() -> Iterator[Server]:
    """Serves until the block ends, on a free port of loopback."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if "json" in self.headers.get("Content-Type", "") else {}
            streamed = re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            if streamed:
                server.stream(streamed[1], body)
                return self.reply({})
            found = re.search(r"\b(?:query|mutation)\s+(\w+)", body.get("query", ""))
            operation = found[1] if found else self.path
            data = server.answer(operation, body.get("variables") or {})
            if data is None:
                server.unknown.append(operation)
                return self.reply({"errors": [{"message": f"{operation} is not known"}], "data": None})
            return self.reply({"data": data})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply({})

        def do_GET(self) -> None:
            self.reply({})

        def reply(self, content: dict[str, Any]) -> None:
            raw = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
