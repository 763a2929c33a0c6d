# SPDX-License-Identifier: Apache-2.0
"""perf/run --only migration: live migration beside QEMU's own way, over an emulated link."""

import argparse
import shutil
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

import report
from files import compare_files
from measure import DONE, FAILED, GIVEN_UP, Run, medians, targets
from profiles import Profile
from qemu_way import QemuWay
from vmferry_way import VmferryWay
from vmlib import Build


@dataclass(frozen=True)
class Link:
    rate: str
    rtt: str

    @staticmethod
    def parse(text: str) -> "Link":
        rate, slash, rtt = text.partition("/")
        if not (rate and slash and rtt):
            raise argparse.ArgumentTypeError(f"'{text}' is not RATE/RTT, as 100Mbit/40ms")
        return Link(rate, rtt)

    def __str__(self) -> str:
        return f"{self.rate}, {self.rtt} round trip"


def one_run(build: Build, profile: Profile, variant: str, link: Link, number: int, original: Path) -> Run:
    folder = Path(tempfile.mkdtemp(prefix="vmferry-perf-"))
    try:
        way = VmferryWay(folder, build, profile, link) if variant == "vmferry" else QemuWay(folder, build, profile,
                                                                                          variant, link)
        run = way.run(number)
        if run.status == DONE:
            run.verified.update(compare_files(original, way.image("b")))
            run.verified["ok"] = run.verified["ok"] and run.verified["files_wrong"] == 0
        return run
    except Exception as error:  # one broken run must not lose the results of the others
        return Run(variant, number, str(link), status=FAILED, reason=f"{error}\n{traceback.format_exc()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(build: Build, profile: Profile, links: list, rounds: int, section: dict, save, say) -> None:
    """Fills `section`, and calls save() after each run."""
    section["links"] = []
    with tempfile.TemporaryDirectory(prefix="vmferry-perf-") as folder:
        original = build.make_disk(Path(folder) / "original.img", profile.disk_size, profile.fill)
        for link in links:
            entry = {"link": str(link)}
            section["links"].append(entry)
            over_link(build, profile, link, rounds, original, entry, save, say)


def over_link(build: Build, profile: Profile, link: Link, rounds: int, original: Path, entry: dict, save, say) -> None:
    """Rounds are interleaved, so that a slow phase of the machine meets every variant."""
    say(f"== migration, {profile.name}: {profile.memory_mb} MiB of memory, disk of {profile.disk_size}, {link}")
    runs, hopeless = [], set()
    for number in range(1, rounds + 1):
        for variant in profile.variants:
            if variant in hopeless:
                continue
            one = one_run(build, profile, variant, link, number, original)
            runs.append(one)
            say(report.text_line(one))
            if one.status == GIVEN_UP and one.disk_s is None:
                # A mirror that never was ready takes minutes to be seen so again; one whose memory was just too late
                # may make it in another round.
                hopeless.add(variant)
            summary = medians(runs)
            entry.update(summary=summary, targets=targets(summary), runs=[each.to_json() for each in runs])
            save()
