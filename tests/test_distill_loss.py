"""The loss of a Distiller against the same written out by hand, for each kind of model; and what it leaves alone."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_models import Dense, Net, Text, assert_same, everything_of, hooks, texts, vectors
from torch import Tensor, nn

import fastkd
from fastkd.distill import Distiller, Focal, OfBatch, Term, next_token_labels


def soft(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return temperature**2 * (p * (p.log() - q)).sum(-1).mean()


def quiet(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode."""
    return copy.deepcopy(model).eval()


def test_logits_and_features() -> None:
    student, teacher, batch = Net(6, dropout=0.0), Net(9), vectors()
    terms = [
        Term(fastkd.kd_loss, temperature=2.0, alpha=0.3),
        Term(fastkd.hint_loss, "body.2", "body.2", weight=0.7, adapt="linear"),
        Term(fastkd.rkd_distance_loss, "body", "body", weight=25.0),
    ]
    before = everything_of(teacher)
    distiller = Distiller(student, teacher, terms).prepare(batch)
    twin = copy.deepcopy(student)
    loss, parts = distiller.loss(batch)
    loss.backward()

    x, y = batch
    eyes, brain = quiet(teacher).body[:3], quiet(teacher)
    own = twin.body[:3](x)
    logits = twin.head(own)
    hint = F.mse_loss(distiller.adapters["hint_loss/body_2"](own), eyes(x).detach())
    kd = 0.3 * F.cross_entropy(logits, y) + 0.7 * soft(logits, brain(x).detach(), 2.0)
    relation = fastkd.rkd_distance_loss(own, eyes(x))
    want = kd + 0.7 * hint + 25 * relation
    torch.testing.assert_close(loss, want)
    assert list(parts) == ["kd_loss", "hint_loss/body.2", "rkd_distance_loss/body"]
    torch.testing.assert_close(list(parts.values()), [kd, hint, relation])
    assert not any(part.requires_grad or part.ndim for part in parts.values())
    grads = torch.autograd.grad(want, list(twin.parameters()))
    torch.testing.assert_close([parameter.grad for parameter in student.parameters()], list(grads))
    assert_same(teacher, before)
    assert hooks(student) == hooks(teacher) == 0


def test_dense_maps() -> None:
    student, teacher = Dense(4), Dense(6)
    x, y = torch.randn(2, 3, 5, 4), torch.randint(4, (2, 5, 4))
    y[0, 0] = -100
    terms = [
        Term(fastkd.kd_loss, alpha=0.5, dim=1, row_weight=Focal(normalize=True)),
        Term(fastkd.attention_transfer_loss, "stem", "stem", weight=10.0),
        Term(fastkd.hint_loss, "norm", "norm", adapt="conv"),
    ]
    distiller = Distiller(student, teacher, terms).prepare((x, y))
    twin = copy.deepcopy(student)
    loss, _ = distiller.loss((x, y))

    brain = quiet(teacher)
    own = twin.norm(twin.stem(x))
    logits, taught = twin.head(own.relu()).movedim(1, -1), brain(x).movedim(1, -1).detach()
    hard = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none")
    divergence = (taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    weight = ((1 - (-hard).exp()) ** 2).detach() * (y != -100)
    kd = (weight * (hard + divergence) / 2).sum() / weight.sum()
    want = kd + 10 * fastkd.attention_transfer_loss(twin.stem(x), brain.stem(x))
    want = want + F.mse_loss(distiller.adapters["hint_loss/norm"](own), brain.norm(brain.stem(x)))
    torch.testing.assert_close(loss, want)


def test_text() -> None:
    """A mapping, an output with logits, labels that are shifted, a mask from the batch, tied weights, attention."""
    student, teacher, batch = Text(6, 1), Text(8, 2), texts()
    student.eval()  # its dropout would differ from the formula's
    terms = [
        Term(fastkd.kd_loss, temperature=2.0, divergence="reverse_kl"),
        Term(fastkd.hint_loss, "layers.0", "layers.1", adapt="linear", mask=OfBatch(mask)),
        Term(attention_distance, "layers.0.self_attn:attention", "layers.1.self_attn:attention"),
        Term(relations, ["layers.0:input"], ["layers.1:input"], mask=OfBatch(flat_mask), relation_heads=2),
    ]
    before = everything_of(teacher)
    distiller = Distiller(student, teacher, terms, labels=next_token_labels).prepare(batch)
    loss, parts = distiller.loss(batch)
    loss.backward()

    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, taught = student(**ids), quiet(teacher)(**ids)
    adapted = distiller.adapters["hint_loss/layers_0"](own.hidden_states[1])
    keep = batch["attention_mask"].bool()
    shifted = batch["labels"].roll(-1, 1)
    shifted[:, -1] = -100
    want = {
        "kd_loss": fastkd.kd_loss(own.logits, taught.logits, shifted, temperature=2.0, divergence="reverse_kl"),
        "hint_loss/layers.0": F.mse_loss(adapted[keep], taught.hidden_states[2][keep]),
        "relations/layers.0:input": relations(own.hidden_states[:1], taught.hidden_states[1:2], keep, 2),
    }
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value.detach())
    assert 0 < parts["attention_distance/layers.0.self_attn:attention"] < 1
    assert_same(teacher, before)


