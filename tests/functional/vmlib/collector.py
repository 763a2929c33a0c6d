# SPDX-License-Identifier: Apache-2.0
"""Receives the heartbeat and the log of a guest from every QEMU it runs in, with the host's monotonic time.

QEMUs connect to two unix sockets (Guest does that); who talks is known from the peer credentials, so source and
destination of a migration are told apart by process id. The receiving runs in a process of its own (this file as a
program), so that a busy test does not look like a pause of the guest. Its results are two files:

    heartbeats.bin  16 bytes each: double time, uint32 pid, uint32 counter
    log.txt         `TIME PID MESSAGE` lines, see tests/guest/workload/log_channel.h; guest-verify reads it

The Collector class starts the process and reads the files. Heartbeats that came in one packet have one time.
"""

import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

HEARTBEAT = struct.Struct("<dII")
RECORD_SIZE = 4096
MESSAGE = re.compile(rb"[RSXAWDMEQ]( [^\n]*)?$")
LINE_MAX = 4096


@dataclass
class LogLine:
    time: float
    pid: int
    kind: str  # first letter of the message
    text: str  # the rest

    def numbers(self) -> list:
        return [int(word) for word in self.text.split()]


@dataclass
class Gap:
    seconds: float
    start: float
    end: float
    pid_before: int
    pid_after: int  # 0: no heartbeat came after it


