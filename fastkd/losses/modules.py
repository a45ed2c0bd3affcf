"""Losses on features as modules: what is trained along with the student, and options that are held."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._features import Features

KINDS = ("linear", "conv")


class Adapter(torch.nn.Module):
    """Takes a student's features to the width of the teacher's, and is trained along with the student.

    Its parameters go to the optimizer beside the student's, and are left behind after training.

    Args:
        kind: ``"linear"`` for features ``(..., width)``, an ``nn.Linear``; ``"conv"`` for maps ``(N, width,
            *positions)``, a convolution of size 1; both as torch initialises them. Or a module of your own, with a
            normalisation for example, which is used as it is.
        in_features: The student's width.
        out_features: The teacher's width.
        bias: Add a bias.

    Raises:
        TypeError: a wrong type, widths beside a module.
        ValueError: a wrong name, a width that is not positive.

    Source: Romero et al. 2015, arXiv 1412.6550 (the regressor of hints).

    Example:
        >>> from fastkd import hint_loss
        >>> adapter = Adapter("linear", 4, 6)
        >>> student_features, teacher_features = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
        >>> hint_loss(adapter(student_features), teacher_features).backward()
        >>> adapter.module.weight.grad.shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        kind: str | torch.nn.Module,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.module: torch.nn.Module
        if isinstance(kind, torch.nn.Module):
            if in_features is not None or out_features is not None:
                _checks.bad_type("Adapter", "in_features", "be left out beside a module", type(kind).__name__)
            self.module = kind
            return
        if not isinstance(kind, str):
            _checks.bad_type("Adapter", "kind", f"be a module or one of {', '.join(KINDS)}", type(kind).__name__)
        _checks.choice("Adapter", "kind", kind, KINDS)
        own = _checks.count("Adapter", "in_features", in_features)
        taught = _checks.count("Adapter", "out_features", out_features)
        self.module = (
            _PointwiseConv(own, taught, 1, bias=bias) if kind == "conv" else torch.nn.Linear(own, taught, bias)
        )

    def forward(self, features: Tensor) -> Tensor:
        adapted: Tensor = self.module(features)
        return adapted


class _PointwiseConv(torch.nn.Conv2d):
    """On positions in any number of dimensions, which a convolution of size 1 does not tell apart."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4:
            return super().forward(input)
        flat: Tensor = super().forward(input.flatten(2).unsqueeze(2))
        return flat.reshape(*flat.shape[:2], *input.shape[2:])


class FeatureLoss(torch.nn.Module):
    """Any loss on features with its keyword arguments held, and what adapts the student's features to it.

    Args:
        loss: A loss on features, such as :func:`fastkd.hint_loss`; or any function of student and teacher.
        adapter: A module that the student's features go through first, an :class:`Adapter` for example: a part of this
            module, so that its parameters are trained, moved and saved with it.
        options: Keyword arguments of ``loss``; a call may replace some.

    Raises:
        TypeError: ``loss`` or ``adapter`` is no function, or ``loss`` does not take an option.

    Example:
        >>> from fastkd import gram_loss
        >>> criterion = FeatureLoss(gram_loss, reduction="sum")
        >>> criterion
        FeatureLoss(gram_loss, reduction='sum')
        >>> criterion(torch.eye(2), torch.ones(2, 1))
        tensor(2.)
    """

    def __init__(
        self, loss: Callable[..., Tensor], *, adapter: Callable[[Tensor], Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__()
        for argument, function in (("loss", loss), ("adapter", adapter)):
            if not callable(function) and not (function is None and argument == "adapter"):
                _checks.bad_type("FeatureLoss", argument, "be a function or a module", type(function).__name__)
        name = getattr(loss, "__name__", type(loss).__name__)
        known = inspect.signature(loss).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            taken = [parameter.name for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
            for option in options:
                if option not in taken:
                    raise TypeError(f"FeatureLoss: {option} must be a keyword argument of {name}, got {option}")
        self.loss, self.adapter, self.options, self.name = loss, adapter, options, name

    def forward(self, student: Tensor, teacher: Tensor | Features, **options: Any) -> Tensor:
        if self.adapter is not None:
            student = self.adapter(student)
        return self.loss(student, teacher, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([self.name, *(f"{name}={value!r}" for name, value in self.options.items())])
