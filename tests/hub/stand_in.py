# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the hub's HTTP interface on loopback: repositories are folders in memory.

It answers what `huggingface_hub` asks for (a model's files at a revision, HEAD and GET of a file,
with ranges), counts it, and breaks as it is told to. Weights are served after a redirect to another
host, as the hub does from its CDN.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIECE = 1 << 16


@dataclass
class Model:
    """A model's commits: each is a commit's files by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    is_gated: bool = False

    def push(self, files: dict[str, bytes]) -> str:
        """Make these files the head of main; return the commit."""
        digest = hashlib.sha1(repr(sorted((k, hash(v)) for k, v in files.items())).encode())
        self.main = digest.hexdigest()
        self.commits[self.main] = files
        return self.main


@dataclass
class Hub:
    """The state of the stand-in, which tests read and change."""

    url: str = ""
    cdn: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    token: str = "right"
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each file's contents that were sent."""
    gets: Counter[str] = field(default_factory=Counter)
    """Requests for each file's contents."""
    ranges: list[tuple[str, int]] = field(default_factory=list)
    """Files that were asked for from a later byte on."""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """By file, after how many bytes the connection breaks at the next requests."""
    refuses: Counter[str] = field(default_factory=Counter)
    """By file, how many of the next requests are answered with 503."""
    spoils: Counter[str] = field(default_factory=Counter)
    """By file, how many of the next answers have a wrong byte."""
    stalls: set[str] = field(default_factory=set)
    """Files of which half is sent, and nothing more until the stand-in ends."""
    ended: threading.Event = field(default_factory=threading.Event)
    pause: float = 0.0
    """Seconds between two pieces of a file."""

    def add(self, name: str, folder: Path) -> str:
        """Push a folder's files as the head of a model; return the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.models.setdefault(name, Model()).push(files)

    def weights_sent(self) -> int:
        return sum(n for name, n in self.sent.items() if name.endswith(".safetensors"))

    def forget(self) -> None:
        """Start counting anew."""
        self.sent.clear()
        self.gets.clear()
        self.ranges.clear()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            self._answer(unquote(urlsplit(self.path).path))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, path: str) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/blobs/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._contents(match[3], self.hub.models[match[1]].commits[match[2]][match[3]])
        else:
            self._error(404, "NotFound")

    def _error(self, status: int, code: str) -> None:
        body = json.dumps({"error": code}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(status, headers | {"Content-Length": str(len(body))}, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit of a revision; None after an error was sent."""
        model = self.hub.models.get(name)
        if model is None:
            self._error(401, "RepoNotFound")
            return None
        commit = model.main if revision == "main" else revision
        if commit not in model.commits:
            self._error(404, "RevisionNotFound")
            return None
        return commit

    def _info(self, name: str, revision: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        files = self.hub.models[name].commits[commit]
        siblings = []
        for file, data in files.items():
            entry = {"rfilename": file, "size": len(data), "blobId": _git_digest(data)}
            if file.endswith(".safetensors"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        self._send(200, {"Content-Length": str(len(body))}, body.encode())

    def _resolve(self, name: str, revision: str, file: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        model = self.hub.models[name]
        if model.is_gated and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            self._error(403, "GatedRepo")
            return
        data = model.commits[commit].get(file)
        if data is None:
            self._error(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_digest(data)}"'}
        if not file.endswith(".safetensors"):
            self._contents(file, data, headers)
            return
        self._send(
            302,
            {
                **headers,
                "X-Linked-Size": str(len(data)),
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "Location": f"{self.hub.cdn}/blobs/{name}/{commit}/{file}",
                "Content-Length": "0",
            },
        )

    def _contents(self, file: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        hub, start, stop = self.hub, 0, len(data)
        if self.command == "GET":
            hub.gets[file] += 1
            if hub.refuses[file] > 0:
                hub.refuses[file] -= 1
                self._error(503, "Busy")
                return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if wanted:
            start = int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            if start:
                hub.ranges.append((file, start))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._stream(file, data, start, stop)

    def _stream(self, file: str, data: bytes, start: int, stop: int) -> None:
        hub = self.hub
        # The beginning of a shard that a plan asks for breaks nothing.
        is_whole = stop == len(data)
        breaks = hub.breaks.get(file) if is_whole else None
        end = min(stop, start + breaks.pop(0)) if breaks else stop
        if is_whole and hub.spoils[file] > 0:
            hub.spoils[file] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        for at in range(start, end, PIECE):
            piece = data[at : min(at + PIECE, end)]
            self.wfile.write(piece)
            hub.sent[file] += len(piece)
            if hub.pause:
                time.sleep(hub.pause)
            if is_whole and file in hub.stalls and 2 * at > len(data):
                hub.ended.wait()
                raise ConnectionResetError
        if end < stop:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
