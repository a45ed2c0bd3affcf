"""Which evaluation was the best so far, and whether it is worth waiting for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import _checks


@dataclass
class Best:
    """Follows one metric. A NaN is never better, and counts as an evaluation without improvement."""

    monitor: str | None
    mode: str = "min"
    patience: int | None = None
    min_delta: float = 0.0
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    mark: float | None = None  # what the next one has to beat by min_delta, for patience to begin anew
    waited: int = 0  # evaluations since then

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether these are better than all before."""
        if self.monitor is None:
            self.monitor = "loss" if "loss" in metrics else next(iter(metrics))
        if self.monitor not in metrics:
            _checks.bad_value("fit", "monitor", f"be one of {', '.join(map(repr, metrics))}", repr(self.monitor))
        value = metrics[self.monitor]
        if self._beats(value, self.mark, self.min_delta):
            self.mark, self.waited = value, 0
        else:
            self.waited += 1
        better = self._beats(value, self.metrics.get(self.monitor), 0.0)
        if better:
            self.step, self.metrics = step, dict(metrics)
        return better

    def _beats(self, value: float, other: float | None, by: float) -> bool:
        if value != value:
            return False
        return other is None or (value < other - by if self.mode == "min" else value > other + by)

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """What happened so far; patience and min_delta may be others now."""
        for name in ("monitor", "step", "metrics", "mark", "waited"):
            setattr(self, name, state[name])
