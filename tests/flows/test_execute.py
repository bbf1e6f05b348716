"""The logs of runs: as many as a month of nights leaves."""

import os
from pathlib import Path

from flows.execute import LOGS, drop_old_logs


def test_the_logs_of_the_last_thirty_runs_are_kept(tmp_path: Path) -> None:
    drop_old_logs(tmp_path)
    for number in range(33):
        run = tmp_path / LOGS / f"run-{number:02d}"
        run.mkdir(parents=True)
        (run / "train.log").write_text("text")
        # The first one was gone on with today.
        time = 10**9 + (number or 100)
        os.utime(run, (time, time))
    drop_old_logs(tmp_path)
    kept = sorted(path.name for path in (tmp_path / LOGS).iterdir())
    assert kept == ["run-00", *(f"run-{number:02d}" for number in range(4, 33))]
