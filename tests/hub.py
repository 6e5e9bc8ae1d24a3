"""A small hub on the loopback address, speaking as much of the Hugging Face protocol as a download needs."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `folder` as `repository`. `cut_after`: bytes after which a transfer stalls and breaks off; `damage`: a file
    that is sent with a byte changed; `token`: what must be sent along; `log`: (method, path, range header)."""

    def __init__(self, folder: Path, repository: str, token: str | None = None):
        self.folder, self.repository, self.token = folder, repository, token
        self.log, self.cut_after, self.damage = [], None, None
        self.stalled, self.go_on = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self) -> list[dict]:
        out = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            entry = {"rfilename": path.name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            out.append(entry)
        return out

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.log.append((request.command, path, request.headers.get("Range")))
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        api, resolve = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/v1"):
            info = {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": self.files()}
            return self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        if path.startswith(f"{api}/revision/"):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if not path.startswith(f"{resolve}{COMMIT}/"):
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        name = path.rpartition("/")[2]
        data = (self.folder / name).read_bytes()
        entry = next(entry for entry in self.files() if entry["rfilename"] == name)
        if name == self.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {"ETag": f'"{entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := request.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and self.cut_after is not None and len(data) - start > self.cut_after:
            request.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data) - start)}).items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data[start:start + self.cut_after])
            request.wfile.flush()
            self.stalled.set()
            self.go_on.wait(60)
            request.close_connection = True
            return None
        return self.send(request, status, data[start:], headers, body)

    def send(self, request, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)
