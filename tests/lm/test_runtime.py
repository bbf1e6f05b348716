"""Generation with onnxruntime and numpy alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from odd import make_model

from lm import hugging_face, onnx_int8
from lm.runtime import Generator, PromptTooLong, sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model over bytes, exported."""
    folder = tmp_path_factory.mktemp("int8")
    tiny.write_tokenizer(folder / "tokenizer.json")
    model = make_model(vocab_size=tiny.VOCAB, bos_token_id=256, eos_token_id=256)
    onnx_int8.export(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps(hugging_face.config_to_json(model.config)))
    return folder


def test_equal_seeds_write_equal_text_and_others_other(folder: Path) -> None:
    generator = Generator(folder)
    texts = ["".join(generator.generate("light", 30, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_is_that_of_a_loop_without_a_cache(folder: Path) -> None:
    generator = Generator(folder)
    ids = generator.tokenizer.encode("light").ids
    for _ in range(12):
        logits, _ = generator.run(np.array([ids], np.int64), generator.empty_cache())
        ids.append(int(logits[0, -1].argmax()))
    expected = generator.tokenizer.decode(ids[len("light") + 1 :])
    written = "".join(generator.generate("light", 12, temperature=0))
    # What is still an incomplete character at the end is not written.
    assert written
    assert expected.startswith(written)


def test_it_stops_where_the_models_positions_end(folder: Path) -> None:
    generator = Generator(folder)
    assert generator.context == 64
    "".join(generator.generate("a" * 60, 1000))
    with pytest.raises(PromptTooLong, match="the prompt has 65 tokens, and the model reads at most 64"):
        list(generator.generate("a" * 64, 1))


def test_it_needs_no_torch(folder: Path) -> None:
    program = (
        f"import sys; from pathlib import Path; from lm.runtime import Generator; Generator(Path({str(folder)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit('torch' in sys.modules)"], cwd=tiny.ROOT, check=False
    )
    assert done.returncode == 0


def test_sampling_keeps_to_the_likeliest_and_to_their_shares() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.25, 0.05], np.float32))
    random = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, 1.0, 2, random) for _ in range(4000)], minlength=4) / 4000
    assert drawn.tolist() == pytest.approx([0, 0.6 / 0.85, 0.25 / 0.85, 0], abs=0.03)
    assert sample(logits, 0, 4, random) == 1
