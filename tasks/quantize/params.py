"""The section ``quantize`` of ``params.yaml``."""

from tasks.training_params import TrainingParams


class QuantizeParams(TrainingParams):
    """Quantization-aware fine-tuning before the export to INT8."""
