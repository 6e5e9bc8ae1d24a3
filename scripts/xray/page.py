"""The page: a template filled in one pass, and written so that nothing in it can be anything but text.

Data stand in a script element of type application/json, where "<" is escaped, so no text ends it. The browser is told
(Content-Security-Policy) to run this one script and this one style, by their hashes, and to load nothing from anywhere.
"""

import hashlib
import json
import os
import re
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
MARK = '<meta name="generator" content="X-ray of LLM From Scratch">'
SCRIPTS = "frame.js", "strip.js", "compare.js", "layers.js", "parts.js", "outcome.js"  # in this order


def as_json(data: dict) -> str:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def page(data: dict) -> str:
    style = (HERE / "page.css").read_text("utf-8")
    script = "".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    policy = (f"default-src 'none'; script-src {hash_of(script)}; style-src {hash_of(style)}; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    parts = {"policy": policy, "mark": MARK, "style": style, "data": as_json(data), "script": script}
    # In one pass: a prompt that spells {{script}} is text like any other.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], (HERE / "page.html").read_text("utf-8"))


def hash_of(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def check_output(path: Path) -> None:
    """ValueError where the page could not be written, or would replace something else than an earlier page."""
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"-o {path} is a folder; name a file in it, such as {path / 'xray.html'}")
    if path.exists() and (not path.is_file() or MARK not in path.read_bytes()[:2000].decode("utf-8", "replace")):
        raise ValueError(f"-o {path} exists and is no X-ray; it stays as it is, choose another name")


def write(path: Path, text: str) -> None:
    """Whole or not at all: beside its place first, then renamed."""
    check_output(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8")
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
