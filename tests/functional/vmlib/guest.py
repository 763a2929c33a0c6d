# SPDX-License-Identifier: Apache-2.0
"""Starts a QEMU with the test guest, or as the destination of a migration, and ends it.

Every QEMU gets two QMP sockets: one for the test, `qmp_path("daemon")` for vmferryd; a QMP socket serves one client.
A QEMU ends with the process that started it, also when that is killed (more exactly: with the thread that called
start(), so start guests from one that lasts).
"""

import ctypes
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from .collector import Collector
from .qmp import Qmp, QmpError

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class RawDisk:
    """A file or block device, opened with O_DIRECT (needed where two QEMUs share it in a migration)."""

    path: object
    direct: bool = True

    def blockdev(self, node: str) -> str:
        direct = "on" if self.direct else "off"
        return (f"driver=raw,node-name={node},discard=unmap,cache.direct={direct},file.driver=file,"
                f"file.filename={self.path},file.cache.direct={direct},file.discard=unmap")


@dataclass
class NbdDisk:
    """An NBD export on a unix socket, or on host and port."""

    export: str
    unix: object = None
    host: str = "127.0.0.1"
    port: int = 10809
    reconnect_delay: int | None = 60

    def blockdev(self, node: str) -> str:
        server = (f"server.type=unix,server.path={self.unix}" if self.unix
                  else f"server.type=inet,server.host={self.host},server.port={self.port}")
        delay = "" if self.reconnect_delay is None else f"reconnect-delay={self.reconnect_delay},"
        return f"driver=nbd,node-name={node},discard=unmap,export={self.export},{delay}{server}"


@dataclass
class VhostDisk:
    """A vhost-user-blk export. The guest's memory becomes shareable; the disk is the same /dev/vdX."""

    socket: object
    queues: int = 1
    packed: bool = False
    reconnect_ms: int = 100
    options: str = ""  # further ones of the device

    def arguments(self, index: int, qemu_major: int) -> list:
        packed = "on" if self.packed else "off"
        reconnect = f"reconnect-ms={self.reconnect_ms}" if qemu_major >= 10 else "reconnect=1"
        return ["-chardev", f"socket,id=vhost{index},path={self.socket},{reconnect}",
                "-device", f"vhost-user-blk-pci,chardev=vhost{index},id=vd{index},num-queues={self.queues},"
                           f"packed={packed}{self.options}"]


@dataclass
class Workload:
    """What the guest does; None: the default of tests/guest/workload/options.h. Sizes are texts like 448M."""

    mode: str = "raw"  # raw, file (needs a disk of build-disk), none
    disk_rate: str | None = None
    area: str | None = None
    hot: str | None = None
    offset: str | None = None
    fsync: int | None = None
    direct: int | None = None
    mem: str | None = None
    mem_rate: str | None = None
    warm: str | None = None
    heartbeat: int | None = None
    seed: int | None = None
    extra: dict = field(default_factory=dict)  # further options by name

    def words(self, disk_count: int) -> list:
        options = {name: value for name, value in vars(self).items() if name != "extra" and value is not None}
        options["disk"] = ",".join(f"/dev/vd{chr(ord('a') + i)}" for i in range(disk_count))
        if disk_count == 0:
            options.update(mode="none", disk="none")
        return [f"vf.{name}={value}" for name, value in {**options, **self.extra}.items()]


# QEMU 10.0 under TCG with several processors: the firmware moves a device's memory while another one looks it up, once in
# some hundred starts. Nothing of ours is running by then.
QEMU_RACE = "iotlb_to_section: Assertion"


