"""A small hub on the loopback address, speaking as much of the Hugging Face protocol as a download needs."""

import hashlib
import json
import random
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from huggingface_hub import constants

from scripts import download, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(path: Path) -> dict:
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    out = {"rfilename": path.name, "size": len(data), "blobId": blob}
    if path.suffix == ".safetensors":
        out["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return out


class Server:
    """`answer(request, body)` on a port of its own. `log`: (method, path, range header, authorization)."""

    def __init__(self):
        self.log = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path, headers = self.path.partition("?")[0], self.headers
                server.log.append((self.command, path, headers.get("Range"), headers.get("Authorization")))
                try:
                    server.answer(self)
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # whoever asked was killed
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes = b"{}",
             headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            if value:
                request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Hub(Server):
    """Serves `folder` as `repository`; what is unfriendly about it can be set at any time.

    token: what must be sent along. damage: files of which the first N transfers have a byte changed. api, transfers:
    answers (status, headers) that come first. stall_after, break_after: bytes after which a transfer stands still or
    is cut. speed: bytes a second. ranges: "no" ignores them, "wrong" sends another part, "416" refuses them.
    extra: bytes after the end. cdn: a second server to which files are redirected, at signed addresses.
    """

    def __init__(self, folder: Path, repository: str):
        self.folder, self.repository, self.token = folder, repository, None
        self.damage, self.api, self.transfers, self.ranges = {}, deque(), deque(), "yes"
        self.stall_after = self.break_after = self.speed = self.cdn = None
        self.extra = b""
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.files = [entry(path) for path in sorted(folder.iterdir())]
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        sent = request.headers.get("Authorization")
        if self.token and sent not in (None, f"Bearer {self.token}"):
            return self.send(request, 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.token and not sent:
            return self.send(request, 401, headers={"X-Error-Code": "RepoNotFound"})
        api, resolve = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/v1"):
            if self.api:
                return self.send(request, *self.api.popleft())
            info = {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": self.files}
            return self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if path.startswith(f"{api}/revision/"):
            return self.send(request, 404, headers={"X-Error-Code": "RevisionNotFound"})
        if not path.startswith(f"{resolve}{COMMIT}/"):
            return self.send(request, 404, headers={"X-Error-Code": "RepoNotFound"})
        name = path.rpartition("/")[2]
        if self.cdn:
            self.cdn.signed += 1
            return self.send(request, 302, headers={"Location": f"{self.cdn.url}/{name}?signature={self.cdn.signed}"})
        return self.file(request, name)

    def file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if self.transfers:
            return self.send(request, *self.transfers.popleft())
        data, status, start, headers = (self.folder / name).read_bytes(), 200, 0, {}
        if self.damage.get(name, 0) > 0:
            self.damage[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = request.headers.get("Range")
        if wanted and self.ranges == "416":
            return self.send(request, 416)
        if wanted and self.ranges != "no":
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) + (self.ranges == "wrong")
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        data = data[start:] + self.extra
        length = {"Transfer-Encoding": "", "Content-Length": "" if self.extra else str(len(data))}
        if self.extra:
            length |= {"Connection": "close"}
        limit = min(self.stall_after or len(data), self.break_after or len(data), len(data))
        if limit == len(data) and not self.speed:
            return self.send(request, status, data, headers | length)
        self.send(request, status, b"", headers | length)
        step = max(self.speed // 50, 1) if self.speed else limit
        for begin in range(0, limit, step):
            request.wfile.write(data[begin:min(begin + step, limit)])
            request.wfile.flush()
            time.sleep(0.02 if self.speed else 0)
        if limit < len(data):
            if self.stall_after:
                self.stalled.set()
                self.go_on.wait(60)
            request.close_connection = True
        return None


class Cdn(Server):
    """Where a hub keeps its files: another host, as seen from a token. `expired`: how many addresses have expired."""

    def __init__(self, hub: Hub):
        self.hub, self.signed, self.expired = hub, 0, 0
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        if int(parse_qs(query)["signature"][0]) <= self.expired:
            return self.send(request, 403, b"<Error>Request has expired</Error>")
        return self.hub.file(request, path.removeprefix("/"))


WEIGHTS, SIZE = "model-2-of-2.safetensors", 300_000


def random_files(folder: Path) -> Path:
    """A checkpoint by its names: the bytes are random."""
    made = random.Random(1)
    for name in ("model-1-of-2.safetensors", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes(made.randbytes(SIZE if name.endswith("safetensors") else 2000))
    (folder / "README.md").write_text("not needed")
    return folder


class Place:
    """scripts/download.py in this process, with a hub and folders of its own."""

    def __init__(self, root: Path, published: Path, monkeypatch, capfd):
        self.hub, self.published, self.capfd = Hub(published, "Qwen/Qwen3-0.6B"), published, capfd
        self.folder, self.cache = root / "checkpoints/Qwen3-0.6B", root / "cache"
        for name, value in {"ENDPOINT": self.hub.url, "HF_HUB_CACHE": str(self.cache), "HF_HUB_DOWNLOAD_TIMEOUT": 1,
                            "HF_TOKEN_PATH": str(root / "token"), "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(download, "CHECKPOINTS", root / "checkpoints")
        monkeypatch.setattr(hub, "WAITS", (0.01,) * 4)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    def get(self, *words: str, package: str = "qwen3") -> tuple[int, str, str]:
        code = download.main([package, *words])
        out, err = self.capfd.readouterr()
        assert all(len(line) < 300 for line in err.splitlines())
        return code, out, err

    def transfers(self) -> list[tuple[str, str | None]]:
        """(file, range) of every file that was asked for, and forget them."""
        asked = [(path.rpartition("/")[2], wanted) for _, path, wanted, _ in self.hub.log if "/resolve/" in path]
        self.hub.log.clear()
        return asked

    def is_whole(self) -> bool:
        return all((self.folder / path.name).read_bytes() == path.read_bytes() for path in self.published.iterdir()
                   if path.name != "README.md") and not list(self.folder.glob("*.part"))

    def part(self, data: bytes, name: str = WEIGHTS) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (entry,) = [entry for entry in self.hub.files if entry["rfilename"] == name]
        (path := self.folder / f"{name}.{entry['blobId'][:8]}.part").write_bytes(data)
        return path

    def bytes(self, name: str = WEIGHTS) -> bytes:
        return (self.published / name).read_bytes()
