# SPDX-License-Identifier: Apache-2.0
"""Where the programs are, and how they come to be there: QEMU >= 9, the guest's kernel, disks, the verifier."""

import json
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[3]
GUEST = SOURCE / "tests/guest"


class Build:
    """folder: the build folder; by default $VMFERRY_BUILD, else build/ of the checkout."""

    def __init__(self, folder=None):
        self.folder = Path(folder or os.environ.get("VMFERRY_BUILD") or SOURCE / "build").resolve()
        self.bin = Path(os.environ.get("VMFERRY_BIN") or self.folder / "bin").resolve()
        self._prepared = set()

    def _prepare(self, script: str, *arguments: str) -> None:
        """Runs a script of tests/guest once per process; it does nothing when everything is there."""
        if script in self._prepared:
            return
        done = subprocess.run([GUEST / script, *arguments], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{script} failed: {done.stdout.strip()}")
        self._prepared.add(script)

    def qemu_bin(self, version: str = "10") -> Path:
        """Folder of qemu-system-x86_64, qemu-img, qemu-nbd, qemu-io, qemu-storage-daemon.
        "10": from backports, fetched when missing; "system": what is installed (7.2 on Debian 12)."""
        if version == "system":
            found = shutil.which("qemu-system-x86_64")
            if found is None:
                raise RuntimeError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
            return Path(found).parent
        self._prepare("fetch-qemu", str(self.folder))
        return self.folder / "qemu10/bin"

    def qemu(self, version: str = "10") -> Path:
        return self.qemu_bin(version) / "qemu-system-x86_64"

    def guest_image(self) -> Path:
        """Folder with vmlinuz and initramfs.cpio."""
        self._prepare("build-image", str(self.folder))
        return self.folder / "guest"

    def make_disk(self, out, size: str = "2G", fill: str = "1140M") -> Path:
        """Raw ext4 image with files of /usr; made once per size, then copied."""
        done = subprocess.run([GUEST / "build-disk", str(out), "--size", size, "--fill", fill, "--build",
                               str(self.folder)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              check=False)
        if done.returncode != 0:
            raise RuntimeError(f"build-disk failed: {done.stdout.strip()}")
        return Path(out)

    def verify(self, image, log_path, disk: int = 0, include_written: bool = False) -> dict:
        """What guest-verify found, plus "ok". Raises when it could not check."""
        command = [self.bin / "guest-verify", str(image), "--acks", str(log_path), "--disk", str(disk)]
        if include_written:
            command.append("--include-written")
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stderr.strip() or f"guest-verify ended with {done.returncode}")
        return {**json.loads(done.stdout), "ok": done.returncode == 0}
