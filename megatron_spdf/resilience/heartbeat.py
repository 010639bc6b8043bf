"""Heartbeats of all ranks: rank 0 collects them, and ends the run when a rank dies, hangs or fails.

Each rank sends a beat to rank 0 every second over a connection of its own. A process that dies
closes the connection. A stopped process, a lost node or a cut network falls silent. A training
thread that hangs makes no progress while its beats go on. The rank at fault, its host and its last
collective are named on standard error, and every rank exits with `exit_codes.LOST_RANK`, or with
the code of the error that one of them met.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Annotated, NamedTuple

import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_spdf import exit_codes
from megatron_spdf.resilience import progress
from megatron_spdf.resilience.connections import (
    MOST_LINE_BYTES,
    Connection,
    Listener,
    Notices,
    connect,
    own_address,
    shared_token,
)
from megatron_spdf.resilience.slurm import this_host
from megatron_spdf.resilience.startup_check import Unhealthy
from megatron_spdf.resilience.world import Ranks
from megatron_spdf.text import first_line, printable

BEAT_SECONDS = 1.0
# after the first sign of trouble: its cause may be the death of another rank, known a little later
GRACE_SECONDS = 2.0


@dataclass
class Beat:
    """State of a rank, as it reports it.

    Attributes:
        activity: current one, in words.
        collective: last one entered, with its number.
        inside: whether the training thread is inside a collective.
        still: seconds without progress in a watched activity; 0 in others.
        failed: error that ends the rank; empty: none.
        code: exit code of a run that this error ends.
        leaving: whether the rank is about to exit normally.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    rank: int
    host: str
    activity: str = ""
    collective: str = ""
    inside: bool = False
    still: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    failed: str = ""
    code: int = exit_codes.LOST_RANK
    leaving: bool = False

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def did(self) -> str:
        return (f"in {self.activity or 'setting up'}; its last collective: "
                f"{self.collective or 'none yet'}")


