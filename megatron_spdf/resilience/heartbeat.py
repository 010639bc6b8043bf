"""While a run is on: rank 0 hears from every rank each second, and ends the run when one dies,
hangs or fails.

Each rank keeps a connection to rank 0. A process that dies closes it; a process that is stopped, a
node that is gone or a network that is cut falls silent; a training thread that hangs stands still
while its beats go on. Whatever it is, the rank, its host and its last collective are named on
standard error, and every rank ends with `exit_codes.LOST_RANK`.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta

from megatron_spdf import exit_codes
from megatron_spdf.resilience import progress
from megatron_spdf.resilience.world import Ranks, shared_store
from megatron_spdf.text import first_line

BEAT_SECONDS = 1.0
GRACE_SECONDS = 2.0  # after the first sign of trouble: its cause may be another rank's death


@dataclass
class Beat:
    """What a rank says of itself.

    Attributes:
        still: seconds without progress in a watched activity; 0 in others.
        failed: the error that ends it; leaving: it ends as it should.
    """

    rank: int
    host: str
    activity: str = ""
    collective: str = ""
    inside: bool = False
    still: float = 0.0
    failed: str = ""
    leaving: bool = False

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def did(self) -> str:
        return (f"in {self.activity or 'setting up'}; its last collective: "
                f"{self.collective or 'none yet'}")


@dataclass
class Peer:
    """A rank as rank 0 knows it.

    Attributes:
        heard: when its last beat was.
        closed: whether its connection was, as of a process that is no more.
        trouble: since when it is closed, or has failed.
    """

    beat: Beat
    heard: float
    closed: bool = False
    trouble: float | None = None

    def hear(self, beat: dict | None) -> None:
        """Takes a beat; None: the connection was closed."""
        self.heard = time.monotonic()
        if beat is None:
            self.closed = True
        else:
            self.beat = Beat(**beat)
        if self.trouble is None and (self.closed or self.beat.failed):
            self.trouble = self.heard


def verdict(peers: list[Peer], now: float, seconds: float) -> str:
    """What ends the run, or empty; deaths before silence, silence before standing still, since each
    causes the next.

    Args:
        now: time.monotonic().
        seconds: fault_tolerance.hang_seconds.
    """
    there = [p for p in peers if not p.beat.leaving]
    troubled = sorted((p for p in there if p.trouble is not None), key=lambda p: p.trouble)
    dead = [p for p in troubled if p.closed and not p.beat.failed]
    failed = [p for p in troubled if p.beat.failed]
    first = troubled[0].trouble if troubled else now
    if now - first > GRACE_SECONDS:
        if dead:
            return "; ".join(f"{p.beat.who} died {p.beat.did}" for p in dead)
        return f"{failed[0].beat.who} failed {failed[0].beat.did}; {failed[0].beat.failed}"
    silent = [p for p in there if not p.closed and now - p.heard > seconds]
    if silent:
        return "; ".join(f"{p.beat.who} has been silent for {now - p.heard:.0f} s "
                         f"(fault_tolerance.hang_seconds={seconds:g}), last heard of {p.beat.did}"
                         for p in silent)
    if there and all(p.beat.still > seconds for p in there):
        outside = [p for p in there if not p.beat.inside]
        behind = outside if 0 < len(outside) < len(there) else [max(there,
                                                                    key=lambda p: p.beat.still)]
        named = "; ".join(f"{p.beat.who} has stood still for {p.beat.still:.0f} s "
                          f"(fault_tolerance.hang_seconds={seconds:g}) {p.beat.did}"
                          for p in behind)
        return named + ("" if len(there) == len(behind) else "; others wait for it")
    return ""


class Heartbeat:
    """This rank's part; a context around all that follows the joining of the ranks. With one rank
    it does nothing.

    Args:
        seconds: fault_tolerance.hang_seconds.
    """

    def __init__(self, ranks: Ranks, seconds: float):
        self.ranks, self.seconds, self.host = ranks, seconds, socket.gethostname()
        self.failed, self.leaving = "", threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self.ranks.world == 1:
            return self
        store = shared_store()
        if self.ranks.rank == 0:
            door = socket.create_server(("", 0), backlog=self.ranks.world)
            token = secrets.token_hex(16)
            store.set("heartbeat",
                      json.dumps([os.environ["MASTER_ADDR"], door.getsockname()[1], token]))
            target, arguments = self._preside, (door, token)
        else:
            store.wait(["heartbeat"], timedelta(seconds=self.seconds))
            host, port, token = json.loads(store.get("heartbeat"))
            line = socket.create_connection((host, port), timeout=self.seconds)
            line.sendall(token.encode() + b"\n")
            target, arguments = self._report, (line,)
        self._thread = threading.Thread(target=target, args=arguments, name="heartbeat",
                                        daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Leaves; after an error only when rank 0 has had the time to name the cause, which may be
        another rank's."""
        if not self._thread:
            return
        if error is not None and not isinstance(error, SystemExit):
            traceback.print_exception(error)
            self.failed = f"{type(error).__name__}: {first_line(error)}"
            self._thread.join(2 * GRACE_SECONDS + 4 * BEAT_SECONDS)
        self.leaving.set()
        self._thread.join(4 * BEAT_SECONDS)

    def _beat(self) -> Beat:
        now = progress.PROGRESS
        return Beat(self.ranks.rank, self.host, now.activity, now.last_collective(), now.inside,
                    time.monotonic() - now.moved if now.watched else 0.0, self.failed,
                    self.leaving.is_set())

    def _report(self, line: socket.socket) -> None:
        """Of every other rank: a beat to rank 0 each second, and one of rank 0 in return."""
        line.settimeout(BEAT_SECONDS)
        head, heard, rest = Beat(0, os.environ["MASTER_ADDR"]), time.monotonic(), b""
        try:
            while True:
                mine = self._beat()
                line.sendall(json.dumps(asdict(mine)).encode() + b"\n")
                if mine.leaving:
                    return
                self.leaving.wait(BEAT_SECONDS / 2)
                try:
                    read = line.recv(1 << 16)
                    if not read:
                        raise ConnectionResetError
                    *lines, rest = (rest + read).split(b"\n")
                    for text in lines:
                        said, heard = json.loads(text), time.monotonic()
                        if said["verdict"]:
                            os._exit(exit_codes.LOST_RANK)  # rank 0 has said why
                        head = Beat(**said["beat"])
                except TimeoutError:
                    pass
                if head.leaving:
                    return
                # its own verdict comes first
                if time.monotonic() - heard > self.seconds + 2 * GRACE_SECONDS:
                    self._end(f"{head.who} has been silent for {time.monotonic() - heard:.0f} s "
                              f"(fault_tolerance.hang_seconds={self.seconds:g}), last heard of "
                              f"{head.did}")
        except OSError:
            if not head.leaving and not self.leaving.is_set():
                time.sleep(GRACE_SECONDS)
                self._end(f"{head.who} died {head.did}" if not head.failed
                          else f"{head.who} failed: {head.failed}")

    def _preside(self, door: socket.socket, token: str) -> None:
        """Of rank 0: hears everyone, judges, tells everyone."""
        began = time.monotonic()
        peers = {r: Peer(Beat(r, "a host that rank 0 has not heard of"), began)
                 for r in range(self.ranks.world)}
        lines = _Lines(door, token)
        while True:
            mine = self._beat()
            for rank, beat in [*lines.read(BEAT_SECONDS / 2), (0, asdict(mine))]:
                peers[rank].hear(beat)
            said = verdict(list(peers.values()), time.monotonic(), self.seconds)
            lines.tell(json.dumps({"beat": asdict(mine), "verdict": said}))
            if said:
                self._end(said)
            if mine.leaving:
                return

    def _end(self, said: str) -> None:
        if self.ranks.rank == 0 or self.ranks.local == 0 or self.ranks.rank == 1:
            print(f"the run ends on rank {self.ranks.rank} on {self.host}: {said}",
                  file=sys.stderr, flush=True)
        # the training thread may be inside a collective that never returns
        os._exit(exit_codes.LOST_RANK)


