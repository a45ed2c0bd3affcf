"""What each tail of a TopK teacher loses of the whole teacher, on logits of models that were trained.

    python bench/tails.py

Not a matter of time, and so no family of ``bench/run.py``: the demo's language model of 32k tokens is trained as
teacher, a smaller one for fewer steps as student, and on texts that neither saw, the loss and its gradient to the
student's logits are compared with those of the whole teacher. The rows go to bench/results/tails.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fastkd  # noqa: E402
from bench import record  # noqa: E402
from fastkd import TopK  # noqa: E402
from fastkd.demo import text  # noqa: E402
from fastkd.demo.corpus import load  # noqa: E402
from fastkd.demo.settings import TextSettings  # noqa: E402

TAILS = ("bucket", "uniform", "renormalize", "support", "samples")
DIVERGENCES = ("forward_kl", "reverse_kl")
WINDOWS, SEED, DRAWS = 8, 0, 32
FILE = "tails.csv"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/tails.py", description=__doc__.split("\n")[0])
    parser.add_argument("--k", nargs="+", type=int, default=(8, 32, 128))
    parser.add_argument("--steps", type=int, default=TextSettings.teacher_steps, help="of the teacher's training")
    parser.add_argument("--vocabulary", type=int, default=TextSettings.vocabulary)
    parser.add_argument("--source-files", type=int, help="of the text; default: all")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    settings = replace(TextSettings(), vocabulary=args.vocabulary, source_files=args.source_files)
    student, teacher = trained(settings, args.steps)
    commit = record.environment(torch.device("cpu"), "")["commit"]
    rows = [{"commit": commit, "teacher_steps": args.steps, **row} for row in measured(student, teacher, args.k)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
    return 0


@torch.no_grad()
def logits_of(model: torch.nn.Module, inputs: Tensor) -> Tensor:
    logits: Tensor = model(inputs)
    return logits.flatten(0, 1)


def trained(settings: TextSettings, steps: int) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher on texts that were held out."""
    corpus = load(settings.vocabulary, settings.source_files)
    models = []
    for width, some, rate in (
        (settings.student_width, max(1, steps // 4), settings.student_lr),
        (settings.teacher_width, steps, settings.teacher_lr),
    ):
        model = text._model(settings, corpus, width, SEED)
        for _ in text.train_on_labels(model, settings, corpus, some, rate, SEED):
            pass
        models.append(model)
    inputs = corpus.held_out[: WINDOWS * settings.window].view(WINDOWS, settings.window)
    return logits_of(models[0], inputs), logits_of(models[1], inputs)


def measured(student: Tensor, teacher: Tensor, ks: Sequence[int]) -> Iterator[dict[str, object]]:
    for divergence in DIVERGENCES:
        whole, exact = loss_and_gradient(student, teacher, divergence)
        for k in ks:
            best = TopK.from_logits(teacher, k)
            known = float(best.log_probs.exp().sum(-1).mean())
            for tail in TAILS:
                if tail == "samples" and divergence == "forward_kl":
                    results = [loss_and_gradient(student, draw(teacher, k, seed), divergence) for seed in range(DRAWS)]
                elif divergence in ("reverse_kl",) and tail in ("renormalize", "samples"):
                    continue
                else:
                    sparse = TopK(best.indices, best.log_probs, tail=tail)
                    results = [loss_and_gradient(student, sparse, divergence)]
                one = results[0]
                mean = torch.stack([gradient for _, gradient in results]).mean(0)
                yield {
                    "divergence": divergence,
                    "k": k,
                    "tail": tail,
                    "mass_of_the_k": known,
                    "loss": float(one[0]),
                    "loss_of_whole": float(whole),
                    "gradient_error": float((one[1] - exact).norm() / exact.norm()),
                    "gradient_error_of_mean": float((mean - exact).norm() / exact.norm()),
                    "cosine": float(torch.cosine_similarity(one[1].flatten(), exact.flatten(), dim=0)),
                    "draws": len(results),
                }


def loss_and_gradient(student: Tensor, teacher: Tensor | TopK, divergence: str) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, divergence=divergence)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def draw(teacher: Tensor, k: int, seed: int) -> TopK:
    """k draws of every row, those of one id counted together."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(teacher.softmax(-1), k, replacement=True, generator=generator).sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).sum(-1)
    return TopK.from_samples(torch.where(first, ids, -1), torch.where(first, counts, 0))


if __name__ == "__main__":
    raise SystemExit(main())
