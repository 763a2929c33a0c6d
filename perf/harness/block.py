# SPDX-License-Identifier: Apache-2.0
"""perf/run --only block: IOPS, latency and processor time of NBD servers, side by side.

fio's nbd engine is the client of all. In a round every server has its turn, in an order that rotates; a ratio compares
two servers within one round, so that a slow phase of the machine meets both. raw: fio on the file itself with io_uring.
"""

import json
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from block_servers import SERVERS

RAW = "raw"
OURS = ("vmferry", "vmferry-untracked")
TRACKING_MIN = 0.97  # of the IOPS without tracking, at a depth of 32


@dataclass(frozen=True)
class Cell:
    pattern: str  # fio's rw
    block: str
    depth: int
    direct: bool
    iops_min: float  # against the best of the others
    p99_max: float | None = None
    cpu_max: float | None = None  # seconds per GB, against the leanest of the others

    @property
    def name(self) -> str:
        return f"{'direct' if self.direct else 'cached'} {self.pattern} {self.block} d{self.depth}"


CELLS = (
    Cell("randread", "4k", 32, True, 1.5, p99_max=0.7, cpu_max=0.6), Cell("randwrite", "4k", 32, True, 1.25, cpu_max=0.6),
    Cell("randread", "4k", 1, True, 1.0), Cell("randwrite", "4k", 1, True, 1.0),
    Cell("read", "128k", 8, True, 1.0), Cell("write", "128k", 8, True, 1.5),
    Cell("randread", "4k", 32, False, 1.0), Cell("randwrite", "4k", 32, False, 1.0),
    Cell("read", "128k", 8, False, 1.0), Cell("write", "128k", 8, False, 1.0),
)


@dataclass(frozen=True)
class BlockProfile:
    name: str
    image_bytes: int
    seconds: float
    rounds: int
    cells: tuple


FULL = BlockProfile("full", 1 << 30, 2.5, 15, CELLS)
QUICK = BlockProfile("quick", 256 << 20, 1.0, 3, (CELLS[0], CELLS[1]))


def fio(cell: Cell, seconds: float, target: list) -> dict:
    done = subprocess.run(
        ["fio", "--name=cell", *target, f"--rw={cell.pattern}", f"--bs={cell.block}", f"--iodepth={cell.depth}",
         f"--runtime={seconds}", "--time_based", "--ramp_time=0.3", "--output-format=json"],
        text=True, capture_output=True, check=False, timeout=seconds + 60)
    if done.returncode != 0:
        raise RuntimeError(f"fio {target}: {done.stderr.strip()} {done.stdout[-500:]}")
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    side = job["write" if "write" in cell.pattern else "read"]
    return {"iops": side["iops"], "bytes": side["io_bytes"], "mb_s": side["bw_bytes"] / 1e6,
            "mean_us": side["clat_ns"]["mean"] / 1e3, "p99_us": side["clat_ns"]["percentile"]["99.000000"] / 1e3}


def measure(cell: Cell, seconds: float, server) -> dict:
    before = server.cpu_seconds()
    found = fio(cell, seconds, ["--ioengine=nbd", f"--uri={server.uri}"])
    # The ramp is not in fio's bytes but in the processor time: scaled by time.
    used = (server.cpu_seconds() - before) * seconds / (seconds + 0.3)
    return {**found, "cpu_s_per_gb": used / (found["bytes"] / 1e9)}


def measure_round(build, cell: Cell, seconds: float, order: list, folder: Path) -> dict:
    found = {server.name: measure(cell, seconds, server) for server in order}
    found[RAW] = fio(cell, seconds, ["--ioengine=io_uring", f"--filename={folder / 'vmferry.img'}",
                                     f"--direct={int(cell.direct)}"])
    return found


def run_rounds(build, cell, kinds: list, profile: BlockProfile, rounds: int, source: Path, folder: Path,
               measure_one_round) -> list:
    """Every server has its turn in each round, in an order that rotates."""
    servers = []
    try:
        for kind in kinds:
            image = folder / f"{kind.name}.img"
            shutil.copyfile(source, image)
            servers.append(kind(folder, build, image, cell.direct))
            servers[-1].start()
        return [measure_one_round(build, cell, profile.seconds,
                                  servers[number % len(servers):] + servers[:number % len(servers)], folder)
                for number in range(rounds)]
    finally:
        for server in servers:
            server.stop()
        for left in folder.glob("*.img"):
            left.unlink()


