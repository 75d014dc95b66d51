"""A stand-in for the Hugging Face hub: the few calls that huggingface_hub makes, on this machine, repositories in memory.

It answers as the hub does where the tests look: 404 with X-Error-Code, commits, ETags. No file goes through LFS or Xet.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """repositories: {owner/name: {file: content}}; requests: "METHOD /path" of each; created: what new ones were asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.created: list[dict] = []

    def commit(self, repo: str) -> str:
        """The name of what a repository holds now."""
        return hashlib.sha1(repr(sorted(self.repositories[repo].items())).encode()).hexdigest()


@contextmanager
def serve() -> Iterator[HubServer]:
    server = HubServer()
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = match.groups()
            if self.known(repo, revision):
                self.answer(self.tree(repo) if kind == "tree" else self.info(repo))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if self.known(repo, revision):
                content = self.server.repositories[repo].get(name)
                if content is None:
                    return self.refuse("EntryNotFound")
                headers = {"X-Repo-Commit": self.server.commit(repo), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
                self.answer(content, headers)
        else:
            self.refuse("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            self.server.created.append(request)
            self.server.repositories.setdefault(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, kind = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if kind == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repositories[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = self.server.commit(repo)
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repo}/commit/{commit}"})

    def known(self, repo: str, revision: str | None) -> bool:
        if repo not in self.server.repositories:
            self.refuse("RepoNotFound")
        elif revision not in (None, "main", self.server.commit(repo)):
            self.refuse("RevisionNotFound")
        else:
            return True
        return False

    def info(self, repo: str) -> dict:
        siblings = [{"rfilename": name} for name in self.server.repositories[repo]]
        return {"id": repo, "sha": self.server.commit(repo), "siblings": siblings, "tags": [], "private": False}

    def tree(self, repo: str) -> list[dict]:
        files = self.server.repositories[repo].items()
        return [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, {"X-Error-Code": code}, 404)

    def answer(self, content: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
