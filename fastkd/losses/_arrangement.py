"""Teachers without logits: from a user's objects to the rows of ``_rows.py``, and who computes what with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch
from .._rows import ExpectedTeacher, LogitRows, SparseTeacher, state_width, weights
from ..inputs import Expected, Head, TopK
from ..inputs.topk import ABSENT
from . import _vocab_map
from ._logit_arguments import Given, Logits
from .terms import Term
from .terms.decoupled import COLUMNS, DECOUPLED, Decoupled
from .terms.expected import WithExpected
from .terms.mapped import Mapped
from .terms.several import Several
from .terms.student_topk import StudentTopK
from .terms.topk import WithTopK
from .terms.weighing import column, soft_rows

EVERY = ("forward_kl", "skew_kl", "jsd", "tvd", "cross_entropy", "reverse_kl", "skew_reverse_kl")
TAKES = {  # the divergences that a tail has
    "bucket": EVERY,
    "support": EVERY,
    "uniform": EVERY,
    "renormalize": EVERY[:5],
    "samples": ("forward_kl", "cross_entropy"),
}
CONVERTED = ("renormalize", "support")  # to any temperature
MOST = 1.1  # 16-bit log-probabilities may add up to a little more than 1
PASSES = "kd_loss(TopK)"  # the operation that has the passes over the student's logits


def arrange(logits: Logits, rows: LogitRows) -> tuple[Given, ...]:
    """Splits the teachers. Those with logits are returned, and ``rows`` keeps their numbers; it gets the others."""
    dense: list[int] = []
    temperatures, weights = list(rows.teacher_temperature), rows.teacher_weight
    shares: Sequence[float | Tensor] = weights.unbind(1) if isinstance(weights, Tensor) else weights
    for i, teacher in enumerate(logits.teachers):
        if isinstance(teacher, TopK):
            sparse = _sparse(logits, rows, teacher, temperatures[i], shares[i])
            if sparse.tail != "uniform":
                rows.sparse += (sparse,)
                continue
            temperatures[i] = 1.0  # it is spread out to log-probabilities
        elif isinstance(teacher, Expected):
            rows.expected += (_expected(logits, rows, teacher, temperatures[i], shares[i]),)
            continue
        dense.append(i)
    rows.teacher_temperature = tuple(temperatures[i] for i in dense)
    rows.teacher_weight = weights[:, dense] if isinstance(weights, Tensor) else tuple(weights[i] for i in dense)
    others = len(rows.sparse) + len(rows.expected)
    given = tuple(logits.teachers[i] for i in dense)
    logits.computed |= (others > 0 and others + len(dense) > 1) or any(isinstance(one, TopK) for one in given)
    return given


def term(impl: str | None, like: Tensor, others: Sequence[Tensor], rows: LogitRows, **kind: Any) -> Term:
    """Who computes these rows: an implementation, or a term made of its parts. ``kind``: pairs, student_topk."""
    dense: Term = _dispatch.pick(rows.op, impl, like, others)
    if rows.op in DECOUPLED:
        return Decoupled(dense, rows.op)
    pairs, k = kind.get("pairs"), kind.get("student_topk")
    if not rows.sparse and not rows.expected and k is None:
        return dense if pairs is None else Mapped(dense, dense, pairs)
    passes = _dispatch.pick(PASSES, impl, like, others)
    sparse, expected = WithTopK(dense, passes), WithExpected(passes)
    several = Several(dense, sparse, expected)
    chosen: Term
    if k is not None:
        chosen = StudentTopK(k, passes, sparse, several)
    elif len(rows.teacher_temperature) + len(rows.sparse) + len(rows.expected) > 1:
        chosen = several
    else:
        chosen = sparse if rows.sparse else expected
    return chosen if pairs is None else Mapped(dense, chosen, pairs)


def state_columns(rows: LogitRows, dense: int, student_topk: int | None = None, mapped: bool = False) -> int:
    """How wide the state is that such a term leaves."""
    if rows.op in DECOUPLED:
        return state_width(dense) + COLUMNS
    events = [one.indices.shape[1] for one in rows.sparse]
    kept = 0
    if student_topk is not None:
        events, kept, dense = [student_topk] * dense, student_topk + dense * (student_topk + 1), 0
    single = len(events) + len(rows.expected) == 1 and dense == 0
    sparse = sum(state_width(0) + k + 1 + state_width(1) for k in events)
    others = sparse + state_width(0) * len(rows.expected)
    own = others if single else state_width(dense, rows.standardize) + others
    return kept + own + (state_width(0) if mapped else 0)


def _sparse(
    logits: Logits, rows: LogitRows, teacher: TopK, temperature: float | Tensor, weight: float | Tensor
) -> SparseTeacher:
    op, tail = logits.op, teacher.tail
    if rows.divergence not in TAKES[tail]:
        rule = f"be one of {', '.join(TAKES[tail])} with a TopK teacher of tail {tail!r}"
        _checks.bad_value(op, "divergence", rule, rows.divergence)
    indices = teacher.indices.detach().reshape(-1, teacher.k).to(torch.int64).contiguous()
    log_probs = teacher.log_probs.detach().reshape(-1, teacher.k).to(logits.dtype)
    if tail in CONVERTED:
        if isinstance(temperature, Tensor):
            temperature = _usable(logits, temperature).to(log_probs.dtype).unsqueeze(1)
        log_probs = log_probs * (teacher.temperature / temperature)
    else:
        _same_temperature(op, f"TopK of tail {tail!r}", teacher.temperature, temperature, CONVERTED)
    kept = _kept(logits, indices)
    log_probs = torch.where((indices if kept is None else kept) == ABSENT, -torch.inf, log_probs)
    if kept is None and tail in ("bucket", "uniform"):
        _check_sum(logits, rows, log_probs, weight)
    else:
        log_probs, tail = _whole(log_probs), "support" if tail == "support" else "whole"
    indices = logits.constant(indices if kept is None else kept)
    return SparseTeacher(indices, logits.constant(log_probs), tail, weight)


def _expected(
    logits: Logits, rows: LogitRows, teacher: Expected, temperature: float | Tensor, weight: float | Tensor
) -> ExpectedTeacher:
    op, head = logits.op, logits.student
    if not isinstance(head, Head):
        _checks.bad_type(op, "student", "be a Head with an Expected teacher", type(head).__name__)
    if rows.divergence not in ("forward_kl", "cross_entropy"):
        _checks.bad_value(op, "divergence", "be forward_kl or cross_entropy with an Expected teacher", rows.divergence)
    for name in ("weight", "bias"):
        value = getattr(head, name)
        if value is not None and value.requires_grad:
            rule = "not require a gradient with an Expected teacher, which is made for one frozen head"
            _checks.bad_value(op, f"student.{name}", rule, "requires_grad=True")
    if head.softcap is not None:
        _checks.bad_value(op, "student.softcap", "be None with an Expected teacher", head.softcap)
    if logits.shared != logits.vocabulary or logits.vocab_map is not None:
        name = "shared_vocab" if logits.vocab_map is None else "vocab_map"
        _checks.bad_value(op, name, "be None with an Expected teacher, which is over all of the student's ids", "one")
    _same_temperature(op, "Expected teacher", teacher.temperature, temperature)
    hidden = head.input.shape[-1]
    if teacher.mean.shape[-1] != hidden:
        _checks.bad_value(op, "teacher.mean", f"have the student's hidden size, {hidden}", teacher.mean.shape[-1])
    if (teacher.bias is None) != (head.bias is None):
        rule = "be given exactly where the student's head has a bias"
        _checks.bad_value(op, "teacher.bias", rule, "none" if teacher.bias is None else "one")

    mean = logits.constant(teacher.mean.detach().reshape(-1, hidden))
    bias = None if teacher.bias is None else logits.constant(teacher.bias.detach().reshape(-1) * head.scale)
    entropy = None if teacher.entropy is None else logits.constant(teacher.entropy.detach().reshape(-1))
    return ExpectedTeacher(mean, bias, entropy, weight, teacher.checksum)


def _same_temperature(
    op: str, what: str, recorded: float, temperature: float | Tensor, converted: Sequence[str] = ()
) -> None:
    if isinstance(temperature, Tensor) or temperature != recorded:
        got = "one per row" if isinstance(temperature, Tensor) else temperature
        rule = f"be {recorded}, at which the {what} was recorded"
        rule += f" ({' and '.join(converted)} convert to any)" if converted else ""
        _checks.bad_value(op, "teacher_temperature", rule, got)


def _usable(logits: Logits, temperature: Tensor) -> Tensor:
    """One per row. What is none is refused where looking does not wait for a device, elsewhere its row is NaN."""
    wrong = ~((temperature > 0) & (temperature < torch.inf))
    if _can_look(logits, temperature) and bool(wrong.any()):
        rule = "be positive and finite in every row"
        _checks.bad_value(logits.op, "teacher_temperature", rule, float(temperature[wrong][0]))
    return torch.where(wrong, torch.nan, temperature)


def _kept(logits: Logits, indices: Tensor) -> Tensor | None:
    """The ids as positions among the shared ones, if some may have to be dropped. What is no id at all stays wrong."""
    if logits.vocab_map is not None:
        places = _vocab_map.places(logits.vocab_map)
        known = (indices >= 0) & (indices < len(places))
        return torch.where(known, places[torch.where(known, indices, 0)], indices)
    if logits.cut:
        return torch.where(indices >= logits.shared, ABSENT, indices)
    return None


def _whole(log_probs: Tensor) -> Tensor:
    """As if the row's ids were all there are. A row without any stays as it is."""
    total = torch.logsumexp(log_probs, 1, keepdim=True)
    return torch.where(total == -torch.inf, log_probs, log_probs - total)


def _check_sum(logits: Logits, rows: LogitRows, log_probs: Tensor, weight: float | Tensor) -> None:
    """Logits, or probabilities, in the place of log-probabilities: seen where looking does not wait for a device."""
    if not _can_look(logits, log_probs):
        return
    sums = log_probs.double().exp().sum(1)
    counts = soft_rows(rows, weights(rows, logits.count, log_probs)) & (column(weight, sums) != 0)
    wrong = (sums > MOST) & counts
    if bool(wrong.any()):
        rule = "hold log-probabilities that add up to at most 1 in a row"
        _checks.bad_value(logits.op, "teacher.log_probs", rule, float(sums[wrong][0]))


def _can_look(logits: Logits, data: Tensor) -> bool:
    return data.device.type == "cpu" and not torch.compiler.is_compiling() and logits.lie_in_memory()
