"""What a run comes back with: :class:`Result`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What :func:`fastkd.distill.fit` did, over all the times that it was resumed.

    Attributes:
        step: Optimizer steps that were taken.
        epoch: Epochs that were completed.
        stopped_early: Whether ``patience`` ended it.
        metrics: The last evaluation.
        best_step: The step of the best one; None without an evaluation.
        best: The best evaluation.
        folder: The ``out`` of the run, or None. In it are ``last.pt``, what the run goes on from; ``best.pt``, a dict
            of ``"student"``, its ``state_dict``, with ``"distiller"``, ``"step"`` and ``"metrics"``; ``train.csv``,
            ``val.csv``, ``metrics.jsonl`` and ``curves.png``; and ``.lock``, which says who trains or trained last.
    """

    step: int
    epoch: int
    stopped_early: bool
    metrics: dict[str, float]
    best_step: int | None
    best: dict[str, float]
    folder: Path | None

    @property
    def last_checkpoint(self) -> Path | None:
        return None if self.folder is None else self.folder / "last.pt"

    @property
    def best_checkpoint(self) -> Path | None:
        """None if nothing was evaluated."""
        return None if self.folder is None or self.best_step is None else self.folder / "best.pt"
