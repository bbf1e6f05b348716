"""When the nightly flow starts: what people may type, and that we and Prefect's scheduler name the same moments."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from flows import timetable
from flows.timetable import Timetable
from tasks.errors import UserMistake


@pytest.mark.parametrize(
    ("at", "cron", "line"),
    [
        (None, None, "0 2 * * *"),
        ("23:05", None, "5 23 * * *"),
        ("7:30", None, "30 7 * * *"),
        (None, "0 2 * * MON-FRI", "0 2 * * MON-FRI"),
        (None, "15 3 1 MAR *", "15 3 1 MAR *"),
    ],
)
def test_a_time_of_day_becomes_a_cron_line_and_a_cron_line_stays(at: str | None, cron: str | None, line: str) -> None:
    assert timetable.parse(at, "UTC", cron) == Timetable(line, "UTC")


def test_without_a_zone_the_machines_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert timetable.parse(None, None, None).timezone == "Asia/Tokyo"


@pytest.mark.parametrize(
    ("at", "zone", "cron", "told"),
    [
        ("25:00", None, None, "--at: '25:00'"),
        ("2am", None, None, "--at: '2am'"),
        ("02:60", None, None, "--at: '02:60'"),
        ("02:00", None, "0 2 * * *", "give one of them"),
        (None, "Berlin", None, "--timezone: 'Berlin'"),
        (None, "europe/berlin", None, "--timezone: 'europe/berlin'"),
        (None, "../../etc/passwd", None, "--timezone"),
        (None, "", None, "--timezone: ''"),
        (None, None, "0 2 * *", "--cron: '0 2 * *'"),
        (None, None, "0 2 * * * *", "five fields"),
        (None, None, "61 2 * * *", "--cron: '61 2 * * *'"),
        (None, None, "H 2 * * *", "--cron: 'H 2 * * *'"),
        (None, None, "@daily", "--cron: '@daily'"),
        (None, None, "0 2 31 2 *", "names a day that never comes"),
        (None, None, "", "--cron: ''"),
    ],
)
def test_what_is_no_time_zone_or_cron_line_is_one_clear_line(
    at: str | None, zone: str | None, cron: str | None, told: str
) -> None:
    with pytest.raises(UserMistake) as caught:
        timetable.parse(at, zone, cron)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


# Berlin has no 02:30 on 2027-03-28 and two on 2027-10-31.
@pytest.mark.parametrize("day", ["2027-01-15", "2027-03-27", "2027-03-28", "2027-10-30", "2027-10-31"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * *", "0 1 * * 0"])
def test_the_next_start_is_the_one_that_prefects_scheduler_plans(day: str, cron: str) -> None:
    from prefect.server.schemas.schedules import CronSchedule

    after = datetime.fromisoformat(f"{day}T00:00").replace(tzinfo=UTC)
    schedule = CronSchedule(cron=cron, timezone="Europe/Berlin")
    planned = asyncio.run(schedule.get_dates(n=1, start=after + timedelta(seconds=1)))
    assert Timetable(cron, "Europe/Berlin").next(after).astimezone(UTC) == planned[0].astimezone(UTC)
