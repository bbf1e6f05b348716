"""What a test needs of the machine."""

import os
from typing import NoReturn

import pytest


def missing(message: str) -> NoReturn:
    """Skips the test that runs; where CI runs it, it fails instead."""
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
