# SPDX-License-Identifier: Apache-2.0
"""Starts nbd-testserver and speaks raw NBD, for the functional tests of the export."""

import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time

BIN = os.environ["VMFERRY_BIN"]
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
OPT_ABORT, OPT_LIST, OPT_GO, OPT_STRUCTURED = 2, 3, 7, 8
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3


def run(*command, timeout=30, check=True):
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if check and result.returncode != 0:
        raise AssertionError(f"{command} exited {result.returncode}: {result.stdout}{result.stderr}")
    return result


class Server:
    """A running nbd-testserver; at the end of the block it must drain and exit 0, within bounds."""

    def __init__(self, *exports, options=()):
        self.folder = tempfile.TemporaryDirectory(prefix="vmferry-nbd-")
        self.socket = os.path.join(self.folder.name, "nbd.sock")
        self.exports = exports
        self.options = options
        self.sockets = []
        self.stopping = False  # set by a test that ends the server itself

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def __enter__(self):
        command = [os.path.join(BIN, "nbd-testserver"), "--listen", f"unix:{self.socket}", "--listen", "127.0.0.1:0"]
        for text in self.exports:
            command += ["--export", text.replace("DIR", self.folder.name)]
        self.errors = open(self.path("stderr"), "w+")
        # In a sanitizer build freed memory is kept for a while; little enough for the tests that watch the memory.
        environment = dict(os.environ, ASAN_OPTIONS="quarantine_size_mb=4")
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        env=environment)
        for line in self.process.stdout:
            found = re.match(r"listening .*:(\d+)$", line)
            if found:
                self.port = int(found.group(1))
            if line == "ready\n":
                return self
        raise AssertionError("nbd-testserver did not start: " + self.error_text())

    def __exit__(self, kind, value, trace):
        for connection in self.sockets:
            connection.close()
        crashed = None if self.stopping else self.process.poll()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        text = self.error_text()
        self.process.stdout.close()
        self.errors.close()
        self.folder.cleanup()
        if kind is None:
            assert crashed is None, f"the server ended by itself with {crashed}: {text}"
            assert self.process.returncode == 0, f"exit status {self.process.returncode}: {text}"

    def error_text(self):
        self.errors.flush()
        with open(self.path("stderr")) as file:
            return file.read()[-4000:]

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.socket}"

    def tcp_uri(self, name=""):
        return f"nbd://127.0.0.1:{self.port}/{name}"

    def stats(self):
        self.process.send_signal(signal.SIGUSR1)
        line = self.process.stdout.readline()
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}

    def fd_count(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_kib(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))

    def wait_idle(self, seconds=10):
        """Until no connection and no request is left."""
        deadline = time.monotonic() + seconds
        while True:
            stats = self.stats()
            if stats["connections"] == 0 and stats["inflight"] == 0:
                return
            assert time.monotonic() < deadline, f"still there: {stats}"
            time.sleep(0.02)

    def connect(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(self.socket)
        self.sockets.append(connection)
        return connection


def receive(connection, size):
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError(f"closed after {len(data)} of {size} bytes")
        data += part
    return data


def option(number, data=b""):
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def read_option_reply(connection):
    magic, number, kind, size = struct.unpack(">QIII", receive(connection, 20))
    assert magic == OPTION_REPLY_MAGIC
    return number, kind, receive(connection, size)


def request(command, offset, length, flags=0, cookie=1, payload=b""):
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def go(connection, name=b""):
    """From the greeting to transmission, without structured replies."""
    receive(connection, 18)
    connection.sendall(struct.pack(">I", 3) + option(OPT_GO, struct.pack(">I", len(name)) + name + b"\0\0"))
    while True:
        _, kind, data = read_option_reply(connection)
        if kind == 1:
            return
        assert kind == 3, f"GO answered {kind:#x} {data}"


def simple_reply(connection):
    magic, error, cookie = struct.unpack(">IIQ", receive(connection, 16))
    assert magic == 0x67446698, hex(magic)
    return error, cookie
