"""A model's logits that were not computed yet: hidden states and the matrix that turns them into logits."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._int8 import channel_scales, quantize
from . import _pretrained

PRECISIONS = ("float32",)
TENSORS = ("input", "weight", "bias", "weight_scale")


@dataclass(frozen=True, eq=False)
class Head:
    """Logits not computed yet. Same as::

        scale * (input @ weight.T + bias)                               # without softcap
        softcap * tanh(scale * (input @ weight.T + bias) / softcap)     # with it

    but a loss computes them a few rows at a time, and no tensor of tokens x vocabulary ever exists. As a student, each
    of ``input``, ``weight`` and ``bias`` that requires a gradient gets one, and one that does not costs nothing: a
    frozen ``weight`` saves a matmul. As a teacher it is a constant.

    The logits are float32, or float64 where an operand is. Those of 16-bit operands are not rounded: on a GPU the
    matmul accumulates and returns float32; on a CPU the operands are widened slab by slab, since its 16-bit matmul
    would round. Under ``torch.autocast`` a GPU multiplies in autocast's dtype; a CPU ignores it.

    Args:
        input: Hidden states ``(..., H)``, of any float dtype.
        weight: ``(V, H)``, as ``torch.nn.Linear`` and ``torch.nn.Embedding`` have it.
        bias: ``(V,)``. -inf masks an id.
        weight_scale: ``(V,)``, of a teacher whose ``weight`` is int8: what one step of each row stands for. The logits
            are those of ``weight * weight_scale[:, None]``, which is never there; :meth:`from_layer` takes all from a
            :class:`fastkd.int8.Int8Linear`. Where the student's ``compact`` is ``"device"``, all rows are computed.
        round_input: With ``weight_scale``: round each row of the input to int8 too, as the layer itself does with
            :class:`fastkd.int8.Dynamic`, and multiply integers.
        scale: A factor of the logits: Cohere's ``logit_scale``, one over Granite's ``logits_scaling``.
        softcap: Squashes the logits into (-softcap, softcap): Gemma's ``final_logit_softcapping``.
        grad_precision: What the gradient of the logits is rounded to before its two matmuls. None: on a GPU to the
            operands' dtype, once; on a CPU not at all. ``"float32"``: nowhere.
        compact: Leave rows that ``ignore_index`` drops out of the matmuls. None: on a CPU yes; on a GPU no, since the
            host would have to wait for their number; True accepts that wait. ``"device"``, for a GPU: rows that count
            go first, and Triton's matmuls, in place of torch's, read on the device how many they are; nobody waits.
            Where the heads of a call differ, ``"device"`` goes before True, and True before False.
        filter_eps: Leave parts of the logits (64 rows, 512 ids) out of the two backward matmuls where every |gradient|
            is at most this, in units of probability: before row weights, normalizer and upstream gradient. The error of
            a row of input's gradient is at most filter_eps, times those, times the sum of |weight| over what is left
            out. It buys nothing where some row of the 64 has probability everywhere, as in models that are not yet
            trained, and at most half of the time where all are certain. 0 leaves nothing out. On a CPU only.
        workspace: Bytes for the logits of some rows, for this call; by default what :func:`fastkd.set_workspace` says.

    Raises:
        RuntimeError: ``filter_eps`` on a GPU; from the loss, ``compact="device"`` where it cannot run.
        TypeError: a wrong type or dtype; a distributed (DTensor) weight, which has to be gathered first.
        ValueError: shapes that do not fit, different devices, a scale or softcap that is not a usable number.

    Example:
        >>> head = Head(torch.ones(2, 3), torch.ones(5, 3), scale=0.5)
        >>> head.shape
        torch.Size([2, 5])
        >>> head.logits()[0, 0]
        tensor(1.5000)
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    weight_scale: Tensor | None = None
    round_input: bool = False
    scale: float = 1.0
    softcap: float | None = None
    grad_precision: str | None = None
    compact: bool | str | None = None
    filter_eps: float = 0.0
    workspace: int | None = None

    def __post_init__(self) -> None:
        for name in TENSORS:
            value = getattr(self, name)
            if value is not None or name in TENSORS[:2]:
                _check_tensor(name, value, self.weight_scale is not None)
        _check_shapes(self)
        _check_rounding(self)
        if _checks.finite("Head", "scale", self.scale) == 0:
            _checks.bad_value("Head", "scale", "not be 0", self.scale)
        if self.softcap is not None:
            _checks.positive("Head", "softcap", self.softcap)
        if self.grad_precision is not None:
            _checks.choice("Head", "grad_precision", self.grad_precision, PRECISIONS)
        if self.compact is not None and not isinstance(self.compact, bool) and self.compact != "device":
            _checks.bad_value("Head", "compact", "be None, True, False or 'device'", repr(self.compact))
        if _checks.not_negative("Head", "filter_eps", self.filter_eps) and self.input.device.type != "cpu":
            raise RuntimeError("Head: filter_eps runs on a CPU alone: the matmuls of a GPU cannot leave tiles out")
        if self.filter_eps != 0 and self.compact == "device":
            _checks.bad_value("Head", "filter_eps", 'be 0 with compact="device"', self.filter_eps)
        if self.workspace is not None:
            _checks.count("Head", "workspace", self.workspace)

    @classmethod
    def from_model(cls, model: torch.nn.Module, hidden: Tensor, **options: Any) -> Head:
        """The head of a HuggingFace model, over hidden states of its own. Same logits as::

            model(ids).logits                                           # hidden = model.model(ids).last_hidden_state

        Weight and bias are those of ``model.get_output_embeddings()``, tied or not; gradients go into them. One that
        peft has put LoRA on (dropout too) is taken with it: then the weight is a copy with B beside it. Scale and
        softcap are what the model's config says: Gemma's ``final_logit_softcapping``, Cohere's ``logit_scale``,
        Granite's ``logits_scaling``, and those of other families. A config that asks for more is refused, as a student
        would be trained on other logits than it is used with.

        Args:
            model: Its forward may be wrapped (DistributedDataParallel, peft). Its parameters have to be whole.
            hidden: Its last hidden state ``(..., H)``, after the last norm, as the backbone returns it. What the model
                multiplies it with before its output layer (T5's ``d_model**-0.5``) is taken care of.
            options: Keyword arguments of :class:`Head`. Where ``scale`` or ``softcap`` is among them, the config is not
                looked at, and the other is as :class:`Head` has it.

        Raises:
            TypeError: the model has no output layer that is linear, or no config.
            ValueError: a model, an adapter or a setting in its config that does something else to the logits.

        Example:
            >>> from types import SimpleNamespace
            >>> model = torch.nn.Linear(3, 5, bias=False)
            >>> model.get_output_embeddings = lambda: model
            >>> model.config = SimpleNamespace(model_type="granite", logits_scaling=8.0)
            >>> Head.from_model(model, torch.ones(2, 3)).scale
            0.125
        """
        unwrapped: Any = _pretrained.unwrap(model)
        tensors = _pretrained.tensors(unwrapped, hidden)
        if not options.keys() & {"scale", "softcap"}:
            options["scale"], options["softcap"] = _pretrained.scale_and_softcap(unwrapped, len(tensors[1]))
        return cls(*tensors, **{**_pretrained.rounding(unwrapped.get_output_embeddings()), **options})

    @classmethod
    def from_layer(cls, layer: torch.nn.Module, hidden: Tensor, **options: Any) -> Head:
        """A layer over hidden states of its own. Same logits as::

            layer(hidden)                           # of a torch.nn.Linear, or of an Int8Linear
            F.linear(hidden, layer.weight)          # of a torch.nn.Embedding, which is tied to a head

        An int8 layer is a teacher's. Unless its config is :class:`fastkd.int8.WeightOnly` rows of ``hidden`` are
        rounded each by its own largest magnitude, with :class:`fastkd.int8.Static` too; ``round_input=False`` leaves
        them as they are.

        Args:
            layer: Linear, an embedding, one of them with peft's LoRA, or an int8 form of them.
            hidden: Its input ``(..., H)``.
            options: Keyword arguments of :class:`Head`.

        Raises:
            TypeError, ValueError: as :meth:`from_model`, of another layer.

        Example:
            >>> from fastkd.int8 import Int8Linear
            >>> layer = Int8Linear.from_float(torch.nn.Linear(3, 5))
            >>> head = Head.from_layer(layer, torch.ones(2, 3))
            >>> torch.allclose(head.logits(), layer(torch.ones(2, 3)))
            True
        """
        return cls(*_pretrained.of_layer(layer, hidden), **{**_pretrained.rounding(layer), **options})

    @property
    def shape(self) -> torch.Size:
        """That of the logits, ``(..., V)``."""
        return torch.Size((*self.input.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        wide = any(x.dtype is torch.float64 for x in self.tensors())
        return torch.float64 if wide else torch.float32

    @property
    def device(self) -> torch.device:
        return self.input.device

    def names(self) -> tuple[str, ...]:
        """Of the arguments that are tensors."""
        return tuple(name for name in TENSORS if getattr(self, name) is not None)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names())

    def options(self) -> dict[str, Any]:
        """The keyword arguments that are no tensors."""
        return {x.name: getattr(self, x.name) for x in fields(self) if x.kw_only and x.name not in TENSORS}

    def logits(self) -> Tensor:
        """The definition, all rows at once, differentiable: what the losses are tested against."""
        wide = self.dtype
        bias = None if self.bias is None else self.bias.to(wide)
        input, weight = self.input.to(wide), self.weight.to(wide)
        if self.weight_scale is not None:
            weight = weight * self.weight_scale.to(wide).unsqueeze(1)
        if self.round_input:
            rows = input.reshape(-1, input.shape[-1])
            steps = channel_scales(rows)
            input = (quantize(rows, steps) * steps.unsqueeze(1)).reshape(input.shape)
        logits = self.scale * torch.nn.functional.linear(input, weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _check_tensor(name: str, value: Any, rounded: bool) -> None:
    if not isinstance(value, Tensor):
        _checks.bad_type("Head", name, "be a tensor", type(value).__name__)
    if name == "weight" and value.dtype is torch.int8 and not rounded:
        rule = "be float without weight_scale (Head.from_layer takes both from an int8 layer)"
        _checks.bad_type("Head", name, rule, value.dtype)
    if name == "weight" and rounded and value.dtype is not torch.int8:
        _checks.bad_type("Head", name, "be int8 with weight_scale", value.dtype)
    if value.dtype not in _checks.FLOATS and not (name == "weight" and rounded):
        _checks.bad_type("Head", name, "be float16, bfloat16, float32 or float64", value.dtype)
    if value.layout is not torch.strided:
        _checks.bad_type("Head", name, "be a dense (strided) tensor", value.layout)
    if hasattr(value, "full_tensor"):
        rule = "be a whole tensor: gather a distributed one first, with .full_tensor() or FSDP's summon_full_params"
        _checks.bad_type("Head", name, rule, type(value).__name__)


def _check_shapes(head: Head) -> None:
    hidden, matrix = head.input.shape, head.weight.shape
    if not hidden:
        _checks.bad_value("Head", "input", "have a last dimension, the hidden size", "a 0-dim tensor")
    if len(matrix) != 2 or matrix[0] == 0:
        rule = "have shape (vocabulary, hidden size)"
        if head.weight.numel() == 0:
            rule += " and elements (an FSDP or ZeRO-3 shard has to be gathered first)"
        _checks.bad_value("Head", "weight", rule, tuple(matrix))
    if hidden[-1] != matrix[1]:
        _checks.bad_value("Head", "input", f"have the weight's hidden size, {matrix[1]}, last", tuple(hidden))
    for name, value in zip(head.names(), head.tensors(), strict=True):
        if name not in TENSORS[:2] and value.shape != matrix[:1]:
            _checks.bad_value("Head", name, f"have shape {tuple(matrix[:1])}", tuple(value.shape))
        if value.device != head.input.device:
            _checks.bad_value("Head", name, f"be on the input's device, {head.input.device}", value.device)


def _check_rounding(head: Head) -> None:
    if not isinstance(head.round_input, bool):
        _checks.bad_type("Head", "round_input", "be True or False", type(head.round_input).__name__)
    if head.weight_scale is None:
        if head.round_input:
            _checks.bad_value("Head", "round_input", "be False without weight_scale", True)
        return
    if head.compact == "device":
        _checks.bad_value("Head", "compact", "be None, True or False with weight_scale", repr(head.compact))
