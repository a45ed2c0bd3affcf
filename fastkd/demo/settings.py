"""Every number a run of the demo depends on; tests pass smaller ones."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("digits", "text")


@dataclass(frozen=True)
class DigitsSettings:
    teacher_hidden: tuple[int, ...] = (512, 64)
    student_hidden: tuple[int, ...] = (14,)
    teacher_steps: int = 300
    student_steps: int = 600
    batch: int = 128
    teacher_lr: float = 1e-3
    student_lr: float = 1e-2
    labels_per_class: int = 6
    temperature: float = 4.0
    alpha: float = 0.1  # of the rows that have a label; the others get 0
    terms: bool = False  # students of the labels and one term on features each
    methods: bool = False  # every way of distilling, of networks that are fully connected, and of convolutions
    method_steps: int = 400
    map_steps: int = 200
    canvases: int = 40  # that a student has


@dataclass(frozen=True)
class TextSettings:
    vocabulary: int = 32_000
    source_files: int | None = None  # None: every top-level module of the standard library
    window: int = 64
    batch: int = 8
    teacher_width: int = 128
    student_width: int = 64
    teacher_steps: int = 200
    student_steps: int = 50
    teacher_lr: float = 4e-3  # at its highest
    student_lr: float = 8e-3
    temperature: float = 1.0  # a higher one is mostly about the thousands of tokens that will not follow
    alpha: float = 0.1
    evaluation_batches: int = 10
    compared_steps: int = 50  # the curves have to agree over this many first steps
    tolerance: float = 1e-3
    heads: bool = False  # a third student, for whom no logits are stored
    int8: bool = False  # a fourth one, whose teacher is int8


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # the digits take all, the text the first
    digits: DigitsSettings = field(default_factory=DigitsSettings)
    text: TextSettings = field(default_factory=TextSettings)
    int8: bool = False  # the networks of both parts with int8 layers
