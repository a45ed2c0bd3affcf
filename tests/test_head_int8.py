"""A teacher's head whose weight is int8: the logits of its float form, which is never there, and the layer's own."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_problems import device_of
from test_head_memory import Allocations
from torch import Tensor, nn

import fastkd
from fastkd import Expected, Head, TopK
from fastkd.inputs import _rounded
from fastkd.int8 import Dynamic, Int8Embedding, Int8Linear, Static, WeightOnly, quantize_
from fastkd.losses import _rounded_source
from fastkd.testing import assert_as_exact_as_fp32

pytestmark = pytest.mark.few_interpreted(9)
N, H, V, K = 7, 6, 45, 5
FEW = 3 * 2 * V * 4  # bytes for three rows of both sides
LABELS = (3, -100, 0, 44, 20, -100, 7)


class Problem:
    """A student's head, and a teacher's in int8, of all int8 numbers."""

    def __init__(self, impl: str, dtype: torch.dtype = torch.float32) -> None:
        device = device_of(impl)
        shapes = ((N, H), (V, H), (V,), (N, K), (V,))
        student_input, student_weight, student_bias, self.input, self.bias = (
            torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i, shape in enumerate(shapes)
        )
        self.student = [x.requires_grad_() for x in (student_input, student_weight, student_bias)]
        self.input = self.input.to(dtype)
        self.weight = (torch.arange(V * K).reshape(V, K) * 37 % 256 - 128).to(device, torch.int8)
        self.scale = (torch.arange(1, V + 1) / (60 * V)).to(device)
        self.target = torch.tensor(LABELS, device=device)

    def head(self, **options: Any) -> Head:
        options = {"bias": self.bias, "workspace": FEW, "weight_scale": self.scale, **options}
        return Head(self.input, self.weight, **options)

    def loss(self, teacher: Any, **options: Any) -> tuple[Tensor, ...]:
        loss = fastkd.kd_loss(Head(*self.student, workspace=FEW), teacher, self.target, **options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), self.student)


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 2e-6) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slab", [None, 4 * K * 7])
def test_exact(impl: str, bias: bool, dtype: torch.dtype, slab: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the teacher's int8 numbers as they stand: of 16-bit hidden states too, whatever the parts."""
    monkeypatch.setattr(_rounded, "SLAB", slab or _rounded.SLAB)
    problem = Problem(impl, dtype)
    options = {"bias": problem.bias if bias else None, "scale": 0.25, "softcap": 9.0}
    logits = torch.randn(N, V, device=problem.input.device)

    def formula(logits: Tensor, hidden: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        weight = problem.weight.to(logits.dtype) * scale.unsqueeze(1)
        taught = hidden @ weight.T + (bias if options["bias"] is not None else 0)
        p = (9 * (0.25 * taught / 9).tanh()).log_softmax(-1)
        return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)

    got = fastkd.kd_loss(logits, problem.head(**options), reduction="none", impl=impl)
    assert_as_exact_as_fp32(got, formula, logits, problem.input, problem.scale, problem.bias)
    assert got.min() > 0.05


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("divergence", fastkd._rows.DIVERGENCES)
def test_the_students_gradients_are_those_of_stored_logits(impl: str, divergence: str, reduction: str) -> None:
    problem = Problem(impl)
    options = {"divergence": divergence, "reduction": reduction, "impl": impl}
    stored = problem.input @ (problem.weight * problem.scale.unsqueeze(1)).T + problem.bias
    want = problem.loss(stored, **options)
    close(problem.loss(problem.head(), **options), want)
    close(problem.loss(problem.head(compact=False), **options), want)
    assert float(want[1].abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [Dynamic(), Static(), WeightOnly()], ids=lambda config: config.scheme)
