"""What outliers of activations cost an int8 layer, with and without ``fastkd.int8.smooth``.

    python bench/outliers.py

Not a matter of time, and so no family of ``bench/run.py``: a norm whose gain is large in a few channels, as trained
transformers have them, and the linear layer behind it. The error is that of the layer's output without its bias,
relative to the float layer in float64. The rows go to bench/results/outliers.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench import record  # noqa: E402
from bench.int8_rivals import torch_dynamic  # noqa: E402
from fastkd.int8 import Dynamic, Static, quantize_, smooth  # noqa: E402
from fastkd.int8.configs import Config  # noqa: E402

GAINS = (1, 10, 30, 100)
OUTLIERS, WIDTH, ROWS = 8, 1024, 512
FILE = "outliers.csv"
CONFIGS: dict[str, Config] = {"dynamic": Dynamic(), "static": Static(), "static, percentile": Static("percentile")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/outliers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--gain", nargs="+", type=int, default=GAINS, help="of the outliers' channels")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    commit = record.environment(torch.device("cpu"), "")["commit"]
    rows = [{"commit": commit, "gain": gain, **row} for gain in args.gain for row in measured(gain, args.width)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
    return 0


@torch.no_grad()
def measured(gain: float, width: int) -> Iterator[dict[str, object]]:
    """Calibrated and smoothed on one half of the rows, judged by the other."""
    torch.manual_seed(0)
    seen, input = torch.randn(2, ROWS, width)
    exact = block(gain, width).double()(input.double())

    def error(model: nn.Module) -> float:
        return float((model(input).double() - exact).norm() / exact.norm())

    for smoothed in (False, True):
        for scheme, config in CONFIGS.items():
            yield {"scheme": scheme, "smoothed": smoothed, "error": error(rounded(gain, width, seen, smoothed, config))}
    norm, linear = block(gain, width)
    assert isinstance(linear, nn.Linear)
    rival: Callable[[Tensor], Tensor] = torch_dynamic(linear, input)
    yield {"scheme": "torch dynamic", "smoothed": False, "error": error(nn.Sequential(norm, rival))}


def rounded(gain: float, width: int, seen: Tensor, smoothed: bool, config: Config) -> nn.Module:
    model = block(gain, width)
    if smoothed:
        smooth(model, seen)
    quantize_(model, config, example=seen)
    return model


def block(gain: float, width: int) -> nn.Sequential:
    torch.manual_seed(1)
    norm, linear = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    norm.weight.data[torch.randperm(width)[:OUTLIERS]] = gain
    return nn.Sequential(norm, linear).eval()


if __name__ == "__main__":
    raise SystemExit(main())
