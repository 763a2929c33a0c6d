# SPDX-License-Identifier: Apache-2.0
"""Whether the files that lay still on the guest's disk arrived: the records prove what was written meanwhile, this the
rest. Reads the image with debugfs (no mount); what only the journal holds does not matter for files nobody writes."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

RECORDS = "vf-records.dat"  # the load's own file, which guest-verify checks
_originals = {}


def file_hashes(image: Path) -> dict:
    """{path: hash of the content} of the ext4 filesystem in a raw image, without the load's own file."""
    debugfs = shutil.which("debugfs", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
    if debugfs is None:
        raise RuntimeError("debugfs is missing: apt-get install e2fsprogs")
    hashes = {}
    with tempfile.TemporaryDirectory(prefix="vmferry-files-") as folder:
        listed = subprocess.run([debugfs, "-R", "ls -p /", image], text=True, capture_output=True, check=True).stdout
        # /inode/mode/uid/gid/name/size/
        names = [line.split("/")[5] for line in listed.splitlines() if line.count("/") >= 6]
        for name in names:
            if name not in (".", "..", "lost+found", RECORDS):
                subprocess.run([debugfs, "-R", f"rdump /{name} {folder}", image], capture_output=True, check=True)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                hashes[str(path.relative_to(folder))] = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    return hashes


def compare_files(original: Path, image: Path) -> dict:
    """How many files of `original` the image has, and which are missing or different."""
    key = (original.stat().st_ino, original.stat().st_size, original.stat().st_mtime_ns)
    if key not in _originals:
        _originals[key] = file_hashes(original)
    wanted, found = _originals[key], file_hashes(image)
    if not wanted:
        raise RuntimeError(f"no files in {original}: nothing can be compared")
    wrong = [path for path, value in wanted.items() if found.get(path) != value]
    return {"files": len(wanted), "files_wrong": len(wrong), "files_wrong_examples": wrong[:5]}
