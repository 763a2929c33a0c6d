# SPDX-License-Identifier: Apache-2.0
"""NBD servers beside each other: vmferryd and what an operator would use instead, each on an image of its own."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from vmlib import Daemon, pair


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """direct: the image is opened with O_DIRECT. `uri` is what a client connects to, `pid` the process that serves."""

    name = ""
    can_direct = True

    def __init__(self, folder: Path, build, image: Path, direct: bool):
        self.folder, self.build, self.image, self.direct = folder, build, image, direct
        self.socket = folder / f"{self.name}.sock"
        self._process = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def command(self) -> list:
        raise NotImplementedError

    def start(self) -> None:
        log = self.folder / f"{self.name}.log"
        with open(log, "wb") as output:
            self._process = subprocess.Popen([str(word) for word in self.command()], stdin=subprocess.DEVNULL,
                                             stdout=output, stderr=output)
        deadline = time.monotonic() + 10
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not serve: {log.read_text(errors='replace').strip()}")
            time.sleep(0.02)
        time.sleep(0.1)  # bound is not yet listening

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class VmferryUntracked(Server):
    """A volume that has no replica: no dirty tracking."""

    name = "vmferry-untracked"

    def export(self) -> str:
        return f"nbd=unix:{self.socket}"

    def start(self) -> None:
        cache = "none" if self.direct else "writeback"
        self._daemon = Daemon(self.name, self.folder, self.build,
                              [f"name=vda,path={self.image},{self.export()},cache={cache}"], log_level="warn",
                              listen=f"127.0.0.1:{free_port()}").start()

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def stop(self) -> None:
        self._daemon.stop()
        shutil.rmtree(self._daemon.state_dir, ignore_errors=True)


class Vmferry(VmferryUntracked):
    """With dirty tracking: a peer has a copy, replication is paused and the peer gone, so that nothing else runs."""

    name = "vmferry"

    def start(self) -> None:
        super().start()
        replica = self.folder / "replica.img"
        with open(replica, "wb") as file:
            file.truncate(self.image.stat().st_size)
        with Daemon("replica", self.folder, self.build, [f"name=vda,path={replica},role=secondary"],
                    listen=f"127.0.0.1:{free_port()}", log_level="warn") as peer:
            pair(self._daemon, peer)
            self._daemon.vmferry("replicate", "start", "vda", "--peer", "replica")
            self._daemon.vmferry("replicate", "wait", "vda", "--timeout", "5m", timeout=310)
            self._daemon.vmferry("replicate", "pause", "vda")
        shutil.rmtree(peer.state_dir)
        replica.unlink()


class QemuNbd(Server):
    name = "qemu-nbd"

    def command(self) -> list:
        return [self.build.qemu_bin("10") / "qemu-nbd", "--format=raw", "--persistent", "--shared=8",
                f"--socket={self.socket}", f"--cache={'none' if self.direct else 'writeback'}", "--aio=io_uring",
                self.image]


class QemuStorageDaemon(Server):
    name = "qemu-storage-daemon"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.socket}"

    def command(self) -> list:
        direct = "on" if self.direct else "off"
        return [self.build.qemu_bin("10") / "qemu-storage-daemon",
                "--blockdev", f"driver=file,node-name=file,filename={self.image},aio=io_uring,cache.direct={direct}",
                "--blockdev", f"driver=raw,node-name=disk,file=file,cache.direct={direct}",
                *self.export()]

    def export(self) -> list:
        return ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0",
                "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"]


class Nbdkit(Server):
    name = "nbdkit"
    can_direct = False

    def command(self) -> list:
        return ["nbdkit", "--foreground", "--exit-with-parent", f"--unix={self.socket}", "file", self.image]


class NbdServer(Server):
    name = "nbd-server"
    can_direct = False

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.socket}"

    def command(self) -> list:
        config = self.folder / "nbd-server.conf"
        config.write_text(f"[generic]\nunixsock = {self.socket}\nallowlist = true\nport = 0\nlistenaddr = 127.0.0.1\n"
                          f"[disk]\nexportname = {self.image}\nflush = true\nfua = true\n")
        return [shutil.which("nbd-server") or "/usr/sbin/nbd-server", "-d", "-C", config]


SERVERS = (Vmferry, VmferryUntracked, QemuNbd, QemuStorageDaemon, Nbdkit, NbdServer)
