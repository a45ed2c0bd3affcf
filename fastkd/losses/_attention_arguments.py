"""Arguments of the losses on attention scores, checked, as the :class:`AttentionRows` that they ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._attention import AttentionRows

REDUCTIONS = ("none", "sum", "mean", "batchmean")
LARGEST_SCALE = _checks.HUGE / 2  # times log2(e) it is finite still


class Scores:
    """What the scores of student and teacher are made of. ``flat``: the caller's tensors had no batch dimension."""

    def __init__(self, op: str, q_s: Any, k_s: Any, q_t: Any, k_t: Any, relation_heads: Any = None) -> None:
        self.op = op
        tensors = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}
        for name, x in tensors.items():
            self._check_tensor(name, x, q_s)
        self._check_sizes(tensors)
        self.flat = q_s.ndim == 3
        same, teacher_same = k_s is q_s, k_t is q_t
        if relation_heads is not None:
            _checks.count(op, "relation_heads", relation_heads)
            tensors = {name: self._split(name, x, relation_heads) for name, x in tensors.items()}
        self._check_heads(tensors, relation_heads)
        queries, keys, teacher_queries, teacher_keys = (x.unsqueeze(0) if self.flat else x for x in tensors.values())
        self.queries, self.keys = queries, queries if same else keys
        self.teacher_queries, self.teacher_keys = teacher_queries, teacher_queries if teacher_same else teacher_keys

    def _check_tensor(self, name: str, x: Any, first: Any) -> None:
        op = self.op
        _checks.logits(op, name, x, "a tensor")
        if x.ndim not in (3, 4):
            _checks.bad_value(op, name, "be (B, heads, tokens, dim) or (heads, tokens, dim)", tuple(x.shape))
        if x.ndim != first.ndim:
            _checks.bad_value(op, name, f"have as many dimensions as q_s, {first.ndim}", tuple(x.shape))
        _checks.same_device(op, name, x, first)
        if x.shape[-3] == 0 or x.shape[-1] == 0:
            _checks.bad_value(op, name, "have heads and a head dimension", tuple(x.shape))

    def _check_sizes(self, tensors: dict[str, Tensor]) -> None:
        """What no splitting of heads changes."""
        op, first = self.op, tensors["q_s"]
        for name, of in (("k_s", "q_s"), ("k_t", "q_t")):
            if tensors[name].dtype != tensors[of].dtype:
                _checks.bad_type(op, name, f"have the dtype of {of}, {tensors[of].dtype}", tensors[name].dtype)
        for name, x in tensors.items():
            of = "q_s" if name == "q_t" else "k_s"
            if x.ndim == 4 and x.shape[0] != first.shape[0]:
                _checks.bad_value(op, name, f"have the batch size of q_s, {first.shape[0]}", tuple(x.shape))
            if name.endswith("_t") and x.shape[-2] != tensors[of].shape[-2]:
                _checks.bad_value(op, name, f"have the tokens of {of}, {tensors[of].shape[-2]}", tuple(x.shape))

    def _split(self, name: str, x: Tensor, heads: int) -> Tensor:
        """Heads concatenated, and split again."""
        hidden = x.shape[-3] * x.shape[-1]
        if hidden % heads:
            rule = f"divide the hidden size of {name}, {x.shape[-3]} heads of {x.shape[-1]}"
            _checks.bad_value(self.op, "relation_heads", rule, heads)
        tokens: Tensor = x.transpose(-3, -2).flatten(-2)
        return tokens.view(*tokens.shape[:-1], heads, hidden // heads).transpose(-3, -2)

    def _check_heads(self, tensors: dict[str, Tensor], relation_heads: int | None) -> None:
        op, (q_s, _, q_t, _) = self.op, tensors.values()
        for name, of in (("k_s", "q_s"), ("k_t", "q_t")):
            keys, queries = tensors[name], tensors[of]
            if keys.shape[-1] != queries.shape[-1]:
                what = "head dimension" if relation_heads is None else "head dimension, once split,"
                _checks.bad_value(op, name, f"have the {what} of {of}, {queries.shape[-1]}", keys.shape[-1])
            if queries.shape[-3] % keys.shape[-3]:
                rule = f"have a number of heads that divides that of {of}, {queries.shape[-3]}"
                _checks.bad_value(op, name, rule, keys.shape[-3])
        if q_s.shape[-3] != q_t.shape[-3]:
            rule = f"have the heads of q_s, {q_s.shape[-3]}, unless relation_heads says how many both have"
            _checks.bad_value(op, "q_t", rule, q_t.shape[-3])

    def rows(
        self, *, causal: Any, key_mask: Any, query_mask: Any, scale: Any, teacher_scale: Any, reduction: Any
    ) -> AttentionRows:
        _checks.choice(self.op, "reduction", reduction, REDUCTIONS)
        batch, _, length, _ = self.queries.shape
        keys = self.keys.shape[2]
        if not isinstance(causal, bool):
            _checks.bad_type(self.op, "causal", "be a bool", type(causal).__name__)
        if causal and length != keys:
            _checks.bad_value(self.op, "causal", f"be False unless there are as many queries as keys, {keys}", length)
        divisor = {"mean": None, "batchmean": batch}.get(reduction, 1)
        return AttentionRows(
            student_queries=self.queries,
            student_keys=self.keys,
            teacher_queries=self.teacher_queries,
            teacher_keys=self.teacher_keys,
            key_mask=self._mask("key_mask", key_mask, batch, keys),
            query_mask=self._mask("query_mask", query_mask, batch, length),
            causal=causal,
            scale=self._scale("scale", scale, self.queries),
            teacher_scale=self._scale("teacher_scale", teacher_scale, self.teacher_queries),
            divisor=divisor,
            reduce=reduction != "none",
            same=self.keys is self.queries,
        )

    def _mask(self, name: str, mask: Any, batch: int, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            _checks.bad_type(self.op, name, "be a tensor of bool, True for what takes part", got)
        _checks.same_device(self.op, name, mask, self.queries)
        shape = (tokens,) if self.flat else (batch, tokens)
        if mask.shape != shape:
            _checks.bad_value(self.op, name, f"have the shape {shape}", tuple(mask.shape))
        return mask.unsqueeze(0) if self.flat else mask

    def _scale(self, name: str, scale: Any, of: Tensor) -> float:
        if scale is None:
            return float(of.shape[-1] ** -0.5)
        got = _checks.number(self.op, name, scale)
        if not _checks.TINY <= got <= LARGEST_SCALE:
            _checks.bad_value(self.op, name, "be positive and finite in float32", got)
        return got
