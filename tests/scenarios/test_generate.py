"""`overnight generate` on a project that has run, and on one whose run was stopped while it made the model."""

import shutil

from chain import Chain


def test_the_finished_model_writes_and_while_a_run_makes_another_it_still_does(finished: Chain) -> None:
    arguments = ("generate", "the light", "--max-new-tokens", "12", "--seed", "3")
    written = finished.overnight(*arguments)
    assert (written.code, written.err) == (0, "")
    assert written.out.startswith("the light")
    assert len(written.out) > len("the light\n")
    assert finished.overnight("generate", "the light", "--max-new-tokens", "12", "--seed", "4").out != written.out

    # As DVC leaves the project when `quantize` has started.
    shutil.rmtree(finished.root / "models/int8")
    stopped = finished.overnight(*arguments)
    assert (stopped.code, stopped.out) == (0, written.out)
    assert stopped.err == (
        "models/int8 is not there: a run makes it, or was stopped. The last finished one writes this.\n"
    )

    # Nobody has it any more.
    shutil.rmtree(finished.root / ".overnight/last")
    shutil.rmtree(finished.root / ".dvc/cache")
    lost = finished.overnight(*arguments)
    assert (lost.code, lost.out) == (2, "")
    assert "models/int8/model.onnx: no such file. Run `overnight run` first" in lost.complaint()
