"""Hubs on this machine, spoken to by their real client libraries: HTTP servers with as much of the hubs' protocols as a download takes."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5" * 40
LARGE_BYTES = 10_000
"""What is larger lies in large file storage: a redirection leads there, to another host by its name."""


@dataclass
class Hub:
    """Repositories by name, as folders, and what was asked for."""

    repositories: Mapping[str, Path]
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: frozenset[str] = frozenset()
    """Repositories whose files only `token` opens."""
    token: str = "hf_sesame"
    url: str = ""
    says_instead: bytes | None = None
    """To whatever is asked."""
    fetched: list[str] = field(default_factory=list)
    """Files whose content was asked for, as repository/file."""


@dataclass(frozen=True)
class Answer:
    status: int
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_a_file(self) -> bool:
        return "Accept-Ranges" in self.headers


def refused(status: int, code: str) -> Answer:
    """The hub's clients tell errors apart by this header."""
    return Answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def hugging_face(**hub: Any) -> Iterator[Hub]:
    """https://huggingface.co/docs/hub/api, and what `huggingface_hub` asks beyond it."""
    with _served(Hub(**hub), _hugging_face) as served:
        yield served


def _hugging_face(hub: Hub, path: str, _query: Mapping[str, list[str]], headers: Mapping[str, str]) -> Answer:
    parts = path.strip("/").split("/")
    if parts[:1] == ["lfs"]:
        return _content(hub, "/".join(parts[1:3]), "/".join(parts[3:]))
    asked = parts[2:] if parts[:2] == ["api", "models"] else parts
    repository, verb, revision, rest = "/".join(asked[:2]), *[*asked[2:4], "", ""][:2], asked[4:]
    folder = hub.repositories.get(repository)
    if folder is None:
        return refused(404, "RepoNotFound")
    if revision not in hub.revisions:
        return refused(404, "RevisionNotFound")
    if verb == "revision":
        siblings = [{"rfilename": name} for name in _names(folder)]
        return _json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})
    if verb == "tree":
        return _json([_entry(folder, name) for name in _names(folder)])
    if verb != "resolve":
        return Answer(404)
    if repository in hub.gated and headers.get("Authorization") != f"Bearer {hub.token}":
        return refused(403, "GatedRepo")
    return _resolved(hub, repository, "/".join(rest))


@contextmanager
def model_scope(**hub: Any) -> Iterator[Hub]:
    """As its library, `modelscope`, asks: /api/v1/models/owner/name/repo/files lists, /repo?FilePath= gives."""
    with _served(Hub(**hub), _model_scope) as served:
        yield served


def _model_scope(hub: Hub, path: str, query: Mapping[str, list[str]], _headers: Mapping[str, str]) -> Answer:
    parts = path.removeprefix("/api/v1/models/").split("/")
    repository, verb = "/".join(parts[:2]), "/".join(parts[2:])
    folder = hub.repositories.get(repository)
    if folder is None or query.get("Revision", ["master"])[0] not in hub.revisions:
        return Answer(404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
    if verb == "repo":
        name = query["FilePath"][0]
        return _content(hub, repository, name) if name in _names(folder) else Answer(404)
    if verb != "repo/files":
        return _json({"Code": 200, "Success": True, "Data": {"Name": parts[1], "Path": parts[0]}})
    found = [_entry(folder, name) for name in _names(folder)]
    files = [
        {"Path": entry["path"], "Name": entry["path"].rsplit("/", 1)[-1], "Type": "blob", "Size": entry["size"], "Sha256": entry["sha256"]}
        for entry in found
    ]
    return _json({"Code": 200, "Success": True, "Data": {"Files": files}})


def _resolved(hub: Hub, repository: str, name: str) -> Answer:
    """A file's content, or where it lies."""
    folder = hub.repositories[repository]
    if name not in _names(folder):
        return refused(404, "EntryNotFound")
    entry = _entry(folder, name)
    told = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry["oid"]}"'}
    if "lfs" not in entry:
        content = _content(hub, repository, name)
        return Answer(200, content.content, {**content.headers, **told})
    linked = {
        "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
        "X-Linked-Size": str(entry["size"]),
        "Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/lfs/{repository}/{name}",
    }
    return Answer(302, b"", {**told, **linked})


def _content(hub: Hub, repository: str, name: str) -> Answer:
    return Answer(200, (hub.repositories[repository] / name).read_bytes(), {"Accept-Ranges": "bytes"})


def _entry(folder: Path, name: str) -> dict[str, Any]:
    content = (folder / name).read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git has it
    sha256 = hashlib.sha256(content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(content), "path": name, "sha256": sha256}
    if len(content) > LARGE_BYTES:
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


@contextmanager
def _served(hub: Hub, answer: Any) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            told: Answer = answer(hub, path, parse_qs(parts.query), self.headers)
            if hub.says_instead is not None:
                told = Answer(200, hub.says_instead)
            content, status = told.content, told.status
            if (asked := self.headers.get("Range")) and status == 200:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                content, status = content[int(begin) : int(end) + 1 if end else None], 206
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **told.headers}.items():
                self.send_header(name, value)
            if status == 206:
                self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(content) - 1}/{len(told.content)}")
            self.end_headers()
            if self.command == "GET":
                if status in (200, 206) and hub.says_instead is None and told.is_a_file:
                    hub.fetched.append(self.path)
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
