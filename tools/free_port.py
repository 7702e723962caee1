"""A port for ranks that meet without a launcher."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """One below those that the system gives to connections, which would take it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
