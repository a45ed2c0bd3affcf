"""What a run leaves on the disk, and how it goes on from there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import _checks
from . import checkpoint, curves, lock, ranks
from .group import terms_of
from .random_states import get_states, set_states

if TYPE_CHECKING:
    from .loop import Loop

VERSION = 1
LAST, BEST = "last.pt", "best.pt"


class Records:
    """``last.pt``, all that a run needs to go on, and ``best.pt``, the student that was evaluated best.

    Rank 0 writes. The order makes an interruption harmless: ``last.pt`` is first, and from it follows what ``best.pt``
    has to be.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.folder: Path | None = loop.settings.folder
        self._saved: tuple[int, ...] | None = None
        self._best: dict[str, Any] | None = None  # in memory, where there is no folder

    def claimed(self) -> AbstractContextManager[None]:
        """Nobody else trains in the folder meanwhile."""
        if self.folder is None:
            return nullcontext()
        if self.loop.settings.resume is True and not ranks.from_first((self.folder / LAST).exists()):
            _checks.bad_value("fit", "out", "hold a last.pt to resume from", self.folder)
        return lock.held(self.folder)

    def resume(self) -> Iterator[Any] | None:
        """Put everything back as it was. The rest of the epoch's batches, if there is one in the middle."""
        loop = self.loop
        if self.folder is None:
            return None
        last = self.folder / LAST
        there = ranks.from_first(last.exists())
        if there and not loop.settings.resume:
            refuse_run("fit", self.folder)
        if ranks.rank() == 0:
            checkpoint.clear(self.folder)
        if not there:
            return None
        state = checkpoint.load(last)
        self._check(state)
        loop.distiller.load_state_dict(state["distiller"])
        loop.optimizer.load_state_dict(state["optimizer"])
        if loop.scheduler is not None:
            loop.scheduler.load_state_dict(state["scheduler"])
        loop.precision.load(state["precision"])
        loop.best.load(state["best"])
        loop.step, loop.epoch, loop.position, loop.evaluated = state["place"]
        loop.metrics = state["metrics"]
        own = state["ranks"][ranks.rank()]
        loop.source.load(own["source"])
        self._saved = tuple(state["place"])
        if ranks.rank() == 0:
            self._mend_best(state)
        set_states(own["random"], loop.device)
        if loop.done or loop.position == 0:
            return None
        batches = loop.source.open(loop.epoch, loop.position)
        set_states(own["random"], loop.device)  # opening it may have drawn numbers
        return batches

    def save(self) -> None:
        """Once for a place in training."""
        loop = self.loop
        place = loop.step, loop.epoch, loop.position, loop.evaluated
        if self.folder is None or self._saved == place:
            return
        loop.watch.check()
        own = {"random": get_states(loop.device), "source": loop.source.state()}
        everyones = ranks.gathered(own)
        if ranks.rank() == 0:
            state = {
                "version": VERSION,
                "settings": self._fingerprint(),
                "place": list(place),
                "distiller": loop.distiller.state_dict(),
                "optimizer": loop.optimizer.state_dict(),
                "scheduler": None if loop.scheduler is None else _without_functions(loop.scheduler.state_dict()),
                "precision": loop.precision.state(),
                "best": loop.best.state(),
                "metrics": loop.metrics,
                "ranks": everyones,
            }
            checkpoint.save(self.folder / LAST, state)
        self._saved = place
        ranks.wait()

    def keep_best(self) -> None:
        """These weights are the best so far."""
        if self.folder is not None:
            self.save()
            if ranks.rank() == 0:
                self._write_best(self.loop.distiller.state_dict())
        elif self.loop.settings.keep == "best":
            state = self.loop.distiller.state_dict()
            self._best = {name: value.detach().clone() for name, value in state.items()}

    def finish(self) -> None:
        """The weights that the student keeps, and the picture."""
        loop = self.loop
        ranks.wait()
        if loop.settings.keep == "best" and loop.best.step is None:
            warnings.warn(
                f"fit: {loop.best.monitor} was NaN in every evaluation, so none was the best: the student keeps its "
                "last weights",
                stacklevel=2,
            )
        elif loop.settings.keep == "best":
            best = self._best if self.folder is None else checkpoint.load(self.folder / BEST)["distiller"]
            assert best is not None
            loop.distiller.load_state_dict(best)
        self._share_buffers()
        if self.folder is not None and ranks.rank() == 0:
            curves.draw(self.folder)

    def _share_buffers(self) -> None:
        """Statistics as BatchNorm's are those of a rank's own rows: all ranks end with what rank 0 has written."""
        if ranks.count() > 1:
            own = dict(self.loop.distiller.named_buffers())
            firsts = ranks.from_first({name: buffer.cpu() for name, buffer in own.items()})
            for name, buffer in own.items():
                buffer.copy_(firsts[name])

    def _write_best(self, state: dict[str, Any]) -> None:
        assert self.folder is not None
        best = self.loop.best
        student = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
        # The tensors of both are the same, and are in the file once.
        whole = {"student": student, "distiller": state, "step": best.step, "metrics": best.metrics}
        checkpoint.save(self.folder / BEST, whole)

    def _mend_best(self, state: dict[str, Any]) -> None:
        """If the run was interrupted between the two files."""
        assert self.folder is not None
        path, best = self.folder / BEST, self.loop.best.step
        if best is None:
            path.unlink(missing_ok=True)
        elif best == self.loop.step and (not path.exists() or checkpoint.load(path)["step"] != best):
            self._write_best(state["distiller"])

    def _fingerprint(self) -> dict[str, Any]:
        """What has to be the same when a run goes on; epochs, steps and how often something is done may change."""
        loop = self.loop
        return {
            **loop.source.fingerprint,
            "accumulate": loop.settings.accumulate,
            "precision": loop.settings.precision,
            "clip_norm": loop.settings.clip_norm,
            "optimizer": type(loop.optimizer).__name__,
            "lr_scheduler": None if loop.scheduler is None else type(loop.scheduler).__name__,
            "terms": list(terms_of(loop.distiller)),
            "processes": ranks.count(),
        }

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            _checks.bad_value("fit", "out", f"hold a checkpoint of version {VERSION}", state.get("version"))
        was, now = state["settings"], self._fingerprint()
        for name in now:
            if was.get(name) != now[name]:
                _checks.bad_value("fit", name, f"be {was.get(name)!r}, as in the run in {self.folder}", repr(now[name]))


def refuse_run(op: str, folder: Path) -> NoReturn:
    _checks.bad_value(op, "out", 'hold no run (resume="auto" goes on with it)', folder)


def _without_functions(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state holds functions that it was made with, and is made with again."""
    return {name: value for name, value in state.items() if not callable(value)}