class Collector:
    """Use as a context manager, or start() and stop()."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_socket = self.folder / "log.sock"
        self.heartbeat_socket = self.folder / "heartbeat.sock"
        self.log_path = self.folder / "log.txt"
        self._heartbeat_path = self.folder / "heartbeats.bin"
        self._process = None
        self._lines = []
        self._log_read = 0
        self._heartbeats = []
        self._heartbeat_read = 0

    def start(self) -> "Collector":
        ready_read, ready_write = os.pipe()
        self._process = subprocess.Popen([sys.executable, "-S", __file__, str(self.folder), str(ready_write)],
                                         pass_fds=[ready_write], stdin=subprocess.DEVNULL)
        os.close(ready_write)
        with open(ready_read, "rb") as ready:
            if ready.read() != b"ready":
                raise RuntimeError(f"the collector in {self.folder} did not start")
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_exc):
        self.stop()

    def command(self, text: str) -> None:
        """Sends a line (verify, stop, poweroff) to the guest, through the QEMU that was heard last."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as control:
            control.sendto(text.encode() + b"\n", str(self.folder / "control.sock"))

    def lines(self, kind: str | None = None, since: float = 0.0, pid: int | None = None) -> list:
        """What the guest has logged; kind: letters of interest."""
        if self.log_path.exists():
            with open(self.log_path, "rb") as file:
                file.seek(self._log_read)
                data = file.read()
            data = data[:data.rfind(b"\n") + 1]
            self._log_read += len(data)
            for line in data.decode("utf-8", "replace").splitlines():
                stamp, source, message = line.split(" ", 2)
                self._lines.append(LogLine(float(stamp), int(source), message[:1], message[2:]))
        return [line for line in self._lines
                if line.time >= since and (kind is None or line.kind in kind) and (pid is None or line.pid == pid)]

    def wait_for(self, kind: str, text: str = "", since: float = 0.0, pid: int | None = None,
                 timeout: float = 30.0) -> LogLine:
        """First line of these kinds whose text starts with `text`; TimeoutError with what came instead."""
        deadline = time.monotonic() + timeout
        while True:
            for line in self.lines(kind, since, pid):
                if line.text.startswith(text):
                    return line
            if time.monotonic() > deadline:
                last = [f"{line.kind} {line.text}" for line in self.lines()[-3:]]
                raise TimeoutError(f"no '{kind} {text}' from the guest within {timeout} s; last: {last}, "
                                   f"errors: {self.errors()}")
            time.sleep(0.02)

    def errors(self) -> list:
        """What the guest reported as wrong: I/O errors, memory that changed by itself."""
        return [line.text for line in self.lines("E")]

    def heartbeats(self) -> list:
        """(time, pid, counter) of all."""
        if self._heartbeat_path.exists():
            with open(self._heartbeat_path, "rb") as file:
                file.seek(self._heartbeat_read)
                data = file.read()
            data = data[:len(data) // HEARTBEAT.size * HEARTBEAT.size]
            self._heartbeat_read += len(data)
            self._heartbeats.extend(HEARTBEAT.iter_unpack(data))
        return self._heartbeats

    def wait_heartbeat(self, pid: int, timeout: float = 30.0) -> float:
        """Time of the first heartbeat through this QEMU: when the guest first ran there."""
        deadline = time.monotonic() + timeout
        while True:
            for beat in self.heartbeats():
                if beat[1] == pid:
                    return beat[0]
            if time.monotonic() > deadline:
                raise TimeoutError(f"no heartbeat through QEMU {pid} within {timeout} s")
            time.sleep(0.02)

    def largest_gap(self, since: float | None = None, until: float | None = None) -> Gap | None:
        """Largest hole between two heartbeats, of which one lies in the given time. With `until`, silence up to then
        counts too, so that a guest which never came back is not reported with a small gap. None: no heartbeat."""
        beats = self.heartbeats()
        times = [beat[0] for beat in beats]
        first = 0 if since is None else max(bisect_left(times, since) - 1, 0)
        last = len(beats) if until is None else bisect_left(times, until) + 1
        chosen = beats[first:last]
        if not chosen:
            return None
        best = Gap(0.0, chosen[0][0], chosen[0][0], chosen[0][1], chosen[0][1])
        for before, after in zip(chosen, chosen[1:]):
            if after[0] - before[0] > best.seconds:
                best = Gap(after[0] - before[0], before[0], after[0], before[1], after[1])
        if until is not None and until - chosen[-1][0] > best.seconds:
            best = Gap(until - chosen[-1][0], chosen[-1][0], until, chosen[-1][1], 0)
        return best

    def ran_twice(self) -> int:
        """Number of heartbeats that two QEMUs both sent: the guest ran at both places."""
        seen = {}
        return sum(1 for _time, pid, counter in self.heartbeats() if seen.setdefault(counter, pid) != pid)

    def acknowledged_bytes(self, since: float = 0.0, until: float = float("inf"), disk: int | None = None) -> int:
        """Bytes of records whose acknowledgement arrived in this time."""
        total = 0
        for line in self.lines("AW", since):
            numbers = line.numbers()
            if line.time < until and (disk is None or numbers[0] == disk):
                total += numbers[2] * RECORD_SIZE
        return total

    def write_rate(self, since: float, until: float, disk: int | None = None) -> float:
        """Bytes per second that the guest's writers got acknowledged in this time."""
        return self.acknowledged_bytes(since, until, disk) / max(until - since, 1e-9)

    def write_waits_ms(self, since: float = 0.0, until: float = float("inf")) -> list:
        """Longest wait (write or fsync) of each batch of records, milliseconds, sorted: for percentiles."""
        return sorted(line.numbers()[3] / 1000 for line in self.lines("AW", since) if line.time < until)


class _Connection:
    def __init__(self, connection: socket.socket, heartbeat: bool):
        self.socket = connection
        self.heartbeat = heartbeat
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = struct.unpack("3i", credentials)[0]
        self.partial = b""
        self.heard = 0.0


class _Receiver:
    """The receiving process."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._connections = set()
        self._heartbeats = open(folder / "heartbeats.bin", "ab", buffering=0)
        self._log = open(folder / "log.txt", "ab", buffering=0)
        self._stray = open(folder / "stray.txt", "ab", buffering=0)
        for name, heartbeat in (("log.sock", False), ("heartbeat.sock", True)):
            listener = socket.socket(socket.AF_UNIX)
            self._bind(listener, name)
            listener.listen(16)
            self._selector.register(listener, selectors.EVENT_READ,
                                    lambda s=listener, h=heartbeat: self._accept(s, h))
        control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._bind(control, "control.sock")
        self._selector.register(control, selectors.EVENT_READ, lambda: self._command(control.recv(LINE_MAX)))

    def _bind(self, listener: socket.socket, name: str) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)
        listener.bind(str(path))

    def run(self) -> None:
        while True:
            for key, _events in self._selector.select():
                key.data()

    def _accept(self, listener: socket.socket, heartbeat: bool) -> None:
        connection = _Connection(listener.accept()[0], heartbeat)
        connection.socket.setblocking(False)
        self._connections.add(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ, lambda: self._receive(connection))

    def _command(self, text: bytes) -> None:
        heard = {}
        for connection in self._connections:
            heard[connection.pid] = max(heard.get(connection.pid, 0.0), connection.heard)
        logs = [connection for connection in self._connections if not connection.heartbeat]
        if logs:
            max(logs, key=lambda connection: heard[connection.pid]).socket.send(text)

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        now = time.monotonic()
        if not data:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            self._connections.discard(connection)
            return
        connection.heard = now
        *lines, connection.partial = (connection.partial + data).split(b"\n")
        connection.partial = connection.partial[-LINE_MAX:]
        if connection.heartbeat:
            self._store_heartbeats(lines, now, connection.pid)
        else:
            self._store_log(lines, now, connection.pid)

    def _store_heartbeats(self, lines, now: float, pid: int) -> None:
        out = b""
        for line in lines:
            try:
                out += HEARTBEAT.pack(now, pid, int(line, 16))
            except (ValueError, struct.error):
                self._stray.write(line + b"\n")
        self._heartbeats.write(out)

    def _store_log(self, lines, now: float, pid: int) -> None:
        # A line that a migration cut in two is not one any more: half an acknowledgement acknowledges nothing.
        out = b""
        for line in lines:
            if MESSAGE.match(line):
                out += b"%.6f %d %s\n" % (now, pid, line)
            else:
                self._stray.write(line + b"\n")
        self._log.write(out)


def main() -> None:
    folder, ready = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it is over
    try:
        os.nice(-5)
    except OSError:
        pass  # without the right: same priority as everybody
    receiver = _Receiver(folder)
    os.write(ready, b"ready")
    os.close(ready)
    parent = os.getppid()
    # A test that was killed must not leave this behind.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1) if os.getppid() != parent else None)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    receiver.run()


if __name__ == "__main__":
    main()
