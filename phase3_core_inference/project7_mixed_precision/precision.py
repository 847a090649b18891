"""
Precision

This file implements the public face of this project, which gathers what follows:
- "Mixed Precision Training" (Micikevicius et al., 2017) - loss scaling and master weights
- "FP8 Formats for Deep Learning" (Micikevicius et al., 2022) - linear layers in 8 bits

Each component is explained with paper references for educational purposes.
"""

from phase3_core_inference.project7_mixed_precision.float8 import Float8Linear, convert_to_float8
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear, store_float8
from phase3_core_inference.project7_mixed_precision.formats import FORMATS, Format, lost, round_to
from phase3_core_inference.project7_mixed_precision.loss_scaling import LossScaler, ScaledStep
from phase3_core_inference.project7_mixed_precision.master_weights import MasterStep, ScaledMasterStep

__all__ = [
    "FORMATS", "Float8Linear", "Format", "LossScaler", "MasterStep", "ScaledMasterStep", "ScaledStep",
    "StoredFloat8Linear", "convert_to_float8", "lost", "round_to", "store_float8",
]  # fmt: skip
