"""Layers of the teacher in the student: which, how, and what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distill_models import Dense, Net, Text, assert_same, everything_of
from torch import nn

from fastkd.distill import init_from_teacher


def stack(depth: int, width: int = 3) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    for index, layer in enumerate(model):
        nn.init.constant_(layer.weight, float(index))
        nn.init.constant_(layer.bias, -float(index))
    return model


def levels(model: nn.Sequential) -> list[float]:
    return [layer.weight[0, 0].item() for layer in model]


@pytest.mark.parametrize(
    ("spacing", "depths", "want"),
    [
        ("even", (3, 6), [0, 2, 5]),
        ("even", (6, 12), [0, 2, 4, 7, 9, 11]),  # those of DistilBERT
        ("even", (1, 4), [0]),
        ("even", (4, 4), [0, 1, 2, 3]),
        ("first", (2, 5), [0, 1]),
        ("last", (2, 5), [3, 4]),
        ("average", (2, 5), [0.5, 3.0]),
        ("average", (2, 4), [0.5, 2.5]),
    ],
)
def test_stacks(spacing: str, depths: tuple[int, int], want: list[float]) -> None:
    student, teacher = stack(depths[0]), stack(depths[1])
    nn.init.constant_(student[0].weight, 77.0)
    before = everything_of(teacher)
    done = init_from_teacher(student, teacher, {"*": "*"}, spacing=spacing)
    assert levels(student) == want
    assert [-layer.bias[2].item() for layer in student] == want
    assert len(done.copied) == 2 * depths[0]
    assert done.skipped == {}
    assert_same(teacher, before)


def test_a_middle_is_rounded_as_python_does() -> None:
    student, teacher = stack(3), stack(10)
    init_from_teacher(student, teacher, {"*": "*"})
    assert levels(student) == [0, 4, 9]  # round(4.5)


def test_buffers_and_what_they_are() -> None:
    student, teacher = Dense(4), Dense(4)
    for model in (student, teacher):
        model(torch.randn(2, 3, 4, 4))
    teacher(torch.randn(2, 3, 4, 4))
    done = init_from_teacher(student, teacher, {"norm": "norm", "stem": "stem", "head.weight": "head.weight"})
    assert set(done.copied) == {f"norm.{name}" for name in teacher.norm.state_dict()} | {
        "stem.weight",
        "stem.bias",
        "head.weight",
    }
    assert student.norm.num_batches_tracked == 2
    torch.testing.assert_close(student.norm.running_var, teacher.norm.running_var, rtol=0, atol=0)
    assert not torch.equal(student.head.bias, teacher.head.bias)
    assert student.stem.weight.data_ptr() != teacher.stem.weight.data_ptr()
    assert student.stem.weight.requires_grad


def test_the_mean_of_layers() -> None:
    student, teacher = nn.Sequential(nn.BatchNorm1d(2)).half(), nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3)))
    for index, norm in enumerate(teacher):
        norm.running_mean.fill_(float(index))
        norm.num_batches_tracked.fill_(7 + 2 * index)
    done = init_from_teacher(student, teacher, {"0": ["1", "2"]})
    assert done.copied["0.running_mean"] == ("1.running_mean", "2.running_mean")
    assert student[0].running_mean.tolist() == [1.5, 1.5]
    assert student[0].running_mean.dtype is torch.float16
    assert student[0].num_batches_tracked == 9


def test_text_models() -> None:
    """A stack inside of a model, and weights that are tied on both sides."""
    student, teacher = Text(8, 2), Text(8, 4)
    done = init_from_teacher(student, teacher, {"embed": "embed", "layers.*": "layers.*", "head": "head"})
    torch.testing.assert_close(dict(student.layers[1].state_dict()), dict(teacher.layers[3].state_dict()))
    assert torch.equal(student.head.weight, teacher.embed.weight)
    assert student.head.weight is student.embed.weight
    assert done.copied["layers.1.norm1.bias"] == ("layers.3.norm1.bias",)


def test_the_whole_model_by_default() -> None:
    student, teacher = Net(6), Net(6)
    student.register_buffer("scratch", torch.zeros(1), persistent=False)
    init_from_teacher(student, nn.DataParallel(teacher))
    torch.testing.assert_close(dict(student.state_dict()), dict(teacher.state_dict()))
    inner = nn.ModuleDict({"model": Net(6)})
    init_from_teacher(student, inner, {"": "model"})
    torch.testing.assert_close(dict(student.state_dict()), dict(inner["model"].state_dict()))


def test_weights_that_are_tied_in_the_student_alone() -> None:
    student, teacher = Text(8, 1), Text(8, 1)
    teacher.head.weight = nn.Parameter(torch.randn_like(teacher.embed.weight))
    before = everything_of(student)
    with pytest.raises(ValueError, match=r"give tied weights one source .*, got head.weight is tied to embed.weight"):
        init_from_teacher(student, teacher)
    assert_same(student, before)
    done = init_from_teacher(student, teacher, strict=False)
    assert list(done.skipped) == ["head.weight"]
    assert torch.equal(student.head.weight, teacher.embed.weight)


def test_what_does_not_fit() -> None:
    student, teacher = Net(6), Net(9)
    before = everything_of(student)
    rule = r"init_from_teacher: student must have the teacher's tensors \(strict=False skips others\), got "
    with pytest.raises(ValueError, match=rule + r"body.0.weight is \(6, 8\), the teacher's body.0.weight is \(9, 8\)"):
        init_from_teacher(student, teacher)
    assert_same(student, before)
    done = init_from_teacher(student, teacher, strict=False)
    assert set(done.copied) == {"head.bias", "body.1.num_batches_tracked"}
    assert set(done.skipped) | set(done.copied) == set(student.state_dict())
    assert torch.equal(student.head.bias, teacher.head.bias)

    plain = nn.Linear(8, 5, bias=False)
    with pytest.raises(ValueError, match=rule + r"the student has no bias for the teacher's head.bias"):
        init_from_teacher(plain, Net(8), {"": "head"})
    with pytest.raises(ValueError, match=rule + r"the teacher has no bias for the student's head.bias"):
        init_from_teacher(Net(8), plain, {"head": ""})
    counter = nn.Module()
    counter.register_buffer("bias", torch.zeros(5, dtype=torch.int8))
    with pytest.raises(ValueError, match=rule + r"bias is torch.int8, the teacher's head.bias is torch.float32"):
        init_from_teacher(counter, Net(8), {"bias": "head.bias"})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"boddy": "body"},
            r"layers must name layers of the student that have tensors, such as \['body'.*\], got 'boddy'",
        ),
        ({"body": "bodi"}, r"layers must name layers of the teacher .*, got 'bodi'"),
        ({"body.*": "body"}, r"layers must have one \* on each side, or none, got 'body.\*': 'body'"),
        ({"body.*": ["body.*", "body.*"]}, r"one \* on each side"),
        ({"head.*": "body.*"}, r"layers must name a stack of numbered layers, got 'head.\*'"),
        ({"body": "body", "body.0": "body.0"}, r"layers must name each tensor once \(body.0.weight\)"),
    ],
)
def test_wrong_layers(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_from_teacher(Net(6), Net(6), layers)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="student must have at most the teacher's 2 layers in a stack, got 3"):
        init_from_teacher(stack(3), stack(2), {"*": "*"})
    with pytest.raises(ValueError, match="spacing must be one of even, first, last, average, got 'odd'"):
        init_from_teacher(stack(2), stack(2), spacing="odd")
    with pytest.raises(TypeError, match="student must be a module, got str"):
        init_from_teacher("x", stack(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layers must be a dict of paths, got list"):
        init_from_teacher(stack(2), stack(2), ["0"])  # type: ignore[arg-type]


def test_a_copy_is_no_link() -> None:
    student, teacher = stack(2), stack(2)
    init_from_teacher(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        student[0].weight.add_(1)
    torch.testing.assert_close(dict(teacher.state_dict()), dict(before))


@pytest.mark.parametrize("layers", [{"0": 3}, {"0": None}, {"0": []}, {0: "0"}, {"0": ["0", 1]}])
def test_what_is_no_path(layers: Any) -> None:
    with pytest.raises(TypeError, match="init_from_teacher: layers must be a dict of paths to paths or lists of them"):
        init_from_teacher(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), layers)