def mask(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()[..., None]


def flat_mask(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def relations(student: Any, teacher: Any, mask: Tensor, relation_heads: int) -> Tensor:
    one_head = ([x.unsqueeze(1) for x in side] for side in (student, teacher))
    return fastkd.minilm_loss(*one_head, mask=mask, relation_heads=relation_heads)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def test_different_tasks() -> None:
    """Vectors to five classes, taught by what a model of three classes and two inputs has inside."""

    class Two(Net):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + shift)

    student, teacher, (x, y) = Net(6, dropout=0.0), Two(6, classes=3), vectors()
    terms = [Term(fastkd.cross_entropy, label_smoothing=0.1), Term(fastkd.cka_loss, "body", "body", weight=0.5)]
    distiller = Distiller(student, teacher, terms, teacher_inputs=lambda batch: (batch[0], torch.ones(8)))
    twin = copy.deepcopy(student)
    loss, _ = distiller.loss((x, y))
    want = F.cross_entropy(twin(x), y, label_smoothing=0.1)
    torch.testing.assert_close(loss, want + 0.5 * fastkd.cka_loss(twin.body(x), quiet(teacher).body(x + 1)))


def test_several_teachers() -> None:
    student, small, large, batch = Net(6, dropout=0.0), Net(7), Net(9), vectors()
    terms = [
        Term(fastkd.kd_loss, teacher_weight=[0.25, 0.75], alpha=0.0, name="all"),
        Term(fastkd.kd_loss, teacher="large/", alpha=0.0, name="one"),
        Term(fastkd.cka_loss, "body", "small/body"),
    ]
    distiller = Distiller(student, {"small": small, "large": large}, terms)
    twin = copy.deepcopy(student)
    loss, parts = distiller.loss(batch)
    x, _ = batch
    body = twin.body(x)
    logits = twin.head(body)
    first, second = soft(logits, quiet(small)(x), 1.0), soft(logits, quiet(large)(x), 1.0)
    want = [0.25 * first + 0.75 * second, second, fastkd.cka_loss(body, quiet(small).body(x))]
    torch.testing.assert_close(list(parts.values()), [value.detach() for value in want])
    torch.testing.assert_close(loss, sum(want))
    listed = Distiller(student.eval(), [small, large], [Term(fastkd.kd_loss, teacher=["1/", "0/"], alpha=0.0)])
    named = Distiller(student, {"1": small, "0": large}, [Term(fastkd.kd_loss, alpha=0.0)])
    torch.testing.assert_close(listed.loss(batch), named.loss(batch))


def test_no_teacher() -> None:
    student, (x, y) = Net(6, dropout=0.0).eval(), vectors()
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), fastkd.cross_entropy):
        got, _ = Distiller(student, None, [Term(loss)]).loss((x, y))
        torch.testing.assert_close(got, F.cross_entropy(student(x), y))
    got, _ = Distiller(student, None, [Term(energy, teacher=None, target=False)]).loss(x)
    torch.testing.assert_close(got, student(x).square().mean())