@dataclass
class Answer:
    """Line of rank 0 to the others.

    Attributes:
        beat: its own.
        fault: what ends the run; empty: nothing.
        code: exit code that it ends with.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    beat: Beat
    fault: str
    code: int


BEATS, ANSWERS = TypeAdapter(Beat), TypeAdapter(Answer)


@dataclass
class Peer:
    """State of a rank, as rank 0 knows it. Times are `time.monotonic()`.

    Attributes:
        beat: the last one.
        heard: time of the last beat.
        closed: whether its connection is closed, as that of a dead process is.
        trouble: time when it was closed or failed; None: neither.
    """

    beat: Beat
    heard: float
    closed: bool = False
    trouble: float | None = None

    def update(self, beat: Beat | None) -> None:
        """Records a beat, or with None that the connection was closed."""
        self.heard = time.monotonic()
        if beat is None:
            self.closed = True
        else:
            self.beat = beat
        if self.trouble is None and (self.closed or self.beat.failed):
            self.trouble = self.heard


class Fault(NamedTuple):
    """What ends a run.

    Attributes:
        said: a sentence; empty: nothing.
        code: exit code of every rank.
    """

    said: str = ""
    code: int = exit_codes.LOST_RANK


def diagnose(peers: list[Peer], now: float, seconds: float) -> Fault:
    """Finds the fault that ends the run.

    Deaths come before silence, and silence before standing still, since each causes the next.

    Args:
        now: `time.monotonic()`.
        seconds: fault_tolerance.hang_seconds.
    """
    there = [p for p in peers if not p.beat.leaving]
    troubled = sorted((p for p in there if p.trouble is not None), key=lambda p: p.trouble)
    dead = [p for p in troubled if p.closed and not p.beat.failed]
    failed = [p for p in troubled if p.beat.failed]
    first = troubled[0].trouble if troubled else now
    if now - first > GRACE_SECONDS:
        if dead:
            return Fault("; ".join(f"{p.beat.who} died {p.beat.did}" for p in dead))
        beat = failed[0].beat
        return Fault(f"{beat.who} failed {beat.did}; {beat.failed}", beat.code)
    silent = [p for p in there if not p.closed and now - p.heard > seconds]
    if silent:
        return Fault("; ".join(
            f"{p.beat.who} has been silent for {now - p.heard:.0f} s "
            f"(fault_tolerance.hang_seconds={seconds:g}), last heard of {p.beat.did}"
            for p in silent))
    return Fault(_diagnose_hang(there, seconds))


def _diagnose_hang(there: list[Peer], seconds: float) -> str:
    """Names the ranks that hold up the others. Empty while any rank makes progress."""
    if not there or any(p.beat.still <= seconds for p in there):
        return ""
    # Those outside of collectives are waited for. Where all or none are inside, the cause is the
    # rank that has stood still longest.
    behind = [p for p in there if not p.beat.inside]
    if len(behind) in (0, len(there)):
        behind = [max(there, key=lambda p: p.beat.still)]
    named = "; ".join(f"{p.beat.who} has stood still for {p.beat.still:.0f} s "
                      f"(fault_tolerance.hang_seconds={seconds:g}) {p.beat.did}" for p in behind)
    return named + ("" if len(there) == len(behind) else "; others wait for it")


class Heartbeat:
    """Context that exchanges heartbeats in a thread, once the ranks are joined and before they make
    process groups, which may wait for a dead one. With one rank it does nothing.

    Args:
        ranks: this process among all.
        store: shared by all ranks.
        seconds: fault_tolerance.hang_seconds.
        codes: kind of an error that a user can put right -> exit code of a run that it ends.
    """

    def __init__(self, ranks: Ranks, store: dist.Store, seconds: float,
                 codes: Mapping[type[BaseException], int] | None = None):
        self.ranks, self.seconds, self.host = ranks, seconds, this_host()
        self.store = dist.PrefixStore("heartbeat", store)
        self.failed, self.code, self.leaving = "", exit_codes.LOST_RANK, threading.Event()
        self.codes = codes or {}
        self.say = Notices(f"heartbeat of rank {ranks.rank}")
        self._thread: threading.Thread | None = None
        self._looked = self._woke = time.monotonic()

    def __enter__(self) -> Heartbeat:
        if self.ranks.world == 1:
            return self
        if self.ranks.rank == 0:
            listener = Listener(own_address(), shared_token(self.store), self.say.name)
            self.store.set("address", json.dumps([*listener.address, listener.token.decode()]))
            target, arguments = self._coordinate, (listener,)
        else:
            target, arguments = self._report, (self._reach(),)
        self._thread = threading.Thread(target=target, args=arguments, name="heartbeat",
                                        daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Ends the thread. After an error it first gives rank 0 the time to name the cause, which
        may lie on another rank: where it has done so already, this error only follows from it and
        is not printed."""
        if not self._thread:
            return
        if error is not None and not isinstance(error, SystemExit):
            known = next((k for k in self.codes if isinstance(error, k)), None)
            self.code = self.codes.get(known, exit_codes.LOST_RANK)
            self.failed = printable(f"{type(error).__name__}: {first_line(error)}")
            self._thread.join(BEAT_SECONDS)
            if known is None:
                traceback.print_exception(error)
            self._thread.join(2 * GRACE_SECONDS + 3 * BEAT_SECONDS)
        self.leaving.set()
        self._thread.join(4 * BEAT_SECONDS)

    def _reach(self) -> socket.socket:
        """Connects to rank 0.

        Raises:
            Unhealthy: it has died since the start-up check, or cannot be reached.
        """
        try:
            self.store.wait(["address"], timedelta(seconds=self.seconds))
            host, port, token = json.loads(self.store.get("address"))
            return connect((host, port), token, self.seconds)
        except (RuntimeError, OSError) as error:  # some versions of PyTorch have no class of theirs
            raise Unhealthy(
                f"rank 0 on {os.environ.get('MASTER_ADDR')} fell silent after the start-up check "
                f"({first_line(error)}); look at that node, and start again") from None

    def _look(self) -> float:
        """Looks at the clock, and notes whether the whole process was stopped since it last did, as
        in a suspended job. Returns `time.monotonic()`."""
        now = time.monotonic()
        if now - self._looked > self.seconds / 2:
            self._woke = now
        self._looked = now
        return now

    def _beat(self) -> Beat:
        """State of this rank. What stood still while the whole process was stopped is no fault of
        its training thread."""
        now, done = self._look(), progress.PROGRESS
        return Beat(self.ranks.rank, self.host, done.activity, done.last_collective(), done.inside,
                    now - max(done.moved, self._woke) if done.watched else 0.0, self.failed,
                    self.code, self.leaving.is_set())

    def _report(self, connection: socket.socket) -> None:
        """Other ranks: exchange beats with rank 0, and exit on a fault that it names."""
        connection.settimeout(BEAT_SECONDS)
        answers = _Answers(connection, Beat(0, os.environ["MASTER_ADDR"]), self.say)
        while not answers.head.leaving:
            with self.say.what_fails():
                try:
                    mine = self._beat()
                    connection.sendall(json.dumps(asdict(mine)).encode() + b"\n")
                    if mine.leaving:
                        return
                    self.leaving.wait(BEAT_SECONDS / 2)
                    answers.read()
                except TimeoutError:
                    pass
                except OSError:
                    self._lost(answers)
                    return
                self._heed(answers)

    def _heed(self, answers: _Answers) -> None:
        """Ends this rank where rank 0 has named a fault, or is silent."""
        head, now = answers.head, self._look()
        silent = now - max(answers.heard, self._woke)
        if answers.fault:
            os._exit(answers.code)  # rank 0 has printed it
        # rank 0, if it lives, names a fault earlier
        if not head.leaving and silent > self.seconds + 2 * GRACE_SECONDS:
            self._end(Fault(f"{head.who} has been silent for {silent:.0f} s (fault_tolerance."
                            f"hang_seconds={self.seconds:g}), last heard of {head.did}"))

    def _lost(self, answers: _Answers) -> None:
        """Ends this rank after the connection to rank 0, whose last words may still be there: it
        may have ended the run while this rank was stopped."""
        answers.read_rest()
        self._heed(answers)
        head = answers.head
        if not head.leaving and not self.leaving.is_set():
            time.sleep(GRACE_SECONDS)
            self._end(Fault(f"{head.who} failed: {head.failed}", head.code) if head.failed
                      else Fault(f"{head.who} died {head.did}"))

    def _coordinate(self, listener: Listener) -> None:
        """Rank 0: collects beats, detects faults, broadcasts both."""
        began = time.monotonic()
        peers = [Peer(Beat(r, "a host that rank 0 has not heard of"), began)
                 for r in range(self.ranks.world)]
        beats, left = _Beats(listener, self.ranks.world), False
        while not left:
            with self.say.what_fails():
                left = self._round(beats, peers)
        listener.close()

    def _round(self, beats: _Beats, peers: list[Peer]) -> bool:
        """Collects beats once, and broadcasts. Returns whether rank 0 is about to leave."""
        mine = self._beat()
        for rank, beat in [*beats.read(BEAT_SECONDS / 2), (0, mine)]:
            peers[rank].update(beat)
        now = self._look()  # it may have been stopped while it read
        for one in peers:  # nobody is silent while rank 0 is stopped
            one.heard = max(one.heard, self._woke)
        fault = diagnose(peers, now, self.seconds)
        beats.listener.broadcast(json.dumps(asdict(Answer(mine, *fault))).encode())
        if fault.said:
            self._end(fault)
        return mine.leaving

    def _end(self, fault: Fault) -> None:
        """Prints the fault, on some ranks in case rank 0 is gone, and exits."""
        if self.ranks.rank == 0 or self.ranks.local == 0 or self.ranks.rank == 1:
            print(f"the run ends on rank {self.ranks.rank} on {self.host}: {printable(fault.said)}",
                  file=sys.stderr, flush=True)
        # the training thread may be inside a collective that never returns
        os._exit(fault.code)


