"""English and code that every Python brings along, as byte-pair tokens: no download, and a real vocabulary."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

IGNORE = -100
HELD_OUT_EVERY = 20  # every 20th text is kept for evaluation


@dataclass(frozen=True)
class Corpus:
    vocabulary: int
    train: Tensor  # token ids, all training texts in a row
    held_out: Tensor

    def log_frequency(self) -> Tensor:
        """Of each token in the training texts; a token not seen there counts as half seen."""
        counts = torch.bincount(self.train, minlength=self.vocabulary) + 0.5
        return (counts / counts.sum()).log()

    def unigram_loss(self) -> float:
        """What a model loses on the held-out texts that knows the frequencies and nothing else."""
        return -self.log_frequency()[self.held_out].mean().item()


def load(vocabulary: int, source_files: int | None) -> Corpus:
    texts = read_texts(source_files)
    tokenizer = _train_tokenizer(texts, vocabulary)
    reached = tokenizer.get_vocab_size()
    if reached != vocabulary:
        raise RuntimeError(f"demo: the texts of this Python give {reached} byte-pair tokens, {vocabulary} are needed")
    tokens = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    held_out = torch.cat(tokens[::HELD_OUT_EVERY])
    return Corpus(vocabulary, torch.cat([text for i, text in enumerate(tokens) if i % HELD_OUT_EVERY]), held_out)


def read_texts(source_files: int | None) -> list[str]:
    """The language reference, then the top-level modules of the standard library."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:source_files]
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        topics = {}
    return [*topics.values(), *sources]


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def draw(tokens: Tensor, batch: int, window: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows ``(batch, window)`` and, for each position, the token after it."""
    starts = torch.randint(len(tokens) - window + 1, (batch, 1), generator=generator)
    inputs = tokens[starts + torch.arange(window)]
    # The labels are shifted and padded, not the logits sliced: a slice of (batch, window, vocabulary) is a copy.
    return inputs, F.pad(inputs[:, 1:], (0, 1), value=IGNORE)
