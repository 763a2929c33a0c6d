#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that every C++ source is as clang-format-14 writes it with the .clang-format of this tree.

Prints the names of those that are not; `clang-format-14 -i FILE...` puts them right. No build needed. Another version
of clang-format formats some lines otherwise, so that it has to be this one.
"""
import concurrent.futures
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ["blockdev", "engine", "kmod-shim", "netproto", "perf", "tests", "tools"]
BATCH = 40  # files


def check(files: list) -> str:
    done = subprocess.run(["clang-format-14", "--dry-run", *files], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"formatting: clang-format-14 failed: {done.stderr[-500:]}")
    return done.stderr


def main() -> int:
    files = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")
                   if path.suffix in (".cpp", ".h"))
    if len(files) < 100:
        sys.exit(f"formatting: only {len(files)} sources found below {ROOT}")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        output = "".join(pool.map(check, [files[at:at + BATCH] for at in range(0, len(files), BATCH)]))
    wrong = sorted({line.split(":", 1)[0] for line in output.splitlines() if "-Wclang-format-violations" in line})
    for name in wrong:
        print(name)
    print(f"formatting: {len(files)} files, {len(wrong)} not as clang-format-14 writes them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