def energy(student: Tensor) -> Tensor:
    return student.square().mean()


def test_any_two_functions_of_tensors() -> None:
    student, teacher, batch = Net(6).eval(), Net(6).eval(), vectors()
    half = functools.partial(F.huber_loss, delta=0.5)
    terms = [Term(F.mse_loss), Term(nn.SmoothL1Loss(beta=0.5), "body", "body"), Term(half), Term(torch.dist)]
    _, parts = Distiller(student, teacher, terms).loss(batch)
    own, taught = student(batch[0]).detach(), teacher(batch[0]).detach()
    bodies = student.body(batch[0]).detach(), teacher.body(batch[0]).detach()
    want = {
        "mse_loss": F.mse_loss(own, taught),
        "SmoothL1Loss/body": F.smooth_l1_loss(*bodies, beta=0.5),
        "huber_loss": half(own, taught),
        "dist": (own - taught).norm(),
    }
    torch.testing.assert_close(parts, want)


@pytest.mark.parametrize("loss", [fastkd.KDLoss(temperature=3.0), fastkd.dkd_loss, fastkd.nkd_loss, fastkd.wsld_loss])
def test_labels_reach_losses_that_take_them(loss: Any) -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(6).eval(), vectors()
    got, _ = Distiller(student, teacher, [Term(loss)]).loss((x, y))
    torch.testing.assert_close(got, loss(student(x), teacher(x), y))


def test_labels_that_are_absent_or_refused() -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(6).eval(), vectors()
    want = soft(student(x), teacher(x), 1.0)
    for term, batch in ((Term(fastkd.kd_loss), x), (Term(fastkd.kd_loss, target=False), (x, y))):
        torch.testing.assert_close(Distiller(student, teacher, [term]).loss(batch)[0], want)
    other = Term(fastkd.kd_loss, alpha=1.0, target=lambda batch: (batch[1] + 1) % 5)
    loss, _ = Distiller(student, teacher, [other]).loss((x, y))
    torch.testing.assert_close(loss, F.cross_entropy(student(x), (y + 1) % 5))


def test_no_rows() -> None:
    terms = [Term(fastkd.kd_loss), Term(fastkd.hint_loss, "head", "head"), Term(fastkd.gram_loss, "body.0", "body.0")]
    distiller = Distiller(Net(6).eval(), Net(6), terms)
    loss, _ = distiller.loss((torch.zeros(0, 8), torch.zeros(0, dtype=torch.long)))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in distiller.parameters())


def test_parts_of_a_batch_add_up() -> None:
    """With one normalizer the gradients of parts, of which one has no label, are those of the whole."""
    student, teacher, (x, y) = Net(6).eval(), Net(6), vectors(9)
    y[:4] = -100
    terms = [
        Term(fastkd.kd_loss, alpha=0.3),
        Term(fastkd.hint_loss, "head", "head"),
        Term(fastkd.KDLoss(), name="module"),
    ]
    distiller = Distiller(student, teacher, terms)
    distiller.loss((x, y))[0].backward()
    want = [parameter.grad for parameter in student.parameters()]
    student.zero_grad()
    normalizer: Any
    for normalizer in ((y != -100).sum(), {"kd_loss": 5, "module": 5.0, "hint_loss/head": 1}):
        for rows in (slice(0, 4), slice(4, 6), slice(6, 9)):
            loss, _ = distiller.loss((x[rows], y[rows]), normalizer=normalizer, share=len(y[rows]) / 9)
            loss.backward()
        torch.testing.assert_close([parameter.grad for parameter in student.parameters()], want)
        student.zero_grad()
    with pytest.raises(
        ValueError, match="share must be given with normalizer, which hint_loss does not take, got None"
    ):
        distiller.loss((x, y), normalizer=5)


