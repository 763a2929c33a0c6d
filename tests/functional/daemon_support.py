# SPDX-License-Identifier: Apache-2.0
"""What the tests of daemons and commands share: a folder, daemons that are ended, images, NBD clients, a TCP proxy."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import nbd

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from vmlib import Build, Daemon, VmferryError, pair, wait_until  # noqa: E402,F401  (re-exported)

MIB = 1 << 20
BUILD = Build()
# Addresses of our own on loopback: tests run side by side, and a daemon's port is known before it starts.
_HOSTS = iter(f"127.{10 + os.getpid() // 250 % 240}.{1 + os.getpid() % 250}.{n}" for n in range(1, 255))
_PORT = 4411


def new_address() -> str:
    return f"{next(_HOSTS)}:{_PORT}"


def run(*command, timeout=60, check=True, text=True, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=text, timeout=timeout, check=False, **options)
    if check and done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done


def digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def allocated(path) -> int:
    return os.stat(path).st_blocks * 512


def write_random(path, offset: int, length: int, seed: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(random.Random(seed).randbytes(length))


class Proxy:
    """A TCP relay that counts bytes, and can be cut (connections reset, new ones refused) or stalled."""

    def __init__(self, target: str):
        self.target = target
        self.address = new_address()
        self.bytes_to_target = 0
        self.bytes_from_target = 0
        self.rate = 0  # bytes per second towards the target; 0: unlimited
        self._pairs: set = set()
        self._open = threading.Event()
        self._open.set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        host, port = self.address.split(":")
        self._listener.bind((host, int(port)))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._open.is_set():
                client.close()
                continue
            host, port = self.target.split(":")
            try:
                server = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._pairs.add((client, server))
            threading.Thread(target=self._relay, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, False), daemon=True).start()

    def _relay(self, source, target, forwards):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if forwards:
                    self.bytes_to_target += len(data)
                    if self.rate:
                        time.sleep(len(data) / self.rate)
                else:
                    self.bytes_from_target += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self._open.clear()
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for ends in pairs:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def mend(self):
        self._open.set()

    def stall(self, stalled: bool):
        (self._flowing.clear if stalled else self._flowing.set)()

    def close(self):
        self._flowing.set()
        self.cut()
        self._listener.close()


class DaemonCase(unittest.TestCase):
    """Ends every daemon it made; a daemon that a test left running has to end cleanly."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-functional-"))
        if os.environ.get("VMFERRY_KEEP"):  # for looking at logs afterwards
            print(f"{self.id()}: {self.folder}", file=sys.stderr)
        else:
            self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.daemons: list[Daemon] = []
        self.addCleanup(self._end_daemons)

    def _end_daemons(self):
        for daemon in self.daemons:
            if daemon.alive():
                self.assertEqual(daemon.stop(), 0, daemon.log()[-2000:])

    def image(self, name: str, size: int, data: int = 0, seed: int = 1) -> Path:
        """A sparse file; the first `data` bytes are random."""
        path = self.folder / name
        with open(path, "wb") as file:
            file.truncate(size)
        if data:
            write_random(path, 0, data, seed)
        return path

    def daemon(self, name: str, *volumes: str, listen: str | None = None, **options) -> Daemon:
        daemon = Daemon(name, self.folder, BUILD, volumes, listen=listen, **options)
        self.daemons.append(daemon)
        return daemon.start()

    def volume(self, name: str, path, *more: str) -> str:
        return ",".join([f"name={name}", f"path={path}", f"nbd=unix:{self.socket(path)}", *more])

    def socket(self, path) -> Path:
        return Path(path).with_suffix(".nbd")

    def uri(self, path, export: str = "vda") -> str:
        return f"nbd+unix:///{export}?socket={self.socket(path)}"

    def two_daemons(self, size: int = 16 * MIB, data: int = 0, volumes=("vda",), proxied: bool = False):
        """a (primary) and b (secondary), paired. proxied: a reaches b only through self.proxy, b cannot dial a."""
        for volume in volumes:
            self.image(f"a-{volume}.img", size, data)
            self.image(f"b-{volume}.img", size)
        b = self.daemon("b", *[self.volume(v, self.folder / f"b-{v}.img", "role=secondary") for v in volumes],
                        listen=new_address())
        a = self.daemon("a", *[self.volume(v, self.folder / f"a-{v}.img") for v in volumes],
                        listen=None if proxied else new_address())
        if proxied:
            self.proxy = Proxy(b.listen)
            self.addCleanup(self.proxy.close)
            token = b.vmferry("peer", "invite", "--address", self.proxy.address)["token"]
            a.vmferry("peer", "join", "-", "--name", "b", "--as", "a", input_text=token + "\n")
        else:
            pair(a, b)
        return a, b

    def path(self, name: str) -> Path:
        return self.folder / name

    def refused(self, daemon: Daemon, *arguments, status: int = 1, **options) -> str:
        """The error's text of a command that has to fail with this status."""
        with self.assertRaises(VmferryError) as caught:
            daemon.vmferry(*arguments, **options)
        self.assertEqual(caught.exception.status, status, caught.exception)
        error = caught.exception.output["error"]
        self.assertTrue(error, caught.exception)
        return error

    def qemu_io(self, path, *commands, export: str = "vda", check: bool = True):
        """qemu-io through the NBD export of the volume at `path`."""
        words = []
        for command in commands:
            words += ["-c", command]
        done = run("qemu-io", "-f", "raw", *words, self.uri(path, export), check=False)
        failed = done.returncode != 0 or "failed" in done.stdout + done.stderr or "error" in (done.stdout + done.stderr).lower()
        if check and failed:
            raise AssertionError(f"qemu-io {commands}: {done.stdout}{done.stderr}")
        return done

    def nbd_client(self, path, export: str = "vda") -> nbd.NBD:
        """A libnbd client of the volume at `path`, which goes in the end, however its connection is by then."""
        client = nbd.NBD()
        client.connect_uri(self.uri(path, export))
        self.addCleanup(self.disconnect, client)
        return client

    @staticmethod
    def disconnect(client) -> None:
        with contextlib.suppress(nbd.Error):
            client.shutdown()

    def in_sync(self, daemon: Daemon, *volumes: str, timeout: str = "30s") -> None:
        daemon.vmferry("replicate", "wait", *(volumes or ["vda"]), "--timeout", timeout)

    def wait_role(self, daemon: Daemon, role: str, volume: str = "vda") -> dict:
        return wait_until(lambda: (s := daemon.volume_status(volume))["role"] == role and s, 20, f"{daemon.name} is {role}")

    def wait_log(self, daemon: Daemon, text: str, timeout: float = 10) -> None:
        wait_until(lambda: text in daemon.log(), timeout, f"{text!r} in the log of {daemon.name}")

    def events(self, daemon: Daemon) -> list:
        """Events so far, oldest first."""
        done = run(*daemon.vmferry_command("events"))
        return [json.loads(line) for line in done.stdout.splitlines()]
