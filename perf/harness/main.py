# SPDX-License-Identifier: Apache-2.0
"""Behind perf/run: runs what was asked for, prints the tables, writes results.json and report.html."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "tests/functional"))
sys.dont_write_bytecode = True  # run as root in somebody's checkout

import block  # noqa: E402  (the path above is where vmlib lives)
import migration  # noqa: E402
import report  # noqa: E402
import vhost  # noqa: E402
from migration import Link  # noqa: E402
from profiles import FULL, QUICK, TITLES, Profile  # noqa: E402
from vmlib import Build  # noqa: E402

SECTIONS = ("block", "vhost", "migration", "replication", "wan")
BUILT = ("block", "vhost", "migration")


def parse(words) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="perf/run", description=__doc__)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=SOURCE / "build/perf")
    parser.add_argument("--link", type=Link.parse, action="append")
    parser.add_argument("--variants", type=lambda text: text.split(","))
    parser.add_argument("--before", type=float, help="seconds of the guest's write rate before each migration")
    parser.add_argument("--check-usage", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.only is not None and arguments.only not in BUILT:
        parser.error(f"--only {arguments.only} is not available yet; there is: {', '.join(BUILT)}")
    if arguments.rounds is not None and not 1 <= arguments.rounds <= 100:
        parser.error("--rounds must be 1..100")
    unknown = set(arguments.variants or ()) - set(TITLES)
    if unknown:
        parser.error(f"unknown variant {', '.join(sorted(unknown))}; there are: {', '.join(TITLES)}")
    return arguments


def say(text: str = "") -> None:
    print(text, flush=True)


def machine(build: Build) -> dict:
    def first(text, key):
        return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), "unknown")

    def output(*command):
        done = subprocess.run([str(word) for word in command], text=True, capture_output=True, check=False, cwd=SOURCE)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"

    return {"cpu": first(Path("/proc/cpuinfo").read_text(), "model name"), "cores": os.cpu_count(),
            "memory_mib": int(first(Path("/proc/meminfo").read_text(), "MemTotal").split()[0]) >> 10,
            "kernel": platform.release(), "qemu": output(build.qemu("10"), "--version"),
            "vmferry": output("git", "-c", "safe.directory=*", "rev-parse", "--short", "HEAD")}


def main(words) -> int:
    arguments = parse(words)
    if arguments.check_usage:
        return 0
    if os.geteuid() != 0:
        print("perf/run: network namespaces need root", file=sys.stderr)
        return 1
    # Guests, daemons and namespaces are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    build = Build()
    began = time.time()
    results = {"schema": 1, "profile": "full" if arguments.full else "quick", "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
               "command": "perf/run " + " ".join(words), "machine": machine(build), "sections": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        results["seconds"] = round(time.time() - began, 1)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "report.html").write_text(report.html(results))

    failures = []
    if arguments.only in (None, "migration"):
        failures += run_migration(build, arguments, results["sections"].setdefault("migration", {}), save)
    if arguments.only in (None, "block"):
        failures += run_block(build, arguments, results["sections"].setdefault("block", {}), save)
    if arguments.only in (None, "vhost"):
        failures += run_vhost(build, arguments, results["sections"].setdefault("vhost", {}), save)
    say(f"{arguments.out}/results.json, {arguments.out}/report.html")
    return 1 if failures else 0


def run_migration(build: Build, arguments, section: dict, save) -> list:
    """What makes the exit status 1: broken runs, and with --full missed targets."""
    profile = FULL if arguments.full else QUICK
    if arguments.variants:
        profile = Profile(**{**vars(profile), "variants": tuple(arguments.variants)})
    if arguments.before:
        profile = Profile(**{**vars(profile), "before_s": arguments.before})
    migration.run(build, profile, arguments.link or [Link("100Mbit", "40ms")], arguments.rounds or profile.rounds, section,
                  save, say)
    links = section["links"]
    for link in links:
        say(f"\n{link['link']}\n{report.text_table(link)}")
    (arguments.out / "picture.svg").write_text(report.picture(links[0]))
    broken = [run for link in links for run in link["runs"] if run["broken"]]
    for run in broken:
        print(f"BROKEN: {run['variant']}, round {run['round']}: {run['status']} {run['reason']} {run['verified']}",
              file=sys.stderr)
    return broken + missed([target for link in links for target in link["targets"]], arguments)


def run_block(build: Build, arguments, section: dict, save) -> list:
    profile = block.FULL if arguments.full else block.QUICK
    say(f"== block, {profile.name}: image of {profile.image_bytes >> 20} MiB, {arguments.rounds or profile.rounds} rounds")
    block.run(build, profile, arguments.rounds or profile.rounds, section, save, say)
    return missed([target for cell in section["cells"] for target in cell["targets"]], arguments)


def run_vhost(build: Build, arguments, section: dict, save) -> list:
    profile = vhost.FULL if arguments.full else vhost.QUICK
    say(f"== vhost, {profile.name}: image of {profile.image_bytes >> 20} MiB, {arguments.rounds or profile.rounds} rounds")
    vhost.run(build, profile, arguments.rounds or profile.rounds, section, save, say)
    return missed([target for cell in section["cells"] for target in cell["targets"]], arguments)


def missed(targets: list, arguments) -> list:
    names = [target["name"] for target in targets if target["passed"] is False]
    if names:
        say(f"missed: {', '.join(names)}" + (" (the targets are of --full; told only)" if arguments.quick else ""))
    return names if arguments.full else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
