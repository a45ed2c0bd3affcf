"""int8 inference: layers that hold and multiply 8-bit integers, and the calls that put them into a model."""

from .calibration import calibrate
from .configs import Dynamic, Static, WeightOnly
from .conv import Int8Conv2d
from .embedding import Int8Embedding
from .linear import Int8Linear
from .quantizing import Quantized, dequantize, quantize_
from .reporting import LayerReport, Report, report
from .smoothing import smooth
from .straight_through import fake_quantize
from .training import prepare_qat_

__all__ = [
    "Dynamic",
    "Int8Conv2d",
    "Int8Embedding",
    "Int8Linear",
    "LayerReport",
    "Quantized",
    "Report",
    "Static",
    "WeightOnly",
    "calibrate",
    "dequantize",
    "fake_quantize",
    "prepare_qat_",
    "quantize_",
    "report",
    "smooth",
]
