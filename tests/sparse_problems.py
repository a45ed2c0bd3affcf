"""What teachers without logits mean, in plain PyTorch over the whole vocabulary, and problems to ask it of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import Expected, Head, TopK
from fastkd.testing import flat_logits

INF = float("inf")
EVERY = ("forward_kl", "skew_kl", "jsd", "tvd", "cross_entropy", "reverse_kl", "skew_reverse_kl")
TAKES = {
    "bucket": EVERY,
    "support": EVERY,
    "uniform": EVERY,
    "renormalize": EVERY[:5],
    "samples": ("forward_kl", "cross_entropy"),
}
PAIRS = [(tail, divergence) for tail, takes in TAKES.items() for divergence in takes]
BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
Teacher = Tensor | Head | TopK | Expected


def column(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def moved(teacher: Teacher, device: str) -> Teacher:
    if isinstance(teacher, Tensor):
        return teacher.to(device)
    if isinstance(teacher, Expected):
        values = (None if x is None else x.to(device) for x in (teacher.mean, teacher.bias, teacher.entropy))
        mean, bias, entropy = values
        assert mean is not None
        options = {"temperature": teacher.temperature, "checksum": teacher.checksum}
        return Expected(mean, bias=bias, entropy=entropy, **options)  # type: ignore[arg-type]
    return type(teacher)(*(x.to(device) for x in teacher.tensors()), **teacher.options())


def divergence_of(name: str, lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    """Of two distributions given by logarithms, (N,). A probability of 0 contributes 0."""
    p, q = lp.exp(), lq.exp()
    has = lp > -INF
    log_p = torch.where(has, lp, 0.0)
    if name in ("jsd", "skew_kl"):
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    if name == "forward_kl":
        value = torch.where(has, p * (log_p - lq), 0.0)
    elif name == "cross_entropy":
        value = torch.where(has, -p * lq, 0.0)
    elif name == "reverse_kl":
        value = q * (lq - lp)
    elif name == "jsd":
        value = torch.where(has, beta * p * (log_p - lm), 0.0) + (1 - beta) * q * (lq - lm)
    elif name == "skew_kl":
        value = torch.where(has, p * (log_p - lm), 0.0)
    elif name == "skew_reverse_kl":
        value = q * (lq - torch.logaddexp(lq + math.log(beta), lp + math.log1p(-beta)))
    else:
        value = (p - q).abs() / 2
    return value.sum(-1)


def compared(tail: str, lq: Tensor, ids: Tensor, log_probs: Tensor, floor: float) -> list[tuple[Tensor, Tensor]]:
    """For each row the logarithms (log p, log q) that its teacher of k ids compares."""
    rows = []
    vocabulary = lq.shape[1]
    for row, names, known in zip(lq, ids, log_probs.to(lq.dtype), strict=True):
        present = names >= 0
        names, known = names[present], known[present]
        others = torch.ones(vocabulary, dtype=torch.bool, device=lq.device).index_fill(0, names, False)
        rest = (1 - known.double().exp().sum()).clamp(min=0)
        if tail == "bucket":
            rest = rest.clamp(min=floor)
            lp, q = torch.cat([known, rest.log().to(known).view(1)]), row[names]
            if bool(others.any()):
                q = torch.cat([q, row[others].logsumexp(0, keepdim=True)])
            else:
                lp = known
        elif tail == "support":
            lp, q = known, row[names].log_softmax(0)
        else:
            each = (rest / others.sum()).log() if tail == "uniform" else torch.tensor(-INF)
            lp = torch.full_like(row, float(each)).index_copy(0, names, known)
            q = row
        rows.append(((lp - lp.logsumexp(0)).detach(), q))
    return rows


def soft(divergence: str, student: Tensor, teacher: TopK, log_probs: Tensor, **options: Any) -> Tensor:
    """S, with its T^2, for a teacher of k ids. ``log_probs``: the teacher's, in some precision."""
    temperature = options.get("temperature", 1.0)
    own = options.get("teacher_temperature", temperature)
    if teacher.tail in ("renormalize", "support"):
        log_probs = log_probs * (teacher.temperature / column(own, log_probs))
    lq = (student / column(temperature, student)).log_softmax(-1)
    floor = 2.0**-24 if divergence in ("reverse_kl", "skew_reverse_kl") else 0.0
    beta = options.get("beta", BETA.get(divergence, 0.0))
    pairs = compared(teacher.tail, lq, teacher.indices.reshape(len(lq), -1).long(), log_probs, floor)
    values = [divergence_of(divergence, lp.unsqueeze(0), q.unsqueeze(0), beta) for lp, q in pairs]
    squared = torch.as_tensor(temperature).to(student.dtype) ** 2 if options.get("scale_by_t2", True) else 1.0
    return torch.cat(values) * squared if values else student.sum(-1)


