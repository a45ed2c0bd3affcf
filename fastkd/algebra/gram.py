"""Losses that compare inner products of rows: what ``fastkd/_gram.py`` says, with products by torch."""

from __future__ import annotations

from functools import partial

from .. import _gram
from . import _products

gram_loss = partial(_gram.gram_loss, _products)
cosine_relation_loss = partial(_gram.cosine_relation_loss, _products)
similarity_preserving_loss = partial(_gram.similarity_preserving_loss, _products)
cka_loss = partial(_gram.cka_loss, _products)
