"""A student that begins with its teacher's layers: :func:`init_from_teacher`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .paths import WRAPPED, unwrap

OP = "init_from_teacher"
SPACINGS = ("even", "first", "last", "average")


class Initialized(NamedTuple):
    """What :func:`init_from_teacher` did."""

    copied: dict[str, tuple[str, ...]]
    """The student's tensors, each with the teacher's that it is now a copy of, or the mean of."""
    skipped: dict[str, str]
    """What was asked for and not copied, by the name that it has in the student, or would have, with the reason."""


def init_from_teacher(
    student: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, str | Sequence[str]] | None = None,
    *,
    spacing: str = "even",
    strict: bool = True,
) -> Initialized:
    """Copy parameters and buffers of the teacher's layers into the student's, in place. Same as, for each pair::

        student.get_submodule(a).load_state_dict(teacher.get_submodule(b).state_dict())

    Args:
        student: The model that is changed.
        teacher: The model that is read.
        layers: Paths in the student to paths in the teacher; of a submodule, or of one parameter or buffer. ``""`` is
            the model itself. A list of paths gives the mean of these layers (of a count, such as BatchNorm's, the
            first). With a ``*`` on both sides, ``{"layers.*": "encoder.layer.*"}``, the two stacks are matched by
            ``spacing``. By default ``{"": ""}``, all tensors of the same name.
        spacing: Of a stack of n layers from one of m: ``"even"`` takes layers ``round(i * (m - 1) / (n - 1))``, the
            first and the last among them (the first, if n is 1); ``"first"`` and ``"last"`` n neighbours; ``"average"``
            the mean of each of n groups of neighbours.
        strict: If False, what does not fit is skipped and reported.

    Returns:
        What was copied, and what was skipped.

    Raises:
        TypeError: a wrong type.
        ValueError: a path that names nothing, with near matches; a tensor without a counterpart, of another shape or
            kind; one tensor that is asked to be two, by name or because weights are tied. Nothing is changed then.

    Example:
        >>> student, teacher = (torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(n))) for n in (2, 5))
        >>> init_from_teacher(student, teacher, {"*": "*"}).copied["1.weight"]
        ('4.weight',)
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            _checks.bad_type(OP, name, "be a module", type(model).__name__)
    _checks.choice(OP, "spacing", spacing, SPACINGS)
    own, taught = tensors_of(student), tensors_of(teacher)
    asked: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    for mine, theirs in _pairs(own, taught, {"": ""} if layers is None else layers, spacing):
        for name, sources in _tensors(own, taught, mine, theirs):
            if name in asked:
                _checks.bad_value(OP, "layers", f"name each tensor once ({name})", f"{asked[name]} and {sources}")
            reason = _misfit(own, taught, name, sources)
            if reason is None:
                asked[name] = sources
            elif strict:
                _checks.bad_value(OP, "student", "have the teacher's tensors (strict=False skips others)", reason)
            else:
                skipped[name] = reason
    _untie(own, taught, asked, skipped, strict)
    with torch.no_grad():
        for name, sources in asked.items():
            own[name].copy_(_mean([taught[source] for source in sources]))
    return Initialized(asked, skipped)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a state_dict holds, under the names that the model has without wrappers; tied weights under each name."""
    found: dict[str, Tensor] = {}
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        parts = [part for part in prefix.split(".") if part and part not in WRAPPED]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[".".join([*parts, name])] = tensor
    return found


def _pairs(
    own: Mapping[str, Tensor],
    taught: Mapping[str, Tensor],
    layers: Mapping[str, str | Sequence[str]],
    spacing: str,
) -> list[tuple[str, tuple[str, ...]]]:
    """Each path of the student, without stars, with the teacher's."""
    if not isinstance(layers, Mapping):
        _checks.bad_type(OP, "layers", "be a dict of paths", type(layers).__name__)
    pairs: list[tuple[str, tuple[str, ...]]] = []
    for mine, theirs in layers.items():
        sources = (theirs,) if isinstance(theirs, str) else tuple(theirs) if isinstance(theirs, Sequence) else ()
        if not sources or not all(isinstance(path, str) for path in (mine, *sources)):
            rule = "be a dict of paths to paths or lists of them"
            _checks.bad_type(OP, "layers", rule, f"{mine!r}: {theirs!r}")
        stars = [path.count("*") for path in (mine, *sources)]
        if not any(stars):
            pairs.append((mine, sources))
        elif stars != [1, 1]:
            _checks.bad_value(OP, "layers", "have one * on each side, or none", f"{mine!r}: {theirs!r}")
        else:
            places, layers_of_teacher = _indices(own, mine), _indices(taught, sources[0])
            for place, group in zip(places, _spaced(len(places), layers_of_teacher, spacing), strict=True):
                pairs.append((mine.replace("*", place), tuple(sources[0].replace("*", index) for index in group)))
    return pairs


