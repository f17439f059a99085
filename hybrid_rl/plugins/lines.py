"""JSON, one message a line, from a process that may send anything, at any pace."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

LONGEST_MESSAGE = 1 << 26
"""Bytes of one message."""


class Lines:
    """What arrives at a socket. The socket's time-out is set anew by each call."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def take(self, until: float) -> dict[str, Any]:
        """The next message. Raises `TimeoutError` at `until` (`time.monotonic`), `EOFError` or another `OSError` at the
        end, and `ValueError` for what is no message."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LONGEST_MESSAGE:
                raise ValueError(f"more than {LONGEST_MESSAGE >> 20} MiB")
            self._connection.settimeout(max(1e-3, until - time.monotonic()))
            received = self._connection.recv(1 << 20)
            if not received:
                raise EOFError("it ended")
            self._buffer += received
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(message, dict):
            raise ValueError("no object")
        return message

    def silent(self) -> bool:
        """Whether nothing has arrived that was not taken, the end included."""
        if self._buffer:
            return False
        self._connection.setblocking(False)
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False
