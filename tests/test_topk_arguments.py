"""Making a TopK, from what there is; and every refusal, with its message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sparse_problems import TAKES, evaluate, known

import fastkd
from fastkd import Head, TopK
from fastkd.testing import flat_logits

IDS, LP = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log()
S = torch.zeros(2, 10)

MADE: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "list": (TypeError, "TopK: indices must be a tensor, got list", ([1], LP), {}),
    "probabilities": (TypeError, "TopK: log_probs must be a tensor, got NoneType", (IDS, None), {}),
    "float ids": (TypeError, "TopK: indices must hold integer ids, got torch.float32", (LP, LP), {}),
    "integers": (
        TypeError,
        "TopK: log_probs must be float16, bfloat16, float32 or float64, got torch.int64",
        (IDS, IDS),
        {},
    ),
    "0-dim": (ValueError, "TopK: indices must have a last dimension, k > 0, got ()", (IDS[0, 0], LP[0, 0]), {}),
    "k 0": (ValueError, "TopK: indices must have a last dimension, k > 0, got (2, 0)", (IDS[:, :0], LP[:, :0]), {}),
    "shape": (ValueError, "TopK: log_probs must have the shape of the indices, (2, 2), got (1, 2)", (IDS, LP[:1]), {}),
    "device": (ValueError, "TopK: log_probs must be where the indices are, cpu, got meta", (IDS, LP.to("meta")), {}),
    "tail": (
        ValueError,
        "TopK: tail must be one of bucket, renormalize, support, uniform, samples, got 'none'",
        (IDS, LP),
        {"tail": "none"},
    ),
    "temperature": (
        ValueError,
        "TopK: temperature must be positive and finite in float32, got 0.0",
        (IDS, LP),
        {"temperature": 0.0},
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_made_wrongly(case: str) -> None:
    error, message, args, options = MADE[case]
    with pytest.raises(error, match="^" + re.escape(message)):
        TopK(*args, **options)


RECORDED = "(renormalize and support convert to any), got"
REFUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "rows": ("teacher must have the student's rows, (2,), got (1,)", TopK(IDS[:1], LP[:1]), {}),
    "mapped rows": ("teacher must have the student's rows, (10,), got (2,)", TopK(IDS, LP), {"dim": 0}),
    "temperature": (
        f"teacher_temperature must be 2.0, at which the TopK of tail 'bucket' was recorded {RECORDED} 1.0",
        TopK(IDS, LP, temperature=2.0),
        {},
    ),
    "of the student": (
        f"teacher_temperature must be 1.0, at which the TopK of tail 'uniform' was recorded {RECORDED} 3.0",
        TopK(IDS, LP, tail="uniform"),
        {"temperature": 3.0},
    ),
    "by row": (
        f"teacher_temperature must be 1.0, at which the TopK of tail 'samples' was recorded {RECORDED} one per row",
        TopK(IDS, LP, tail="samples"),
        {"temperature": torch.ones(2)},
    ),
    "0 in a row": (
        "teacher_temperature must be positive and finite in every row, got -1.0",
        TopK(IDS, LP, tail="support"),
        {"teacher_temperature": torch.tensor([1.0, -1.0])},
    ),
    "nan in a row": (
        "teacher_temperature must be positive and finite in every row, got nan",
        TopK(IDS, LP, tail="renormalize"),
        {"teacher_temperature": torch.tensor([float("nan"), 1.0])},
    ),
    "logits": (
        "teacher.log_probs must hold log-probabilities that add up to at most 1 in a row, got 7.38",
        TopK(IDS, torch.tensor([[-9.0, -9.0], [2.0, -9.0]])),
        {},
    ),
    "probabilities": (
        "teacher.log_probs must hold log-probabilities that add up to at most 1 in a row, got 2.9",
        TopK(IDS, LP.exp(), tail="uniform"),
        {},
    ),
    "outside": ("teacher must hold ids from 0 to 9 (or -1 for none), got 10", TopK(IDS + 6, LP), {}),
    "below": ("teacher must hold ids from 0 to 9 (or -1 for none), got -2", TopK(IDS - 3, LP), {}),
    "twice": ("teacher must hold every id once in a row, got 1 twice", TopK(IDS * 0 + 1, LP), {}),
    "student_topk": (
        "student_topk must be None unless every teacher has logits, got 3",
        TopK(IDS, LP),
        {"student_topk": 3, "divergence": "reverse_kl"},
    ),
}
for tail in ("uniform", "support", "renormalize"):
    REFUSED |= {
        f"outside {tail}": (REFUSED["outside"][0], TopK(IDS + 6, LP, tail=tail), {}),
        f"twice {tail}": (REFUSED["twice"][0], TopK(IDS * 0 + 1, LP, tail=tail), {}),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    message, teacher, options = REFUSED[case]
    with pytest.raises(ValueError, match="^kd_loss: " + re.escape(message)):
        fastkd.kd_loss(S, teacher, **options)
    if case not in ("mapped rows",):
        head = Head(torch.zeros(2, 3), torch.zeros(10, 3))
        with pytest.raises(ValueError, match="^kd_loss: " + re.escape(message)):
            fastkd.kd_loss(head, teacher, **options)


@pytest.mark.parametrize("tail", TAKES)
def test_divergences_that_a_tail_has(tail: str) -> None:
    every = (*TAKES["bucket"], "mse")
    for divergence in every:
        if divergence in TAKES[tail]:
            fastkd.kd_loss(S, TopK(IDS, LP, tail=tail), divergence=divergence)
            continue
        got = rf"with a TopK teacher of tail '{tail}', got {divergence}$"
        with pytest.raises(ValueError, match=f"^kd_loss: divergence must be one of forward_kl, .*{got}"):
            fastkd.kd_loss(S, TopK(IDS, LP, tail=tail), divergence=divergence)


def test_16_bit_log_probabilities_may_add_up_to_a_little_more_than_1() -> None:
    teacher = TopK(IDS, torch.tensor([[0.75, 0.3], [0.5, 0.5]]).log())
    assert fastkd.kd_loss(S, teacher).isfinite()
    with pytest.raises(ValueError, match="add up to at most 1"):
        fastkd.kd_loss(S, TopK(IDS, torch.tensor([[0.75, 0.4], [0.5, 0.5]]).log()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_logits(dtype: torch.dtype, temperature: float) -> None:
    logits = flat_logits(6, 41, dtype=dtype)
    fastkd.set_workspace(41 * 4 * 4)  # a row at a time
    try:
        made = TopK.from_logits(logits.view(2, 3, 41).requires_grad_(), 5, temperature=temperature, tail="support")
    finally:
        fastkd.set_workspace(None)
    want = (logits.double() / temperature).log_softmax(-1).topk(5)
    assert (made.k, made.tail, made.temperature, made.indices.shape) == (5, "support", temperature, (2, 3, 5))
    assert made.log_probs.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert not made.log_probs.requires_grad
    torch.testing.assert_close(made.log_probs.view(6, 5).double(), want.values, rtol=0, atol=1e-6)
    assert bool((made.indices.view(6, 5).sort().values == want.indices.sort().values).float().mean() > 0.9)
    given = TopK.from_logits(logits, 5, indices=made.indices.view(6, 5).int().flip(1), temperature=temperature)
    assert torch.equal(given.log_probs.flip(1), made.log_probs.view(6, 5))


def test_from_the_logits_of_a_head() -> None:
    x, w, b = torch.randn(5, 7), torch.randn(41, 7), torch.randn(41)
    for options in ({}, {"scale": 0.5, "softcap": 3.0}):
        head = Head(x.requires_grad_(), w, b, **options)  # type: ignore[arg-type]
        fastkd.set_workspace(41 * 4 * 4 * 2)
        try:
            got = TopK.from_logits(head, 6)
        finally:
            fastkd.set_workspace(None)
        want = TopK.from_logits(head.logits(), 6)
        torch.testing.assert_close(got.log_probs, want.log_probs)
        assert torch.equal(got.indices, want.indices)
    assert TopK.from_logits(torch.zeros(0, 9), 2).indices.shape == (0, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TopK.from_logits(head, 6).log_probs, want.log_probs)


def test_from_logits_made_wrongly() -> None:
    for k in (0, 42):
        with pytest.raises(
            ValueError, match=r"^TopK\.from_logits: k must be (positive|from 1 to 41, the vocabulary), g"
        ):
            TopK.from_logits(torch.zeros(2, 41), k)
    with pytest.raises(ValueError, match=r"^TopK\.from_logits: indices must have shape \(2, 3\), got \(2, 2\)"):
        TopK.from_logits(torch.zeros(2, 41), 3, indices=IDS)
    for got in (-1, 41):
        with pytest.raises(ValueError, match=rf"^TopK\.from_logits: indices must hold ids from 0 to 40, got {got}$"):
            TopK.from_logits(torch.zeros(2, 41), 2, indices=torch.full((2, 2), got))
    for wrong, message in (
        ([[1]], "be a tensor, got list"),
        (torch.zeros(2, 2), "hold integer ids, got torch.float32"),
    ):
        with pytest.raises(TypeError, match=rf"^TopK\.from_logits: indices must {message}"):
            TopK.from_logits(torch.zeros(2, 41), 2, indices=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^TopK\.from_logits: logits must be a tensor of logits or a Head, got list$"):
        TopK.from_logits([[1.0]], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^TopK\.from_logits: temperature must be positive"):
        TopK.from_logits(torch.zeros(2, 41), 3, temperature=0)


def test_from_samples() -> None:
    made = TopK.from_samples(torch.tensor([[4, 2, -1], [0, 1, 9]]), torch.tensor([[3, 1, 5], [0, 2, 2]]))
    torch.testing.assert_close(made.log_probs.exp(), torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"^TopK\.from_samples: counts must not be negative, got -1$"):
        TopK.from_samples(IDS, IDS - 2)
    with pytest.raises(TypeError, match=r"^TopK\.from_samples: indices must be a tensor, got list$"):
        TopK.from_samples([1], IDS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^TopK\.from_samples: counts must be a tensor, got list$"):
        TopK.from_samples(IDS, [1])  # type: ignore[arg-type]


def drawn(p: torch.Tensor, rounds: int, draws: int) -> TopK:
    """Ids and how often, for each round."""
    picked = p.multinomial(rounds * draws, replacement=True, generator=torch.Generator().manual_seed(3))
    counts = torch.zeros(rounds, len(p)).scatter_add(1, picked.view(rounds, draws), torch.ones(rounds, draws))
    return TopK.from_samples(torch.arange(len(p)).expand(rounds, -1).where(counts > 0, -1), counts)


def test_the_gradient_of_samples_is_unbiased() -> None:
    """Within 5 standard errors of the whole teacher's; taking k of the ids and renormalising is far outside."""
    rounds, draws, v = 4000, 6, 12
    student, logits = flat_logits(1, v), 1.5 * flat_logits(1, v, seed=2)
    p = logits.softmax(-1)[0]
    want_loss, want = evaluate("reference", student, logits)
    samples = drawn(p, rounds, draws)

    def mean(teacher: TopK, divergence: str = "forward_kl") -> tuple[torch.Tensor, ...]:
        leaf = student.expand(rounds, v).clone().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, divergence=divergence, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach().mean(), grad.mean(0), grad.std(0) / rounds**0.5

    value, grad, error = mean(samples)
    far = (grad - 2 * want[0]).abs() / error  # `evaluate` has 0.5 upstream
    assert float(far.max()) < 5
    assert float(error.max() / want.abs().max()) < 0.03
    top = TopK.from_logits(logits, draws, tail="renormalize")
    biased = TopK(*(x.expand(rounds, draws) for x in top.tensors()), tail="renormalize")
    assert float(((mean(biased)[1] - 2 * want[0]).abs() / error).max()) > 20

    # The value of cross-entropy is unbiased, forward KL's is larger by the entropy that the samples lack.
    entropy = float(-(p * p.log()).sum())
    assert float(mean(samples, "cross_entropy")[0]) == pytest.approx(float(want_loss) + entropy, rel=0.02)
    lacking = float(value) - float(want_loss)
    assert 0.5 * (v - 1) / (2 * draws) < lacking < 1.2 * (v - 1) / (2 * draws)


