"""What a fork server runs is the code of the repository whose tests started it."""

import subprocess
import sys
from pathlib import Path

import forked

FORK = """
import functools, multiprocessing, os, sys
from pathlib import Path
sys.path[:0] = [{support!r}, {root!r}]
import forked
multiprocessing.set_forkserver_preload(["tasks"])
told = functools.partial(exec, "import tasks; print(tasks.__file__)")
raise SystemExit(forked.end([forked.call(told, Path.cwd(), Path("log"), dict(os.environ))])[0])
"""


def test_a_fork_server_that_starts_in_another_folder_runs_this_repository_s_code(tmp_path: Path) -> None:
    root, installed = Path(__file__).parents[1], tmp_path / "installed"
    (installed / "tasks").mkdir(parents=True)
    (installed / "tasks/__init__.py").touch()
    code = FORK.format(support=str(Path(forked.__file__).parent), root=str(root))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, check=True)
    assert (tmp_path / "log").read_text() == f"{root / 'tasks/__init__.py'}\n"