class Guest:
    """One QEMU process.

    name       of its files in `folder`: NAME-qmp.sock, NAME-qmp-daemon.sock, NAME-console.log, NAME-qemu.log
    qemu       program, Build.qemu()
    image      folder with vmlinuz and initramfs.cpio, Build.guest_image()
    incoming   None, or "defer" (migrate-incoming by QMP) or a URI: a destination, which waits
    namespace  network namespace to run in (root only)
    """

    def __init__(self, name: str, folder, qemu, image, collector: Collector, disks, *, workload: Workload | None = None,
                 memory_mb: int = 512, cpus: int = 1, incoming: str | None = None, namespace: str | None = None,
                 machine: str = "q35", cpu: str = "qemu64", extra_args=()):
        self.name = name
        self.folder = Path(folder)
        self.collector = collector
        self.disks = list(disks)
        self.workload = workload or Workload()
        self.incoming = incoming
        self._namespace = namespace
        self._process = None
        self._qmp = None
        # no_timer_check: on a busy host the emulated timer misses the kernel's test of it, which then panics.
        words = ["console=ttyS0", "quiet", "panic=-1", "random.trust_cpu=on", "no_timer_check", *self.workload.words(len(self.disks))]
        self.command = [
            str(qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", f"vf-{name}",
            "-machine", machine, "-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", str(cpus), "-m", str(memory_mb),
            "-kernel", str(Path(image) / "vmlinuz"), "-initrd", str(Path(image) / "initramfs.cpio"),
            "-append", " ".join(words),
            "-chardev", f"file,id=console,path={self.folder / (name + '-console.log')}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci,id=serial0",
            "-chardev", f"socket,id=log,path={collector.log_socket}",
            "-device", "virtserialport,chardev=log,name=vf.log",
            "-chardev", f"socket,id=heartbeat,path={collector.heartbeat_socket}",
            "-device", "virtserialport,chardev=heartbeat,name=vf.heartbeat"]
        for socket_name in ("test", "daemon"):
            self.command += ["-qmp", f"unix:{self.qmp_path(socket_name)},server=on,wait=off"]
        if any(isinstance(disk, VhostDisk) for disk in self.disks):
            self.command[self.command.index("-machine") + 1] += ",memory-backend=memory0"
            self.command += ["-object", f"memory-backend-memfd,id=memory0,size={memory_mb}M,share=on"]
        for index, disk in enumerate(self.disks):
            if isinstance(disk, VhostDisk):
                self.command += disk.arguments(index, 7 if "qemu10" not in str(qemu) else 10)
                continue
            self.command += ["-blockdev", disk.blockdev(f"disk{index}"),
                             "-device", f"virtio-blk-pci,drive=disk{index},id=vd{index}"]
        if incoming is not None:
            self.command += ["-incoming", incoming]
        self.command += list(extra_args)

    def qmp_path(self, socket_name: str = "test") -> Path:
        return self.folder / (f"{self.name}-qmp.sock" if socket_name == "test" else f"{self.name}-qmp-{socket_name}.sock")

    def start(self) -> "Guest":
        prefix = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        for socket_name in ("test", "daemon"):
            self.qmp_path(socket_name).unlink(missing_ok=True)
        self._log = open(self.folder / f"{self.name}-qemu.log", "ab")
        self._log.write((shlex.join(prefix + self.command) + "\n").encode())
        self._log.flush()
        self._process = subprocess.Popen(
            prefix + self.command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        self._qmp = self._connect()
        return self

    def _connect(self) -> Qmp:
        deadline = time.monotonic() + 20
        while True:
            try:
                return Qmp(str(self.qmp_path()), connect_timeout=0.5)
            except QmpError as error:
                if not self.alive():
                    raise RuntimeError(f"QEMU {self.name} ended: {self.output()[-500:]}") from error
                if time.monotonic() > deadline:
                    raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def qmp(self) -> Qmp:
        return self._qmp

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """What QEMU itself printed."""
        path = self.folder / f"{self.name}-qemu.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def console(self) -> str:
        path = self.folder / f"{self.name}-console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_started(self, timeout: float = 60.0) -> float:
        """Waits until the load runs and the first records are acknowledged; returns the time of `R started`."""
        for starts_left in (2, 1, 0):
            try:
                started = self.collector.wait_for("R", "started", pid=self.pid, timeout=timeout)
                if self.workload.mode != "none" and self.disks:
                    self.collector.wait_for("AW", pid=self.pid, timeout=timeout)
                break
            except TimeoutError as error:
                if starts_left and self.incoming is None and not self.alive() and QEMU_RACE in self.output():
                    self.start()
                    continue
                raise TimeoutError(f"{error}; console: {self.console()[-500:]}; QEMU: {self.output()[-500:]}") from error
        return started.time

    def verify_memory(self, timeout: float = 60.0) -> tuple:
        """Has the guest check every page of its memory load now; returns (pages, bad since the start)."""
        since = time.monotonic()
        self.collector.command("verify")
        numbers = self.collector.wait_for("M", since=since, timeout=timeout).numbers()
        return numbers[1], numbers[2]

    def stop_load(self, timeout: float = 60.0) -> None:
        """Ends writers (after a last fsync) and memory load (after a last verification); the guest keeps beating."""
        since = time.monotonic()
        self.collector.command("stop")
        self.collector.wait_for("Q", since=since, timeout=timeout)

    def cpu_seconds(self) -> float:
        """CPU time of the QEMU process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def quit(self, timeout: float = 20.0) -> None:
        """Ends QEMU in order; the guest is not asked."""
        if self.alive():
            try:
                self._qmp.command("quit")
            except (QmpError, TimeoutError):
                self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        self._close()

    def kill(self) -> None:
        """SIGKILL: the power cut of a virtual machine."""
        if self.alive():
            self._process.kill()
        if self._process is not None:
            self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
            self._log.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_exc):
        self.quit()