def test_logits_of_the_layer_itself(impl: str, config: Any, dtype: torch.dtype) -> None:
    problem = Problem(impl, dtype)
    layer = Int8Linear(problem.weight, problem.scale, problem.bias, config=config)
    alike = layer if not isinstance(config, Static) else Int8Linear(problem.weight, problem.scale, problem.bias)
    head = Head.from_layer(layer, problem.input, workspace=FEW)
    assert head.round_input is not isinstance(config, WeightOnly)
    want = alike(problem.input.float())
    torch.testing.assert_close(head.logits(), want, rtol=2e-6, atol=1e-5)
    close(problem.loss(head, impl=impl), problem.loss(want, impl=impl), 1e-5)
    capped = Head.from_layer(layer, problem.input, workspace=FEW, scale=0.5, softcap=3.0)
    close(problem.loss(capped, impl=impl), problem.loss(3 * (0.5 * want / 3).tanh(), impl=impl), 1e-5)
    plain = Head.from_layer(layer, problem.input, round_input=False)
    exact = problem.input.float() @ layer.float_weight().T + problem.bias
    torch.testing.assert_close(plain.logits(), exact, rtol=2e-6, atol=1e-5)
    assert torch.equal(plain.logits(), want) is False or isinstance(config, WeightOnly)


