"""When stages run, and who is told: Prefect flows and the command line."""

import tasks  # noqa: F401  (it keeps compiled files whole where a disk is full)
