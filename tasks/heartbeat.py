"""Who keeps the others waiting: each process says where it is, and one that waits too long names who did not arrive.

A collective only knows that somebody is missing (gloo after half an hour), or ends the process (NCCL). So every
process writes its place and a beat into the store that the group met at, from a thread of its own. One that has been at
the same place for too long looks up the others: whose beat stands still is stopped or gone, who beats at an earlier
place is held up there. It tells that in one line, kills what lies still on its machine, and ends.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn, TypeVar, get_args

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from tasks.errors import EXIT_TRY_AGAIN
from tasks.parallel import traffic
from tasks.parallel import waits as waits_for

# What comes before the steps, what each of them consists of, and what comes after them, in this order.
Part = Literal[
    "the start",
    "the gradients",
    "the agreement",
    "the validation",
    "the stop",
    "the checkpoint",
    "the model's gathering",
    "the model's writing",
]
_PARTS: tuple[Part, ...] = get_args(Part)
_OF_NO_STEP: tuple[Part, ...] = ("the start", "the model's gathering", "the model's writing")
_PREFIX = "overnight/heartbeat"
# There once a process was told to end.
_STOP = f"{_PREFIX}/stop"
# How many have come to tell who is late, of which the first does; how many others know of it.
_TOLD, _HEARD = f"{_PREFIX}/told", f"{_PREFIX}/heard"
_SECONDS_TO_TELL = 2.0


@dataclass(frozen=True)
class Beat:
    """What a process has written last: how often it had written, how often it had moved, and where it is.

    ``batches`` counts within the gradients of a step, where all processes have the same number of them.
    """

    number: int
    moves: int
    step: int
    part: int
    batches: int
    host: str
    process: int

    @property
    def position(self) -> tuple[int, int, int]:
        return self.step, self.part, self.batches

    @property
    def place(self) -> str:
        part = _PARTS[self.part]
        return part if part in _OF_NO_STEP else f"{part} of step {self.step:,}"


def verdict(rank: int, before: Mapping[int, Beat | None], after: Mapping[int, Beat | None]) -> tuple[str, list[int]]:
    """Returns what holds up ``rank``, in words, and the ranks whose beat stood still between the two looks.

    The words are empty when something has moved meanwhile.
    """
    if any(beat and (was := before[other]) and beat.moves != was.moves for other, beat in after.items()):
        return "", []
    here = after[rank]
    assert here is not None
    still = [other for other, beat in after.items() if beat is None or beat == before[other]]
    if still:
        return f"{ranks(still)} did not come through {here.place}: stopped, or gone", still
    there = {other: beat for other, beat in after.items() if beat is not None}
    earliest, furthest = (choose(there.values(), key=lambda beat: beat.position) for choose in (min, max))
    late = ranks([other for other, beat in there.items() if beat.position == earliest.position])
    if earliest.position == furthest.position:
        return f"no process came through {here.place}: the network between them, or a disk, does not answer", []
    if earliest.place == furthest.place:
        return f"{late} is held up in {here.place}, where the others wait", []
    return f"{late} did not arrive at {furthest.place}: still at {earliest.place}", []


_Item = TypeVar("_Item")


class Heartbeat:
    """Where this process is: at the start, until it says more. Made by :func:`beating`."""

    def __init__(self) -> None:
        self.step, self.part, self.batches = 0, 0, 0
        self.moves, self.moved = 0, time.monotonic()
        # Whether one of all was told to end; the others know within a second.
        self.told = False
        self.watch: _Watch | None = None

    def at(self, step: int, part: Part) -> None:
        """Says that this process begins ``part`` of ``step``, counted from 1."""
        self.step, self.part, self.batches = step, _PARTS.index(part), 0
        self.move()

    def batch(self) -> None:
        """Says that this process has read another batch, or has computed its loss."""
        self.batches += 1
        self.move()

    def move(self) -> None:
        """Says that it gets on."""
        self.moves, self.moved = self.moves + 1, time.monotonic()

    def tell(self) -> None:
        """Says to all that this process was told to end."""
        self.told = True
        if self.watch:
            self.watch.store.set(_STOP, "")

    def settled(self, step: int) -> bool:
        """Returns whether all stop after ``step`` steps, which they have not taken together: once that is certain.

        False where another one has begun a further step, which is then to be taken too.
        """
        self.at(step, "the stop")
        while self.watch:
            self.watch.beat()
            beats = self.watch.beats_of_all().values()
            if any(beat is not None and beat.step > step for beat in beats):
                return False
            if all(beat is not None and beat.position >= (step, self.part, 0) for beat in beats):
                break
            time.sleep(self.watch.interval / 4)
        return True

    def along(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yields ``items``, and says with each that it gets on."""
        for item in items:
            self.move()
            yield item


@contextlib.contextmanager
def beating(rank: int, size: int, seconds: float) -> Iterator[Heartbeat]:
    """Yields a :class:`Heartbeat` of one of ``size`` processes, which ends when it makes no move for ``seconds``."""
    here, over = Heartbeat(), threading.Event()
    here.watch = watch = _Watch(_connect(seconds), here, over, rank, size, seconds)
    thread = threading.Thread(target=watch.run, name="heartbeat", daemon=True)
    thread.start()
    threading.Thread(target=watch.run_without_answers, name="patience", daemon=True).start()
    try:
        yield here
    finally:
        over.set()
        # Where the store does not answer, the thread does not end either.
        thread.join(_SECONDS_TO_TELL)


