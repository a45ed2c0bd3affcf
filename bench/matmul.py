"""The roof of losses that compute their own logits: the matmuls alone, measured in the same rounds as all others."""

from __future__ import annotations

import torch
from torch import Tensor


class Matmul:
    """The matmuls of two heads, each with all rows at once, which is the shape that runs fastest.

    Both logits, then the gradient of the student's input and, unless the head is frozen, of its weight. The operands
    are those of the problem, because a GPU multiplies zeros faster; the results are in their dtype, in memory that is
    there already.
    """

    def __init__(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], frozen: bool) -> None:
        (self.input, self.weight), (self.teacher_input, self.teacher_weight) = (
            tuple(x.detach() for x in head) for head in (student, teacher)
        )
        rows, vocab = len(self.input), len(self.weight)
        self.frozen = frozen
        self.logits = self.input.new_zeros((rows, vocab))
        self.of_input = torch.zeros_like(self.input)
        self.of_weight = None if frozen else torch.zeros_like(self.weight)
        hidden, teacher_hidden = self.input.shape[1], self.teacher_input.shape[1]
        self.work = 2 * rows * vocab * ((2 if frozen else 3) * hidden + teacher_hidden)  # floating-point operations

    def __call__(self) -> tuple[Tensor, ...]:
        torch.mm(self.input, self.weight.t(), out=self.logits)
        torch.mm(self.teacher_input, self.teacher_weight.t(), out=self.logits)  # from here on, a gradient of logits
        torch.mm(self.logits, self.weight, out=self.of_input)
        if self.of_weight is None:
            return (self.of_input,)
        torch.mm(self.logits.t(), self.input, out=self.of_weight)
        return self.of_input, self.of_weight