def test_layers_and_models() -> None:
    hidden = torch.randn(N, H)
    linear, table = nn.Linear(H, V), nn.Embedding(V, H)
    for layer, want in ((linear, linear(hidden)), (table, hidden @ table.weight.T)):
        head = Head.from_layer(layer, hidden, scale=0.5)
        assert head.weight is layer.weight
        torch.testing.assert_close(head.logits(), 0.5 * want)
    rounded = Int8Embedding.from_float(table)
    torch.testing.assert_close(Head.from_layer(rounded, hidden).logits(), hidden @ rounded.float_weight().T)
    with pytest.raises(TypeError, match="have a linear layer, or one with LoRA, as its output layer"):
        Head.from_layer(nn.ReLU(), hidden)

    class Model(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head, self.config = head, SimpleNamespace(model_type="granite", logits_scaling=8.0)

        def get_output_embeddings(self) -> Any:
            return self.head[-1] if isinstance(self.head, nn.Sequential) else self.head

    model = Model(copy.deepcopy(linear)).eval()
    quantize_(model)
    head = Head.from_model(model, hidden)
    assert (head.scale, head.round_input) == (0.125, True)
    torch.testing.assert_close(head.logits(), model.head(hidden) / 8, rtol=1e-5, atol=1e-6)
    wrapped = Model(nn.Sequential(nn.Linear(H, H), nn.Linear(H, V))).eval()
    quantize_(wrapped)
    with pytest.raises(ValueError, match=r"by its output layer alone .*, got a Sequential with other layers"):
        Head.from_model(wrapped, hidden)


@pytest.mark.parametrize("round_input", [False, True])
def test_no_float_copy_of_the_weight(impl: str, round_input: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rounded, "SLAB", 4 * K * 8)
    problem = Problem(impl)
    if impl == "native":  # packed when it is first used, for good
        problem.loss(problem.head(round_input=round_input), impl=impl)
    given = (problem.input, problem.weight, problem.scale, problem.bias, problem.target, *problem.student)
    with Allocations(*given) as seen:
        fastkd.kd_loss(torch.randn(N, V, device=problem.input.device), problem.head(round_input=round_input), impl=impl)
    if impl == "native":
        assert seen.largest <= max(FEW, N * V * 4, 4 * K * 8)
        assert seen.largest < 4 * V * K + N * V * 4


@pytest.mark.parametrize(("round_input", "chunks"), [(False, 2), (True, 3)])
def test_its_logits_count_as_workspace(round_input: bool, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded rows twice, since those of the chunk before are still there."""
    problem, seen, logits_of = Problem("reference"), [], _rounded.logits_of

    def watched(head: Head, hidden: Tensor, *more: Any) -> Tensor:
        seen.append(len(hidden))
        return logits_of(head, hidden, *more)

    monkeypatch.setattr(_rounded_source, "logits_of", watched)
    fastkd.kd_loss(torch.randn(N, V), problem.head(round_input=round_input))
    assert len(seen) == chunks
    assert max(seen) * (2 if round_input else 1) * V * 4 <= FEW


def test_the_weight_of_a_large_teacher_is_never_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rounded, "SLAB", 2**15)
    vocabulary, width = 600, 512
    weight = torch.randint(-127, 128, (vocabulary, width), dtype=torch.int8)
    scale, student, hidden = torch.rand(vocabulary) / 999, torch.randn(4, vocabulary), torch.randn(4, width)
    for round_input in (False, True):
        teacher = Head(hidden, weight, weight_scale=scale, round_input=round_input)
        fastkd.kd_loss(student, teacher)  # packs
        with Allocations(weight, scale, student, hidden) as seen:
            fastkd.kd_loss(student, teacher)
            TopK.from_logits(teacher, 3)
        assert seen.peak < vocabulary * width  # a byte each; in float32 it would be four


def test_rows_harm_no_others(impl: str) -> None:
    for round_input in (False, True) if impl != "triton" else (True,):
        problem = Problem(impl)
        options = {"reduction": "none", "impl": impl}
        want, *gradients = problem.loss(problem.head(round_input=round_input), **options)
        problem.input[0] = torch.nan
        problem.input[1] = torch.inf  # which does not count
        got, of_input, *_ = problem.loss(problem.head(round_input=round_input), **options)
        assert got.isnan().tolist() == [True] + [False] * (N - 1)
        torch.testing.assert_close(got[1:], want[1:])
        torch.testing.assert_close(of_input[2:], gradients[0][2:])


def test_masked_ids_and_scales_of_zero(impl: str) -> None:
    """A bias of -inf masks; a row of zeros, pruned for example, has its bias as logit."""
    problem = Problem(impl)
    problem.scale[4] = 0
    problem.bias[5] = -torch.inf
    stored = problem.input @ (problem.weight * problem.scale.unsqueeze(1)).T + problem.bias
    close(problem.loss(problem.head(), impl=impl), problem.loss(stored, impl=impl))


def test_several_teachers_and_other_arguments(impl: str) -> None:
    problem = Problem(impl)
    stored = problem.input @ (problem.weight * problem.scale.unsqueeze(1)).T + problem.bias
    other = torch.randn(N, V, device=stored.device)
    options: dict[str, Any] = {"temperature": 2.0, "teacher_weight": [0.3, 0.7], "label_smoothing": 0.1, "impl": impl}
    close(problem.loss([problem.head(), other], **options), problem.loss([stored, other], **options))
    options = {"shared_vocab": V, "reduction": "sum", "impl": impl}
    close(problem.loss(problem.head(), **options), problem.loss(stored, **options))


def test_float64() -> None:
    problem = Problem("reference", torch.float64)
    head = problem.head()
    assert head.dtype is torch.float64
    weight = problem.weight.double() * problem.scale.double().unsqueeze(1)
    want = problem.input @ weight.T + problem.bias.double()
    student = torch.randn(N, V, dtype=torch.float64)
    for one in (head, problem.head(weight_scale=problem.scale.double())):
        torch.testing.assert_close(fastkd.kd_loss(student, one), fastkd.kd_loss(student, want), rtol=1e-12, atol=0)


def test_caches_of_its_logits() -> None:
    problem = Problem("reference")
    for round_input in (False, True):
        head = problem.head(round_input=round_input)
        got, want = TopK.from_logits(head, 4), TopK.from_logits(head.logits(), 4)
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)
        weight = torch.randn(V, 3)
        torch.testing.assert_close(
            Expected.from_teacher(head, weight).mean, Expected.from_teacher(head.logits(), weight).mean
        )


@pytest.mark.parametrize("round_input", [False, True])
def test_compiled_and_exported(round_input: bool) -> None:
    problem = Problem("reference")
    scale, bias, target, weight = problem.scale, problem.bias, problem.target, problem.weight

    def loss(student: Tensor, hidden: Tensor) -> Tensor:
        teacher = Head(hidden, weight, bias, weight_scale=scale, round_input=round_input)
        return fastkd.kd_loss(student, teacher, target)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", weight)

        def forward(self, student: Tensor, hidden: Tensor) -> Tensor:
            head = Head(hidden, self.weight, weight_scale=hidden.new_ones(V), round_input=round_input)
            return fastkd.kd_loss(student, head)

    student = torch.randn(N, V, requires_grad=True)
    want = loss(student, problem.input)
    (gradient,) = torch.autograd.grad(want, student)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, problem.input)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], gradient)
    module, given = Loss(), (student.detach(), problem.input)
    torch.testing.assert_close(torch.export.export(module, given).module()(*given), module(*given))


def test_graphs_that_are_kept(impl: str) -> None:
    """A second backward computes the logits again, and notices that a scale was changed."""
    problem = Problem(impl)
    loss = fastkd.kd_loss(Head(*problem.student), problem.head(), problem.target, impl=impl)
    first = torch.autograd.grad(loss, problem.student, retain_graph=True)
    close(torch.autograd.grad(loss, problem.student, retain_graph=True), first)
    problem.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, problem.student)


def test_teachers_of_inference_mode_and_autocast(impl: str) -> None:
    problem = Problem(impl)
    want = problem.loss(problem.head(round_input=True), impl=impl)
    with torch.inference_mode():
        layer = Int8Linear(problem.weight.clone(), problem.scale.clone(), problem.bias.clone())
        hidden = problem.input.clone()
    close(problem.loss(Head.from_layer(layer, hidden), impl=impl), want)
    if device_of(impl) == "cpu":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(problem.loss(problem.head(round_input=True), impl=impl), want)


def test_where_the_student_asks_the_device_which_rows_count() -> None:
    pytest.importorskip("triton")
    problem = Problem("triton")
    want = problem.loss(problem.head(), impl="triton")
    student = Head(*problem.student, workspace=FEW, compact="device")
    loss = fastkd.kd_loss(student, problem.head(), problem.target, impl="triton")
    close((loss.detach(), *torch.autograd.grad(loss, problem.student)), want)


INPUT, INT8, SCALE = torch.zeros(N, K), torch.zeros(V, K, dtype=torch.int8), torch.ones(V)
ONLY_INT8 = "Head: weight must be int8 with weight_scale, got torch.float32"
FLOAT = (
    "Head: weight must be float without weight_scale (Head.from_layer takes both from an int8 layer), got torch.int8"
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_scale": None}, TypeError, FLOAT),
        ({"weight": INT8.float()}, TypeError, ONLY_INT8),
        ({"weight": INT8.to(torch.uint8)}, TypeError, "Head: weight must be int8 with weight_scale, got torch.uint8"),
        ({"weight_scale": 1.0}, TypeError, "Head: weight_scale must be a tensor, got float"),
        ({"weight_scale": SCALE.long()}, TypeError, "Head: weight_scale must be float16, bfloat16, float32 or float64"),
        ({"weight_scale": SCALE[:3]}, ValueError, "Head: weight_scale must have shape (45,), got (3,)"),
        ({"weight_scale": SCALE.unsqueeze(1)}, ValueError, "Head: weight_scale must have shape (45,), got (45, 1)"),
        ({"weight_scale": SCALE.to("meta")}, ValueError, "Head: weight_scale must be on the input's device, cpu, got"),
        ({"round_input": 1}, TypeError, "Head: round_input must be True or False, got int"),
        (
            {"compact": "device"},
            ValueError,
            "Head: compact must be None, True or False with weight_scale, got 'device'",
        ),
        (
            {"weight": INT8.float(), "weight_scale": None, "round_input": True},
            ValueError,
            "Head: round_input must be False without weight_scale, got True",
        ),
    ],
)
def test_head_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Head(**{"input": INPUT, "weight": INT8, "weight_scale": SCALE} | arguments)


def test_no_student_is_int8() -> None:
    student = Head(INPUT, INT8, weight_scale=SCALE)
    message = (
        r"student must have a float weight: an int8 one gets no gradient \(prepare_qat_ trains with rounded numbers"
    )
    with pytest.raises(TypeError, match=f"^kd_loss: {message}"):
        fastkd.kd_loss(student, torch.zeros(N, V))
    with pytest.raises(TypeError, match=f"^cross_entropy: {message}"):
        fastkd.cross_entropy(student, torch.zeros(N, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"^dkd_loss: {message}"):
        fastkd.dkd_loss(student, torch.zeros(N, V), torch.zeros(N, dtype=torch.int64))