class _Lines:
    """Rank 0's connections: JSON lines from ranks that gave the token first."""

    def __init__(self, door: socket.socket, token: str):
        self.token, self.ready = token.encode(), selectors.DefaultSelector()
        self.rest: dict[socket.socket, bytes] = {}
        self.ranks: dict[socket.socket, int | None] = {}
        self.door = door
        door.setblocking(False)
        self.ready.register(door, selectors.EVENT_READ)

    def read(self, seconds: float) -> list[tuple[int, dict | None]]:
        """(rank, beat) of all that came meanwhile; None instead of a beat where a rank's connection
        was closed."""
        end, found = time.monotonic() + seconds, []
        while (left := end - time.monotonic()) > 0:
            for key, _ in self.ready.select(left):
                line = key.fileobj
                if line is self.door:
                    self._let_in()
                else:
                    found += self._hear(line)
        return found

    def tell(self, text: str) -> None:
        for line, rank in list(self.ranks.items()):
            if rank is not None:
                try:
                    line.sendall(text.encode() + b"\n")
                except OSError:  # heard of when it is read
                    continue

    def _let_in(self) -> None:
        line, _ = self.door.accept()
        line.setblocking(False)
        self.ready.register(line, selectors.EVENT_READ)
        self.rest[line], self.ranks[line] = b"", None

    def _hear(self, line: socket.socket) -> list[tuple[int, dict | None]]:
        try:
            read = line.recv(1 << 16)
        except OSError:
            read = b""
        if not read:
            rank = self._drop(line)
            return [] if rank is None else [(rank, None)]
        *texts, self.rest[line] = (self.rest[line] + read).split(b"\n")
        found = []
        for text in texts:
            if line not in self.ranks:
                break
            if self.ranks[line] is None:
                if text == self.token:
                    self.ranks[line] = -1  # its first beat says which
                else:
                    self._drop(line)
                continue
            beat = json.loads(text)
            self.ranks[line] = beat["rank"]
            found.append((beat["rank"], beat))
        return found

    def _drop(self, line: socket.socket) -> int | None:
        self.ready.unregister(line)
        line.close()
        self.rest.pop(line)
        rank = self.ranks.pop(line)
        return None if rank in (None, -1) else rank
