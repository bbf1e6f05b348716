"""When the nightly flow starts: a cron line read in a time zone, from what the user typed."""

import contextlib
import dataclasses
import re
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from tasks.errors import UserMistake

DEFAULT_TIME = "02:00"


@dataclasses.dataclass(frozen=True)
class Timetable:
    """A cron line of five fields and the IANA name of the zone whose clock it is read by."""

    cron: str
    timezone: str

    def next(self, after: datetime) -> datetime:
        """Returns the first start later than ``after``, in the timetable's zone.

        A time that the clocks leave out in spring comes an hour early, one that they repeat in autumn comes once, at
        the first: so does Prefect's scheduler, which decides.
        """
        # The library that Prefect's scheduler asks, with its way of asking (clock times without a zone), so that both
        # name the same moment on the days that are 23 and 25 hours long.
        from prefect._vendor.croniter.croniter import croniter

        zone = ZoneInfo(self.timezone)
        clock = after.astimezone(zone).replace(tzinfo=None)
        found: datetime = croniter(self.cron, clock).get_next(datetime).replace(tzinfo=zone)
        left_out = found.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != found.replace(tzinfo=None)
        return found.replace(fold=1).astimezone(UTC).astimezone(zone) if left_out else found


def parse(at: str | None, timezone: str | None, cron: str | None) -> Timetable:
    """Returns the timetable of ``--at``, ``--timezone`` and ``--cron``; by default 02:00 by the machine's clock.

    Raises :class:`UserMistake` for a time, zone or cron line that is none.
    """
    if at is not None and cron is not None:
        raise UserMistake("--at and --cron: give one of them. --at is for every night, --cron for anything else.")
    return Timetable(_daily(at or DEFAULT_TIME) if cron is None else _checked(cron), _zone(timezone))


def machine_zone() -> str:
    """Returns the IANA name of the machine's time zone, or ``UTC`` where it names none."""
    from tzlocal import get_localzone_name

    with contextlib.suppress(ZoneInfoNotFoundError, ValueError, OSError):
        return get_localzone_name() or "UTC"
    return "UTC"


def _zone(name: str | None) -> str:
    if name is None:
        return machine_zone()
    if name not in available_timezones():
        raise UserMistake(
            f"--timezone: '{name}' is no time zone. Name one of the IANA list, such as Europe/Berlin or UTC."
        )
    return name


def _daily(at: str) -> str:
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", at)
    if not found:
        raise UserMistake(f"--at: '{at}' is no time of day. Write hours and minutes, such as 02:00 or 23:30.")
    return f"{int(found[2])} {int(found[1])} * * *"


def _checked(cron: str) -> str:
    from prefect._vendor.croniter.croniter import CroniterBadDateError, croniter

    fields = cron.split()
    # A sixth field (seconds), @daily, and random and hashed fields are croniter's own; Prefect refuses the last two.
    if len(fields) != 5 or any(field in ("R", "H", "r", "h") for field in fields) or not croniter.is_valid(cron):
        raise UserMistake(
            f"--cron: '{cron}' is no cron line. Write five fields (minute, hour, day, month, weekday), such as "
            "'0 2 * * 1-5' for 02:00 on working days."
        )
    try:
        croniter(cron, datetime.now()).get_next(datetime)
    except CroniterBadDateError:
        raise UserMistake(f"--cron: '{cron}' names a day that never comes, such as 31 February.") from None
    return cron
