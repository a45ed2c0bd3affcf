"""Several students of the same teachers, which run once for all of them: :class:`Group`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .distiller import Distiller
from .fit import fit
from .term import Term


class Group(nn.Module):
    """Several Distillers that learn from the same batches and teachers. Same as::

        outputs = teacher(batch)
        loss = sum(distiller.loss(batch, teacher_outputs=outputs)[0] for distiller in distillers)

    Each student has its own terms and adapters, and gets the gradients that it would get alone. ``fit`` takes it like a
    Distiller: it clips the gradient of each by itself, and names each part and metric ``"<student>/<name>"``.

    Args:
        distillers: By name. They have the same teachers: the same models, by the same names.

    Raises:
        TypeError, ValueError: a wrong type; other teachers; a student that is there twice.

    Example:
        >>> from fastkd import kd_loss
        >>> from fastkd.distill import Distiller, Group, Term
        >>> teacher = torch.nn.Linear(4, 2)
        >>> group = Group({n: Distiller(torch.nn.Linear(4, 2), teacher, [Term(kd_loss)]) for n in ("a", "b")})
        >>> loss, parts = group.loss((torch.randn(3, 4), torch.tensor([0, 1, 1])))
        >>> sorted(parts)
        ['a/kd_loss', 'b/kd_loss']
    """

    def __init__(self, distillers: Mapping[str, Distiller]) -> None:
        super().__init__()
        if not isinstance(distillers, Mapping) or not distillers:
            _checks.bad_type("Group", "distillers", "be a dict of Distiller by name", type(distillers).__name__)
        for name, one in distillers.items():
            if not isinstance(one, Distiller):
                _checks.bad_type("Group", "distillers", "be a dict of Distiller by name", type(one).__name__)
            if not isinstance(name, str) or not name or set(name) & set("./"):
                _checks.bad_value("Group", "distillers", "have names without a slash or a dot", repr(name))
            if hasattr(nn.ModuleDict, name):
                _checks.bad_value("Group", "distillers", "have names that ModuleDict leaves free", repr(name))
        self.distillers = nn.ModuleDict(distillers)
        first = next(iter(self.members.values()))
        taught = _taught(first)
        held = [parameter for one in self.members.values() for parameter in {*map(id, one.parameters())}]
        for name, one in self.members.items():
            if _taught(one) != taught:
                _checks.bad_value("Group", "distillers", "have the same teachers by the same names", repr(name))
        if len(held) != len(set(held)):
            _checks.bad_value("Group", "distillers", "share no parameter", ", ".join(self.members))

    @property
    def members(self) -> dict[str, Distiller]:
        return dict(self.distillers.items())  # type: ignore[arg-type]

    @property
    def student(self) -> nn.ModuleDict:
        """All of them, by name."""
        return nn.ModuleDict({name: one.student for name, one in self.members.items()})

    def prepare(self, batch: Any) -> Group:
        """See :meth:`Distiller.prepare`"""
        for one in self.members.values():
            one.prepare(batch)
        return self

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for one in self.members.values():
            one.check_optimizer(optimizer)

    def set_progress(self, step: int, total: int) -> None:
        for one in self.members.values():
            one.set_progress(step, total)

    def weights(self) -> dict[str, float]:
        return {f"{name}/{term}": w for name, one in self.members.items() for term, w in one.weights().items()}

    fit = fit

    def forward(self, batch: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss`"""
        return self.loss(batch, **options)

    def loss(
        self,
        batch: Any,
        *,
        normalizer: float | Tensor | Mapping[str, float | Tensor] | None = None,
        share: float | Tensor | Mapping[str, float | Tensor] | None = None,
        teacher_outputs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all students' losses, and the parts of each; the arguments are those of :meth:`Distiller.loss`."""
        first = next(iter(self.members.values()))
        if teacher_outputs is None:
            teacher_outputs = first._cached(batch)
        if teacher_outputs is None:
            paths = dict.fromkeys(path for one in self.members.values() for path in one.teacher_paths())
            teacher_outputs = first.teach(batch, paths)
        total, parts = None, {}
        for name, one in self.members.items():
            scale = {"normalizer": _of_member(name, normalizer), "share": _of_member(name, share)}
            loss, of_terms = one.loss(batch, teacher_outputs=teacher_outputs, **scale)
            total = loss if total is None else total + loss
            parts.update({f"{name}/{term}": part for term, part in of_terms.items()})
        assert total is not None
        return total, parts


def _taught(distiller: Distiller) -> tuple[bool, dict[str, int]]:
    return distiller._single, {name: id(teacher.model) for name, teacher in distiller.teachers.items()}


def _of_member(name: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}/")}


def members(distiller: Distiller | Group) -> Iterator[tuple[str, Distiller]]:
    """The Distillers with what their names of parts begin with."""
    if isinstance(distiller, Group):
        yield from ((f"{name}/", one) for name, one in distiller.members.items())
    else:
        yield "", distiller


def terms_of(distiller: Distiller | Group) -> dict[str, Term]:
    """By the name of their part."""
    return {prefix + term.name: term for prefix, one in members(distiller) for term in one.terms}
