"""int8 layers as functions of tensors, and as operators for ``torch.compile`` and ``torch.export``.

Inference only: what a layer returns has no gradient, and a backward that asks for one raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from . import _int8_arguments as check
from ._int8 import Window, compute_dtype, memory_format
from ._int8_again import again, keep

LINEAR, CONV2D, EMBEDDING, WEIGHT_ONLY = "int8_linear", "int8_conv2d", "int8_embedding", "int8_weight_only_linear"
LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
LAYER = "Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor? input_scale, Tensor? residual, str activation"


def linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """A linear layer whose input is quantised as it comes, row by row or with a scale that is known before.

    ``activation(F.linear(s * a, weight * scale[:, None], bias) + residual)`` with ``a`` int8; ``fastkd/_int8.py`` has
    the numbers.

    Args:
        input: ``(..., K)``, float16, bfloat16, float32 or float64. Rows that are not contiguous are not copied.
        weight: ``(N, K)`` int8.
        scale: ``(N,)``, what one step of each output channel stands for.
        bias: ``(N,)``.
        input_scale: One number; None takes ``amax(|row|) / 127``.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        residual: The output's shape and dtype, added before the activation.
        impl: Pins an implementation.

    Returns:
        ``(..., N)`` in the input's dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or the scale not positive.
        RuntimeError: the pinned implementation cannot run here; ``vmap``, ``jvp`` and other transforms; in backward:
            there is no gradient.

    Example:
        >>> from fastkd._int8 import quantize_channels
        >>> weight, scale = quantize_channels(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        >>> linear(torch.tensor([[2.0, 1.0]]), weight, scale)
        tensor([[0., 1.]])
    """
    given = (input, weight, (scale, bias, input_scale), (LINEAR, activation, impl))
    if residual is None and not torch.compiler.is_compiling() and (output := again(*given)) is not None:
        return output
    check.no_transform(LINEAR, input)
    check.weight(LINEAR, weight, 2)
    check.rows(LINEAR, input, weight)
    dtype, shape = compute_dtype(input.dtype), (*input.shape[:-1], weight.shape[0])
    tensors = _channels(LINEAR, weight, scale, bias, dtype)
    step = None if input_scale is None else check.input_scale(LINEAR, input_scale, input, dtype)
    added = _residual(LINEAR, residual, input, shape)
    check.activation(LINEAR, activation)
    taken = (_rows(input), weight.contiguous(), *tensors, step)
    if _in_graph(input, *tensors, step, added):
        traced: Tensor = torch.ops.fastkd.int8_linear(*taken, added, activation, impl)
        return traced.view(shape)
    return _call(LINEAR, impl, given, shape, taken, added, activation)


def weight_only_linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """A linear layer whose weights alone are int8.

    ``activation(F.linear(input, weight * scale[:, None], bias) + residual)``, with sums in float32, or in float64
    for a float64 input. Arguments, result and errors are those of :func:`linear`.
    """
    given = (input, weight, (scale, bias), (WEIGHT_ONLY, activation, impl))
    if residual is None and not torch.compiler.is_compiling() and (output := again(*given)) is not None:
        return output
    check.no_transform(WEIGHT_ONLY, input)
    check.weight(WEIGHT_ONLY, weight, 2)
    check.rows(WEIGHT_ONLY, input, weight)
    dtype, shape = compute_dtype(input.dtype), (*input.shape[:-1], weight.shape[0])
    tensors = _channels(WEIGHT_ONLY, weight, scale, bias, dtype)
    added = _residual(WEIGHT_ONLY, residual, input, shape)
    check.activation(WEIGHT_ONLY, activation)
    taken = (_rows(input), weight.contiguous(), *tensors)
    if _in_graph(input, *tensors, added):
        traced: Tensor = torch.ops.fastkd.int8_weight_only_linear(*taken, added, activation, impl)
        return traced.view(shape)
    return _call(WEIGHT_ONLY, impl, given, shape, taken, added, activation)


def conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """A convolution whose input is quantised as it comes, image by image or with a scale that is known before.

    ``activation(F.conv2d(s * a, weight * scale[:, None, None, None], bias, ...) + residual)`` with ``a`` int8;
    ``fastkd/_int8.py`` has the numbers.

    Args:
        input: ``(B, C, H, W)`` or ``(C, H, W)``, float16, bfloat16, float32 or float64.
        weight: ``(N, C / groups, kh, kw)`` int8.
        scale: ``(N,)``, what one step of each output channel stands for.
        bias: ``(N,)``.
        input_scale: One number; None takes ``amax(|image|) / 127`` of each image.
        stride, padding, dilation, groups: As in :func:`torch.nn.functional.conv2d`, padding as numbers.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        residual: The output's shape and dtype, added before the activation.
        impl: Pins an implementation.

    Returns:
        ``(B, N, H', W')`` in the input's dtype, in channels_last if the input is.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device, or the scale not positive.
        RuntimeError: the pinned implementation cannot run here; ``vmap``, ``jvp`` and other transforms; in backward:
            there is no gradient.

    Example:
        >>> image, weight = torch.ones(1, 1, 2, 2), torch.full((1, 1, 3, 3), 127, dtype=torch.int8)
        >>> conv2d(image, weight, torch.tensor([1 / 127]), padding=1).shape
        torch.Size([1, 1, 2, 2])
    """
    given = (input, weight, (scale, bias, input_scale), (CONV2D, activation, impl, stride, padding, dilation, groups))
    if residual is None and not torch.compiler.is_compiling() and (output := again(*given)) is not None:
        return output
    check.no_transform(CONV2D, input)
    check.weight(CONV2D, weight, 4)
    window = check.window(CONV2D, weight, stride, padding, dilation, groups)
    check.images(CONV2D, input, weight, window)
    if input.ndim == 3:
        added = None if residual is None else residual.unsqueeze(0)
        named: dict[str, Any] = {"activation": activation, "residual": added, "impl": impl, **window._asdict()}
        return conv2d(input.unsqueeze(0), weight, scale, bias, input_scale=input_scale, **named).squeeze(0)
    dtype = compute_dtype(input.dtype)
    tensors = _channels(CONV2D, weight, scale, bias, dtype)
    step = None if input_scale is None else check.input_scale(CONV2D, input_scale, input, dtype)
    dense = (input if input.is_contiguous(memory_format=torch.channels_last) else input.contiguous()).resolve_neg()
    if residual is not None:
        check.residual(CONV2D, residual, input, _images_shape(input, weight, window))
        residual = residual.contiguous(memory_format=memory_format(dense)).resolve_neg()
    check.activation(CONV2D, activation)
    taken = (dense, weight.contiguous(), *tensors, step)
    if _in_graph(input, *tensors, step, residual):
        traced: Tensor = torch.ops.fastkd.int8_conv2d(*taken, residual, activation, *window, impl)
        return traced
    return _call(CONV2D, impl, given, _images_shape(input, weight, window), taken, residual, activation, window)


def embedding(
    input: Tensor, weight: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32, impl: str | None = None
) -> Tensor:
    """Rows of an int8 table: ``(weight[input] * scale[input][..., None]).to(dtype)``.

    Args:
        input: Ids, any shape.
        weight: ``(V, K)`` int8.
        scale: ``(V,)``, what one step of each row stands for.
        dtype: Of the result.
        impl: Pins an implementation.

    Returns:
        ``(*input.shape, K)``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape or device; on the CPU, an id out of range.

    Example:
        >>> from fastkd._int8 import quantize_channels
        >>> weight, scale = quantize_channels(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        >>> embedding(torch.tensor([1, 0]), weight, scale)
        tensor([[ 0.5000,  0.0000],
                [ 1.0079, -2.0000]])
    """
    check.no_transform(EMBEDDING, input)
    check.weight(EMBEDDING, weight, 2)
    check.ids(EMBEDDING, input, weight, dtype)
    scale = check.by_channel(EMBEDDING, "scale", scale, weight, compute_dtype(dtype))
    ids = input.reshape(-1).to(torch.int64).contiguous()
    call = torch.ops.fastkd.int8_embedding if _in_graph(scale) else _embedding
    output: Tensor = call(ids, weight.contiguous(), scale, dtype, impl)
    return output.view(*input.shape, weight.shape[1])


def _channels(op: str, weight: Tensor, scale: Any, bias: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    added = None if bias is None else check.by_channel(op, "bias", bias, weight, dtype)
    return check.by_channel(op, "scale", scale, weight, dtype), added


def _residual(op: str, residual: Any, input: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if residual is None:
        return None
    check.residual(op, residual, input, shape)
    return _rows(residual)


def _rows(tensor: Tensor) -> Tensor:
    """As a matrix with last stride 1, copied only where the layout, or a lazy minus sign, forces it."""
    rows = tensor if tensor.ndim == 2 else tensor.flatten(0, -2) if tensor.ndim > 2 else tensor.unsqueeze(0)
    return (rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()).resolve_neg()


def _in_graph(*tensors: Tensor | None) -> bool:
    """Traced, or in need of a node that refuses a gradient: then it is an operator, which costs a few us more."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _call(
    op: str,
    impl: str | None,
    given: tuple[Tensor, Tensor, tuple[Tensor | None, ...], tuple[Any, ...]],
    shape: tuple[int, ...],
    taken: tuple[Tensor | None, ...],
    residual: Tensor | None,
    *options: Any,
) -> Tensor:
    """With tensors that are `taken` for those that were given. A call that copied none of them may be made again."""
    input, weight, others, _ = given
    implementation = _dispatch.pick(op, impl, input, ())
    if input.is_cuda or not hasattr(implementation, "ready"):
        whole: Tensor = implementation.forward(*taken, residual, *options)
        return whole.view(shape)
    call = implementation.ready(*taken, residual, *options)
    if residual is None and all(map(_is_same_memory, taken, (input, weight, *others))):
        keep(*given, call._replace(size=shape))
    output: Tensor = call(taken[0])
    return output if output.ndim == len(shape) else output.view(shape)


def _is_same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype is b.dtype and a.data_ptr() == b.data_ptr())