def _indices(tensors: Mapping[str, Tensor], pattern: str) -> list[str]:
    before, after = pattern.split("*")
    form = re.compile(re.escape(before) + r"(\d+)" + re.escape(after) + r"(\..*)?")
    found = {match[1] for match in map(form.fullmatch, tensors) if match}
    if not found:
        _checks.bad_value(OP, "layers", "name a stack of numbered layers", repr(pattern))
    return sorted(found, key=int)


def _spaced(count: int, layers: list[str], spacing: str) -> list[list[str]]:
    total = len(layers)
    if count > total:
        _checks.bad_value(OP, "student", f"have at most the teacher's {total} layers in a stack", count)
    if spacing == "average":
        return [layers[i * total // count : (i + 1) * total // count] for i in range(count)]
    if spacing == "even":
        chosen = [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
    else:
        chosen = [i + (total - count if spacing == "last" else 0) for i in range(count)]
    return [[layers[i]] for i in chosen]


def _tensors(
    own: Mapping[str, Tensor], taught: Mapping[str, Tensor], mine: str, theirs: tuple[str, ...]
) -> list[tuple[str, tuple[str, ...]]]:
    """Each tensor of a layer of the student's, or of one of the teacher's layers, with all names."""
    inside = _below("student", own, mine)
    for path in theirs:
        if path or mine:  # of two whole models the teacher may have more
            inside += [rest for rest in _below("teacher", taught, path) if rest not in inside]
    return [
        (mine + rest if mine else rest[1:], tuple(path + rest if path else rest[1:] for path in theirs))
        for rest in inside
    ]


def _below(who: str, tensors: Mapping[str, Tensor], path: str) -> list[str]:
    """What stands behind the path in the names of its tensors: with a dot, or nothing if it names a tensor."""
    if path == "":
        return [f".{name}" for name in tensors]
    inside = [name[len(path) :] for name in tensors if name == path or name.startswith(f"{path}.")]
    if not inside:
        known = {".".join(name.split(".")[:n]) for name in tensors for n in range(1, name.count(".") + 2)}
        near = difflib.get_close_matches(path, sorted(known), n=5, cutoff=0.5)
        _checks.bad_value(OP, "layers", f"name layers of the {who} that have tensors, such as {near}", repr(path))
    return inside


def _misfit(own: Mapping[str, Tensor], taught: Mapping[str, Tensor], name: str, sources: tuple[str, ...]) -> str | None:
    """Why it cannot be copied."""
    for source in sources:
        if name not in own:
            return f"the student has no {name} for the teacher's {source}"
        if source not in taught:
            return f"the teacher has no {source} for the student's {name}"
        mine, theirs = own[name], taught[source]
        if mine.shape != theirs.shape:
            return f"{name} is {tuple(mine.shape)}, the teacher's {source} is {tuple(theirs.shape)}"
        if mine.is_floating_point() != theirs.is_floating_point():
            return f"{name} is {mine.dtype}, the teacher's {source} is {theirs.dtype}"
    return None


def _untie(
    own: Mapping[str, Tensor],
    taught: Mapping[str, Tensor],
    asked: dict[str, tuple[str, ...]],
    skipped: dict[str, str],
    strict: bool,
) -> None:
    """One tensor that has several names cannot be a copy of several."""
    first: dict[int, str] = {}
    for name in list(asked):
        twin = first.setdefault(id(own[name]), name)
        if [id(taught[source]) for source in asked[twin]] == [id(taught[source]) for source in asked[name]]:
            continue
        reason = f"{name} is tied to {twin}, and the teacher's {asked[name]} are not {asked[twin]}"
        if strict:
            _checks.bad_value(OP, "layers", "give tied weights one source (strict=False takes the first)", reason)
        skipped[name] = reason
        del asked[name]


def _mean(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if len(tensors) == 1 or not first.is_floating_point():
        return first
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)
