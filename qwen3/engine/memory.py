"""Where the model runs, and how much memory is left there."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

from . import processes

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None


def find_device(name: str | None) -> torch.device:
    """The named device, or the fastest that is there; ValueError if it cannot be used."""
    if processes.ranks() > 1:
        name = processes.device_of(name)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # which of them depends on the device
        raise ValueError(f"device {name[:40]!r} is not usable here; `-d cpu` always is") from None
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be used on the device; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cpu":
        return None
    known = [left for left in (free_of_machine(), free_of_limits(), free_of_cgroup()) if left is not None]
    return min(known, default=None)


def give_back() -> None:
    """Memory that was used and freed, back to the system: Linux's C library keeps it for later."""
    with suppress(OSError, AttributeError, TypeError):  # other systems do it by themselves
        ctypes.CDLL(None).malloc_trim(0)


def numbers_of(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable: 123 kB` or `inactive_file 123` -> name: bytes; nothing without such a file."""
    found = {}
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found


def free_of_machine(proc: Path = Path("/proc")) -> int | None:
    """What Linux calls available: it counts what could be dropped, such as files that it caches."""
    return numbers_of(proc / "meminfo").get("MemAvailable")


def free_of_limits(proc: Path = Path("/proc")) -> int | None:
    """What `ulimit -v` and `ulimit -d` leave to this process."""
    if resource is None:
        return None
    used, left = numbers_of(proc / "self/status"), []
    for name, counted in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and counted in used:
            left.append(max(limit - used[counted], 0))
    return min(left, default=None)


def free_of_cgroup(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the container's limit leaves, in version 1 and 2; the groups above set limits too.

    Pages of files that could be dropped are counted as used there, and are not in the way.
    """
    left = []
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base = root / "memory" if controllers else root
            limit, usage, inactive = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if controllers else
                ("memory.max", "memory.current", "inactive_file"))
            group = base / path.lstrip("/")
            for folder in {base, group, *(parent for parent in group.parents if base in parent.parents)}:
                with suppress(OSError, ValueError):  # "max" is no number: there is no limit
                    most = int((folder / limit).read_text())
                    used = int((folder / usage).read_text()) - numbers_of(folder / "memory.stat").get(inactive, 0)
                    if most < 1 << 60:  # version 1 writes a huge number for "none"
                        left.append(max(most - max(used, 0), 0))
    return min(left, default=None)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
