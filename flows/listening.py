"""A socket that answers at once, for a server that is handed one."""

import socket


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at ``host`` for a server; port 0 is any that is free. Raises :class:`OSError`."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((host, port), family=family)
    # What it accepts inherits this. asyncio takes a socket that it is handed for one without TCP, and leaves it out:
    # what is sent in two parts then waits 40 ms for the acknowledgement of the first.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