def weighed(student: Tensor, softness: Tensor, target: Tensor | None, **options: Any) -> Tensor:
    """L of every row."""
    weight = options.get("row_weight", torch.ones(len(student))).to(student)
    if target is None:
        return torch.where(weight == 0, 0.0, weight * softness)
    alpha = torch.as_tensor(options.get("alpha", 0.5)).to(student)
    kept = target != options.get("ignore_index", -100)
    smoothing = options.get("label_smoothing", 0.0)
    hard = F.cross_entropy(student, target.where(kept, 0), label_smoothing=smoothing, reduction="none")
    hard = hard + options.get("z_loss", 0.0) * student.logsumexp(-1).square()
    loss = weight * (alpha * hard + torch.where(alpha == 1, 0.0, (1 - alpha) * softness))
    return torch.where(kept & (weight != 0), loss, 0.0)


def upstream(n: int) -> Tensor:
    """Not 1, and as large as a sum's."""
    return torch.linspace(0.5, 1.5, n, dtype=torch.float64)


def plain(teacher: TopK, target: Tensor | None = None, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Loss and gradient of every row, as a function of the student's logits and the teacher's log-probabilities."""
    divergence = options.pop("divergence")

    def compute(student: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        leaf = student.detach().requires_grad_()
        loss = weighed(leaf, soft(divergence, leaf, teacher, log_probs, **options), target, **options)
        (grad,) = torch.autograd.grad(loss, leaf, upstream(len(leaf)).to(loss))
        return loss.detach(), grad

    return compute


def evaluate(impl: str, student: Tensor, teacher: Teacher | Sequence[Teacher], **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of every row and the gradient, from the library."""
    device = device_of(impl)
    leaf = student.detach().to(device).requires_grad_()
    several = isinstance(teacher, (list, tuple))
    given: Any = [moved(x, device) for x in teacher] if several else moved(teacher, device)  # type: ignore
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    loss = fastkd.kd_loss(leaf, given, reduction="none", impl=impl, **there)
    loss.backward(upstream(loss.numel()).to(loss).view(loss.shape))
    assert leaf.grad is not None
    return loss.detach().cpu(), leaf.grad.cpu()


def labels(n: int, v: int) -> Tensor:
    return torch.arange(n) * 7919 % v


def known(
    tail: str, n: int, v: int, k: int, dtype: torch.dtype = torch.float32, temperature: float = 1.0, seed: int = 2
) -> TopK:
    """The k best ids of flat logits in random order; every seventh entry is absent, and says something else."""
    t = flat_logits(n, v, seed=seed)
    if tail == "samples":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial((t / temperature).softmax(-1), k, generator=generator)
        counts = torch.randint(0, 9, (n, k), generator=generator)
        counts[:, 0] += 1
        return TopK.from_samples(drawn.masked_fill(torch.arange(k) % 7 == 5, -1), counts, temperature=temperature)
    full = TopK.from_logits(t, k, temperature=temperature, tail=tail)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    ids = full.indices[:, order].masked_fill(torch.arange(k) % 7 == 5, -1)
    return TopK(ids, full.log_probs[:, order].to(dtype), tail=tail, temperature=temperature)


OPTIONS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "soft": lambda n, v: {},
    "hard": lambda n, v: {"target": labels(n, v), "alpha": 0.3, "label_smoothing": 0.1},
    "temperature_2": lambda n, v: {"target": labels(n, v), "temperature": 2.0, "z_loss": 0.01},
    "student_alone": lambda n, v: {"temperature": 2.0, "teacher_temperature": 1.0, "scale_by_t2": False},
    "by_row": lambda n, v: {
        "target": labels(n, v),
        "temperature": torch.linspace(0.5, 4, n),
        "teacher_temperature": 1.0,
        "alpha": torch.linspace(0, 1, n),
        "row_weight": torch.linspace(2, 0.5, n),
    },
    "weights": lambda n, v: {
        "target": labels(n, v).index_fill(0, torch.tensor([1]), -1),
        "ignore_index": -1,
        "row_weight": torch.arange(n).remainder(3).float(),
    },
}
RECORDED = {"temperature_2": 2.0}
