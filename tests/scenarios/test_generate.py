"""`overnight generate` on a project that has run, and on one whose run was stopped while it made the model."""

import shutil
from pathlib import Path

from chain import Chain

from tasks.champion import MODEL_FILES


def test_the_finished_model_writes_and_while_a_run_makes_another_it_still_does(finished: Chain, tmp_path: Path) -> None:
    arguments = ("generate", "the light", "--max-new-tokens", "12", "--seed", "3")
    written = finished.overnight(*arguments)
    assert (written.code, written.err) == (0, "")
    assert written.out.startswith("the light")
    assert len(written.out) > len("the light\n")
    assert finished.overnight("generate", "the light", "--max-new-tokens", "12", "--seed", "4").out != written.out

    # As DVC leaves the project when `quantize` has started.
    kept = tmp_path / "int8"
    shutil.move(finished.root / "models/int8", kept)
    stopped = finished.overnight(*arguments)
    assert (stopped.code, stopped.out) == (0, written.out)
    assert stopped.err == (
        "models/int8 is not there: a run makes it, or was stopped. The last finished one writes this.\n"
    )
    # What its fine-tuning began with is not brought for that.
    (last,) = (finished.root / ".overnight/last").iterdir()
    recorded = {path.relative_to(kept) for path in kept.rglob("*")}
    assert recorded - {path.relative_to(last) for path in last.rglob("*")} == {
        Path("post_training"), *(Path("post_training") / name for name in MODEL_FILES)
    }  # fmt: skip

    # Nobody has it any more.
    shutil.rmtree(finished.root / ".overnight/last")
    shutil.rmtree(finished.root / ".dvc/cache")
    lost = finished.overnight(*arguments)
    assert (lost.code, lost.out) == (2, "")
    assert "models/int8/model.onnx: no such file. Run `overnight run` first" in lost.complaint()