@dataclass
class Logprob:
    """As vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def test_from_vllm() -> None:
    sequence = [None, {5: Logprob(-0.5, 1), 3: Logprob(-2.5, 7)}, {}, {9: Logprob(-3.0, 9), 2: Logprob(-0.1), 4: -4.0}]
    made = TopK.from_vllm(sequence, tail="renormalize", temperature=0.7)
    assert (made.tail, made.temperature) == ("renormalize", 0.7)
    assert made.indices.tolist() == [[-1, -1, -1], [5, 3, -1], [-1, -1, -1], [2, 9, 4]]
    assert made.log_probs[1].tolist() == [-0.5, -2.5, -float("inf")]
    two = TopK.from_vllm(sequence, k=2)
    assert two.indices.tolist() == [[-1, -1], [5, 3], [-1, -1], [2, 9]]
    assert TopK.from_vllm(sequence, k=4).indices.shape == (4, 4)
    batch = TopK.from_vllm([sequence, sequence[1:2], []])
    assert batch.indices.shape == (3, 4, 3)
    assert torch.equal(batch.indices[0], made.indices)
    assert batch.indices[1].tolist() == [[5, 3, -1], *[[-1] * 3] * 3]
    assert bool((batch.indices[2] == -1).all())
    loss = fastkd.kd_loss(flat_logits(12, 10).view(3, 4, 10), batch, reduction="none")
    assert loss.shape == (3, 4)
    assert float(loss[0, 0]) == pytest.approx(0, abs=1e-6)
    assert float(loss[0, 1]) > 0
    assert TopK.from_vllm([]).indices.shape == (0, 1)
    with pytest.raises(ValueError, match=r"^TopK\.from_vllm: k must be positive, got 0$"):
        TopK.from_vllm(sequence, k=0)


def test_what_a_topk_says_of_itself() -> None:
    teacher = known("bucket", 2, 41, 8, torch.bfloat16)
    assert (teacher.k, teacher.dtype, teacher.device.type) == (8, torch.bfloat16, "cpu")
    with pytest.raises(AttributeError):
        teacher.tail = "uniform"  # type: ignore[misc]
