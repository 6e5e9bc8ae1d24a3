"""Several processes on one CPU that have met, over gloo: run_on(2, function, …) gives what it returned in each of two.

They meet at a file and not at a port, and talk over the loopback interface, so that any machine can do it.
"""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path

from tests.warm import DEVNULL, ROOT, start  # noqa: F401

ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run_on(n: int, function: Callable, *arguments, timeout: float = 300) -> list:
    """What `function(*arguments)` returns on each of n ranks. The other processes find it by module and name."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job").write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        env = os.environ | ALONE | {"WORLD_SIZE": str(n)}
        ranks = [start(["-m", "tests.ranks", folder], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                       stdout=DEVNULL, stderr=Path(folder, f"{rank}.err").open("wb")) for rank in range(n)]
        try:
            codes = [process.wait(timeout) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        said = "\n".join(f"rank {rank}: {Path(folder, f'{rank}.err').read_text()[-3000:]}" for rank in range(n))
        assert codes == [0] * n, said
        return [pickle.loads(Path(folder, f"{rank}.out").read_bytes()) for rank in range(n)]


def main() -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank,
                            world_size=int(os.environ["WORLD_SIZE"]))
    module, name, arguments = pickle.loads((folder / "job").read_bytes())
    result = getattr(import_module(module), name)(*arguments)
    (folder / f"{rank}.out").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
