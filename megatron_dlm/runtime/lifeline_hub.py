"""Rank 0's end of the lifeline: hears of failures, waits a moment, names the first cause."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, MutableSet
from dataclasses import dataclass, field
from typing import Any

# A failure is one cause and many consequences: those that arrive together are judged together.
GATHER_SECONDS = 1.0
# The connection of a vanished host breaks later than the collectives of the others may.
CONSEQUENCE_SECONDS = 25.0
# A rank that is stopped or holds its interpreter does not answer at all.
ANSWER_SECONDS = 5.0
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Rank:
    """Who a rank is."""

    number: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host} (pid {self.pid})"


@dataclass
class _Member:
    """A connected rank."""

    rank: Rank | None = None
    text: bytes = b""
    has_left: bool = False


@dataclass
class _Case:
    """What is known of a failure."""

    causes: list[str] = field(default_factory=list)
    consequences: list[str] = field(default_factory=list)
    hang: str | None = None
    states: dict[int, str] = field(default_factory=dict)
    """rank -> what it was doing when it was asked for its stacks."""
    decide_at: float = float("inf")

    def wait_until(self, deadline: float) -> None:
        self.decide_at = min(self.decide_at, deadline)


class Hub(threading.Thread):
    """Listens to all ranks, rank 0 included, until rank 0 leaves."""

    def __init__(
        self,
        listener: socket.socket,
        token: str,
        world_size: int,
        own_sockets: MutableSet[socket.socket],
    ) -> None:
        """`own_sockets`: gets every connection, for whoever must close them in a fork."""
        super().__init__(name="lifeline_hub", daemon=True)
        self._listener = listener
        self._token = token
        self._world_size = world_size
        self._own_sockets = own_sockets
        self._members: dict[socket.socket, _Member] = {}
        self._case = _Case()
        self._is_decided = False

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while True:
            wait = min(self._case.decide_at - time.monotonic(), 3600.0)
            for key, _ in selector.select(max(0.0, wait)):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._accept(selector)
                elif not self._read(connection):
                    selector.unregister(connection)
                    connection.close()
            if time.monotonic() >= self._case.decide_at and not self._is_decided:
                self._decide()

    def dismiss(self) -> None:
        """The run is over: nobody needs to end any more. From any thread of rank 0."""
        self._is_decided = True
        self._tell(bye=True)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._listener.accept()
        self._own_sockets.add(connection)
        keep_alive(connection)
        self._members[connection] = _Member()
        selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> bool:
        """False when the connection is over."""
        member = self._members[connection]
        try:
            received = connection.recv(4096)
        except OSError:
            received = b""
        *lines, member.text = (member.text + received).split(b"\n")
        is_understood = len(member.text) < _LONGEST_LINE and all(
            self._understand(member, line) for line in lines
        )
        if received and is_understood:
            return True
        del self._members[connection]
        if member.rank is not None and not member.has_left:
            self._add_cause(f"{member.rank} died (killed, out of memory, or its host is gone)")
        return False

    def _understand(self, member: _Member, line: bytes) -> bool:
        """False for what does not come from a rank of this run."""
        message = json.loads(line) if member.rank is not None else _greeting(line, self._token)
        if message is None:
            return False
        if "token" in message:
            member.rank = Rank(message["rank"], message["host"], message["pid"])
        elif "bye" in message:
            member.has_left = True
        elif "failed" in message:
            self._hear_failure(member, message)
        elif "hang" in message:
            self._hear_hang(message["hang"])
        elif "state" in message and member.rank is not None:
            self._case.states[member.rank.number] = message["state"]
            if len(self._case.states) == self._world_size:
                self._case.wait_until(time.monotonic())
        return True

    def _hear_failure(self, member: _Member, message: dict[str, Any]) -> None:
        member.has_left = True  # its end is no news
        what = f"{member.rank} failed: {message['failed']}"
        if message["is_consequence"]:
            self._case.consequences.append(what)
            self._case.wait_until(time.monotonic() + CONSEQUENCE_SECONDS)
        else:
            self._add_cause(what)

    def _add_cause(self, what: str) -> None:
        self._case.causes.append(what)
        self._case.wait_until(time.monotonic() + GATHER_SECONDS)

    def _hear_hang(self, reason: str) -> None:
        if self._case.hang is None:
            self._case.hang = reason
            self._case.wait_until(time.monotonic() + ANSWER_SECONDS)
            self._tell(dump=True)

    def _decide(self) -> None:
        self._is_decided = True
        self._case.decide_at = float("inf")
        case = self._case
        ranks = [member.rank for member in self._members.values() if member.rank is not None]
        if case.causes:
            verdict = case.causes[0]
        elif case.hang is not None:
            verdict = f"{case.hang}; {_who_hangs(ranks, case.states)}"
        else:
            verdict = case.consequences[0]
        self._tell(verdict=verdict)

    def _tell(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        for connection in list(self._members):
            with contextlib.suppress(OSError):
                connection.sendall(line)


def _greeting(line: bytes, token: str) -> dict[str, Any] | None:
    """The first line of a connection, if it is of this run: anybody may connect."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(message, dict) and message.get("token") == token
    return message if is_ours else None


def _who_hangs(ranks: list[Rank], states: dict[int, str]) -> str:
    """Ranks that give no answer, else those that are where most are not."""
    silent = [str(rank) for rank in ranks if rank.number not in states]
    if silent:
        return f"no answer from {', '.join(sorted(silent))}"
    usual, count = Counter(states.values()).most_common(1)[0]
    if count == len(states):
        return f"all ranks are in {usual}"
    others = [f"{rank} is in {states[rank.number]}" for rank in ranks]
    others = [text for text in others if not text.endswith(f"is in {usual}")]
    return f"most ranks are in {usual}, but {', '.join(sorted(others))}"


def keep_alive(connection: socket.socket) -> None:
    """Notice within about 20 s that the other host no longer answers."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Messages until the connection ends, however it ends."""
    text = b""
    while True:
        *lines, text = text.split(b"\n")
        yield from (json.loads(line) for line in lines)
        try:
            received = connection.recv(4096)
        except OSError:
            return
        if not received:
            return
        text += received