def _images_shape(input: Tensor, weight: Tensor, window: Window) -> tuple[int, int, int, int]:
    size = window.output_size((input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3]))
    return input.shape[0], weight.shape[0], *size


def _linear(input: Tensor, *arguments: Any) -> Tensor:
    *given, impl = arguments
    return _computed(LINEAR, impl, input, *given)


def _weight_only(input: Tensor, *arguments: Any) -> Tensor:
    *given, impl = arguments
    return _computed(WEIGHT_ONLY, impl, input, *given)


def _conv2d(input: Tensor, *arguments: Any) -> Tensor:
    *given, stride, padding, dilation, groups, impl = arguments
    return _computed(CONV2D, impl, input, *given, Window(tuple(stride), tuple(padding), tuple(dilation), groups))


def _embedding(input: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, impl: str | None) -> Tensor:
    implementation = _dispatch.pick(EMBEDDING, impl, scale.new_empty(0, dtype=dtype), ())
    output: Tensor = implementation.forward(input, weight, scale, dtype)
    return output


def _computed(op: str, impl: str | None, input: Tensor, *arguments: Any) -> Tensor:
    output: Tensor = _dispatch.pick(op, impl, input, ()).forward(input, *arguments)
    return output


def _define(name: str, arguments: str, compute: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    LIBRARY.define(f"{name}({arguments}, str? impl) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"fastkd::{name}", _refuse(name), setup_context=_keep, lib=LIBRARY)


def _refuse(name: str) -> Callable[..., tuple[Any, ...]]:
    """No derivative of rounding is of use: the graph holds a node that says so as it runs, not as it is made."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return tuple(
            None if shape is None else torch.ops.fastkd.int8_no_gradient(grad, shape, name) for shape in ctx.shapes
        )

    return backward


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
    ctx.shapes = [x.shape if wanted else None for x, wanted in zip(inputs, floating, strict=True)]


def _no_gradient(grad: Tensor, shape: list[int], op: str) -> Tensor:
    raise RuntimeError(f"{op}: there is no gradient through int8 layers: call them under torch.no_grad()")


LIBRARY.define("int8_no_gradient(Tensor grad, SymInt[] shape, str op) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("int8_no_gradient", _no_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::int8_no_gradient", lambda grad, shape, op: grad.new_empty(shape), lib=LIBRARY)


def _fake_rows(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]))


def _fake_conv2d(input: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *_, stride, padding, dilation, groups, _ = arguments
    shape = _images_shape(input, weight, Window(tuple(stride), tuple(padding), tuple(dilation), groups))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _fake_embedding(input: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return scale.new_empty((input.shape[0], weight.shape[1]), dtype=dtype)


WINDOW = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_define("int8_linear", LAYER, _linear, _fake_rows)
_define("int8_weight_only_linear", LAYER.replace(" Tensor? input_scale,", ""), _weight_only, _fake_rows)
_define("int8_conv2d", f"{LAYER}, {WINDOW}", _conv2d, _fake_conv2d)
_define("int8_embedding", "Tensor input, Tensor weight, Tensor scale, ScalarType dtype", _embedding, _fake_embedding)
