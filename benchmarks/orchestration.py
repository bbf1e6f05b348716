"""What the workflow costs beside plain DVC: ``python benchmarks/orchestration.py``.

1. A night with nothing to do (worktree, merge, checkout, stages, publication; it starts a temporary server of its own,
   which one of `overnight schedule` need not), and `overnight run` with nothing to do, each against `dvc repro` with
   nothing to do plus the start of that server.
2. What a stage costs beyond its own work: `overnight run --force` and `dvc repro --force` on the same project with tiny
   parameters, each less its run with nothing to do and less the seconds in which the commands of its stages ran. What
   the commands take beside Prefect and DVC shows against the same commands by hand; these are longer than what is
   looked for, and on a shared machine differ by more.

Each round runs all sides one after the other. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from chain import STAGES, Chain  # noqa: E402
from lay_out import lay_out  # noqa: E402

MOST_TIMES = 1.5
MOST_SECONDS_A_STAGE = 0.7

# Starts what flows/server.py starts, waits until it answers, ends it.
_SERVER = """
import os, pathlib
from flows import server
with server.serve(pathlib.Path.cwd(), os.open(os.devnull, os.O_RDONLY)) as serving:
    serving.wait()
"""
# Notes the seconds of a stage's own command.
_TIMED = """
import subprocess, sys, time
started = time.monotonic()
code = subprocess.call([sys.executable, "-m", sys.argv[1]])
with open(".overnight/own-seconds", "a") as file:
    print(time.monotonic() - started, file=file)
sys.exit(code)
"""
# One night, as `overnight rerun` starts one.
_NIGHT = """
import os, pathlib, sys
from flows import server
with server.serve(pathlib.Path.cwd(), os.open(os.devnull, os.O_RDONLY)) as serving:
    from flows import flow_runs, run
    from flows.nightly import nightly
    flow_runs.import_ahead()
    serving.wait()
    with serving.settings():
        state = flow_runs.start(nightly, None, project=str(pathlib.Path.cwd()))
    run.flush()
sys.exit(0 if state.is_completed() else state.message)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        chain = lay_out(Path(name) / "project", Path(name) / "home")
        (Path(name) / "home").mkdir(exist_ok=True)
        chain.set("train.steps", 4)
        chain.set("quantize.steps", 2)
        python, dvc = [sys.executable], [sys.executable, "-m", "dvc"]
        overnight = [*python, "-m", "flows", "run"]
        by_hand = [[*python, "timed.py", f"tasks.{stage}"] for stage in STAGES]
        (chain.root / "timed.py").write_text(_TIMED)
        pipeline = chain.root / "dvc.yaml"
        pipeline.write_text(pipeline.read_text().replace("cmd: python -m", "cmd: python timed.py"))
        note = chain.root / ".overnight/own-seconds"
        seconds(chain, overnight)
        # The first night makes a version of it, and the others find nothing new.
        seconds(chain, ["git", "add", "timed.py"])
        commit = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost", "commit", "-qam", "Tiny"]
        seconds(chain, commit, [*python, "-c", _NIGHT])
        sides: dict[str, Callable[[], float]] = {
            "a night, nothing to do": lambda: seconds(chain, [*python, "-c", _NIGHT]),
            "overnight run, nothing to do": lambda: seconds(chain, overnight),
            "dvc repro, nothing to do": lambda: seconds(chain, [*dvc, "repro"]),
            "Prefect's server": lambda: seconds(chain, [*python, "-c", _SERVER]),
            "overnight run --force": lambda: seconds(chain, [*overnight, "--force"]),
            "dvc repro --force": lambda: seconds(chain, [*dvc, "repro", "--force"]),
            "the stages by hand": lambda: seconds(chain, *by_hand),
        }
        measured: dict[str, list[float]] = {}
        for turn in range(rounds):
            for side, measure in sides.items():
                note.unlink(missing_ok=True)
                measured.setdefault(side, []).append(measure())
                if note.exists():
                    own = sum(map(float, note.read_text().split()))
                    measured.setdefault(f"{side}: own work", []).append(own)
            now = "  ".join(f"{side} {values[-1]:.2f}" for side, values in measured.items())
            print(f"round {turn + 1}/{rounds}: {now}", flush=True)
    show(measured)


def seconds(chain: Chain, *commands: list[str]) -> float:
    """Returns the seconds that ``commands`` take one after the other in the project; each must succeed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = chain.environment(PATH=path, SHELL="/bin/sh")
    started = time.monotonic()
    for command in commands:
        done = subprocess.run(command, cwd=chain.root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def show(measured: dict[str, list[float]]) -> None:
    """Prints medians and what follows from them round by round."""
    rounds = [dict(zip(measured, values, strict=True)) for values in zip(*measured.values(), strict=True)]
    times = {
        side: [one[side] / (one["dvc repro, nothing to do"] + one["Prefect's server"]) for one in rounds]
        for side in ("a night, nothing to do", "overnight run, nothing to do")
    }
    added = {
        side: [
            (one[f"{side} --force"] - one[f"{side}, nothing to do"] - one[f"{side} --force: own work"]) / len(STAGES)
            for one in rounds
        ]
        for side in ("overnight run", "dvc repro")
    }
    slower = {
        side: [one[f"{side} --force: own work"] / one["the stages by hand: own work"] for one in rounds]
        for side in ("overnight run", "dvc repro")
    }
    print()
    for side, values in measured.items():
        print(f"{side:<35} {statistics.median(values):6.2f} s")
    print()
    for side, values in times.items():
        print(f"{side}: {spread(values)} times dvc repro and the server's start; goal: at most {MOST_TIMES}")
    for side, values in added.items():
        goal = f"; goal: at most {MOST_SECONDS_A_STAGE} s" if side == "overnight run" else ""
        print(f"a stage under {side}: {spread(values)} s more than its own work{goal}")
    for side, values in slower.items():
        print(f"its own work under {side}: {spread(values)} times the seconds by hand")
    result = {
        "rounds": len(rounds),
        **{side: round(statistics.median(values), 3) for side, values in measured.items()},
        **{f"{side} / (dvc repro + server)": round(statistics.median(values), 3) for side, values in times.items()},
        "goal: nothing to do / (dvc repro + server)": MOST_TIMES,
        **{f"seconds a stage, {side}": round(statistics.median(values), 3) for side, values in added.items()},
        "goal: seconds a stage, overnight run": MOST_SECONDS_A_STAGE,
        **{f"own work, {side} / by hand": round(statistics.median(values), 3) for side, values in slower.items()},
    }
    print(json.dumps(result))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
