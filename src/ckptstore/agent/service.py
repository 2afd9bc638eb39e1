"""What a service manager is told of the agent, where one has started it and asks for it (systemd's Type=notify)."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def tell(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1``, ``STATUS=...``; best effort. Source: sd_notify(3)"""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # Linux's abstract sockets
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(state.encode(), address)
