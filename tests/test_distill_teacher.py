"""Teachers stay what they are, whatever they are made of; and what is refused."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from distill_models import Net, assert_same, everything_of, hooks, vectors
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

import fastkd
from fastkd.distill import Distiller, Linear, Teacher, Term
from fastkd.int8 import Int8Linear, WeightOnly

TERM = Term(fastkd.kd_loss)


@pytest.mark.parametrize("training", [False, True])
def test_a_teacher_is_frozen(training: bool) -> None:
    """Its dropout off, its BatchNorm by its statistics, and all flags as they were, some set and some not."""
    student, teacher, (x, y) = Net(6).eval(), Net(9).train(training), vectors()
    teacher.body[1].train(not training)
    teacher.head.weight.requires_grad_(False)
    before, want = everything_of(teacher), copy.deepcopy(teacher).eval()(x)
    distiller = Distiller(student, teacher, [TERM])
    distiller.train()
    student.eval()
    torch.testing.assert_close(distiller.teach((x, y))[""], want)
    for _ in range(2):
        distiller.loss((x, y))[0].backward()
    assert_same(teacher, before)


def test_a_teacher_is_frozen_when_it_fails() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise OSError("no")

    student, teacher = Net(6), Fails(6)
    before = everything_of(teacher)
    distiller = Distiller(student, teacher, [TERM, Term(fastkd.cka_loss, "body", "body")])
    with pytest.raises(OSError, match="no"):
        distiller.loss(vectors())
    assert_same(teacher, before)
    assert hooks(student) == hooks(teacher) == 0
    with pytest.raises(OSError, match="no"):
        Distiller(teacher, Net(6), [Term(fastkd.cka_loss, "body", "body")]).loss(vectors())
    assert hooks(teacher) == 0


def test_modes_are_set_without_the_side_effects_of_eval() -> None:
    class Folds(nn.Linear):
        """As adapters of low rank that fold themselves into the weight when they are evaluated."""

        def train(self, mode: bool = True) -> Folds:
            if not mode:
                self.weight.data.add_(1)
            return super().train(mode)

    teacher = nn.Sequential(Folds(8, 5))
    before = everything_of(teacher)
    Distiller(Net(6), teacher, [TERM]).loss(vectors())
    assert_same(teacher, before)


def test_a_teacher_that_changes_itself() -> None:
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__(6)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("scratch", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.scratch += 1
            self.calls += 1
            return super().forward(x)

    with pytest.raises(RuntimeError, match=r"the teacher \(Counts\) changed calls in its forward, in evaluation mode$"):
        Distiller(Net(6), Counts(), [TERM]).loss(vectors())


def test_parameters_are_the_students_and_the_adapters() -> None:
    student, teacher, batch = Net(6), Net(9), vectors()
    criterion = nn.Module()
    criterion.scale = nn.Parameter(torch.ones(()))
    criterion.forward = lambda student, teacher: (student - criterion.scale * teacher).square().mean()
    terms = [TERM, Term(fastkd.hint_loss, "body", "body", adapt="linear"), Term(criterion, "head", "head")]
    distiller = Distiller(student, teacher, terms)
    with pytest.raises(RuntimeError, match=r"call prepare\(batch\) before .* no adapter yet for hint_loss/body$"):
        distiller.loss(batch)
    rest = copy.deepcopy(student.state_dict())
    assert distiller.prepare(batch) is distiller
    torch.testing.assert_close(dict(student.state_dict()), dict(rest))  # BatchNorm too
    assert student.training
    adapter = distiller.adapters["hint_loss/body"]
    distiller.prepare(batch)
    assert distiller.adapters["hint_loss/body"] is adapter
    names = {f"student.{name}" for name, _ in student.named_parameters()}
    assert {name for name, _ in distiller.named_parameters()} == names | {
        "adapters.hint_loss/body.module.weight",
        "adapters.hint_loss/body.module.bias",
        "losses.Module/head.scale",
    }
    assert not any(name.startswith("teacher") for name in distiller.state_dict())
    twin = Distiller(Net(6), copy.deepcopy(teacher), terms[:2]).prepare(batch)
    twin.load_state_dict({name: value for name, value in distiller.state_dict().items() if "losses" not in name})
    distiller.eval(), twin.eval()
    torch.testing.assert_close(
        twin.loss(batch)[1], {name: distiller.loss(batch)[1][name] for name in ("kd_loss", "hint_loss/body")}
    )


def test_adapters_have_the_students_dtype() -> None:
    student, (x, y) = Net(6).double(), vectors()
    terms = [Term(fastkd.hint_loss, "body", "body", adapt="linear")]
    distiller = Distiller(student, Net(9), terms, inputs=lambda b: b[0].double(), teacher_inputs=lambda b: b[0])
    loss, _ = distiller.prepare((x, y)).loss((x, y))
    assert distiller.adapters["hint_loss/body"].module.weight.dtype is loss.dtype is torch.float64


def test_one_adapter_for_two_terms() -> None:
    shared = nn.Linear(6, 9)
    terms = [Term(fastkd.hint_loss, path, path, adapt=shared) for path in ("body.1", "body.2")]
    distiller = Distiller(Net(6), Net(9), terms)
    distiller.loss(vectors())[0].backward()
    assert len(list(distiller.parameters())) == len(list(distiller.student.parameters())) + 2
    assert shared.weight.grad is not None


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"int8": True}, {"int8": WeightOnly()}, {"device": "cpu"}]
)
def test_a_teacher_in_another_form(options: dict[str, Any]) -> None:
    model, (x, y) = Net(64), vectors()
    before = everything_of(model)
    teacher = Teacher(model, **options)
    distiller = Distiller(Net(6), teacher, [TERM, Term(fastkd.cka_loss, "body", "body")])
    known = distiller.teach((x, y))
    assert_same(model, before)
    assert teacher.model is not model
    assert isinstance(teacher.model.head, Int8Linear) is ("int8" in options)
    assert known[""].dtype is options.get("dtype", torch.float32)
    torch.testing.assert_close(known[""].float(), copy.deepcopy(model).eval()(x), atol=0.05, rtol=0.05)
    distiller.loss((x, y))[0].backward()


def test_inputs_of_every_form_are_cast() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, pair: Pair, rest: list[Any]) -> Tensor:
            kinds = [pair.x, pair.ids, rest[0][0], rest[1]["y"]]
            assert [one.dtype for one in kinds] == [self.one.dtype, torch.int64, self.one.dtype, torch.bool]
            assert rest[2] == "text"
            return self.one * torch.stack([one.sum().to(self.one.dtype) for one in kinds])

    batch = {"pair": Pair(torch.ones(3), torch.arange(3)), "rest": [(torch.ones(2),), {"y": torch.ones(2) > 0}, "text"]}
    distiller = Distiller(Sum(), Teacher(Sum(), dtype=torch.float64), [Term(nn.functional.mse_loss)])
    assert distiller.teach(batch)[""].tolist() == [3, 3, 2, 2]
    assert distiller.loss(batch)[0] == 0
    assert batch["pair"].x.dtype is torch.float32  # type: ignore[union-attr]


class Pair(NamedTuple):
    x: Tensor
    ids: Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torch(mode: Any) -> None:
    student, teacher, batch = Net(6, dropout=0.0).eval(), Net(9), vectors()
    before = everything_of(teacher)
    terms = [TERM, Term(fastkd.hint_loss, "body", "body", adapt="linear")]
    distiller = Distiller(student, teacher, terms).prepare(batch)
    want, _ = distiller.loss(batch)
    with mode():
        got, _ = distiller.loss(batch)
        assert distiller.teach(batch)[""].requires_grad is False
    torch.testing.assert_close(got, want.detach() if not got.requires_grad else want, rtol=0.05, atol=0.02)
    assert got.dtype is torch.float32
    assert_same(teacher, before)


def test_a_teacher_takes_no_random_number() -> None:
    """So a student's dropout is the same with a cache as without."""
    student, teacher, batch = Net(6), Net(9), vectors()
    distiller = Distiller(student, teacher, [TERM])
    known = distiller.teach(batch)
    losses = []
    for given in (None, known):
        torch.manual_seed(3)
        losses.append(distiller.loss(batch, teacher_outputs=given)[0])
    assert torch.equal(*losses)


