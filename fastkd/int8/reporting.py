"""What became of a model: how exact, how large and how fast each of its layers is."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import _checks
from .agreement import Agreement
from .choosing import FLOAT_LAYERS
from .layer import Int8Layer
from .recording import Example, check, run


@dataclass(frozen=True)
class LayerReport:
    """One layer of a quantised model beside that of the float model."""

    name: str
    scheme: str
    """What happens to the input of an int8 layer, or "float"."""
    own_sqnr: float | None
    """Signal to noise in dB of its output, for the inputs that the float layer gets. None: it was not run."""
    sqnr: float | None
    """The same in the model, where its inputs carry the errors of the layers before."""
    cosine: float | None
    """Of its outputs in the two models."""
    bytes: int
    float_bytes: int
    milliseconds: float | None
    """For the inputs of the example, all calls together, median of the repetitions."""
    float_milliseconds: float | None


@dataclass(frozen=True)
class Report:
    """What :func:`report` found."""

    layers: tuple[LayerReport, ...]
    sqnr: float
    """Of all floating-point outputs of the model, in dB."""
    cosine: float
    top1: float
    """How often the largest number of a row of the first output is at the same place."""
    bytes: int
    """Of all parameters and buffers."""
    float_bytes: int
    milliseconds: float | None
    float_milliseconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON or a plot; ``layers`` is a list of dicts."""
        return {**dataclasses.asdict(self), "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def to_csv(self, path: str | Path) -> None:
        """One row for each layer."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(layer, name) for name in COLUMNS] for layer in self.layers)
        Path(path).write_text(text.getvalue(), encoding="utf-8")

    def rows(self) -> Iterator[list[str]]:
        """The table that ``print`` shows, headings first and the whole model last."""
        yield ["layer", "input", "own SQNR dB", "SQNR dB", "cosine", "KiB", "float KiB", "ms", "float ms"]
        for layer in self.layers:
            yield [layer.name or "(root)", layer.scheme, _number(layer.own_sqnr, 1), *_cells(layer)]
        yield ["model", f"top-1 {100 * self.top1:.1f} %", "", *_cells(self)]

    def __str__(self) -> str:
        rows = list(self.rows())
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(line)
            ).rstrip()
            for line in (list(zip(row, widths, strict=True)) for row in rows)
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        headings, *rows = self.rows()
        table = Table(title="int8 beside float")
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i < 2 else "right")
        for i, row in enumerate(rows):
            table.add_row(*row, end_section=i == len(rows) - 2)
        return table


COLUMNS = tuple(field.name for field in dataclasses.fields(LayerReport))


def report(model: nn.Module, float_model: nn.Module, example: Example, *, repeat: int = 5) -> Report:
    """Run a quantised model beside the float model that it came from, and compare layer by layer.

    A layer's signal is the float model's output, its noise the difference. ``own_sqnr`` says which layer suffers,
    ``sqnr`` what has added up until there. ``print`` shows a table, and so does ``rich``.

    Args:
        model: After :func:`quantize_`, in evaluation mode.
        float_model: The same modules by the same names, before.
        example: A batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        repeat: How often each layer and both models are timed; 0: not at all.

    Raises:
        TypeError: a wrong type.
        ValueError: a model in training mode; one that returns no floating-point tensor; a layer that the float model
            does not have.

    Example:
        >>> import copy
        >>> from fastkd.int8 import quantize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8)).eval()
        >>> float_model = copy.deepcopy(model)
        >>> _ = quantize_(model)
        >>> report(model, float_model, torch.randn(16, 64)).layers[0].own_sqnr > 30
        True
    """
    check("report", model, example)
    check("report", float_model, argument="float_model")
    if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 0:
        _checks.bad_value("report", "repeat", "be an integer, 0 or more", repr(repeat))
    pairs = {name: _Pair(name, layer, float_model) for name, layer in _layers(model)}
    with torch.no_grad():
        float_output = _watched(
            [(pair.float_layer, pair.see_float(repeat)) for pair in pairs.values()], float_model, example
        )
        output = _watched([(pair.layer, pair.see) for pair in pairs.values()], model, example)
        times = _milliseconds([lambda: run(model, example), lambda: run(float_model, example)], output, repeat)
    whole = Agreement()
    outputs, float_outputs = _floats(output), _floats(float_output)
    if not outputs:
        rule = "return floating-point tensors, maybe in tuples, lists or dicts"
        _checks.bad_value("report", "model", rule, type(output).__name__)
    for got, want in zip(outputs, float_outputs, strict=True):
        whole.add(got, want)
    agrees = [got.argmax(-1) == want.argmax(-1) for got, want in zip(outputs[:1], float_outputs[:1], strict=True)]
    top1 = float(agrees[0].double().mean())
    sizes = _bytes(model), _bytes(float_model)
    return Report(tuple(pair.report() for pair in pairs.values()), whole.sqnr(), whole.cosine(), top1, *sizes, *times)


class _Pair:
    """A layer in both models, and what was seen of it."""

    def __init__(self, name: str, layer: nn.Module, float_model: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.float_layer = _part(float_model, name)
        folded = getattr(layer, "folded", None)
        self.norm = _part(float_model, folded) if folded else None
        self.wanted: list[Tensor] = []
        self.own, self.within = Agreement(), Agreement()
        self.times: list[tuple[float, float]] = []
        self.calls = 0

    def see_float(self, repeat: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            # `forward`, since a call would come back here.
            want = self._normed(output)
            self.own.add(self.layer.forward(*args, **kwargs), want)
            self.wanted.append(want.clone())  # what follows may write into it
            times = _milliseconds(
                [
                    lambda: self.layer.forward(*args, **kwargs),
                    lambda: self._normed(self.float_layer.forward(*args, **kwargs)),
                ],
                output,
                repeat,
            )
            self.times += [times] if repeat else []  # type: ignore[list-item]

        return hook

    def _normed(self, output: Tensor) -> Tensor:
        normed: Tensor = output if self.norm is None else self.norm.forward(output)
        return normed

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self.calls < len(self.wanted):
            self.within.add(output, self.wanted[self.calls])
        self.calls += 1

    def report(self) -> LayerReport:
        ran = bool(self.wanted)
        times = [sum(column) for column in zip(*self.times, strict=True)] if self.times else [None, None]
        return LayerReport(
            name=self.name,
            scheme=self.layer.config.scheme if isinstance(self.layer, Int8Layer) else "float",
            own_sqnr=self.own.sqnr() if ran else None,
            sqnr=self.within.sqnr() if ran else None,
            cosine=self.within.cosine() if ran else None,
            bytes=_bytes(self.layer),
            float_bytes=_bytes(self.float_layer) + (0 if self.norm is None else _bytes(self.norm)),
            milliseconds=times[0],
            float_milliseconds=times[1],
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (Int8Layer, *FLOAT_LAYERS)):
            yield name, module


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return _checks.bad_value("report", "float_model", "have the layers of model", f"none called {name}")


def _watched(hooks: Sequence[tuple[nn.Module, Callable[..., None]]], model: nn.Module, example: Example) -> Any:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        return run(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _milliseconds(calls: Sequence[Callable[[], Any]], near: Any, repeat: int) -> tuple[float | None, float | None]:
    """Median of each, in turns, after one call that is not counted."""
    devices = {tensor.device for tensor in _floats(near)}
    times: list[list[float]] = [[] for _ in calls]
    for i in range(repeat + 1 if repeat else 0):
        for call, its in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            for device in devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            its += [1000 * (time.perf_counter() - started)] if i else []
    first, second = (statistics.median(its) if its else None for its in times)
    return first, second


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each memory once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cells(one: LayerReport | Report) -> list[str]:
    sizes = [f"{size / 1024:.1f}" for size in (one.bytes, one.float_bytes)]
    times = [_number(one.milliseconds, 3), _number(one.float_milliseconds, 3)]
    return [_number(one.sqnr, 1), _number(one.cosine, 5), *sizes, *times]
