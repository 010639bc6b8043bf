"""Strangers on the network, and ranks that send rubbish, take nothing from a run and blame nobody.

All connections are real. Limits in seconds are shortened.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import psutil
import pytest
import torch.distributed as dist

from megatron_spdf.resilience import connections, heartbeat
from megatron_spdf.resilience.connections import (
    Listener,
    Notices,
    connect,
    own_address,
    shared_token,
)
from megatron_spdf.resilience.heartbeat import Beat, Peer, diagnose
from megatron_spdf.resilience.world import Ranks

TOKEN, WORLD = "0123456789abcdef" * 2, 3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(connections, "TOKEN_SECONDS", 0.4)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)


class Rank0:
    """Rank 0 of three, its rounds run by a thread, and those that connect to it."""

    def __init__(self, address: str):
        self.listener = Listener(address, TOKEN, "rank 0")
        self.beat = heartbeat.Heartbeat(Ranks(0, WORLD, 0, "test"), dist.HashStore(), 30.0)
        now = time.monotonic()
        self.peers = [Peer(Beat(r, "nowhere"), now) for r in range(WORLD)]
        self.beats = heartbeat._Beats(self.listener, WORLD)
        self.open: list[socket.socket] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        done = False
        while not done:
            with self.beat.say.what_fails():
                done = self.beat._round(self.beats, self.peers)

    def stranger(self, *texts: bytes) -> socket.socket:
        one = socket.create_connection(self.listener.address, timeout=60)
        self.open.append(one)
        with contextlib.suppress(OSError):  # it may be turned away before it has said all
            for text in texts:
                one.sendall(text)
        return one

    def rank(self, number: int, *lines: bytes) -> socket.socket:
        one = connect(self.listener.address, TOKEN, 60.0)
        self.open.append(one)
        one.sendall(b"".join(line + b"\n" for line in (beat(number), *lines)))
        return one

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end and self.thread.is_alive()
            time.sleep(0.01)


def beat(rank: int, **values) -> bytes:
    return json.dumps(asdict(Beat(rank, f"n{rank}", **values))).encode()


@pytest.fixture(params=["127.0.0.1", "::1"])
def rank_0(request) -> Iterator[Rank0]:
    there = Rank0(request.param)
    there.thread.start()
    yield there
    there.beat.leaving.set()
    there.thread.join(60)
    alive = there.thread.is_alive()
    for one in there.open:
        one.close()
    there.listener.close()
    assert not alive


only_once = pytest.mark.parametrize("rank_0", ["127.0.0.1"], indirect=True)


def right_verdict(rank_0: Rank0) -> None:
    """Two ranks beat, one dies, and it is named."""
    one, two = rank_0.rank(1), rank_0.rank(2)
    rank_0.until(lambda: rank_0.peers[1].beat.host == "n1" and rank_0.peers[2].beat.host == "n2")
    one.sendall(beat(1, activity="step 9") + b"\n")
    rank_0.until(lambda: rank_0.peers[1].beat.activity == "step 9")
    assert diagnose(rank_0.peers, time.monotonic(), 30.0).said == ""
    two.sendall(beat(2, activity="step 8") + b"\n")
    rank_0.until(lambda: rank_0.peers[2].beat.activity == "step 8")
    two.close()
    rank_0.until(lambda: rank_0.peers[2].closed)
    later = time.monotonic() + 2 * heartbeat.GRACE_SECONDS
    rank_0.peers[2].trouble -= 3 * heartbeat.GRACE_SECONDS
    assert diagnose(rank_0.peers, later, 300.0).said.startswith("rank 2 on n2 died in step 8")
    rank_0.peers[2].trouble = later + 3600  # the test goes on after this


def test_500_idle_strangers(rank_0):
    before = psutil.Process().num_fds()
    for _ in range(500):
        rank_0.stranger()
    right_verdict(rank_0)
    rank_0.until(lambda: not rank_0.listener._strangers)
    # ours of both ends, of which the server's are closed
    assert psutil.Process().num_fds() - before <= 500 + 6


@only_once
def test_strangers_are_few_at_a_time(rank_0, monkeypatch):
    monkeypatch.setattr(connections, "TOKEN_SECONDS", 60.0)
    for _ in range(300):
        rank_0.stranger()
    right_verdict(rank_0)
    assert len(rank_0.listener._strangers) <= connections.MOST_STRANGERS


ENDLESS = b"x" * (1 << 20)
RUBBISH = {"nothing": [b"\n"], "token of another job": [b"f" * 32 + b"\n" + beat(1, failed="x")],
           "start of the token": [TOKEN[:-1].encode() + b"\n", beat(1, failed="x")],
           "beat without token": [beat(1, failed="x") + b"\n"],
           "token with a blank": [TOKEN.encode() + b" \n", beat(1, failed="x") + b"\n"],
           "no UTF-8": [b"\xff\xfe\x00" * 50 + b"\n"], "HTTP": [b"GET / HTTP/1.1\r\n\r\n"],
           "zeros": [bytes(100_000)], "endless": [ENDLESS], "half of a token": [TOKEN[:9].encode()]}


@pytest.mark.parametrize("texts", RUBBISH.values(), ids=RUBBISH)
@only_once
def test_a_stranger_is_turned_away(rank_0, texts):
    stranger = rank_0.stranger(*texts)
    try:
        assert stranger.recv(99) == b""
    except ConnectionResetError:
        pass
    right_verdict(rank_0)
    assert rank_0.peers[1].beat.failed == ""


LINES = {"no JSON": b"{", "no object": b"[1, 2]", "null": b"null", "no UTF-8": b'{"rank": "\xff"}',
         "nested": b"[" * 50_000, "half of a pair": b'{"rank": 1, "host": "\\ud800"}',
         "missing": b'{"rank": 1}', "wrong type": beat(1).replace(b'"n1"', b"7"),
         "text for a number": beat(1).replace(b"0.0", b'"0.0"'),
         "not a number": beat(1).replace(b"0.0", b"NaN"), "negative": beat(1, still=-1.0),
         "infinite": beat(1).replace(b"0.0", b"1e999"), "unknown key": beat(1)[:-1] + b', "a": 1}',
         "rank 0": beat(0, failed="x"), "no rank": beat(9, failed="x"),
         "another's": beat(2, failed="x"), "large rank": beat(10**40), "below": beat(-1),
         "long": b'"' + b"x" * (1 << 17) + b'"', "terminal": b"\x1b]0;owned\x07",
         "digits": b"1" * 10_000}


@only_once
def test_a_line_that_is_no_beat_is_left_out_with_a_word(rank_0, capfd, monkeypatch):
    monkeypatch.setattr(connections, "SAY_SECONDS", 0.0)
    one, two = rank_0.rank(1), rank_0.rank(2)
    for name, line in LINES.items():
        two_before = rank_0.peers[2].beat
        one.sendall(line + b"\n" + beat(1, activity=name) + b"\n")
        rank_0.until(lambda name=name: rank_0.peers[1].beat.activity == name)
        assert rank_0.peers[2].beat == two_before or two_before.host == "nowhere"
        said = capfd.readouterr().err
        assert "rank 1 at 127.0.0.1" in said and "left out" in said and "\x1b" not in said, name
        assert "Traceback" not in said and len(said) < 500
    two.close()
    one.close()
    rank_0.until(lambda: rank_0.peers[1].closed and rank_0.peers[2].closed)


@only_once
def test_who_takes_the_number_of_another_is_not_heard(rank_0):
    rank_0.rank(1)
    rank_0.until(lambda: rank_0.peers[1].beat.host == "n1")
    other = connect(rank_0.listener.address, TOKEN, 60.0)
    other.sendall(beat(1, failed="x") + b"\n")
    other.close()
    time.sleep(0.3)
    assert not rank_0.peers[1].closed and rank_0.peers[1].beat.failed == ""


@only_once
@pytest.mark.parametrize("first", [b"", TOKEN.encode() + b"\n"], ids=["stranger", "rank"])
def test_a_sender_without_line_ends_takes_no_time(rank_0, first):
    """Of the thread that listens, while the sender sends all the time; and little is taken of it,
    beyond what the kernel keeps."""
    done, sent = threading.Event(), []

    def send() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(
                    rank_0.listener.address, timeout=1) as one:
                one.sendall(first)
                while not done.is_set():
                    sent.append(one.send(ENDLESS))
            done.wait(0.1)
    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.3)
    clock = time.pthread_getcpuclockid(rank_0.thread.ident)
    before, began = time.clock_gettime(clock), time.monotonic()
    right_verdict(rank_0)
    time.sleep(0.5)
    share = (time.clock_gettime(clock) - before) / (time.monotonic() - began)
    done.set()
    sender.join(60)
    assert share < 0.25 and sum(sent) < 40 * len(ENDLESS), (share, sum(sent))


@only_once
def test_a_rank_that_reads_nothing_gets_whole_lines_when_it_does(rank_0):
    rank = rank_0.rank(1)
    rank_0.beat.leaving.set()
    rank_0.thread.join(60)
    for _ in range(300):
        rank_0.listener.broadcast(b"a" * 60_000)
    received = b""
    rank.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while len(received) < 1 << 26 and not received.endswith(b"end\n"):
            received += rank.recv(1 << 20)
            rank_0.listener.broadcast(b"end")
    lines = [line for line in received.split(b"\n")[:-1] if line]
    assert {len(line) for line in lines if line[:1] == b"a"} == {60_000} and lines[-1] == b"end"
    assert all(heartbeat.ANSWERS.validate_json(line) for line in lines if line[:1] == b"{")


@only_once
def test_no_descriptor_left_is_said_and_outlived(rank_0, capfd, monkeypatch):
    true, failures = rank_0.listener._listening.accept, [OSError(24, "Too many open files")] * 5

    class Accepting:
        def __getattr__(self, name):
            return getattr(listening, name)

        def accept(self):
            if failures:
                raise failures.pop()
            return true()

        def fileno(self):
            return listening.fileno()
    listening = rank_0.listener._listening
    monkeypatch.setattr(rank_0.listener, "_listening", Accepting())
    right_verdict(rank_0)
    assert not failures and "Too many open files" in capfd.readouterr().err


@only_once
def test_an_exception_is_said_and_outlived(rank_0, capfd, monkeypatch):
    true, failures = heartbeat.diagnose, [ZeroDivisionError("nobody"), MemoryError()]

    def fails(*rest):
        if failures:
            raise failures.pop()
        return true(*rest)
    monkeypatch.setattr(heartbeat, "diagnose", fails)
    rank_0.until(lambda: not failures)
    right_verdict(rank_0)
    said = capfd.readouterr().err
    assert "ZeroDivisionError: nobody; it goes on" in said and "MemoryError" in said


def test_a_listener_has_one_address_of_its_host():
    listener = Listener("127.0.0.1", TOKEN)
    try:
        kinds = {c.laddr.ip for c in psutil.Process().net_connections()
                 if c.laddr and c.laddr.port == listener.address[1] and c.status == "LISTEN"}
        assert kinds == {"127.0.0.1"}
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", listener.address[1]), timeout=1)
    finally:
        listener.close()


def test_who_does_not_take_the_token_is_no_listener():
    with socket.create_server(("127.0.0.1", 0)) as other:
        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    other.accept()[0].close()
        threading.Thread(target=take, daemon=True).start()
        with pytest.raises(OSError):
            connect(other.getsockname(), TOKEN, 0.5)


def test_a_listener_that_comes_late_is_reached():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = probe.getsockname()
    opened = []
    thread = threading.Thread(target=lambda: opened.append(connect(place, TOKEN, 60.0)))
    thread.start()
    time.sleep(0.3)
    with socket.create_server(place) as late:
        one, _ = late.accept()
        assert one.recv(99) == TOKEN.encode() + b"\n"
        one.sendall(b"\n")
        thread.join(60)
        assert opened
        one.close()
        opened[0].close()


def test_all_ranks_have_one_token_that_nobody_guesses():
    store, other = dist.HashStore(), dist.HashStore()
    tokens = {shared_token(dist.PrefixStore("a", store)) for _ in range(3)}
    assert len(tokens) == 1 and len(bytes.fromhex(*tokens)) == 16
    assert tokens != {shared_token(dist.PrefixStore("a", other))}


@pytest.fixture
def hosts(monkeypatch):
    """Sets which own address leads to a host."""
    def set_routes(**routes: str) -> None:
        monkeypatch.setattr(connections, "_route", lambda host: routes.get(host, ""))
        monkeypatch.setattr(connections.slurm, "hosts_of_ranks", lambda env: {
            r: host for r, host in enumerate(routes) if host.startswith("n")})
    return set_routes


def test_the_own_address_leads_to_the_head_node(hosts):
    hosts(head="10.0.0.7")
    assert own_address({"MASTER_ADDR": "head"}) == "10.0.0.7"
    hosts(head="fd00::7")
    assert own_address({"MASTER_ADDR": "head"}) == "fd00::7"


def test_a_head_node_that_is_its_own_loopback_is_reached_from_other_hosts(hosts):
    hosts(head="127.0.1.1", n0="127.0.1.1", n1="10.0.0.1")
    several = {"MASTER_ADDR": "head", "SLURM_STEP_NUM_NODES": "2"}
    assert own_address(several) == "10.0.0.1"
    assert own_address({**several, "SLURM_STEP_NUM_NODES": "1"}) == "127.0.1.1"
    torchrun = {"MASTER_ADDR": "head", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    assert own_address(torchrun) == "10.0.0.1"
    assert own_address({**torchrun, "WORLD_SIZE": "2"}) == "127.0.1.1"
    hosts(**{"head": "127.0.1.1", connections.ELSEWHERE[0]: "10.9.0.1", "127.0.0.1": "127.0.0.1",
             "localhost": "::1"})
    assert own_address({"MASTER_ADDR": "head"}) == "10.9.0.1"
    assert own_address({"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert own_address({"MASTER_ADDR": "localhost"}) == "::1"


@pytest.mark.parametrize("head", ["127.0.0.1", "::1", "localhost"])
def test_the_kernel_knows_the_way(head):
    assert ipaddress.ip_address(own_address({"MASTER_ADDR": head})).is_loopback


def test_a_word_of_each_kind_comes_once_a_minute(capfd):
    say = Notices("who")
    for _ in range(3):
        say("a", "first\x1b[2J\nsecond")
        say("b", "other")
    assert capfd.readouterr().err == "who: first\\x1b[2J\\nsecond\nwho: other\n"
