"""Graphs in onnxruntime, as :mod:`lm.runtime` has it run them."""

from pathlib import Path

import onnxruntime
import torch

from lm.runtime import ask_for_exact_products

# Texts to look at for what is calibrated.
CALIBRATION = torch.randint(0, 100, (6, 24), generator=torch.Generator().manual_seed(8))


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ask_for_exact_products(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
