"""Requests to a Hugging Face hub: the list of files, and the bytes of one. fetch.py decides which to ask for."""

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

WAITS = (1, 2, 4, 8, 15, 30, 60, 60)  # seconds before the next try; as long as bytes arrive, the first


class Failure(Exception):
    """The download cannot go on; one sentence why. Code 2: the user can mend it; 1: the network or the hub."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class Trouble(Exception):
    """An error that another try may mend, after `wait` seconds if the hub says so and at most `tries` times."""

    def __init__(self, text: str, wait: float = 0, tries: int = len(WAITS)):
        super().__init__(text)
        self.wait, self.tries = wait, tries


class Stopped(Exception):
    """Another file has failed, or Ctrl-C: this thread ends too."""


@dataclass(frozen=True)
class File:
    """A file of a repository, as the hub describes it."""
    name: str
    size: int
    hash: str  # SHA-256 of a large file, git's own SHA-1 of a small one
    blob: str  # git's hash, of the pointer if the file is large

    @property
    def part(self) -> str:
        return f"{self.name}.{self.blob[:8]}.part"  # another revision has another name


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def cache_of(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repository.replace('/', '--')}"


class Hub:
    """One repository of the hub that HF_ENDPOINT names. The token is sent to this host and to no other."""

    def __init__(self, repository: str, note: Callable[[str], None]):
        self.repository, self.endpoint, self.note = repository, constants.ENDPOINT, note
        self.stop, self.notes = threading.Event(), deque()
        if not re.match(r"https?://[^/\s]", self.endpoint):
            raise Failure(2, f"HF_ENDPOINT is {self.endpoint[:80]!r}, expected an address that begins with https://")
        self.token = get_token()
        if self.token and not (self.token.isascii() and self.token.isprintable()):
            raise Failure(2, "HF_TOKEN has characters in it that no token has; unset it (public checkpoints need none) "
                             "or set it again")
        try:
            self.timeout = max(constants.HF_HUB_DOWNLOAD_TIMEOUT, 1)
            self.client = httpx.Client(timeout=self.timeout)
            self.origin = self.origin_of(self.endpoint)
        except httpx.InvalidURL as error:
            raise Failure(2, f"HF_ENDPOINT is {self.endpoint[:80]!r}, which is no address ({error})") from None
        except (ImportError, OSError, ValueError) as error:
            raise Failure(2, "the proxy or certificate that the environment names cannot be used: "
                             f"{str(error)[:150]}") from None
        self.headers = build_hf_headers(token=self.token or False)
        self.commit = ""

    @staticmethod
    def origin_of(url: str) -> tuple[str, str, int]:
        parsed = httpx.URL(url)
        return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme, 0)

    def files(self, revision: str | None, wanted: re.Pattern) -> list[File]:
        """What the hub has under names that are `wanted`, smallest first."""
        def ask() -> list[File]:
            try:
                info = api.model_info(self.repository, revision=revision, files_metadata=True, timeout=self.timeout)
                self.commit = str(info.sha)
                return [File(file.rfilename, int(file.size), file.lfs.sha256 if file.lfs else str(file.blob_id),
                             str(file.blob_id)) for file in info.siblings if wanted.fullmatch(file.rfilename)]
            except HfHubHTTPError as error:
                raise self.refusal(error.response, revision) from None
            except (ValueError, KeyError, TypeError, AttributeError):
                raise Trouble("no list of files came; is it a network to log in to?", tries=2) from None

        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        return sorted(self.patiently("", ask), key=lambda file: file.size)

    def refusal(self, response: httpx.Response, revision: str | None = None) -> Exception:
        """What it means if the hub itself answers with something else than the file."""
        status, code = response.status_code, response.headers.get("X-Error-Code")
        if code == "GatedRepo":
            return Failure(2, f"{self.repository} wants you to accept its terms; do so on its page and set HF_TOKEN")
        if code == "RevisionNotFound":
            return Failure(2, f"{self.repository} has no revision {str(revision)[:80]}")
        invalid = "credentials" in response.headers.get("X-Error-Message", "")
        if status == 401 and self.token and (code != "RepoNotFound" or invalid):
            from_outside = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
            cure = "unset it or set a valid one" if from_outside else "`hf auth logout` removes the stored one"
            return Failure(2, f"{self.endpoint[:80]} says that the token (HF_TOKEN) is wrong or has expired; public "
                              f"checkpoints need none: {cure}")
        if status in (401, 404):
            return Failure(1, f"{self.endpoint[:80]} has no {self.repository}, or HF_TOKEN does not allow it")
        if status in (408, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "")
            return Trouble(f"the hub answered {status}", min(int(asked), 300) if asked.isdecimal() else 0)
        return Failure(1, f"{self.endpoint[:80]} answered {status} for {self.repository}")

    def patiently(self, name: str, action: Callable, progress: Callable[[], int] = lambda: 0):
        """Try until it succeeds, at most len(WAITS) times without progress: a server may always break off."""
        best, tries = progress(), 0
        while True:
            try:
                return action()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                trouble = self.trouble(error)
                if isinstance(error, httpx.ConnectError) and not name:
                    trouble.tries = 2  # at the very beginning: say so soon
            except Trouble as error:
                trouble = error
            if grown := progress() > best:
                best, tries = progress(), 0
            if tries >= min(trouble.tries, len(WAITS)):
                raise Failure(1, f"cannot get {name or self.repository} from {self.endpoint[:60]} "
                                 f"({str(trouble)[:80]}; tried {tries + 1} times); check the network, then run this "
                                 "again: it goes on where it stopped")
            wait = max(trouble.wait, WAITS[tries])
            tries += 1
            if not grown:
                self.notes.append(f"{name or self.repository}: {str(trouble)[:120]}; trying again in {wait:g} s")
            if not name:
                self.tell()
            if self.stop.wait(wait):
                raise Stopped

    def trouble(self, error: Exception) -> Trouble:
        text = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in text:
            raise Failure(1, f"the certificate of {self.endpoint[:80]} is not trusted; if a proxy has its own, "
                             "set SSL_CERT_FILE to it") from None
        if isinstance(error, httpx.TimeoutException):
            return Trouble(f"nothing came for {self.timeout} s")
        return Trouble(f"no connection: {text}" if isinstance(error, httpx.ConnectError) else text)

    def tell(self) -> None:
        """Print the notes that threads have left: only the main thread writes to the terminal."""
        while self.notes:
            self.note(self.notes.popleft())

    @contextmanager
    def open(self, name: str, headers: dict[str, str]) -> Iterator[tuple[httpx.Response, bool]]:
        """The answer, and whether the hub itself gave it. Each try asks the hub anew, since signed addresses expire."""
        url = f"{self.endpoint}/{self.repository}/resolve/{self.commit}/{quote(name)}"
        agent = {"user-agent": self.headers.get("user-agent", "")}
        for _ in range(10):
            own = self.origin_of(url) == self.origin
            with self.client.stream("GET", url, headers=headers | (self.headers if own else agent)) as response:
                if response.status_code not in (301, 302, 303, 307, 308):
                    yield response, own
                    return
                url = urljoin(url, response.headers.get("Location", ""))
        raise Trouble("it redirects without end")

    def receive(self, file: File, part: Path, seen: Callable[[int], None]) -> None:
        """Append to `part` the bytes that it still lacks."""
        start = size_of(part)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self.open(file.name, headers) as (response, own):
            status, length = response.status_code, response.headers.get("Content-Length")
            plain = response.headers.get("Content-Encoding", "identity") == "identity"
            if status == 206:
                begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if status == 416 or status == 206 and not (plain and begins and int(begins[1]) == start):
                part.unlink(missing_ok=True)  # without a range the next time
                raise Trouble(f"the server cannot go on in the middle ({status})")
            if status not in (200, 206):
                raise self.refusal(response) if own else Trouble(f"{response.url.host} answered {status}")
            if status == 200:  # the whole file, though a part may have been asked for
                start = 0
                if plain and length is not None and int(length) != file.size:
                    raise Trouble(f"{length} bytes were sent for a file of {file.size}")
            with part.open("r+b" if part.exists() else "wb") as out:
                out.truncate(start)
                out.seek(start)
                for piece in response.iter_bytes():
                    if self.stop.is_set():
                        raise Stopped
                    out.write(piece)
                    out.flush()  # what has come is not lost with this process
                    start += len(piece)
                    if start > file.size:
                        break
                    seen(start)
                os.fsync(out.fileno())
        if start > file.size:
            part.unlink()
            raise Trouble(f"more was sent than the {file.size} bytes of the file")
        if start < file.size:
            raise Trouble("the transfer broke off")

    def in_cache(self, file: File) -> Path | None:
        """The file in the Hugging Face cache, where other programs may have left it."""
        cache = cache_of(self.repository)
        for path in (cache / "blobs" / file.hash, cache / "snapshots" / self.commit / file.name):
            if size_of(path) == file.size and file.size:
                return path.resolve()
        return None
