"""Losses on relations of other libraries, where they are installed: each computes the number that fastkd's computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.providers import Unavailable, need

Loss = Callable[[Tensor, Tensor], Tensor]


def torchdistill(name: str) -> Loss:
    """Its modules read the features from what its hooks collect: a mapping of paths."""
    need("torchdistill")
    from torchdistill.losses import mid_level

    made: dict[str, Callable[[], Any]] = {
        "rkd-angle": lambda: mid_level.RKDLoss("", "", dist_factor=0, angle_factor=1, reduction="mean"),
        "rkd-distance": lambda: mid_level.RKDLoss("", "", dist_factor=1, angle_factor=0, reduction="mean"),
        "pkt": lambda: mid_level.PKTLoss("", "output", "", "output"),
        "attention-transfer": lambda: mid_level.ATLoss(
            {"maps": {side: {"path": "", "io": "output"} for side in ("student", "teacher")}}
        ),
    }
    if name not in made:
        raise Unavailable(f"torchdistill has no {name} loss of this definition")
    module = made[name]()
    return lambda s, t: module({"": {"output": s}}, {"": {"output": t}})


def pykeops(name: str) -> Loss:
    """Sums over all pairs that never make the matrix; each formula is compiled when it is first met."""
    need("pykeops")
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)

    def pairs(x: Tensor) -> tuple[Any, Any]:
        return LazyTensor(x[:, None, :].contiguous()), LazyTensor(x[None, :, :].contiguous())

    def distances(x: Tensor) -> Any:
        rows, columns = pairs(x)
        return ((rows - columns) ** 2).sum(-1).sqrt()

    def relative(x: Tensor) -> Tensor:
        return x / (distances(x).sum(1).sum() / (len(x) * (len(x) - 1)))

    def rkd_distance(s: Tensor, t: Tensor) -> Tensor:
        error = distances(relative(s)) - distances(relative(t))
        near = error.clamp(-1.0, 1.0)
        return (near * (error - 0.5 * near)).sum(1).sum() / len(s) ** 2

    def gram(s: Tensor, t: Tensor) -> Tensor:
        (a, b), (c, d) = pairs(s), pairs(t)
        return (((a * b).sum(-1) - (c * d).sum(-1)) ** 2).sum(1).sum() / len(s) ** 2

    losses = {"rkd-distance": rkd_distance, "gram": gram}
    if name not in losses:
        raise Unavailable(f"pykeops: no sum over pairs of rows makes {name}")
    return losses[name]


RIVALS: dict[str, Callable[[str], Loss]] = {"torchdistill": torchdistill, "pykeops": pykeops}
