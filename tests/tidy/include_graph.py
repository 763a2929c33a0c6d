#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the sources against the dependency table of docs/architecture.md and the rules that a compiler cannot see.

Fails with one line per violation. Runs in well under a second; no build needed.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# folder -> folders whose headers it may include (itself always). Longest prefix wins.
TABLE = {
    "engine/base": [],
    "engine/runtime": ["engine/base"],
    "netproto": ["engine/base"],
    "blockdev": ["engine/base", "engine/runtime"],
    "blockdev/nbd": ["engine/base", "engine/runtime", "netproto", "blockdev"],
    "blockdev/vhost": ["engine/base", "engine/runtime", "netproto", "blockdev"],
    "engine/track": ["engine/base", "engine/runtime", "blockdev"],
    "engine/delta": ["engine/base", "engine/runtime"],
    "engine/replicate": ["engine/base", "engine/runtime", "engine/track", "engine/delta", "blockdev", "netproto"],
    # PeerLink's GroupChannel is the narrow interface through which memory and migrate reach the link.
    "engine/memory": ["engine/base", "engine/runtime", "engine/delta", "netproto", "engine/replicate/peer_channel.h"],
    "engine/migrate": ["engine/base", "engine/runtime", "netproto", "engine/memory", "engine/replicate/peer_channel.h"],
    "engine/control": ["engine/base", "engine/runtime", "netproto"],
    "engine/daemon": ["engine", "netproto", "blockdev", "blockdev/nbd", "blockdev/vhost", "kmod-shim"],
    "tools/vmferryd": ["engine", "netproto", "blockdev", "kmod-shim"],
    "tools/vmferry": ["engine/base", "netproto", "tools/vmferry"],
    "kmod-shim": ["engine/base", "engine/runtime/unique_fd.h", "netproto"],
    "perf/wan": ["engine/base"],
    "perf/micro": ["engine/base", "engine/runtime", "blockdev", "engine/track"],
    "perf/vhost": ["engine/base", "engine/runtime/unique_fd.h", "netproto"],
}
# An export never learns that replication exists, whatever a wider row above says.
FORBIDDEN = [("blockdev", "engine/track"), ("blockdev", "engine/replicate"), ("netproto", "engine/runtime")]

BANNED_CALLS = re.compile(r"\b(strcpy|strcat|sprintf|vsprintf|gets|alloca|system|popen|rand|srand|atoi|atol|strtok)\s*\(")
BANNED_MARKS = re.compile(r"\b(FIXME|XXX|HACK)\b")
INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.M)


def folder_of(path: str) -> str | None:
    hits = [folder for folder in TABLE if path == folder or path.startswith(folder + "/")]
    return max(hits, key=len) if hits else None


def allowed(folder: str, include: str) -> bool:
    target = folder_of(include)
    if target == folder:
        return True
    for entry in TABLE[folder]:
        if entry == include:
            return True
        if target is not None and (entry == target or (entry == "engine" and target.startswith("engine/"))):
            return True
        # "blockdev" in a row means its core, not the exports below it.
    return False


def strip_comments_and_strings(text: str) -> str:
    pattern = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/'
    return re.sub(pattern, " ", text, flags=re.S)


def main() -> int:
    problems = []
    files = [p for top in ("engine", "netproto", "blockdev", "tools", "kmod-shim", "perf", "tests")
             for p in (ROOT / top).rglob("*") if p.suffix in (".h", ".cpp") and p.is_file()]
    graph: dict[str, set[str]] = {}
    included = set()
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        if "SPDX-License-Identifier: Apache-2.0" not in text[:200]:
            problems.append(f"{name}: no SPDX line at the top")
        if path.suffix == ".h" and "#pragma once" not in text:
            problems.append(f"{name}: no #pragma once")
        code = strip_comments_and_strings(text)
        for match in BANNED_CALLS.finditer(code):
            if name.startswith("tests/") and match[1] in ("system", "popen"):
                continue  # tests run real programs
            problems.append(f"{name}: {match[1]}() is banned")
        for match in BANNED_MARKS.finditer(text):
            problems.append(f"{name}: stray {match[1]}")
        folder = folder_of(name)
        for include in INCLUDE.findall(text):
            included.add(include)
            if not (ROOT / include).exists():
                problems.append(f'{name}: includes "{include}", which is not a path from the top folder')
                continue
            target = folder_of(include)
            if folder and target:
                graph.setdefault(folder, set()).add(target)
            if folder and not allowed(folder, include):
                problems.append(f'{name}: {folder} may not include "{include}"')
            if folder and any(folder.startswith(a) and include.startswith(b + "/") for a, b in FORBIDDEN):
                problems.append(f'{name}: {folder} must never include "{include}"')
    # A header that nobody includes is dead.
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".h" and name not in included:
            problems.append(f"{name}: is included by nothing")
    for line in problems:
        print(line)
    print(f"{len(files)} files, {sum(len(v) for v in graph.values())} edges between folders, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
