"""Runs over two processes of which one or both kill themselves at a named place, and the same ranks once more."""

from __future__ import annotations

import json
import random
import sys
from datetime import timedelta
from pathlib import Path

import torch
from distill_runs import KILLS, digest, ended, files, one_run, started
from torch import distributed

from fastkd.distill import curves, lock

RANKS = 2
PATIENCE = timedelta(seconds=60)  # of a rank that waits for one which was killed, unless it learns of that


def attempt(out: Path, meet: Path, killed: list[int], kill: str | None = None, times: int = 0) -> list[int]:
    """How each rank ended."""

    def work(rank: int) -> None:
        random.seed(rank)
        address = f"file://{meet}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS, timeout=PATIENCE)
        torch.manual_seed(rank)
        if kill is not None and rank in killed:
            KILLS[kill](times)
        weights = digest(one_run(out))
        distributed.barrier()
        distributed.destroy_process_group()
        out.with_suffix(f".{rank}.json").write_text(json.dumps({"weights": weights, "files": files(out)}))

    processes = [started(lambda rank=rank: work(rank)) for rank in range(RANKS)]
    return [ended(process) for process in processes]


def main(folder: Path) -> None:
    """Reads cases as [killed, kill, times] from standard input, a line each, and says how the ranks ended."""
    torch.set_num_threads(1)
    curves.draw = lambda folder: None
    one_run(folder / "imports")  # what is imported when it is first used, once for all ranks
    assert attempt(folder / "whole", folder / "meet", []) == [0] * RANKS
    with lock.held(folder / "whole"):  # as by another run
        assert attempt(folder / "whole", folder / "meet-whole", []) == [1] * RANKS
    for number, line in enumerate(sys.stdin):
        killed, kill, times = json.loads(line)
        out = folder / f"{number}"
        statuses = [attempt(out, folder / f"meet-{number}", killed, kill, times)]
        statuses.append(attempt(out, folder / f"meet-{number}-again", []))
        print(json.dumps({"case": [killed, kill, times], "statuses": statuses}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
