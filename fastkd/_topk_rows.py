"""What every implementation is asked of a teacher that is known by its k best ids a row, and what it hands back.

Such a teacher makes a problem of k + 1 events for each row: its k ids, and the tail, which is any other id. The
divergence over the events is that of :mod:`fastkd._rows`, on rows of k + 1 log-probabilities given as logits. What is
left are two passes over the student's V logits, which each implementation has in ``topk.py``::

    gather(rows, indices, best)                                              -> state, events
    scatter(rows, indices, state, events, slopes, scale, grad_loss)          -> grad

``rows`` is a :class:`~fastkd._rows.LogitRows` without teachers, of which the divergence is never looked at. A row
counts where its weight is not 0; it is soft where it counts and alpha is not 1, and hard where it counts, alpha is not
0 and there are labels. The soft term sees the ids below ``rows.shared``, the hard term all V.

``indices``: ``(N, k)`` int64, contiguous, k from 0 on; each an id below ``shared``, once in its row, or -1 for an entry
that is absent. ``best``: ``(N,)`` int64 or None, the teacher's best id, for the column ``TEACHER_AGREES``.

``state``: float64 ``(N, FIRST_TEACHER)``, the columns of :mod:`fastkd._rows`, the same in every implementation; its
``SOFT`` is 0. ``events``: float32 ``(N, k + 1)``, contiguous (float64 if the computation is), the logarithms of q at
the student's temperature: of each id, and last of the probability of all other shared ids, from a sum over just those,
so that it keeps its digits however small it is. -inf for an entry that is absent, a logit of -inf, and a tail that is
empty; for nothing else. A row with a NaN, a +inf or no finite logit has NaN, one that is not soft 0.

``slopes``: like ``events``, what the logits of each event receive; every weight and the incoming gradient are in them.
``grad`` has the student's shape and dtype, and is the student itself with ``rows.overwrite``. In a soft row the id of
an event gets its slope, and the other shared ids get ``slopes[k] q_j / Q`` with Q the tail's probability (0 if that is
0). A hard row gets the hard gradient beside it, times ``grad_loss * scale`` if ``rows.reduce``, else times its
``grad_loss``. Each element is rounded to storage once. A row that does not count gets 0, a soft one with a NaN among
its slopes NaN.

Wrong ids in a row that counts raise on the CPU, before anything is computed. On a GPU its events are NaN, and so is its
gradient where the slopes are; nothing is read or written out of bounds.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ._checks import bad_value

OP = "kd_loss"
OUTSIDE, TWICE = "outside", "twice"


def bad_id(fault: str, shared: int, got: int) -> NoReturn:
    if fault == OUTSIDE:
        bad_value(OP, "teacher", f"hold ids from 0 to {shared - 1} (or -1 for none)", got)
    bad_value(OP, "teacher", "hold every id once in a row", f"{got} twice")


def wrong_ids(indices: Tensor, shared: int) -> Tensor:
    """Where an id is outside, or was in the row before (in no order: it is sorted)."""
    ordered = indices.sort(-1).values
    twice = torch.zeros_like(ordered, dtype=torch.bool)
    twice[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return twice | (ordered < -1) | (ordered >= shared)


def refuse_wrong_ids(indices: Tensor, shared: int) -> None:
    """The first row with a wrong id, and in it one that is outside before one that comes twice."""
    wrong = wrong_ids(indices, shared).any(-1)
    if not bool(wrong.any()):
        return
    seen: set[int] = set()
    for got in sorted(indices[wrong][0].tolist(), key=lambda i: -1 <= i < shared):
        if not -1 <= got < shared:
            bad_id(OUTSIDE, shared, got)
        if got >= 0 and got in seen:
            bad_id(TWICE, shared, got)
        seen.add(got)
