"""Runs a function on several gloo processes and gives back what each returned."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

TIMEOUT_SECONDS = 240


def launch(target: str, world_size: int, folder: Path, *args) -> list:
    """Calls ``target`` inside a process group of ``world_size``.

    ``target`` is ``module:function``; it is called as ``function(*args)``.
    """
    (folder / "args.pkl").write_bytes(pickle.dumps(args))
    root = Path(__file__).parents[2]
    env = os.environ | {
        "PYTHONPATH": str(root),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, target, str(folder)],
            env=env | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [
        f"rank {rank}: {e[-2000:]}"
        for rank, (p, e) in enumerate(zip(processes, errors, strict=True))
        if p.returncode
    ]
    # The rank that failed first is the one whose peers did not hang up on it.
    assert not failed, min(failed, key=lambda text: "Connection closed by peer" in text)
    return [pickle.loads((folder / f"result{rank}.pkl").read_bytes()) for rank in range(world_size)]


def once_per_world_size(tmp_path_factory, target: str, args_of=lambda world_size: ()):
    """Makes a function of the world size that gives the ranks' results.

    It launches ``target`` at the first call for a world size.
    """

    @functools.cache
    def results(world_size: int) -> list:
        return launch(
            target, world_size, tmp_path_factory.mktemp(f"world{world_size}"), *args_of(world_size)
        )

    return results


def _child(target: str, folder: Path) -> None:
    import importlib

    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    module, function = target.split(":")
    args = pickle.loads((folder / "args.pkl").read_bytes())
    result = getattr(importlib.import_module(module), function)(*args)
    (folder / f"result{rank}.pkl").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
