# SPDX-License-Identifier: Apache-2.0
"""Two hosts with a daemon each, an emulated link between them, and a guest that moves: for the demo, the functional
tests and the performance harness.

    with Lab(folder, build, rate="100Mbit", rtt="40ms", disk_size="256M", fill="100M") as lab:
        lab.start_guest("a")
        outcome = lab.migrate("a", "b")
        print(lab.check("b"))
"""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from .build import Build
from .collector import Collector
from .daemons import Daemon, Wan, pair
from .guest import Guest, NbdDisk, VhostDisk, Workload

PORT = 4411
METRICS_PORT = 9411


@dataclass
class Outcome:
    """One migration, seen from outside."""

    result: dict  # what `migrate --json` printed
    status: int
    seconds: float  # start of the command to its exit
    gap_ms: float  # largest hole in the heartbeat
    wire_bytes: int  # IP bytes from source to destination
    began: float
    ended: float
    stderr: str = ""
    extra: dict = field(default_factory=dict)


class Lab:
    """a and b: the two sides. Volumes are vda, vdb...; each side has DISK-SIDE.img for them."""

    def __init__(self, folder, build: Build, *, rate: str = "1Gbit", rtt: str = "20ms", loss: str | None = None,
                 queue: str | None = None, disk_size: str = "256M", fill: str | None = "100M", volumes: int = 1,
                 memory_mb: int = 256, workload: Workload | None = None, qemu: str = "10", wan: bool = True,
                 log_level: str = "info", volume_options: str = "", vhost: bool = False, disk_options: dict | None = None,
                 metrics: bool = False):
        self.folder = Path(folder)
        self.build = build
        self.memory_mb = memory_mb
        self.workload = workload or Workload()
        self.qemu = qemu
        self.wan = Wan(self.folder, build, rate=rate, rtt=rtt, loss=loss, queue=queue) if wan else None
        self.collector = Collector(self.folder / "collector")
        self.names = [f"vd{chr(ord('a') + i)}" for i in range(volumes)]
        self.daemons: dict[str, Daemon] = {}
        self.guests: dict[str, Guest] = {}
        self._disk_size, self._fill = disk_size, fill
        self._log_level, self._volume_options = log_level, volume_options
        self._vhost, self._disk_options = vhost, disk_options or {}
        self._metrics = metrics

    def image(self, side: str, volume: str = "vda") -> Path:
        return self.folder / f"{volume}-{side}.img"

    def socket(self, side: str, volume: str) -> Path:
        """Of the volume's export: NBD, or vhost-user-blk with `vhost`."""
        return self.folder / f"{volume}-{side}.{'vhost' if self._vhost else 'nbd'}"

    def __enter__(self) -> "Lab":
        try:
            return self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> "Lab":
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, volume in enumerate(self.names):
            if self._fill:
                # A guest that writes files mounts every disk; what fills them matters on the first.
                self.build.make_disk(self.image("a", volume), self._disk_size, self._fill if index == 0 else "8M")
            else:
                subprocess.run(["truncate", "-s", self._disk_size, self.image("a", volume)], check=True)
            size = self.image("a", volume).stat().st_size
            subprocess.run(["truncate", "-s", str(size), self.image("b", volume)], check=True)
        if self.wan:
            self.wan.start()
        self.collector.start()
        for side in ("a", "b"):
            self.daemons[side] = self._make_daemon(side).start()
        pair(self.daemons["a"], self.daemons["b"])
        return self

    def _make_daemon(self, side: str) -> Daemon:
        end = getattr(self.wan, side) if self.wan else None
        listen = end.listen(PORT) if end else f"127.0.0.1:{PORT + ord(side)}"
        role = "primary" if side == "a" else "secondary"
        export = "vhost-user-blk=" if self._vhost else "nbd=unix:"
        specs = [f"name={v},path={self.image(side, v)},role={role},{export}{self.socket(side, v)},"
                 f"qmp={self.folder / (side + '-qmp-daemon.sock')}{self._volume_options}" for v in self.names]
        metrics = ["--metrics", end.listen(METRICS_PORT)] if self._metrics else []
        return Daemon(side, self.folder, self.build, specs, listen=listen, namespace=end.namespace if end else None,
                      log_level=self._log_level, extra_args=metrics)

    def scrape(self, side: str) -> str:
        """The daemon's metrics, asked for inside of its namespace; for a lab with `metrics`."""
        end = getattr(self.wan, side)
        fetch = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"
        done = subprocess.run(["ip", "netns", "exec", end.namespace, "/usr/bin/python3", "-c", fetch,
                               f"http://{end.listen(METRICS_PORT)}/metrics"], text=True, capture_output=True, check=True)
        return done.stdout

    def start_guest(self, side: str, incoming: bool = False, **options) -> Guest:
        """options: of Guest, on top of those that make both sides alike."""
        if side in self.guests:
            self.guests.pop(side).kill()
        disks = [VhostDisk(self.socket(side, v), **self._disk_options) if self._vhost
                 else NbdDisk(v, unix=self.socket(side, v), **self._disk_options) for v in self.names]
        settings = {"workload": self.workload, "memory_mb": self.memory_mb, **options}
        guest = Guest(side, self.folder, self.build.qemu(self.qemu), self.build.guest_image(), self.collector, disks,
                      incoming="defer" if incoming else None, **settings)
        self.guests[side] = guest.start()
        if not incoming:
            guest.wait_started()
        return guest

    def migrate_command(self, source: str, destination: str, *options) -> list:
        return self.daemons[source].vmferry_command("migrate", *self.names, "--peer", destination, *options)

    def migrate(self, source: str, destination: str, *options, timeout: float = 600.0, during=None,
                guest_options: dict | None = None) -> Outcome:
        """Starts a fresh destination QEMU and runs `vmferry migrate` to its end. during(process): called meanwhile."""
        self.start_guest(destination, incoming=True, **(guest_options or {}))
        before = self._wire_bytes(source)
        began = time.monotonic()
        process = subprocess.Popen(self.migrate_command(source, destination, *options), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            if during is not None:
                during(process)
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        ended = time.monotonic()
        try:
            result = json.loads(stdout)
        except ValueError:
            result = {"result": "failed", "error": f"no JSON: {stdout!r}"}
        # The beats of the resumed guest; without one the silence counts.
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not any(beat[0] > ended for beat in self.collector.heartbeats()[-1:]):
            time.sleep(0.1)
        gap = self.collector.largest_gap(since=began, until=time.monotonic())
        return Outcome(result, process.returncode, ended - began, gap.seconds * 1000 if gap else float("inf"),
                       self._wire_bytes(source) - before, began, ended, stderr)

    def _wire_bytes(self, source: str) -> int:
        if not self.wan:
            return 0
        counters = self.wan.counters()
        return counters["a_to_b" if source == "a" else "b_to_a"]["bytes"]

    def check(self, side: str) -> dict:
        """Ends the load of the guest at `side`, flushes, and compares its disk with what was acknowledged."""
        guest = self.guests[side]
        pages, bad_pages = guest.verify_memory() if self.workload.mem != "0" else (0, 0)
        guest.stop_load()
        self.daemons[side].stop()
        found = self.verify_disks(side)
        found.update(memory_pages=pages, memory_bad=bad_pages, guest_errors=self.collector.errors(),
                     ran_twice=self.collector.ran_twice())
        found["ok"] = found["ok"] and bad_pages == 0 and not found["guest_errors"] and found["ran_twice"] == 0
        return found

    def verify_disks(self, side: str) -> dict:
        """What guest-verify finds on all disks together. The guest must not write meanwhile."""
        total = {}
        for index, volume in enumerate(self.names):
            found = self.build.verify(self.image(side, volume), self.collector.log_path, disk=index)
            for name, value in found.items():
                if name == "ok":
                    total[name] = total.get(name, True) and value
                elif isinstance(value, int):
                    total[name] = total.get(name, 0) + value
                else:
                    total.setdefault(name, value)
        return total

    def close(self) -> None:
        for guest in self.guests.values():
            guest.kill()
        for daemon in self.daemons.values():
            daemon.kill()
        self.collector.stop()
        if self.wan:
            self.wan.stop()

    def __exit__(self, exc_type, *_exc):
        if exc_type is not None:
            self.keep_logs()
        self.close()

    def keep_logs(self) -> None:
        """After a failure: what the daemons said, where a test's output shows it."""
        for daemon in self.daemons.values():
            print(f"--- log of vmferryd {daemon.name}\n{daemon.log()[-6000:]}")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
