"""Ports of 127.0.0.1 for servers that have to be told theirs."""

import random
import socket

# Below those that the system hands out by itself (from 32768 on Linux): until our server listens, nobody is given it.
_PORTS = range(20_000, 32_768)


def free_port() -> int:
    """Returns a port at which nobody listens."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
