"""Networks of convolutions: one digit an image, and canvases on which every pixel of several digits has a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastkd

from ..distill import Distiller, Linear, Term
from . import digits
from .int8 import ConvNetwork
from .settings import DigitsSettings

SIDE, PER_CANVAS = 16, 2
BACKGROUND = digits.CLASSES
PLAIN = "logits: kd_loss"
UNITS = {"convolutional networks": "accuracy %", "a class for every pixel": "mean IoU %"}  # of the two tasks
Terms = Callable[[], list[Term]]


class Segmenter(nn.Module):
    """A class for every pixel of an image (N, 1, H, W): logits (N, 11, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (1, width, width, width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, d in zip(sizes, sizes[1:], (1, 2, 3), strict=False)
            )
        )
        self.head = nn.Conv2d(width, BACKGROUND + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(images))
        return logits


def canvases(images: Tensor, target: Tensor, count: int, seed: int) -> TensorDataset:
    """Digits pasted at random, and for each pixel the digit whose ink it is, or the background."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(count, 1, SIDE, SIDE)
    classes = torch.full((count, SIDE, SIDE), BACKGROUND)
    for canvas in range(count):
        for _ in range(PER_CANVAS):
            row = int(torch.randint(len(images), (), generator=generator))
            y, x = torch.randint(SIDE - 7, (2,), generator=generator).tolist()
            digit, place = images[row].reshape(8, 8), (slice(y, y + 8), slice(x, x + 8))
            ink = digit > 0.25
            pixels[canvas, 0][place] = torch.where(ink, digit, pixels[canvas, 0][place])
            classes[canvas][place] = torch.where(ink, target[row], classes[canvas][place])
    return TensorDataset(pixels, classes)


def mean_intersection(model: nn.Module, data: TensorDataset) -> float:
    """Mean over classes of intersection over union, in percent."""
    pixels, classes = data.tensors
    with torch.no_grad():
        guess = model.eval()(pixels).argmax(1)
    ratios: list[float] = []
    for label in range(BACKGROUND + 1):
        own, found = classes == label, guess == label
        ratios.append(float((own & found).sum() / (own | found).sum().clamp(min=1)))
    return 100 * sum(ratios) / len(ratios)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, target = data.tensors
    with torch.no_grad():
        right: Tensor = model.eval()(images).argmax(1) == target
    return 100 * right.float().mean().item()


def ink(student: Tensor, teacher: Any, target: Tensor, *, dim: int) -> Tensor:
    """The background is most of a canvas, and would be all that is learned."""
    return torch.where(target == BACKGROUND, 0.1, 1.0)


def terms_of(layer: str, temperature: float, attention_weight: float) -> dict[str, Terms]:
    options: dict[str, Any] = {"dim": 1, "row_weight": ink}

    def soft() -> list[Term]:
        kd = Term(fastkd.kd_loss, temperature=temperature, target=False, weight=0.9, **options)
        return [Term(fastkd.cross_entropy, weight=0.1, **options), kd]

    def attention() -> list[Term]:
        return [*soft(), Term(fastkd.attention_transfer_loss, layer, layer, weight=attention_weight)]

    def hint() -> list[Term]:
        return [*soft(), Term(fastkd.hint_loss, layer, layer, adapt="conv", weight=0.3)]

    return {
        "labels alone": lambda: [Term(fastkd.cross_entropy, **options)],
        PLAIN: soft,
        "attention maps": attention,
        "feature maps": hint,
    }


@digits.one_thread()
def run(settings: DigitsSettings, seeds: Sequence[int], step: Callable[[], None]) -> dict[str, dict[str, list[float]]]:
    """For each of the two tasks what each method's students reach, one per seed; and the teacher, once."""
    data = digits.load()
    shown, test = TensorDataset(data.train, data.train_target), TensorDataset(data.test, data.test_target)
    many = canvases(data.train, data.train_target, 8 * settings.canvases, 0)
    tested = canvases(data.test, data.test_target, 4 * settings.canvases, 1)

    def few(seed: int) -> TensorDataset:
        rows = digits.choose_labelled(data.train_target, settings.labels_per_class, seed)
        return TensorDataset(data.train[rows], data.train_target[rows])

    def few_canvases(seed: int) -> TensorDataset:
        return TensorDataset(*many[torch.randperm(len(many), generator=generator(seed))[: settings.canvases]])

    images = _compare(
        partial(ConvNetwork, 32), partial(ConvNetwork, 8), shown, few, partial(accuracy, data=test),
        terms_of("layers.1", 4.0, 1000.0), settings, seeds, step,
    )  # fmt: skip
    dense = _compare(
        partial(Segmenter, 24), partial(Segmenter, 16), many, few_canvases, partial(mean_intersection, data=tested),
        terms_of("layers.2", 2.0, 100.0), settings, seeds, step,
    )  # fmt: skip
    return dict(zip(UNITS, (images, dense), strict=True))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _compare(
    make_teacher: Callable[[], nn.Module],
    make_student: Callable[[], nn.Module],
    everything: TensorDataset,
    few: Callable[[int], TensorDataset],
    score: Callable[[nn.Module], float],
    methods: dict[str, Terms],
    settings: DigitsSettings,
    seeds: Sequence[int],
    step: Callable[[], None],
) -> dict[str, list[float]]:
    options: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=settings.student_lr),
        "lr_scheduler": Linear(1.0, 0.05),
        "progress": False,
    }
    torch.manual_seed(0)
    teacher = make_teacher()
    Distiller(teacher, None, methods["labels alone"]()).fit(
        everything, steps=settings.teacher_steps, batch_size=32, **options
    )
    found = {"teacher": [score(teacher)], **{name: [] for name in methods}}
    for seed in seeds:
        for name, terms in methods.items():
            torch.manual_seed(seed)
            student = make_student()
            Distiller(student, teacher, terms()).fit(
                few(seed), steps=settings.map_steps, batch_size=32, seed=seed, **options
            )
            found[name].append(score(student))
            step()
    return found
