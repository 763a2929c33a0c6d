# SPDX-License-Identifier: Apache-2.0
"""vmferryd processes, the command line, and the emulated link between two of them.

    with Wan(folder, build, rate="100Mbit", rtt="40ms") as wan:
        with Daemon("a", folder, build, ["name=vda,path=...,nbd=unix:..."], listen=wan.a.listen, namespace=wan.a.ns) as a:
            ...
            pair(a, b)
            a.vmferry("migrate", "vda", "--peer", "b")
"""

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class VmferryError(Exception):
    """A command ended with another status than 0; `status`, `output` (JSON or text) and `stderr` tell."""

    def __init__(self, command, done):
        self.status, self.stderr = done.returncode, done.stderr
        self.output = _json_or_text(done.stdout)
        super().__init__(f"{shlex.join(map(str, command))}: status {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")


def _json_or_text(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


class Daemon:
    """One vmferryd. `volumes`: values of --volume. Its log is FOLDER/NAME-vmferryd.log."""

    def __init__(self, name: str, folder, build, volumes, *, listen: str | None = None, namespace: str | None = None,
                 extra_args=(), log_level: str | None = "info", control: str | None = None):
        self.name = name
        self.folder = Path(folder)
        self.state_dir = self.folder / f"{name}-state"
        self.listen = listen
        self._bin = build.bin
        self._namespace = namespace
        self._process = None
        self._log_path = self.folder / f"{name}-vmferryd.log"
        self.control = control or f"unix:{self.state_dir}/control.sock"
        self.command = [str(self._bin / "vmferryd"), "--state-dir", str(self.state_dir),
                        *(["--log-level", log_level] if log_level else []), *(["--listen", listen] if listen else []),
                        *extra_args]
        for volume in volumes:
            self.command += ["--volume", volume]

    def start(self, timeout: float = 20.0) -> "Daemon":
        prefix = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                prefix + self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        deadline = time.monotonic() + timeout
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"vmferryd {self.name} ended with {self._process.returncode}: {self.log()[-1500:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"vmferryd {self.name} is not ready after {timeout} s: {self.log()[-1500:]}")
            time.sleep(0.02)
        return self

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self.control.removeprefix("unix:")) == 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM; returns the exit status, which a clean shutdown makes 0."""
        if self._process is None:
            return 0
        if self.alive():
            self._process.terminate()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"vmferryd {self.name} did not end within {timeout} s after SIGTERM: {self.log()[-1500:]}")

    def kill(self) -> None:
        if self.alive():
            self._process.kill()
        if self._process is not None:
            self._process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, exc_type, *_exc):
        if exc_type is None:
            self.stop()
        else:
            self.kill()

    def vmferry_command(self, *arguments) -> list:
        return [str(self._bin / "vmferry"), "--control", self.control, "--json", *map(str, arguments)]

    def vmferry(self, *arguments, timeout: float = 120.0, input_text: str | None = None):
        """Runs a command with --json; its output, parsed. VmferryError when its status is not 0."""
        command = self.vmferry_command(*arguments)
        done = subprocess.run(command, text=True, capture_output=True, timeout=timeout, input=input_text, check=False)
        if done.returncode != 0:
            raise VmferryError(command, done)
        return _json_or_text(done.stdout)

    def volume_status(self, volume: str) -> dict:
        return next(v for v in self.vmferry("status")["volumes"] if v["name"] == volume)

    def replication(self, volume: str) -> dict:
        return next(v for v in self.vmferry("replicate", "status")["volumes"] if v["name"] == volume)

    def wait_phase(self, phase: str, timeout: float = 90.0) -> bool:
        """Follows the events until a migration from here enters the phase (also when it did so before): within
        milliseconds of it. False: it never came."""
        follow = subprocess.Popen(self.vmferry_command("events", "--follow"), text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
        stop = threading.Timer(timeout, follow.kill)
        stop.start()
        try:
            return any(f'"phase":"{phase}"' in line for line in follow.stdout)
        finally:
            stop.cancel()
            follow.kill()
            follow.wait()
            follow.stdout.close()

    def descriptor_count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory_kib(self) -> int:
        """Resident anonymous memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
        return 0

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pair(joiner: Daemon, inviter: Daemon) -> None:
    """Afterwards each knows the other by its `name`."""
    invitation = inviter.vmferry("peer", "invite", "--address", inviter.listen)
    joiner.vmferry("peer", "join", "-", "--name", inviter.name, "--as", joiner.name, input_text=invitation["token"] + "\n")


def wait_until(condition, timeout: float = 30.0, what: str = "condition", interval: float = 0.05):
    """Polls until condition() is true; its value. TimeoutError with the last value otherwise."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout} s; last: {value!r}")
        time.sleep(interval)


@dataclass
class WanEnd:
    namespace: str
    address: str

    def listen(self, port: int = 4411) -> str:
        return f"{self.address}:{port}"


class Wan:
    """vmferry-wan for the duration of a test (root only). a and b are the two ends."""

    _count = 0

    def __init__(self, folder, build, *, rate: str, rtt: str, loss: str | None = None, queue: str | None = None,
                 extra_args=()):
        Wan._count += 1
        self.name = f"vf{os.getpid() % 100000}-{Wan._count}"
        self.control = Path(folder) / f"{self.name}.sock"
        self._tool = build.bin / "vmferry-wan"
        self.command = [str(self._tool), "run", "--name", self.name, "--rate", rate, "--rtt", rtt,
                        "--control", f"unix:{self.control}", *extra_args]
        if loss:
            self.command += ["--loss", loss]
        if queue:
            self.command += ["--queue", queue]
        self._process = None

    def start(self) -> "Wan":
        # SIGTERM, so that it removes its namespaces also when the test was killed.
        self._process = subprocess.Popen(
            self.command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vmferry-wan did not start: {self._process.stderr.read().strip()}")
        ready = json.loads(line)
        self.a = WanEnd(ready["ns_a"], ready["addr_a"].split("/")[0])
        self.b = WanEnd(ready["ns_b"], ready["addr_b"].split("/")[0])
        return self

    def ctl(self, *words) -> str:
        done = subprocess.run([self._tool, "ctl", "--control", f"unix:{self.control}", *map(str, words)], text=True,
                              capture_output=True, check=True, timeout=20)
        return done.stdout

    def counters(self) -> dict:
        return json.loads(self.ctl("counters"))

    def cut(self, seconds: float) -> None:
        self.ctl("cut", seconds)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process.stdout.close()
            self._process.stderr.close()
            self._process = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_exc):
        self.stop()
