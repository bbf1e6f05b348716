"""The frame around every stage's ``main``: where a user's mistake becomes one line and an exit code."""

import sys
from collections.abc import Callable

from tasks.errors import Refused, TryAgain, UserMistake


def run(stage: Callable[[], None]) -> None:
    """Runs ``stage`` and ends the process: 0 on success, else one ``error:`` line and the error's exit code."""
    try:
        stage()
    except (UserMistake, TryAgain, Refused) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
