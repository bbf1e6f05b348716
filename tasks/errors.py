"""What a stage raises when the fault lies outside its code, and the exit codes that tell an orchestrator which it was.

2: the user has to change something, so a retry is useless. 75 (``EX_TEMPFAIL`` of sysexits.h): the world was at fault
and a retry may help. 1: a check refused what the stage made, or, with a traceback, the stage has a bug.
"""

EXIT_USER_MISTAKE = 2
EXIT_TRY_AGAIN = 75
# Between a stage's processes; the one that started them tells it in words and ends with the above. EX_IOERR: this one
# lost its connection to another. The other: it was told to end, and has left a checkpoint if there was time.
EXIT_PEER_LOST = 74
EXIT_STOPPED = 80


class UserMistake(Exception):
    """Something only the user can mend. The message is one line: what was found, what was expected, what to do."""

    exit_code = EXIT_USER_MISTAKE


class BadParameter(UserMistake):
    """``params.yaml`` does not parse, or holds an unknown key, a wrong type or an impossible combination."""


class BadInput(UserMistake):
    """A file that a stage reads is missing, unreadable, empty or not what its manifest says."""


class DiskFull(UserMistake):
    """A write met a full disk or quota. Nothing half-written was left under its final name."""


class TryAgain(Exception):
    """A fault that passes: a worker was killed, a peer went away, a lock was held too long."""

    exit_code = EXIT_TRY_AGAIN


class Refused(Exception):
    """A stage's own check refuses what the stage made. A retry would make the same again."""

    exit_code = 1