def test_cached_teachers_do_not_run() -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(9).eval(), vectors()
    terms = [Term(fastkd.kd_loss), Term(fastkd.cka_loss, "body", "body")]
    distiller = Distiller(student, teacher, terms)
    want = distiller.loss((x, y))
    known = distiller.teach((x, y))
    assert list(known) == ["", "body"]
    assert not any(value.requires_grad for value in known.values())
    teacher.forward = None  # type: ignore[assignment]
    torch.testing.assert_close(distiller.loss((x, y), teacher_outputs=known), want)
    cached = Distiller(student, teacher, terms, cache=lambda batch: known)
    torch.testing.assert_close(cached.loss((x, y)), want)
    mapping = {"x": x, "labels": y, "teacher_outputs": known}
    torch.testing.assert_close(Distiller(student, teacher, terms).loss(mapping), want)
    with pytest.raises(ValueError, match="teacher_outputs must have the values of 'body', got ''"):
        distiller.loss((x, y), teacher_outputs={"": known[""]})


def test_one_pass_for_several_students() -> None:
    teacher, batch = Net(9), vectors()
    distillers = [
        Distiller(Net(n).eval(), teacher, [Term(fastkd.cka_loss, path, path)]) for n, path in ((4, "body"), (5, "head"))
    ]
    paths = {path for distiller in distillers for path in distiller.teacher_paths()}
    distillers[0].attach()
    known = distillers[0].teach(batch, paths)
    assert known.keys() == {"body", "head"}
    assert hooks(teacher) == 2
    distillers[0].detach()
    assert hooks(teacher) == 0
    for distiller in distillers:
        torch.testing.assert_close(distiller.loss(batch, teacher_outputs=known), distiller.loss(batch))


def test_a_forward_of_ones_own() -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(6).eval(), vectors()
    distiller = Distiller(
        student, teacher, [Term(fastkd.kd_loss, alpha=0.0)], forward=lambda model, x: model.head(model.body(x) * 2)
    )
    want = soft(student.head(student.body(x) * 2), teacher.head(teacher.body(x) * 2), 1.0)
    torch.testing.assert_close(distiller.loss((x, y))[0], want)


def test_a_list_is_one_argument() -> None:
    """As detectors take images of different sizes."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.scale * torch.stack([image.sum() for image in images])

    batch = ([torch.ones(2, 2), torch.ones(3, 1)],)
    loss, _ = Distiller(Images(), None, [Term(energy, teacher=None)]).loss(batch)
    assert loss == (16 + 9) / 2


def test_heads_in_place_of_logits() -> None:
    """The models stop before their heads, whose logits are never all there."""
    student, teacher, (x, y) = Net(6).eval(), Net(9).eval(), vectors()

    own, taught = student.head, teacher.head

    def fused(hidden: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        heads = fastkd.Head(hidden, own.weight, own.bias), fastkd.Head(teacher, taught.weight, taught.bias)
        return fastkd.kd_loss(*heads, target, temperature=2.0)

    distiller = Distiller(student, teacher, [Term(fused)], forward=lambda model, x: model.body(x))
    loss, _ = distiller.loss((x, y))
    loss.backward()
    got = own.weight.grad
    want = fastkd.kd_loss(student(x), teacher(x), y, temperature=2.0)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, own.weight)[0])
    assert taught.weight.grad is None


def test_nothing_is_kept_after_a_step() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def spy(student: Tensor, teacher: Tensor) -> Tensor:
        seen.extend((weakref.ref(student), weakref.ref(teacher)))
        return (student - teacher).square().mean()

    distiller = Distiller(Net(6), Net(6), [Term(spy, "body", "body")])
    loss, parts = distiller.loss(vectors())
    loss.backward()
    del loss, parts
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
