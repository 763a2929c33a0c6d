# SPDX-License-Identifier: Apache-2.0
"""A guest that runs what a test tells it: programs of this machine in Debian's kernel, commands over a virtio port.

For what needs a kernel of its own (modules, block devices that may hang). Nothing of this machine is reachable from it:
no network, no disk; it lives in its memory.
"""

import base64
import importlib.machinery
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

from .build import GUEST, Build
from .guest import _LIBC, PR_SET_PDEATHSIG, QEMU_RACE

PROGRAMS = "/usr/local/bin"  # before the applets of busybox
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH={PROGRAMS}:/bin HOME=/tmp
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=70% tmpfs /tmp
for module in $(cat /lib/order); do insmod /lib/modules/$module.ko; done
while ! [ -e /dev/vport0p1 ]; do sleep 0.05; done
exec 3<>/dev/vport0p1
echo "0 0 " >&3
while read -r id script <&3; do
  echo "$script" | base64 -d >/tmp/.script
  sh /tmp/.script >/tmp/.out 2>&1 </dev/null 3>&-
  echo "$id $? $(base64 /tmp/.out | tr -d '\\n')" >&3
done
"""


def _build_image():
    """The functions of tests/guest/build-image."""
    loader = importlib.machinery.SourceFileLoader("build_image", str(GUEST / "build-image"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def libraries_of(program) -> set:
    """Paths of the shared libraries and the loader, as the loader looks for them."""
    listed = subprocess.run(["ldd", str(program)], text=True, capture_output=True, check=False).stdout
    return {word for line in listed.splitlines() for word in line.split() if word.startswith("/")}


class GuestShell:
    """One guest with a shell.

    programs   names (found in PATH and the sbin folders) or paths; debug symbols are left behind
    modules    loaded at the start; `later` ones are only put into /lib/modules
    """

    def __init__(self, folder, build: Build, programs, modules=(), later=(), memory_mb: int = 1024, cpus: int = 2):
        self.folder = Path(folder)
        self._build = build
        self._serial = 0
        self._process = None
        self._channel = None
        self._buffer = b""
        image = build.guest_image()
        self._make_initramfs(image / "root", programs, modules, later)
        self._socket = self.folder / "shell.sock"
        self.command = [
            str(build.qemu()), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", str(memory_mb),
            "-kernel", str(image / "vmlinuz"), "-initrd", str(self.folder / "initramfs.cpio"),
            "-append", "console=ttyS0 panic=-1 random.trust_cpu=on no_timer_check loglevel=5",
            "-chardev", f"file,id=console,path={self.folder / 'console.log'}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=shell,path={self._socket}",
            "-device", "virtserialport,chardev=shell,name=vf.shell"]

    def _make_initramfs(self, root, programs, modules, later) -> None:
        image = _build_image()
        archive = image.Initramfs()
        folders = set()

        def add_folder(path: str) -> None:
            if path in ("", "/") or path in folders:
                return
            add_folder(os.path.dirname(path))
            folders.add(path)
            archive.add(path.lstrip("/"), stat.S_IFDIR | 0o755)

        def add(path: str, data: bytes) -> None:
            add_folder(os.path.dirname(path))
            archive.add(path.lstrip("/"), stat.S_IFREG | 0o755, data)

        for path in ("/dev", "/proc", "/sys", "/tmp", "/mnt"):
            add_folder(path)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        add("/init", INIT.encode("ascii"))
        add("/bin/busybox", (root / "bin/busybox").read_bytes())
        first = image.load_order(root, ("virtio_pci", "virtio_console", *modules))
        add("/lib/order", "".join(f"{name}\n" for name, _ in first).encode("ascii"))
        for name, path in {**dict(first), **dict(image.load_order(root, later))}.items():
            add(f"/lib/modules/{name}.ko", path.read_bytes())
        libraries = set()
        for program in programs:
            path = shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
            if path is None:
                raise RuntimeError(f"{program} is missing; tests/run installs it")
            libraries |= libraries_of(path)
            stripped = self.folder / "stripped"
            subprocess.run(["strip", "-o", str(stripped), path], check=True)
            add(f"{PROGRAMS}/{os.path.basename(program)}", stripped.read_bytes())
            stripped.unlink()
        for library in sorted(libraries):
            add(library, Path(library).read_bytes())
        archive.write(self.folder / "initramfs.cpio")

    def start(self, timeout: float = 60.0) -> "GuestShell":
        with socket.socket(socket.AF_UNIX) as listener:
            self._socket.unlink(missing_ok=True)
            listener.bind(str(self._socket))
            listener.listen(1)
            for tries_left in (2, 1, 0):
                with open(self.folder / "qemu.log", "ab") as log:
                    self._process = subprocess.Popen(
                        self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        preexec_fn=lambda: _LIBC.prctl(PR_SET_PDEATHSIG, 9))
                listener.settimeout(timeout)
                self._channel, _ = listener.accept()
                try:
                    self._answer("0", timeout)
                    return self
                except RuntimeError:
                    self.stop()
                    if tries_left == 0 or QEMU_RACE not in (self.folder / "qemu.log").read_text(errors="replace"):
                        raise
        raise AssertionError("not reached")

    def run(self, script: str, timeout: float = 60.0):
        """Runs a shell script; (exit status, output). What it leaves in the background must redirect its output."""
        self._serial += 1
        self._channel.sendall(f"{self._serial} {base64.b64encode(script.encode()).decode()}\n".encode())
        return self._answer(str(self._serial), timeout)

    def sh(self, script: str, timeout: float = 60.0) -> str:
        """The same for a script that has to succeed."""
        status, output = self.run(script, timeout)
        if status != 0:
            raise AssertionError(f"{script!r} ended with {status}: {output}\nkernel: {self.kernel_log()}")
        return output.strip()

    def _answer(self, serial: str, timeout: float):
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            self._channel.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                got = self._channel.recv(1 << 16)
            except TimeoutError:
                raise RuntimeError(f"the guest does not answer within {timeout} s; kernel: {self.kernel_log()}") from None
            if not got:
                raise RuntimeError(f"the guest has ended; kernel: {self.kernel_log()}")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        words = line.decode("ascii").split(" ")
        if words[0] != serial:
            raise RuntimeError(f"answer {words[0]} to command {serial}")
        return int(words[1]), base64.b64decode(words[2]).decode(errors="replace")

    def kernel_log(self, lines: int = 30) -> str:
        path = self.folder / "console.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._buffer = b""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
