# SPDX-License-Identifier: Apache-2.0
"""A QMP client: one connection, one thread, events kept in the order they came with the host's monotonic time."""

import json
import socket
import time
from dataclasses import dataclass, field


class QmpError(Exception):
    """QEMU refused a command, or the connection is gone."""


@dataclass
class Event:
    name: str
    data: dict
    time: float  # host, CLOCK_MONOTONIC, when read
    qemu_time: float  # QEMU's own stamp, seconds of the epoch


@dataclass
class Qmp:
    path: str
    connect_timeout: float = 10.0
    events: list = field(default_factory=list)

    def __post_init__(self):
        deadline = time.monotonic() + self.connect_timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(self.path))
                break
            except OSError as error:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise QmpError(f"no QMP at {self.path}: {error}") from error
                time.sleep(0.02)
        self._input = b""
        self._read(deadline)  # greeting
        self.command("qmp_capabilities")

    def _read(self, deadline: float) -> dict:
        """Next message; TimeoutError at the deadline. A message that came in part stays for the next call."""
        while b"\n" not in self._input:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"QMP {self.path}: no answer")
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(65536)
            except ConnectionError as error:
                raise QmpError(f"QMP {self.path}: {error}") from error
            if not chunk:
                raise QmpError(f"QMP {self.path}: QEMU has closed the connection")
            self._input += chunk
        line, self._input = self._input.split(b"\n", 1)
        message = json.loads(line)
        if "event" in message:
            stamp = message.get("timestamp", {})
            self.events.append(Event(message["event"], message.get("data", {}), time.monotonic(),
                                     stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6))
        return message

    def command(self, name: str, arguments: dict | None = None, timeout: float = 30.0):
        """Runs a command and returns its value; QmpError with QEMU's words when it fails."""
        request = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"QMP {self.path}: {name}: {error}") from error
        deadline = time.monotonic() + timeout
        while True:
            answer = self._read(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{name}: {answer['error'].get('desc', answer['error'])}")

    def wait_event(self, name: str, match=None, timeout: float = 30.0) -> Event:
        """First event of this name (and for which match(data) holds) that no call has returned yet."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event.name == name and (match is None or match(event.data)):
                    self.events.remove(event)
                    return event
            seen = len(self.events)
            self._read(deadline)

    def next_event(self, timeout: float = 30.0) -> Event:
        """The oldest event that no call has returned yet; TimeoutError when none comes."""
        deadline = time.monotonic() + timeout
        while not self.events:
            self._read(deadline)
        return self.events.pop(0)

    def status(self) -> str:
        return self.command("query-status")["status"]

    def wait_status(self, wanted: str, timeout: float = 30.0) -> None:
        """Until query-status says so; TimeoutError that names what it said instead."""
        deadline = time.monotonic() + timeout
        while (status := self.status()) != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"QMP {self.path}: status is {status}, not {wanted}")
            time.sleep(0.02)

    def close(self) -> None:
        self._socket.close()
