"""Precision: the public names of this project, gathered from the files that explain them."""

from phase3_core_inference.project7_mixed_precision.float8 import Float8Linear, convert_to_float8
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear, store_float8
from phase3_core_inference.project7_mixed_precision.formats import FORMATS, Format, lost, round_to
from phase3_core_inference.project7_mixed_precision.loss_scaling import LossScaler, ScaledStep
from phase3_core_inference.project7_mixed_precision.master_weights import MasterStep, ScaledMasterStep

__all__ = [
    "FORMATS", "Float8Linear", "Format", "LossScaler", "MasterStep", "ScaledMasterStep", "ScaledStep",
    "StoredFloat8Linear", "convert_to_float8", "lost", "round_to", "store_float8",
]  # fmt: skip
