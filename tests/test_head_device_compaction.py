"""``Head(compact="device")``: rows that count go first, and how many there are stays on the device.

Without a GPU in Triton's interpreter, where it is a way to compute the same and not one to save anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_problems import HeadProblem, Tensors, check, device_of, smaller
from torch import Tensor

pytest.importorskip("triton")

import fastkd
from fastkd import Head, TopK, _dispatch
from fastkd._rows import LogitRows
from fastkd.losses import _chunks, _sources

IMPL = "triton"
DEVICE = device_of(IMPL)
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1", allow_module_level=True)

NAN, INF = float("nan"), float("inf")
N, V, H, FEW = 7, 21, 12, 3 * 2 * 21 * 4  # bytes for three rows: three chunks, the last of one row
LABELS = (3, -100, 0, -100, 20, -100, 7)
DROPPED = [i for i, label in enumerate(LABELS) if label < 0]


@pytest.fixture
def tensors() -> Tensors:
    """The student's input, weight and bias, the teacher's input and weight."""
    shapes = ((N, H), (V, H), (V,), (N, 5), (V, 5))
    return tuple(torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes))


def run(
    tensors: Tensors, compact: Any, *, target: Any = LABELS, teacher_compact: Any = None, **options: Any
) -> Tensors:
    """Loss and the gradients of the student's tensors."""
    side = {name: options.pop(name) for name in ("scale", "softcap", "grad_precision") if name in options}
    student, teacher = [x.clone().to(DEVICE).requires_grad_() for x in tensors[:3]], [x.to(DEVICE) for x in tensors[3:]]
    labels = torch.tensor(target, dtype=torch.int64, device=DEVICE)
    heads = (
        Head(*student, compact=compact, workspace=FEW, **side),
        Head(*teacher, compact=teacher_compact, workspace=FEW),
    )
    loss = fastkd.kd_loss(*heads, labels, impl=IMPL, **options)
    return loss.detach(), *torch.autograd.grad(loss, student, torch.ones_like(loss))


