# SPDX-License-Identifier: Apache-2.0
"""perf/run --only vhost: vhost-user-blk back-ends side by side, loaded by vmferry-vhost-bench.

Like block.py: every server has its turn in a round, ratios are within a round, raw is fio on the file with io_uring.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import block
from block_servers import QemuStorageDaemon, Vmferry, VmferryUntracked

RAW_SHARE = 0.92  # of raw io_uring: enough, whatever the other reaches
QUEUES_EVEN = (0.4, 0.6)


@dataclass(frozen=True)
class Cell:
    pattern: str
    depth: int
    queues: int = 1
    iops_min: float | None = None  # against qemu-storage-daemon
    mean_max: float | None = None
    cpu_max: float | None = None
    block: str = "4k"
    direct: bool = True

    @property
    def name(self) -> str:
        return f"vhost {self.pattern} {self.block} d{self.depth}" + (f" {self.queues} queues" if self.queues > 1 else "")


CELLS = (
    Cell("randread", 32, iops_min=1.5, cpu_max=0.7), Cell("randwrite", 32, iops_min=1.5, cpu_max=0.7),
    Cell("randread", 1, mean_max=0.9), Cell("randwrite", 1, mean_max=0.9),
    Cell("randread", 32, queues=2), Cell("read", 8, block="128k"), Cell("write", 8, block="128k"),
)
FULL = block.BlockProfile("full", 1 << 30, 2.5, 15, CELLS)
QUICK = block.BlockProfile("quick", 256 << 20, 1.0, 3, CELLS[:2] + CELLS[4:5])


class VhostUntracked(VmferryUntracked):
    def export(self) -> str:
        return f"vhost-user-blk={self.socket},queues=4"


class VhostTracked(Vmferry):
    def export(self) -> str:
        return f"vhost-user-blk={self.socket},queues=4"


class VhostStorageDaemon(QemuStorageDaemon):
    def export(self) -> list:
        return ["--export", f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={self.socket},"
                            "writable=on,num-queues=4"]


def load(build, cell: Cell, seconds: float, socket: Path, queues: int) -> dict:
    done = subprocess.run(
        [build.bin / "vmferry-vhost-bench", "--socket", socket, "--pattern", cell.pattern, "--block", cell.block.upper(),
         "--depth", str(cell.depth), "--queues", str(queues), "--seconds", str(seconds)],
        text=True, capture_output=True, check=False, timeout=seconds + 60)
    if done.returncode != 0:
        raise RuntimeError(f"vmferry-vhost-bench {socket}: {done.stderr.strip()} {done.stdout[-500:]}")
    found = json.loads(done.stdout)
    return {"iops": found["iops"], "bytes": found["mb_per_s"] * 1e6 * found["seconds"], "mb_s": found["mb_per_s"],
            "mean_us": found["latency_us"]["mean"], "p99_us": found["latency_us"]["p99"],
            "share": found["requests_of_queue"][0] / found["requests"]}


def measure(build, cell: Cell, seconds: float, server, queues: int) -> dict:
    before = server.cpu_seconds()
    found = load(build, cell, seconds, server.socket, queues)
    return {**found, "cpu_s_per_gb": (server.cpu_seconds() - before) / (found["bytes"] / 1e9)}


def measure_round(build, cell: Cell, seconds: float, order: list, folder: Path) -> dict:
    found = {server.name: measure(build, cell, seconds, server, cell.queues) for server in order}
    if cell.queues > 1:
        tracked = next(server for server in order if isinstance(server, VhostTracked))
        found["vmferry, 1 queue"] = measure(build, cell, seconds, tracked, 1)
    found[block.RAW] = block.fio(cell, seconds, ["--ioengine=io_uring", "--direct=1",
                                                 f"--filename={folder / 'vmferry.img'}"])
    return found


def run_cell(build, profile, rounds: int, cell: Cell, source: Path, folder: Path) -> dict:
    kinds = [VhostTracked, VhostUntracked, VhostStorageDaemon]
    return summarize(cell, block.run_rounds(build, cell, kinds, profile, rounds, source, folder, measure_round))


def summarize(cell: Cell, rounds: list) -> dict:
    summary = block.Summary(cell, rounds)
    other = VhostStorageDaemon.name
    summary.check("iops", f"IOPS (or {RAW_SHARE} of raw)", cell.iops_min, other, False,
                  also=summary.raw[1] >= RAW_SHARE)
    summary.check("mean_us", "mean latency", cell.mean_max, other, True)
    summary.check("cpu_s_per_gb", "processor time per GB", cell.cpu_max, other, True)
    if cell.depth == 32:
        summary.check("iops", "IOPS with tracking", block.TRACKING_MIN, block.OURS[1], False)
    if cell.queues > 1:
        summary.check("iops", "IOPS of two queues", 1.0, "vmferry, 1 queue", False)
        shares = block.quartiles([found["vmferry"]["share"] for found in rounds])
        summary.add("share of the first queue", "all", shares, QUEUES_EVEN[1], True,
                    QUEUES_EVEN[0] <= shares[1] <= QUEUES_EVEN[1])
    return summary.result()


def run(build, profile, rounds: int, section: dict, save, say) -> None:
    block.run(build, profile, rounds, section, save, say, run_cell)
