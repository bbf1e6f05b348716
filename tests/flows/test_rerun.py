"""What is told of a night that was gone on with and failed."""

import io
from pathlib import Path

from rich.console import Console

from flows import rerun, runs


def test_an_attempt_that_fails_before_its_record_begins_has_not_the_exit_code_of_the_one_before(tmp_path: Path) -> None:
    def attempt() -> None:
        record = runs.begin(tmp_path, "a-night", night=True)
        record.set(exit_code=2)
        record.end("failed", "there is no text")

    attempt()
    before = runs.find(tmp_path, "a-night")
    err = io.StringIO()
    assert rerun._tell_failure(tmp_path, before, "no dvc.yaml here", Console(file=err, width=20)) == 1
    assert err.getvalue() == "error: no dvc.yaml here\n"
    attempt()
    assert rerun._tell_failure(tmp_path, before, "there is no text", Console(file=err, width=20)) == 2
    assert err.getvalue().endswith("Change that first, then go on with: overnight rerun a-night\n")