@pytest.mark.parametrize(
    ("sides", "dtype"),
    [
        ("both", torch.float32), ("both", torch.bfloat16), ("student", torch.float16), ("teacher", torch.bfloat16),
        ("softcap_bias_scale", torch.float32), ("softcap_bias_scale", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_exact(sides: str, dtype: torch.dtype) -> None:
    check(smaller(HeadProblem("forward_kl", sides, dtype, "ignored"), IMPL), IMPL, compact="device")


@pytest.mark.parametrize("option", ["by_row", "shared_vocab"])
def test_options(option: str) -> None:
    check(smaller(HeadProblem("jsd", option=option), IMPL), IMPL, compact="device", grad_precision="float32")


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_any_number_of_rows_at_a_time(chunk: int) -> None:
    problem = smaller(HeadProblem("reverse_kl", "softcap", option="ignored"), IMPL)
    check(problem, IMPL, compact="device", workspace=chunk * 3 * 4 * problem.vocabulary)


@pytest.mark.parametrize("head", [{}, {"scale": -2.0}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_numbers_of_a_host_that_waits(reduction: str, head: dict[str, Any], tensors: Tensors) -> None:
    """Sums over rows are in another order, since their chunks are others."""
    got, want = (run(tensors, compact, reduction=reduction, **head) for compact in ("device", True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(float(x.abs().max()) > 1e-3 for x in want)


@pytest.mark.parametrize("head", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize(("poison", "reduction"), [(NAN, "mean"), (INF, "none")])
def test_a_row_that_does_not_count_may_hold_anything(
    poison: float, reduction: str, head: dict[str, Any], tensors: Tensors
) -> None:
    want = run(tensors, "device", reduction=reduction, **head)
    poisoned = [x.clone() for x in tensors]
    poisoned[0][DROPPED] = poisoned[3][DROPPED] = poison
    got = run(tuple(poisoned), "device", reduction=reduction, **head)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert not got[1][DROPPED].any()
    if reduction == "none":
        assert not got[0][DROPPED].any()


def test_a_weight_of_infinities_leaves_dropped_rows_at_0(tensors: Tensors) -> None:
    """0 times infinity would not be 0: there is no such product."""
    tensors[1][5] = INF
    loss, of_input, *_ = run(tensors, "device", reduction="none")
    assert not loss[DROPPED].any()
    assert not of_input[DROPPED].any()
    assert loss[0].isnan()


@pytest.mark.parametrize("target", [(-100,) * N, tuple(range(N)), (-100,) * (N - 1) + (5,), ()], ids=str)
def test_all_one_or_none_that_count(target: tuple[int, ...], tensors: Tensors) -> None:
    if not target:
        tensors = (tensors[0][:0], *tensors[1:3], tensors[3][:0], tensors[4])
    got, want = (run(tensors, compact, target=target) for compact in ("device", True))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if not any(label >= 0 for label in target):
        assert not any(x.any() for x in got)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows that each matmul with the vocabulary is told to compute."""
    from fastkd_kernels import matmul

    seen: list[int] = []
    for name in ("multiply", "add_outer"):
        original = getattr(matmul, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> None:
            seen.append(int(args[3] if original.__name__ == "add_outer" else args[2]))
            original(*args, **kwargs)

        monkeypatch.setattr(matmul, name, counted)
    return seen


@pytest.mark.parametrize("why", ["target", "row_weight"])
def test_matmuls_are_over_the_rows_that_count(why: str, counts: list[int], tensors: Tensors) -> None:
    if why == "target":
        run(tensors, "device")
    else:
        weights = torch.tensor([float(label >= 0) for label in LABELS], device=DEVICE)
        run(tensors, "device", target=range(N), row_weight=weights)
    # Four matmuls for each of three chunks: of the first four rows, three and one.
    assert counts == [3] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("student", [None, True, False])
def test_one_head_of_several_asks_for_all(student: bool | None, counts: list[int], tensors: Tensors) -> None:
    run(tensors, student, teacher_compact="device")
    assert counts == [3] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize("precision", [None, "float32"])
def test_16_bit_operands_as_on_a_gpu(precision: str | None, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied as they are, and the gradient of the logits rounded on its way unless that is not wanted."""
    tensors = tuple(x.to(torch.bfloat16) for x in tensors)
    want = run(tensors, True, grad_precision="float32", reduction="sum")
    monkeypatch.setattr(_sources, "_operand_dtype", lambda head, autocast: torch.bfloat16)
    got = run(tensors, "device", grad_precision=precision, reduction="sum")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-6 if precision is None else 1e-5)


def test_backward_twice(tensors: Tensors) -> None:
    x, w, _, tx, tw = (x.to(DEVICE).requires_grad_() for x in tensors)
    loss = fastkd.kd_loss(
        Head(x, w, compact="device", workspace=FEW), Head(tx, tw), torch.tensor(LABELS, device=DEVICE), impl=IMPL
    )
    first, second = (torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_beside_a_teacher_of_few_ids(tensors: Tensors) -> None:
    """Its rows go with those of the logits."""
    logits = tensors[3] @ tensors[4].t()
    teacher = TopK.from_logits(logits.to(DEVICE), 4)
    labels = torch.tensor(LABELS, device=DEVICE)
    found = []
    for compact in ("device", True):
        leaves = [x.clone().to(DEVICE).requires_grad_() for x in tensors[:2]]
        loss = fastkd.kd_loss(Head(*leaves, compact=compact, workspace=FEW), [teacher, teacher], labels, impl=IMPL)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_in_a_compiled_graph(tensors: Tensors) -> None:
    x, w, _, tx, tw = (x.to(DEVICE) for x in tensors)
    labels = torch.tensor(LABELS, device=DEVICE)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fastkd.kd_loss(Head(x, w, compact="device", workspace=FEW), Head(tx, tw), labels, impl=IMPL)

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, w)
    assert torch.equal(got, loss(x, w))


def test_refusals(tensors: Tensors) -> None:
    x, w, _, tx, tw = (x.to(DEVICE) for x in tensors)
    with pytest.raises(ValueError, match=r"^Head: compact must be None, True, False or 'device', got 'gpu'$"):
        Head(x, w, compact="gpu")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r'^Head: filter_eps must be 0 with compact="device", got 0\.1$'):
            Head(x, w, compact="device", filter_eps=0.1)
    head = Head(x, w, compact="device")
    for impl, reason in (
        (None, "the tensors are on cpu, Triton kernels need a CUDA device"),
        ("reference", "impl='reference' cannot run here: there is no fastkd.reference.matmul; what can: triton"),
    ):
        if impl is None and DEVICE != "cpu":
            continue
        with pytest.raises(RuntimeError) as raised:
            fastkd.kd_loss(head, Head(tx, tw), impl=impl)
        expected = f'Head(compact="device"): {reason}; compact=None and compact=True run anywhere'
        assert str(raised.value) == expected
    wide = Head(x, w.double(), compact="device")
    with pytest.raises(RuntimeError, match="no kernel computes float64"):
        fastkd.kd_loss(wide, Head(tx, tw), impl=IMPL)


def test_explain_names_who_could(capsys: pytest.CaptureFixture[str]) -> None:
    fastkd.explain('Head(compact="device")', torch.zeros(2, 3, device="cpu"))
    triton, *others = capsys.readouterr().out.splitlines()[1:]
    assert triton == "  triton     the tensors are on cpu, Triton kernels need a CUDA device <- raises"
    assert [line.split()[1:] for line in others] == [
        ["there", "is", "no", f"fastkd.{name}.matmul"] for name in ("native", "algebra", "reference")
    ]


def _pretended(*_: Any) -> SimpleNamespace:
    """Kernels that only hand out tensors."""

    def forward(rows: Any) -> Tensors:
        n, empty = len(rows.student), rows.student.new_empty
        return empty(()), empty((n, 12), dtype=torch.float64), empty(())

    def backward(rows: Any, *_: Any) -> Tensor:
        return rows.student if rows.overwrite else torch.empty_like(rows.student)

    def matmul(*_: Any, **__: Any) -> None:
        pass

    return SimpleNamespace(forward=forward, backward=backward, multiply=matmul, add_outer=matmul)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_is_asked_of_the_device(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that have no elements: whoever looks at one raises."""
    monkeypatch.setattr(_dispatch, "pick", _pretended)
    monkeypatch.setattr(_chunks, "workspace", lambda device: FEW)
    monkeypatch.setattr(_sources, "_operand_dtype", lambda head, autocast: torch.bfloat16)
    x, w, b, tx, tw = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((N, H), (V, H), (V,), (N, 5), (V, 5))
    )
    target = torch.empty(N, dtype=torch.int64, device="meta")
    rows = LogitRows(
        student=x, teachers=(), target=target, row_weight=None, alpha=0.5, temperature=1.0, teacher_temperature=(1.0,),
        teacher_weight=(1.0,), divisor=1.0, divergence="forward_kl", beta=0.5, scale_by_t2=True, label_smoothing=0.0,
        z_loss=0.0, ignore_index=-100, shared=V, reduce=True, agreement=False, overwrite=False,
    )  # fmt: skip

    def chunks(compact: Any) -> _chunks.Chunks:
        student = Head(x, w, b, softcap=softcap, compact=compact)
        return _chunks.Chunks(rows, student, [Head(tx, tw)], impl=None, dim=1, autocast=None)

    on_device = chunks("device")
    on_device.forward([True] * 3, torch.float32)
    assert len(list(on_device.chunks())) > 1
    assert all(isinstance(part, _sources.Leading) for part, _ in on_device.chunks())
    with pytest.raises((NotImplementedError, RuntimeError)):
        chunks(True).forward([True] * 3, torch.float32)
