r"""What losses on the distances of all pairs of rows have in common, whoever computes them.

With Q (N, N) the squared distances of the rows x_i of one batch, such a loss is a function of the student's Q and the
teacher's, and its gradient goes through Q alone::

    T = P + P',  P_ij = d loss / d Q_ij         d loss / d x_i = 2 sum_j T_ij (x_i - x_j)

An implementation has three pieces, and :func:`loss_of` puts them together. Everything is float64, unless the
implementation brings the teacher's Q, and takes the student's rows as they are:

``squares``   x (N, D) -> Q (N, N), symmetric, 0 on the diagonal. Each, however small, has the relative error of a sum
              of squared differences: |x_i|^2 + |x_j|^2 - 2 x_i . x_j has no digits left for close rows.
``pairs``     Q of the student, Q of the teacher, delta -> the sum of the loss's terms (N^2 for distances, N^3 for
              angles), 0-dim, and T of that sum. Rows with Q_ij <= COINCIDENT^2 sum_kl Q_kl / (N (N - 1)) are
              coincident: their distance and direction are 0, and so is what would be divided by the distance.
``pull``      T (N, N), x (N, D) -> sum_j T_ij (x_i - x_j), (N, D). The diagonal of T says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._features import Features, Result, kept, result_dtype
from ._unit_rows import through_unit_rows, unit_rows
from ._widen import widen

COINCIDENT = 1e-6  # closer rows, as a share of the root mean square of the batch's distances

Squares = Callable[[Tensor], Tensor]
Pairs = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
Pull = Callable[[Tensor, Tensor], Tensor]


def loss_of(
    squares: Squares,
    pairs: Pairs,
    pull: Pull,
    student: Features,
    teacher: Features,
    gradient: bool,
    *,
    power: int,
    reduction: str,
    delta: float,
    normalize_rows: float,
    taught: Tensor | None = None,
) -> Result:
    """The loss, of N to the ``power`` terms, and its gradient. ``taught``: the teacher's Q, from rows as they are."""
    dtype = result_dtype(student, teacher)
    x = student.tensor if taught is not None else widen(student.tensor)
    units, lengths = unit_rows(x) if normalize_rows else (x, None)
    if taught is None:
        taught = (_of_unit_rows(squares) if normalize_rows else _of_rows(squares))(teacher)
    total, slopes = pairs(squares(units), taught, delta)
    terms = 1 if reduction == "sum" else max(1, len(x)) ** power
    loss = (total / terms).to(dtype)
    if not gradient:
        return loss, None
    slope = pull(slopes, units).mul_(2 / terms)
    return loss, (slope if lengths is None else through_unit_rows(slope, units, lengths)).to(dtype)


def _of_rows(squares: Squares) -> Callable[[Features], Tensor]:
    """Whoever computes them first: all give the same matrix."""

    def squared_distances(teacher: Tensor) -> Tensor:
        return squares(widen(teacher))

    return kept(squared_distances)


def _of_unit_rows(squares: Squares) -> Callable[[Features], Tensor]:
    def squared_distances_of_unit_rows(teacher: Tensor) -> Tensor:
        return squares(unit_rows(widen(teacher))[0])

    return kept(squared_distances_of_unit_rows)
