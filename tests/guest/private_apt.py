# SPDX-License-Identifier: Apache-2.0
"""Packages from the mirror that apt already uses, without touching apt's own state.

For tests/guest/fetch-qemu and tests/guest/build-image. apt runs with sources, lists and cache in one private
folder; the sources are those of this machine that serve the Debian release, with the wished suites added. Proxy
and authentication settings are apt's own (apt.conf.d, auth.conf.d stay in use). The list of installed packages is
the machine's, so that only what is missing here is fetched. Nothing is installed: packages are only unpacked.
"""

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

LISTS = Path("/var/lib/apt/lists")


class AptError(Exception):
    """Says what could not be fetched and what to do; meant for the user."""


class BuildLock:
    """One fetch at a time per build folder: tests that start together must not unpack over each other."""

    def __init__(self, build: Path):
        build.mkdir(parents=True, exist_ok=True)
        self._path = build / ".fetch.lock"

    def __enter__(self):
        self._file = open(self._path, "w", encoding="ascii")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_exc):
        self._file.close()


def _release_codename() -> str:
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip('"')
    raise AptError("/etc/os-release names no VERSION_CODENAME: not a Debian release")


def _deb822_sources(path: Path):
    for stanza in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        fields = {}
        key = None
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
            for uri in fields.get("uris", "").split():
                yield uri, fields.get("suites", "").split(), fields.get("components", "").split(), {
                    k: v for k, v in fields.items() if k in ("signed-by", "trusted", "check-valid-until")}


def _one_line_sources(path: Path):
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line)
        if match:
            options = dict(o.split("=", 1) for o in (match[1] or "").split() if "=" in o)
            yield match[2], [match[3]], match[4].split(), {
                k: v for k, v in options.items() if k in ("signed-by", "trusted", "check-valid-until")}


def debian_source(codename: str):
    """(uri, options) of the configured source that serves the main component of the running release."""
    etc = Path("/etc/apt")
    files = [etc / "sources.list"] + sorted((etc / "sources.list.d").glob("*"))
    for path in files:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        read = _deb822_sources if path.suffix == ".sources" else _one_line_sources
        for uri, suites, components, options in read(path):
            if codename in suites and "main" in components:
                return uri, options
    raise AptError(f"no source for '{codename} main' in /etc/apt/sources.list or sources.list.d: configure one, "
                   "the packages for the test guest come from the same mirror")


class PrivateApt:
    def __init__(self, folder: Path, extra_suites=()):
        self.folder = folder
        self.codename = _release_codename()
        uri, options = debian_source(self.codename)
        suites = [self.codename, f"{self.codename}-updates"] + [f"{self.codename}-{s}" for s in extra_suites]
        for sub in ("lists/partial", "archives/partial", "debs"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        if "signed-by" not in options and os.path.exists(keyring):
            options["signed-by"] = keyring
        stanza = f"Types: deb\nURIs: {uri}\nSuites: {' '.join(suites)}\nComponents: main\n"
        stanza += "".join(f"{key.title()}: {value}\n" for key, value in sorted(options.items()))
        (folder / "debian.sources").write_text(stanza, encoding="utf-8")
        # What apt has already fetched for these suites needs not come again; apt checks it against the mirror.
        for path in LISTS.glob(f"*_{self.codename}*"):
            if path.is_file() and os.access(path, os.R_OK) and not (folder / "lists" / path.name).exists():
                shutil.copy2(path, folder / "lists" / path.name)

    def _run(self, tool: str, *args: str, cwd=None) -> str:
        command = [
            tool,
            "-o", f"Dir::Etc::sourcelist={self.folder}/debian.sources",
            "-o", "Dir::Etc::sourceparts=-",
            "-o", f"Dir::State::lists={self.folder}/lists",
            "-o", f"Dir::Cache={self.folder}",
            "-o", "Debug::NoLocking=1",
            "-o", "APT::Sandbox::User=root",
            "-o", "Acquire::Retries=3",
            *args]
        done = subprocess.run(command, cwd=cwd, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}, check=False)
        if done.returncode != 0:
            raise AptError(f"'{tool} {' '.join(args)}' failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def update(self) -> None:
        self._run("apt-get", "update", "-qq")

    def closure(self, names, suite: str):
        """{package: version} that apt would install here for `names` from `suite`, what is installed left out."""
        text = self._run("apt-get", "-s", "-y", "--no-install-recommends", "-t", suite, "install", *names)
        return dict(re.findall(r"^Inst (\S+) (?:\[[^]]*\] )?\((\S+)", text, re.MULTILINE))

    def candidate(self, name: str, suite: str) -> str:
        text = self._run("apt-cache", "-t", suite, "policy", name)
        match = re.search(r"Candidate: (\S+)", text)
        if not match or match[1] == "(none)":
            raise AptError(f"the mirror has no package '{name}' in suite '{suite}'")
        return match[1]

    def depends(self, name: str):
        return re.findall(r"Depends: ([^\s<]+)", self._run("apt-cache", "depends", "--important", name))

    def fetch(self, versions) -> list:
        """Downloads {package: version} (None: apt's choice) and returns the files."""
        debs = self.folder / "debs"
        shutil.rmtree(debs)
        debs.mkdir()
        self._run("apt-get", "download", *[f"{n}={v}" if v else n for n, v in sorted(versions.items())], cwd=debs)
        return sorted(debs.glob("*.deb"))


def unpack(debs, root: Path) -> None:
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
