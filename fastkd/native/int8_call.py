"""A call of an int8 layer's C++ kernel (csrc/cpu/int8_layers.h), which may be made again with other inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._int8 import ACTIVATIONS
from .._int8_arguments import bad_step
from .int8_packing import Shape
from .logit import CPU, DTYPES, _nowhere


def numbers_of_layer(
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """What all of them have, as csrc/bindings_int8.cpp takes it apart.

    Tensors are contiguous, of the CPU and of the dtypes that `fastkd/_int8.py` names.
    """
    return (
        DTYPES[dtype],
        0 if input_scale is None else input_scale.data_ptr() or _nowhere(input_scale),
        panels.data_ptr(),
        scale.data_ptr() or _nowhere(scale),
        0 if bias is None else bias.data_ptr() or _nowhere(bias),
        ACTIVATIONS.index(activation),
    )


class Call(NamedTuple):
    op: str
    kernel: Callable[[Shape, tuple[int, ...]], bool]
    shape: Shape
    numbers: tuple[int, ...]  # that hold for every input of this shape, dtype and layout
    panels: Tensor
    input_scale: Tensor | None
    residual: Tensor | None
    size: tuple[int, ...]  # of the output
    dtype: torch.dtype
    format: torch.memory_format = torch.contiguous_format

    def __call__(self, input: Tensor) -> Tensor:
        residual = self.residual
        output = torch.empty(self.size, dtype=self.dtype, device=CPU, memory_format=self.format)
        numbers = (
            input.data_ptr() or _nowhere(input),
            0 if residual is None else residual.data_ptr() or _nowhere(residual),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        if not self.kernel(self.shape, numbers + self.numbers):
            bad_step(self.op, None if self.input_scale is None else self.input_scale.item())
        return output