class _Beats:
    """Beats that come to rank 0.

    Attributes:
        ranks: connection -> rank, as its first beat says.
    """

    def __init__(self, listener: Listener, world: int):
        self.listener, self.world = listener, world
        self.ranks: dict[Connection, int] = {}

    def read(self, seconds: float) -> list[tuple[int, Beat | None]]:
        """Collects beats for so long.

        Returns:
            (rank, beat) pairs, beat None where the connection of a rank was closed.
        """
        found: list[tuple[int, Beat | None]] = []
        for connection, line in self.listener.read(seconds):
            if line is None:
                if connection in self.ranks:
                    found.append((self.ranks.pop(connection), None))
            elif beat := self._beat(connection, line):
                self.ranks[connection] = beat.rank
                found.append((beat.rank, beat))
        return found

    def _beat(self, connection: Connection, line: bytes) -> Beat | None:
        """The beat that a line is; what is none is said and left out."""
        known = self.ranks.get(connection)
        try:
            beat = BEATS.validate_json(line)
            others = self.ranks.values() if known is None else range(self.world)
            if not 0 < beat.rank < self.world or (beat.rank != known and beat.rank in others):
                raise ValueError(f"rank={beat.rank} is not its rank")
            return beat
        except ValueError as error:
            who = connection.name if known is None else f"rank {known} at {connection.name}"
            self.listener.say(f"line of {who}", f"a line of {who} is no beat and was left out "
                                                f"({_reason(error)})")
            return None


class _Answers:
    """Answers of rank 0 to another rank.

    Attributes:
        head: last beat of rank 0.
        heard: `time.monotonic()` of the last answer.
        fault, code: that rank 0 has named.
    """

    def __init__(self, connection: socket.socket, head: Beat, say: Notices):
        self.connection, self.head, self.say = connection, head, say
        self.heard, self.fault, self._rest = time.monotonic(), "", b""
        self.code = exit_codes.LOST_RANK

    def read(self) -> None:
        """Reads what has come.

        Raises:
            OSError: nothing has, or the connection is closed.
        """
        read = self.connection.recv(1 << 16)
        if not read:
            raise ConnectionResetError("closed")
        *lines, rest = (self._rest + read).split(b"\n")
        self._rest = rest[:MOST_LINE_BYTES]
        for line in lines:
            try:
                said = ANSWERS.validate_json(line)
            except ValueError as error:
                self.say("answer", f"a line of rank 0 is no answer and was left out "
                                   f"({_reason(error)})")
                continue
            self.head, self.heard = said.beat, time.monotonic()
            if not self.fault:
                self.fault, self.code = said.fault, said.code

    def read_rest(self) -> None:
        """Reads what came before the connection was closed."""
        try:
            while not self.fault:
                self.read()
        except OSError:
            return


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False)[0]
        return ".".join([*map(str, first["loc"]), first["msg"]])[:200]
    return str(error)