@contextlib.contextmanager
def joining(rank: int, size: int, seconds: float) -> Iterator[None]:
    """In this ``with`` block a process joins the others, which is ended where that takes more than ``seconds``.

    Who is missing then is told: each says into the store that it is there, as soon as that is.
    """
    over, begun = threading.Event(), time.monotonic()

    def watch() -> None:
        try:
            store = _connect(seconds)
            store.set(f"{_PREFIX}/joins/{rank}", "")
            # Whoever keeps the store may have come late itself.
            if over.wait(max(0.0, begun + seconds - time.monotonic())):
                return
            missing = [other for other in range(size) if not store.check([f"{_PREFIX}/joins/{other}"])]
            told = f"{ranks(missing)} did not join" if missing else "the processes have not joined"
            first = store.add(_TOLD, 1) == 1
        except DistError:
            return
        if first:
            print(
                f"error: {told} the others within {seconds:g} s: stopped, or the network between the machines does "
                "not let them. Run again to go on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(_SECONDS_TO_TELL)
        os._exit(EXIT_TRY_AGAIN)

    threading.Thread(target=watch, name="joining", daemon=True).start()
    # Where the store does not answer, the other one has told nothing until then.
    patience = threading.Timer(seconds + 2 * _SECONDS_TO_TELL, _tell_of_the_store, [rank, seconds, over])
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        over.set()
        patience.cancel()


def _connect(seconds: float) -> TCPStore:
    # A connection of its own: the group's is busy as long as somebody waits in it.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def _tell_of_the_store(rank: int, seconds: float, over: threading.Event) -> None:
    """Ends this process because the store does not answer, unless it is ``over`` meanwhile.

    In a line that another process tells first, if that lives.
    """
    if over.wait(_SECONDS_TO_TELL if rank > 1 else 0):
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    print(
        f"error: rank {rank}: rank 0, or the launcher beside it, does not answer at {place}, where all meet: stopped, "
        f"or gone; nothing has moved for {seconds:g} s. Run again to go on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_TRY_AGAIN)


class _Watch:
    def __init__(
        self, store: Store, here: Heartbeat, over: threading.Event, rank: int, size: int, seconds: float
    ) -> None:
        self.store, self.here, self.over = store, here, over
        self.rank, self.size, self.seconds = rank, size, seconds
        self.interval = min(1.0, seconds / 5)
        self.beats = 0
        self.turned = time.monotonic()

    def run(self) -> None:
        # Without the store, whoever keeps it is gone: the next collective fails by itself, and the launcher sees it.
        with contextlib.suppress(DistError):
            while True:
                self.turned = time.monotonic()
                self.beat()
                self.here.told = self.here.told or self.store.check([_STOP])
                if self.store.check([_TOLD]):
                    self.end_with_another()
                if self.stands_still:
                    self.look()
                if self.over.wait(self.interval):
                    return

    def run_without_answers(self) -> None:
        # Or it is stopped: the other thread is not answered then, and no collective ends.
        while True:
            asked = time.monotonic()
            if self.over.wait(self.interval):
                return
            if time.monotonic() - asked > self.interval + _SECONDS_TO_TELL:
                # This process was stopped itself, as a suspended job's are: the store had no time to answer.
                self.turned = time.monotonic()
            elif self.stands_still and time.monotonic() - self.turned > self.seconds + _SECONDS_TO_TELL:
                _tell_of_the_store(self.rank, self.seconds, self.over)

    @property
    def stands_still(self) -> bool:
        return time.monotonic() - self.here.moved > self.seconds

    def beat(self) -> None:
        self.beats += 1
        here = self.here
        beat = Beat(self.beats, here.moves, here.step, here.part, here.batches, socket.gethostname(), os.getpid())
        self.store.set(f"{_PREFIX}/{self.rank}", json.dumps(list(vars(beat).values())))

    def look(self) -> None:
        before = self.beats_of_all()
        for _ in range(3):
            if self.over.wait(self.interval):
                return
            self.beat()
        after = self.beats_of_all()
        told, still = verdict(self.rank, before, after)
        if not told or self.over.is_set():
            return
        if self.store.add(_TOLD, 1) > 1:
            self.end_with_another()
        where = ""
        # Whatever the record of the collectives holds: this line must be told.
        with contextlib.suppress(Exception):
            waits = traffic.waits_in() or waits_for.a_message()
            where = f" (rank {self.rank} waits in {waits})" if waits else ""
        print(
            f"error: {told}{where}; nothing has moved for {self.seconds:g} s (hang_timeout_seconds). "
            "Run again to go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        # Those that have not heard would tell of what follows, too: of whoever is killed, or of the store, which its
        # keeper takes along.
        end = time.monotonic() + 3 * self.interval + _SECONDS_TO_TELL
        with contextlib.suppress(DistError):
            while self.store.add(_HEARD, 0) < self.size - len(still) - 1 and time.monotonic() < end:
                time.sleep(0.05)
        for beat in (after[rank] for rank in still):
            # Stopped, it would not even end when it is told to.
            if beat is not None and beat.host == socket.gethostname():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.process, signal.SIGKILL)
        os._exit(EXIT_TRY_AGAIN)

    def end_with_another(self) -> NoReturn:
        """Ends this process, as another one does that has told who is late."""
        with contextlib.suppress(DistError):
            self.store.add(_HEARD, 1)
            # Whoever ends first takes the others along.
            time.sleep(_SECONDS_TO_TELL)
        os._exit(EXIT_TRY_AGAIN)

    def beats_of_all(self) -> dict[int, Beat | None]:
        keys = {rank: f"{_PREFIX}/{rank}" for rank in range(self.size)}
        if self.store.check([*keys.values()]):
            # In one go: of many processes, each asks for all.
            found = self.store.multi_get([*keys.values()])
            return {rank: Beat(*json.loads(one)) for rank, one in zip(keys, found, strict=True)}
        return {
            rank: Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None
            for rank, key in keys.items()
        }


def ranks(numbers: list[int]) -> str:
    """Returns how processes are named."""
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