def run_cell(build, profile: BlockProfile, rounds: int, cell: Cell, source: Path, folder: Path) -> dict:
    kinds = [kind for kind in SERVERS if kind.can_direct or not cell.direct]
    return summarize(cell, run_rounds(build, cell, kinds, profile, rounds, source, folder, measure_round))


def quartiles(values: list) -> list:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def ratio(rounds: list, key: str, other: str) -> list:
    return quartiles([found["vmferry"][key] / found[other][key] for found in rounds if found[other][key] > 0])


class Summary:
    """Medians of each server, and the targets, each a ratio of ours to another with its quartiles."""

    def __init__(self, cell, rounds: list):
        self.cell, self.rounds = cell, rounds
        self.medians = {name: {key: statistics.median(found[name][key] for found in rounds) for key in rounds[0][name]}
                        for name in rounds[0]}
        self.raw = ratio(rounds, "iops", RAW)
        self.targets = []

    def add(self, title: str, against: str, values: list, limit: float, at_most: bool, passed: bool) -> None:
        self.targets.append({"name": f"{self.cell.name}: {title}", "against": against, "quartiles": values,
                             "limit": limit, "at_most": at_most, "passed": passed})

    def check(self, key: str, title: str, limit: float | None, against: str, at_most: bool, also: bool = False) -> None:
        if limit is not None:
            values = ratio(self.rounds, key, against)
            self.add(title, against, values, limit, at_most,
                     also or (values[1] <= limit if at_most else values[1] >= limit))

    def result(self) -> dict:
        return {"cell": self.cell.name, "medians": self.medians, "raw_ratio": self.raw, "targets": self.targets,
                "rounds": self.rounds}


def summarize(cell: Cell, rounds: list) -> dict:
    summary = Summary(cell, rounds)
    others = {name: found for name, found in summary.medians.items() if name not in (*OURS, RAW)}

    def best(key: str, choose) -> str:
        return choose(others, key=lambda name: others[name][key])

    summary.check("iops", "IOPS", cell.iops_min, best("iops", max), False)
    summary.check("p99_us", "p99 latency", cell.p99_max, best("p99_us", min), True)
    summary.check("cpu_s_per_gb", "processor time per GB", cell.cpu_max, best("cpu_s_per_gb", min), True)
    if cell.depth == 32 and cell.direct:
        summary.check("iops", "IOPS with tracking", TRACKING_MIN, OURS[1], False)
    return summary.result()


def text_table(cell: dict) -> str:
    lines = [f"{cell['cell']:28} {'IOPS':>9} {'MB/s':>8} {'mean us':>9} {'p99 us':>9} {'CPU s/GB':>9}"]
    for name, found in cell["medians"].items():
        cpu = f"{found['cpu_s_per_gb']:9.2f}" if "cpu_s_per_gb" in found else f"{'-':>9}"
        lines.append(f"  {name:26} {found['iops']:9,.0f} {found['mb_s']:8,.0f} {found['mean_us']:9,.0f} "
                     f"{found['p99_us']:9,.0f} {cpu}")
    for target in cell["targets"]:
        low, middle, high = target["quartiles"]
        lines.append(f"  {'PASS' if target['passed'] else 'FAIL'}  {target['name'].split(': ')[1]}: {middle:.2f} of "
                     f"{target['against']} (quartiles {low:.2f}..{high:.2f}); wanted: "
                     f"{'at most' if target['at_most'] else 'at least'} {target['limit']}")
    return "\n".join(lines)


def run(build, profile: BlockProfile, rounds: int, section: dict, save, say, run_one=run_cell) -> None:
    section["cells"] = []
    with tempfile.TemporaryDirectory(prefix="vmferry-perf-", dir="/var/tmp") as name:
        folder = Path(name)
        source = folder / "source"
        # Random, so that no server gains from zeroes, and allocated, so that none pays for growing the file.
        with open("/dev/urandom", "rb") as random, open(source, "wb") as out:
            for _ in range(profile.image_bytes >> 20):
                out.write(random.read(1 << 20))
        for cell in profile.cells:
            section["cells"].append(run_one(build, profile, rounds, cell, source, folder))
            say(text_table(section["cells"][-1]))
            save()
