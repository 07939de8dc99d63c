"""A server on localhost that speaks as much of the Hugging Face Hub as a download needs, and can be told to fail."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from pocketmoe.offload import hub
from pocketmoe.offload.checkpoint_files import INDEX_FILE
from pocketmoe.offload.errors import PocketMoEError
from pocketmoe.offload.hub import HubModel

NAME = "some-org/Tiny-MoE.v1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What is served, and how it goes wrong."""

    models: dict[str, Path] = field(default_factory=dict)
    """Name -> directory."""
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    """Branch -> commit, of every model."""
    gated: set[str] = field(default_factory=set)
    status: int = 0
    """If not 0, the answer to everything."""
    cut_after: list[int] = field(default_factory=list)
    """The next bodies of weights end after so many bytes."""
    resets: bool = False
    """Connections that end early do so with a reset."""
    ignores_ranges: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was asked for from the start and in full, in order."""
        return [
            path.rpartition("/")[2]
            for method, path, part in self.requests
            if method == "GET" and "/resolve/" in path and not part
        ]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that listens until the end of the block."""
    serving = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = serving
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, serving = unquote(urlsplit(self.path).path), self.hub
        serving.requests.append((self.command, path, self.headers.get("Range", "")))
        if serving.status:
            return self._send(serving.status, b'{"error": "no"}', body=body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            return self._info(found[1], found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[2], found[3], body)
        return self._send(404, b"{}", body=body)

    def _commit(self, name: str, revision: str | None, body: bool = True) -> str | None:
        """The commit of a revision; None when that was answered with an error."""
        if name not in self.hub.models:
            self._send(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
            return None
        commit = self.hub.commits.get(revision or "main", revision)
        if commit not in self.hub.commits.values():
            self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"}, body)
            return None
        return commit

    def _info(self, name: str, revision: str | None) -> None:
        if (commit := self._commit(name, revision)) is not None:
            root = self.hub.models[name]
            files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
            siblings = [{"rfilename": file, "size": (root / file).stat().st_size, "blobId": "b"} for file in files]
            self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        if (commit := self._commit(name, revision, body)) is None:
            return None
        if name in self.hub.gated:
            return self._send(401, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"}, body)
        path = self.hub.models[name] / file
        if not path.is_file():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        status = 200
        asked = "" if self.hub.ignores_ranges else self.headers.get("Range", "")
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            first, last = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        cut = self.hub.cut_after.pop(0) if body and file.endswith(".safetensors") and self.hub.cut_after else None
        return self._send(status, content, headers, body, cut)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
            if cut is not None:
                self.close_connection = True
                if self.hub.resets:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()


def look_up(name: str = NAME, revision: str | None = None) -> HubModel:
    """What is known of a model, its small files downloaded, in this process."""
    return HubModel(**hub.look_up(name, revision))


def shards(path: Path) -> list[str]:
    """The files of weights that a directory's index names."""
    return sorted(set(json.loads((path / INDEX_FILE).read_text())["weight_map"].values()))


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What a call that must fail says to the user."""
    with pytest.raises(PocketMoEError) as caught:
        function(*arguments, **options)
    return str(caught.value)
