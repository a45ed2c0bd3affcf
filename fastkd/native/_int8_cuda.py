"""Addresses and numbers of an int8 linear layer on a GPU, for the CUDA kernels (csrc/cuda/int8.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._int8 import ACTIVATIONS
from . import extension
from ._pairs_cuda import _on
from .logit import DTYPES

_C = extension()


def linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """A row that has no step, an ``input_scale`` that is none too, is NaN: nobody waits to tell."""
    (rows, terms), columns = input.shape, weight.shape[0]
    output = torch.empty(rows, columns, dtype=input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    processors = _processors(input.device)
    scratch_bytes = _C.cuda_int8_linear_scratch(rows, terms, columns, processors)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=input.device)
    numbers = (
        input.data_ptr(),
        rows,
        terms,
        columns,
        input.stride(0),
        DTYPES[input.dtype],
        _address(input_scale),
        weight.data_ptr(),
        scale.data_ptr(),
        _address(bias),
        _address(residual),
        0 if residual is None else residual.stride(0),
        output.data_ptr(),
        ACTIVATIONS.index(activation),
    )
    with _on(input.device) as stream:
        _C.cuda_int8_linear(numbers, processors, scratch.data_ptr(), stream)
    return output


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
