"""Heartbeats of all ranks: rank 0 collects them, and ends the run when a rank dies, hangs or fails.

Each rank sends a beat to rank 0 every second over a connection of its own. A process that dies
closes the connection. A stopped process, a lost node or a cut network falls silent. A training
thread that hangs makes no progress while its beats go on. The rank at fault, its host and its last
collective are named on standard error, and every rank exits with `exit_codes.LOST_RANK`.
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
        leaving: whether the rank is about to exit normally.
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

    def update(self, beat: dict | None) -> None:
        """Records a beat, or with None that the connection was closed."""
        self.heard = time.monotonic()
        if beat is None:
            self.closed = True
        else:
            self.beat = Beat(**beat)
        if self.trouble is None and (self.closed or self.beat.failed):
            self.trouble = self.heard


def diagnose(peers: list[Peer], now: float, seconds: float) -> str:
    """Finds the fault that ends the run, as a sentence, which is empty without one.

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
            return "; ".join(f"{p.beat.who} died {p.beat.did}" for p in dead)
        return f"{failed[0].beat.who} failed {failed[0].beat.did}; {failed[0].beat.failed}"
    silent = [p for p in there if not p.closed and now - p.heard > seconds]
    if silent:
        return "; ".join(f"{p.beat.who} has been silent for {now - p.heard:.0f} s "
                         f"(fault_tolerance.hang_seconds={seconds:g}), last heard of {p.beat.did}"
                         for p in silent)
    return _diagnose_hang(there, seconds)


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
    """Context that exchanges heartbeats in a thread, once the ranks are joined. With one rank it
    does nothing.

    Args:
        ranks: this process among all.
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
            listener = socket.create_server(("", 0), backlog=self.ranks.world)
            token = secrets.token_hex(16)
            store.set("heartbeat",
                      json.dumps([os.environ["MASTER_ADDR"], listener.getsockname()[1], token]))
            target, arguments = self._coordinate, (listener, token)
        else:
            store.wait(["heartbeat"], timedelta(seconds=self.seconds))
            host, port, token = json.loads(store.get("heartbeat"))
            connection = socket.create_connection((host, port), timeout=self.seconds)
            connection.sendall(token.encode() + b"\n")
            target, arguments = self._report, (connection,)
        self._thread = threading.Thread(target=target, args=arguments, name="heartbeat",
                                        daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Ends the thread. After an error it first gives rank 0 the time to name the cause, which
        may lie on another rank."""
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

    def _report(self, connection: socket.socket) -> None:
        """Other ranks: exchange beats with rank 0, and exit on a fault that it names."""
        connection.settimeout(BEAT_SECONDS)
        head, heard, rest = Beat(0, os.environ["MASTER_ADDR"]), time.monotonic(), b""
        try:
            while True:
                mine = self._beat()
                connection.sendall(json.dumps(asdict(mine)).encode() + b"\n")
                if mine.leaving:
                    return
                self.leaving.wait(BEAT_SECONDS / 2)
                try:
                    read = connection.recv(1 << 16)
                    if not read:
                        raise ConnectionResetError
                    *lines, rest = (rest + read).split(b"\n")
                    for text in lines:
                        said, heard = json.loads(text), time.monotonic()
                        if said["fault"]:
                            os._exit(exit_codes.LOST_RANK)  # rank 0 has printed it
                        head = Beat(**said["beat"])
                except TimeoutError:
                    pass
                if head.leaving:
                    return
                # rank 0, if it lives, names a fault earlier
                if time.monotonic() - heard > self.seconds + 2 * GRACE_SECONDS:
                    self._end(f"{head.who} has been silent for {time.monotonic() - heard:.0f} s "
                              f"(fault_tolerance.hang_seconds={self.seconds:g}), last heard of "
                              f"{head.did}")
        except OSError:
            if not head.leaving and not self.leaving.is_set():
                time.sleep(GRACE_SECONDS)
                self._end(f"{head.who} died {head.did}" if not head.failed
                          else f"{head.who} failed: {head.failed}")

    def _coordinate(self, listener: socket.socket, token: str) -> None:
        """Rank 0: collects beats, detects faults, broadcasts both."""
        began = time.monotonic()
        peers = {r: Peer(Beat(r, "a host that rank 0 has not heard of"), began)
                 for r in range(self.ranks.world)}
        connections = _Connections(listener, token)
        while True:
            mine = self._beat()
            for rank, beat in [*connections.read(BEAT_SECONDS / 2), (0, asdict(mine))]:
                peers[rank].update(beat)
            fault = diagnose(list(peers.values()), time.monotonic(), self.seconds)
            connections.broadcast(json.dumps({"beat": asdict(mine), "fault": fault}))
            if fault:
                self._end(fault)
            if mine.leaving:
                return

    def _end(self, fault: str) -> None:
        """Prints the fault, on some ranks in case rank 0 is gone, and exits."""
        if self.ranks.rank == 0 or self.ranks.local == 0 or self.ranks.rank == 1:
            print(f"the run ends on rank {self.ranks.rank} on {self.host}: {fault}",
                  file=sys.stderr, flush=True)
        # the training thread may be inside a collective that never returns
        os._exit(exit_codes.LOST_RANK)


class _Connections:
    """Rank 0's connections: JSON lines from ranks that have sent the token first.

    Attributes:
        rest: connection -> start of a line whose end has not come yet.
        ranks: connection -> rank; -1 before its first beat, None before its token.
    """

    def __init__(self, listener: socket.socket, token: str):
        self.token, self.ready = token.encode(), selectors.DefaultSelector()
        self.rest: dict[socket.socket, bytes] = {}
        self.ranks: dict[socket.socket, int | None] = {}
        self.listener = listener
        listener.setblocking(False)
        self.ready.register(listener, selectors.EVENT_READ)

    def read(self, seconds: float) -> list[tuple[int, dict | None]]:
        """Collects beats for so long.

        Returns:
            (rank, beat) pairs, beat None where the connection of a rank was closed.
        """
        end, found = time.monotonic() + seconds, []
        while (left := end - time.monotonic()) > 0:
            for key, _ in self.ready.select(left):
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    found += self._receive(key.fileobj)
        return found

    def broadcast(self, text: str) -> None:
        """Sends a line to every rank that is connected."""
        for connection, rank in list(self.ranks.items()):
            if rank is not None:
                try:
                    connection.sendall(text.encode() + b"\n")
                except OSError:  # `read` finds the connection closed
                    continue

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        self.ready.register(connection, selectors.EVENT_READ)
        self.rest[connection], self.ranks[connection] = b"", None

    def _receive(self, connection: socket.socket) -> list[tuple[int, dict | None]]:
        try:
            read = connection.recv(1 << 16)
        except OSError:
            read = b""
        if not read:
            rank = self._drop(connection)
            return [] if rank is None else [(rank, None)]
        *texts, self.rest[connection] = (self.rest[connection] + read).split(b"\n")
        found = []
        for text in texts:
            if connection not in self.ranks:
                break
            if self.ranks[connection] is None:
                if text == self.token:
                    self.ranks[connection] = -1  # its first beat says which
                else:
                    self._drop(connection)
                continue
            beat = json.loads(text)
            self.ranks[connection] = beat["rank"]
            found.append((beat["rank"], beat))
        return found

    def _drop(self, connection: socket.socket) -> int | None:
        """Closes a connection and returns its rank, None if it is not known."""
        self.ready.unregister(connection)
        connection.close()
        self.rest.pop(connection)
        rank = self.ranks.pop(connection)
        return None if rank in (None, -1) else rank