def test_teachers_move_and_keep_their_numbers() -> None:
    student, teacher = Net(6), Net(9)
    held = Teacher(Net(4), device="cpu")
    distiller = Distiller(student, [teacher, held], [Term(fastkd.kd_loss)])
    distiller.double()
    assert student.head.weight.dtype is torch.float64
    assert teacher.head.weight.dtype is torch.float32
    distiller.to("meta")
    assert student.head.weight.is_meta
    assert teacher.head.weight.is_meta
    assert not held.model.head.weight.is_meta


def test_what_cannot_be_a_student_or_a_teacher() -> None:
    student, teacher = Net(6), Net(6)
    with pytest.raises(TypeError, match="Distiller: student must be a module, got str"):
        Distiller("x", teacher, [TERM])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Teacher: model must be a module, got str"):
        Distiller(student, "x", [TERM])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"student must share no parameter or buffer with the teacher \(its .*\)"):
        Distiller(student, student, [TERM])
    teacher.head = student.head
    with pytest.raises(ValueError, match=r"\(its head.weight\): copy.deepcopy the teacher, got head.weight"):
        Distiller(student, teacher, [TERM])
    view = Net(6)
    view.head.weight = nn.Parameter(student.head.weight.detach().view(5, 6))
    with pytest.raises(ValueError, match="share no parameter"):
        Distiller(student, view, [TERM])
    with pytest.raises(
        ValueError, match=r"have a parameter that learns \(are student and teacher swapped\?\), got none"
    ):
        Distiller(Net(6).requires_grad_(False), Net(6), [TERM])
    with pytest.raises(ValueError, match=r"got 'body.2' \(a path of the teacher: are they swapped\?\)"):
        Distiller(nn.Linear(8, 5), Net(6), [Term(fastkd.cka_loss, "body.2", "")])
    with pytest.raises(ValueError, match=r"got 'body.2' \(a path of the student: are they swapped\?\)"):
        Distiller(Net(6), nn.Linear(8, 5), [Term(fastkd.cka_loss, "", "body.2")])
    with pytest.raises(ValueError, match="teacher must be given for a term that names one, got None"):
        Distiller(student, None, [TERM])
    with pytest.raises(ValueError, match="teacher must have names without a slash, got 'a/b'"):
        Distiller(student, {"a/b": Net(6)}, [TERM])
    with pytest.raises(ValueError, match=r"teacher must be None where there is none, got \[\]"):
        Distiller(student, [], [TERM])
    for path in ("body", "2/body"):
        with pytest.raises(ValueError, match=f"teacher must begin with '0/' or '1/', got '{path}'"):
            Distiller(student, [Net(6), Net(6)], [Term(fastkd.cka_loss, "body", path)])
    with pytest.raises(ValueError, match=r"Teacher: dtype must be float16, .*, got torch.int8"):
        Teacher(Net(6), dtype=torch.int8)


