"""Training over two processes: the steps of one process with all rows, and runs that go on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from processes import run_ranks
from torch import nn
from torch.utils.data import TensorDataset

from fastkd import hint_loss, kd_loss
from fastkd.distill import Cosine, Distiller, Term

OPTIONS = {"optimizer": partial(torch.optim.SGD, lr=0.1), "clip_norm": 0.5, "accumulate": 2, "log_every": 1}


def distiller(dropout: float) -> Distiller:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 4), nn.Dropout(dropout), nn.Linear(4, 3))
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    terms = [Term(kd_loss, alpha=0.5), Term(hint_loss, "0", "1", adapt="linear", weight=Cosine(1.0, 0.0, until=6))]
    return Distiller(student, teacher, terms)


def rows(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    labels[::3] = -100  # the halves of a batch have different numbers of labels
    return TensorDataset(torch.randn(count, 6, generator=generator), labels)


TRAIN, VAL = rows(23, 1), rows(8, 2)  # the last batch has 3 rows: 1 and 2 of the ranks


def train(
    out: Path | None, batch_size: int, dropout: float = 0.0, noise: int = 0, **options: object
) -> dict[str, torch.Tensor]:
    one = distiller(dropout).prepare(TRAIN[:2])
    torch.manual_seed(noise)
    one.fit(TRAIN, VAL, out=out, batch_size=batch_size, **{**OPTIONS, **options})
    return one.state_dict()


RANKS = """
    import sys
    from pathlib import Path
    import torch
    from torch import distributed
    from fastkd.distill import curves
    from test_distill_distributed import train

    curves.draw = lambda folder: None  # matplotlib takes a second to import
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {"no dropout": train(folder / "plain", 5, epochs=3)}
    found["whole"] = train(folder / "whole", 5, 0.3, noise=rank, epochs=4)
    found["part"] = train(folder / "parts", 5, 0.3, noise=rank, epochs=2)
    found["parts"] = train(folder / "parts", 5, 0.3, noise=99, epochs=4, resume=True)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    run_ranks(RANKS, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = train(None, 10, epochs=3)
    for name, value in alone.items():
        torch.testing.assert_close(first["no dropout"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        for run, state in first.items():
            assert torch.equal(state[name], second[run][name]), "the ranks agree"
        assert torch.equal(first["whole"][name], first["parts"][name]), name
        assert not torch.equal(first["whole"][name], first["part"][name])
    steps = (tmp_path / "parts" / "train.csv").read_text().splitlines()
    assert len(steps) == 1 + 2 * 4, "rank 0 alone writes"
