"""The price of one call: kd_loss forward and backward on 8x10 logits, where nothing but overhead is left."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from bench import kd
from bench.kd import Arena, Gate
from bench.measure import Case
from fastkd import _dispatch
from fastkd._rows import DIVERGENCES

PROVIDERS = ("eager", "compiled", "fastkd")
ROWS, VOCABULARY = 8, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--divergence", nargs="+", default=("forward_kl",), choices=DIVERGENCES, metavar="NAME")
    parser.add_argument("--calls", type=int, default=200, help="per reading of the clock; default: 200")
    parser.add_argument("--impl", choices=_dispatch.ORDER, help="pin fastkd's; default: what it picks")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    arena = Arena(ROWS, VOCABULARY, torch.float32, device)
    for divergence in args.divergence:
        truth = Gate(arena, divergence)
        overhead = {"calls": args.calls, "least_bytes": None, "least_exponentials": None, "inputs": ()}
        yield kd.case(arena, truth, divergence, "forward+backward", args, **overhead)
