"""What can be wrong with models, terms and optimizers that are brought together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from .paths import find, parse
from .term import Term

OP = "Distiller"


def check_models(student: Any, teachers: Mapping[str, nn.Module]) -> None:
    if not isinstance(student, nn.Module):
        _checks.bad_type(OP, "student", "be a module", type(student).__name__)
    own = {id(memory): name for name, memory in _memory(student)}
    addresses = {_address(memory): name for name, memory in _memory(student)} | {None: ""}
    for who, teacher in teachers.items():
        for name, memory in _memory(teacher):
            shared = own.get(id(memory)) or addresses.get(_address(memory))
            if shared:
                rule = f"share no parameter or buffer with {who} (its {name}): copy.deepcopy the teacher"
                _checks.bad_value(OP, "student", rule, shared)


def _memory(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _address(tensor: Tensor) -> int | None:
    """None of what has none: empty tensors, and those on the meta device."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage().data_ptr() or None


def check_terms(terms: Any) -> None:
    if isinstance(terms, Term) or not isinstance(terms, Sequence) or not terms:
        _checks.bad_type(OP, "terms", "be a list of one Term or more", terms)
    names: dict[str, str] = {}
    for term in terms:
        if not isinstance(term, Term):
            _checks.bad_type(OP, "terms", "be a list of Term", type(term).__name__)
        is_kept = term.adapt is not None or isinstance(term.loss, nn.Module)
        if is_kept and hasattr(nn.ModuleDict, term.key):
            _checks.bad_value(OP, "terms", "have names that ModuleDict leaves free", repr(term.name))
        if names.setdefault(term.key, term.name) != term.name or sum(other.name == term.name for other in terms) > 1:
            _checks.bad_value(OP, "terms", "have different names (give some a name=)", repr(term.name))


def check_paths(models: Mapping[str, nn.Module], wanted: Mapping[str, Iterable[str]]) -> None:
    """By who it is that a path is for; an error for one that another model has names that."""
    for who, paths in wanted.items():
        others = {other: model for other, model in models.items() if other != who}
        for path in paths:
            find(OP, models[who], parse(OP, path), others)


def check_optimizer(optimizer: torch.optim.Optimizer, learning: nn.Module, teachers: Mapping[str, nn.Module]) -> None:
    """That it changes no teacher, and everything of ours that is not the student's, as adapters are."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for who, teacher in teachers.items():
        for name, parameter in teacher.named_parameters():
            if id(parameter) in held:
                _checks.bad_value(OP, "optimizer", f"hold no parameter of {who}", name)
    for name, parameter in learning.named_parameters():
        if not name.startswith("student.") and parameter.requires_grad and id(parameter) not in held:
            rule = "hold the parameters of adapters and losses too: pass distiller.parameters()"
            _checks.bad_value(OP, "optimizer", rule, f"none of {name}")


def learns(student: nn.Module, path: str, value: Any) -> None:
    """An error for a value that brings no gradient to a submodule whose parameters ask for one."""
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return
    place = parse(OP, path)
    if place.what == "input":
        return
    if any(parameter.requires_grad for parameter in find(OP, student, place).parameters()):
        raise RuntimeError(
            f"Distiller: {path!r} of the student has no gradient although its parameters learn: it was computed under "
            "no_grad, or inside checkpoint(..., use_reentrant=True), where use_reentrant=False works"
        )