def test_optimizers() -> None:
    student, teacher, batch = Net(6), Net(6), vectors()
    terms = [Term(fastkd.hint_loss, "body", "body", adapt="linear")]
    distiller = Distiller(student, teacher, terms).prepare(batch)
    distiller.check_optimizer(torch.optim.SGD(distiller.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer must hold no parameter of the teacher, got body.0.weight"):
        distiller.check_optimizer(torch.optim.SGD([*distiller.parameters(), *teacher.parameters()], lr=0.1))
    with pytest.raises(
        ValueError, match=r"pass distiller.parameters\(\), got none of adapters.hint_loss/body.module.wei"
    ):
        distiller.check_optimizer(torch.optim.SGD(student.parameters(), lr=0.1))


def test_a_student_without_a_gradient() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    distiller = Distiller(Cut(6), Net(6), [TERM])
    with pytest.raises(RuntimeError, match="'' of the student has no gradient although its parameters learn"):
        distiller.loss(vectors())
    with torch.no_grad():
        distiller.loss(vectors())
    half = Net(6, dropout=0.0)
    half.body.requires_grad_(False)
    Distiller(half, Net(6), [TERM, Term(fastkd.cka_loss, "body", "body")]).loss(vectors())


def test_terms_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"terms must have different names \(give some a name=\), got 'kd_loss'"):
        Distiller(Net(6), Net(6), [TERM, Term(fastkd.kd_loss, temperature=2.0)])
    with pytest.raises(ValueError, match="different names"):
        Distiller(Net(6), Net(6), [Term(fastkd.kd_loss, name="a.b"), Term(fastkd.kd_loss, name="a_b")])
    with pytest.raises(TypeError, match="terms must be a list of one Term or more"):
        Distiller(Net(6), Net(6), [])
    with pytest.raises(TypeError, match="terms must be a list of Term, got function"):
        Distiller(Net(6), Net(6), [fastkd.kd_loss])  # type: ignore[list-item]


def test_arguments_of_terms() -> None:
    with pytest.raises(TypeError, match="Term: loss must be a function or a module, got int"):
        Term(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Term: delta must be an argument of kd_loss, got delta"):
        Term(fastkd.kd_loss, delta=1.0)
    with pytest.raises(TypeError, match="Term: row_weight must be an argument of hint_loss"):
        Term(fastkd.hint_loss, row_weight=torch.ones(2))
    with pytest.raises(TypeError, match="Term: return_parts must be left out"):
        Term(fastkd.kd_loss, return_parts=True)
    with pytest.raises(ValueError, match="Term: weight must be finite, got inf"):
        Term(fastkd.kd_loss, weight=float("inf"))
    with pytest.raises(ValueError, match="Term: adapt must be one of linear, conv, got 'relu'"):
        Term(fastkd.hint_loss, adapt="relu")
    with pytest.raises(TypeError, match="Term: adapt must be a module or one of linear, conv, got int"):
        Term(fastkd.hint_loss, adapt=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Term: adapt must be a module where there are several paths"):
        Term(fastkd.hint_loss, ["a", "b"], ["a", "b"], adapt="linear")
    with pytest.raises(ValueError, match="Term: path must read module"):
        Term(fastkd.hint_loss, "a:b")


def test_errors_of_losses_name_the_term() -> None:
    with pytest.raises(ValueError, match="term 'cross_entropy': the batch must have labels, got None"):
        Distiller(Net(6), None, [Term(fastkd.cross_entropy)]).loss(vectors()[0])
    with pytest.raises(ValueError, match="term 'dkd_loss': the batch must have labels, got None"):
        Distiller(Net(6), Net(6), [Term(fastkd.dkd_loss)]).loss(vectors()[0])
    with pytest.raises(ValueError, match=r"^term 'hint_loss/body': hint_loss: teacher must have the student's shape"):
        Distiller(Net(6), Net(9), [Term(fastkd.hint_loss, "body", "body")]).loss(vectors())
    with pytest.raises(
        TypeError, match=r"Term: loss must return a 0-dim tensor \(lambda\), got a tensor of shape \(6, 5\)"
    ):
        Distiller(Net(6), Net(9), [Term(lambda s, t: s - t, name="lambda")]).loss(vectors())
    term = Term(fastkd.hint_loss, "one", "one", adapt="linear", name="x")
    distiller = Distiller(Sums(), Sums(), [term])
    with pytest.raises(ValueError, match=r"adapt must be for tensors of 2 or more dimensions \(x, student\), got \(\)"):
        distiller.prepare(vectors())


class Sums(Net):
    def __init__(self) -> None:
        super().__init__(6)
        self.one = nn.Flatten(0)
        self.one.forward = torch.sum  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.one(x)


def test_a_distributed_student_with_adapters(tmp_path: Any) -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # without a process group
            nn.Module.__init__(self)
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    term = Term(fastkd.hint_loss, "body", "body", adapt="linear")
    with pytest.raises(
        ValueError, match=r"not be wrapped where adapters learn too: DistributedDataParallel\(distiller\)"
    ):
        Distiller(Wrapped(Net(6)), Net(9), [term])
    student, batch = Net(6).eval(), vectors()
    wrapped = Distiller(Wrapped(student).eval(), DataParallel(Net(9)), [Term(fastkd.cka_loss, "body", "body")])
    want = fastkd.cka_loss(student.body(batch[0]), wrapped.teach(batch)["body"])
    torch.testing.assert_close(wrapped.loss(batch)[0], want)


def test_schedules_reach_terms() -> None:
    student, teacher, (x, y) = Net(6).eval(), Net(6), vectors()
    terms = [
        Term(fastkd.kd_loss, temperature=Linear(4.0, 1.0), weight=Linear(1.0, 0.0, until=0.5)),
        Term(fastkd.hint_loss, "body", "body", weight=lambda done: done, adapt=nn.Linear(6, 6)),
    ]
    distiller = Distiller(student, teacher, terms)
    with pytest.raises(RuntimeError, match=r"a term has a schedule; call set_progress\(step, total\) before each loss"):
        distiller.loss((x, y))
    distiller.set_progress(0, 10)
    assert distiller.weights() == {"kd_loss": 1.0, "hint_loss/body": 0.0}
    distiller.adapters["hint_loss/body"].forward = None  # type: ignore[assignment]
    _, parts = distiller.loss((x, y))
    assert list(parts) == ["kd_loss"]
    torch.testing.assert_close(
        parts["kd_loss"], fastkd.kd_loss(student(x), teacher.eval()(x), y, temperature=4.0).detach()
    )
    distiller.set_progress(2, 10)
    loss, parts = Distiller(student, teacher, terms[:1]), None
    loss.set_progress(2, 10)
    got, parts = loss.loss((x, y))
    want = fastkd.kd_loss(student(x), teacher(x), y, temperature=3.4)
    torch.testing.assert_close(parts["kd_loss"], want.detach())
    torch.testing.assert_close(got, 0.6 * want)
    with pytest.raises(ValueError, match="set_progress: total must be positive, got 0"):
        distiller.set_progress(0, 0)


def test_a_teacher_that_nobody_asks_does_not_run() -> None:
    teacher = Net(6)
    teacher.forward = None  # type: ignore[assignment]
    terms = [Term(fastkd.cross_entropy), Term(fastkd.kd_loss, weight=0.0)]
    Distiller(Net(6), teacher, terms).loss(vectors())
    loss, parts = Distiller(Net(6), teacher, terms[1:]).loss(vectors())
    loss.backward()
    assert loss == 0
    assert parts == {}
