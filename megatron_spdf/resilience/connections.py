"""Connections between the ranks of a job, on the job's own interface and for none but its ranks.

A rank listens at the address that leads to the head node. Who connects gives the job's token in its
first line, and gets an empty line as the answer. Strangers can take neither descriptors, nor
memory, nor time: they are few at a time, say little, and are gone within seconds.

The token goes through PyTorch's store, which asks nobody who they are (docs/trust.md).
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import torch.distributed as dist

from megatron_spdf.resilience import slurm
from megatron_spdf.text import first_line, printable

TOKEN_SECONDS = 5.0  # from connecting until the token is there
SAY_SECONDS = 60.0  # between two lines about the same thing
RETRY_SECONDS = 0.2  # between two attempts to connect
MOST_STRANGERS = 64  # connections without the token at a time
MOST_LINE_BYTES = 1 << 16
MOST_READ_BYTES = 1 << 18  # of one connection in one `Listener.read`
# of the ranges for documentation: a route to them leads out of this host, nothing is sent
ELSEWHERE = ("192.0.2.1", "2001:db8::1")


def shared_token(store: dist.Store) -> str:
    """The token of the job, 128 random bits: that of the first rank that asks."""
    return store.compare_set("token", "", secrets.token_hex(16)).decode()


def own_address(env: Mapping[str, str] = os.environ) -> str:
    """Address of this host on the interface that leads to the head node.

    On the head node itself its name may lead to a loopback address, as /etc/hosts of Debian says.
    Where the job has other hosts, the interface is that which leads to them.
    """
    address = _route(env["MASTER_ADDR"])
    if address and not (_is_loopback(address) and _has_other_hosts(env)):
        return address
    outward = (_route(place) for place in 
               (*dict.fromkeys(slurm.hosts_of_ranks(env).values()), *ELSEWHERE))
    return next((a for a in outward if a and not _is_loopback(a)), address or "127.0.0.1")


def connect(address: tuple[str, int], token: str, seconds: float) -> socket.socket:
    """Connects to a listener of the job, and tries again where that fails.

    Raises:
        OSError: it cannot be reached within so many seconds.
    """
    end = time.monotonic() + seconds
    while True:
        connection = None
        try:
            left = max(0.1, end - time.monotonic())
            connection = socket.create_connection(address, timeout=left)
            connection.sendall(token.encode() + b"\n")
            if connection.recv(1) == b"\n":
                return connection
            raise ConnectionResetError("it does not take this job's token")
        except OSError:
            if connection:
                connection.close()
            if time.monotonic() + RETRY_SECONDS > end:
                raise
            time.sleep(RETRY_SECONDS)


@dataclass(eq=False)
class Connection:
    """An open connection.

    Attributes:
        name: address of the other end.
        since: `time.monotonic()` when it was opened.
        rest: start of a line whose end has not come yet.
        cut: whether what comes belongs to a line that was too long.
        unsent: what the other end has not taken yet.
    """

    socket: socket.socket
    name: str
    since: float
    rest: bytes = b""
    cut: bool = False
    unsent: bytes = b""


class Listener:
    """Listens at an address for lines of who gives the token.

    Args:
        address: of this host, see `own_address`.
        token: of the job.
        name: for what is said on standard error.
    """

    def __init__(self, address: str, token: str, name: str = "the listener"):
        self.token, self.say = token.encode(), Notices(name)
        kind, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        self._listening = socket.create_server(place, family=kind, backlog=1024)
        self._listening.setblocking(False)
        self.address: tuple[str, int] = (address, self._listening.getsockname()[1])
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._listening, selectors.EVENT_READ)
        self._strangers: dict[Connection, None] = {}  # the oldest first
        self._admitted: dict[Connection, None] = {}
        self._resting: list[Connection] = []  # have been read enough of
        self._full = False  # no descriptor is left

    def read(self, seconds: float) -> list[tuple[Connection, bytes | None]]:
        """Collects lines for so long, and once at least what is there.

        Returns:
            (connection, line) pairs, line None where it was closed. A line over MOST_LINE_BYTES is
            cut to them.
        """
        self._wake()
        end, found = time.monotonic() + seconds, []
        shares: dict[Connection, int] = {}
        while True:
            left = max(0.0, end - time.monotonic())
            for key, _ in self._ready.select(min(left, TOKEN_SECONDS / 4)):
                if key.data is None:
                    self._accept()
                elif key.data in self._strangers or key.data in self._admitted:
                    found += self._receive(key.data, shares)
            self._drop_silent()
            if time.monotonic() >= end:
                return found

    def broadcast(self, line: bytes) -> None:
        """Sends a line to all who have given the token. Who has not taken the lines before is left
        out, so that nobody gets a part of one."""
        for connection in self._admitted:
            if not connection.unsent:
                connection.unsent = line + b"\n"
            self._send(connection)

    def close(self) -> None:
        """Closes all connections."""
        for connection in (*self._strangers, *self._admitted):
            self._drop(connection)
        self._ready.close()
        self._listening.close()

    def _accept(self) -> None:
        try:
            one, address = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors
            self.say("accept", f"a connection could not be taken: {error}")
            if self._strangers:
                self._drop(next(iter(self._strangers)))
            else:
                self._ready.unregister(self._listening)
                self._full = True
            return
        one.setblocking(False)
        connection = Connection(one, f"{address[0]}, port {address[1]}", time.monotonic())
        self._ready.register(one, selectors.EVENT_READ, connection)
        self._strangers[connection] = None
        if len(self._strangers) > MOST_STRANGERS:
            self.say("many", f"over {MOST_STRANGERS} connections without this job's token, the "
                             f"last from {address[0]}; the oldest are closed")
            self._drop(next(iter(self._strangers)))

    def _receive(self, connection: Connection,
                 shares: dict[Connection, int]) -> list[tuple[Connection, bytes | None]]:
        try:
            read = connection.socket.recv(1 << (16 if connection in self._admitted else 10))
        except BlockingIOError:
            return []
        except OSError:
            read = b""
        if not read:
            known = connection in self._admitted
            self._drop(connection)
            return [(connection, None)] if known else []
        *lines, connection.rest = (connection.rest + read).split(b"\n")
        if connection in self._strangers:
            if lines:
                self._admit(connection, lines.pop(0))
            elif len(connection.rest) > len(self.token):
                self._drop(connection)
            if connection not in self._admitted:
                return []
        shares[connection] = shares.get(connection, 0) + len(read)
        if shares[connection] > MOST_READ_BYTES:
            self._ready.unregister(connection.socket)
            self._resting.append(connection)
        return [(connection, line) for line in self._whole(connection, lines)]

    def _whole(self, connection: Connection, lines: list[bytes]) -> Iterator[bytes]:
        """The lines that have come, those that are too long cut."""
        for line in lines:
            if not connection.cut and line:
                yield line[:MOST_LINE_BYTES]
            connection.cut = False
        if len(connection.rest) > MOST_LINE_BYTES:
            if not connection.cut:
                yield connection.rest[:MOST_LINE_BYTES]
            connection.rest, connection.cut = b"", True

    def _admit(self, connection: Connection, token: bytes) -> None:
        if hmac.compare_digest(token, self.token):
            del self._strangers[connection]
            self._admitted[connection], connection.unsent = None, b"\n"
            self._send(connection)
        else:
            self.say("token", f"{connection.name} has not this job's token and was turned away")
            self._drop(connection)

    def _send(self, connection: Connection) -> None:
        try:
            sent = connection.socket.send(connection.unsent)
            connection.unsent = connection.unsent[sent:]
        except OSError:  # full, or closed, which `read` finds
            return

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self._strangers if now - c.since > TOKEN_SECONDS]:
            self._drop(connection)

    def _wake(self) -> None:
        for connection in self._resting:
            if connection in self._admitted:
                self._ready.register(connection.socket, selectors.EVENT_READ, connection)
        self._resting = []
        if self._full:
            self._ready.register(self._listening, selectors.EVENT_READ)
            self._full = False

    def _drop(self, connection: Connection) -> None:
        for place in (self._strangers, self._admitted):
            place.pop(connection, None)
        if connection.socket in self._ready.get_map():
            self._ready.unregister(connection.socket)
        connection.socket.close()


@contextmanager
def answering(listener: Listener) -> Iterator[Listener]:
    """Has a thread answer who connects, and closes the listener at the end."""
    done = Event()

    def answer() -> None:
        while not done.is_set():
            with listener.say.what_fails():
                listener.read(0.1)

    thread = Thread(target=answer, name="listener", daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        done.set()
        thread.join()
        listener.close()


class Notices:
    """Lines on standard error, one of each kind in SAY_SECONDS.

    Args:
        name: of who says them.
    """

    def __init__(self, name: str):
        self.name = name
        self._said: dict[str, float] = {}  # kind -> time

    def __call__(self, kind: str, text: str) -> None:
        """Says a text, whose characters that cannot be printed become question marks."""
        now = time.monotonic()
        if kind in self._said and now - self._said[kind] < SAY_SECONDS:
            return
        self._said[kind] = now
        print(f"{self.name}: {printable(text)}", file=sys.stderr, flush=True)

    @contextmanager
    def what_fails(self) -> Iterator[None]:
        """Says an exception and goes on, after a pause."""
        try:
            yield
        except Exception as error:
            self(type(error).__name__,
                 f"{type(error).__name__}: {first_line(error)}; it goes on")
            time.sleep(RETRY_SECONDS)


def _route(host: str) -> str:
    """Own address on the way to a host; empty where there is no way."""
    try:
        places = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for kind, form, number, _, place in places:
        with socket.socket(kind, form, number) as probe:
            try:
                probe.connect(place)  # sends nothing
            except OSError:
                continue
            name = probe.getsockname()
            scope = f"%{socket.if_indextoname(name[3])}" if len(name) > 3 and name[3] else ""
            return name[0].partition("%")[0] + scope
    return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _has_other_hosts(env: Mapping[str, str]) -> bool:
    if "SLURM_STEP_NUM_NODES" in env and "GROUP_WORLD_SIZE" not in env:
        return env["SLURM_STEP_NUM_NODES"] != "1"
    if "LOCAL_WORLD_SIZE" in env and "WORLD_SIZE" in env:
        return env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]
    try:
        return not _is_loopback(env["MASTER_ADDR"])
    except ValueError:  # a name
        return env["MASTER_ADDR"] != "localhost"


