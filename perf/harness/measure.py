# SPDX-License-Identifier: Apache-2.0
"""What one run gives, medians over rounds, and the targets.

Flow: qemu_way.py and vmferry_way.py fill a Run each; main.py collects them; report.py draws them.
Bytes are IP bytes on the wire of the emulated link (docs/wan-emulator.md), times are the host's monotonic clock.
"""

import json
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field

DONE, GIVEN_UP, FAILED = "done", "given up", "failed"


@dataclass
class Run:
    """One migration. Times in seconds unless the name says otherwise; rates in bytes per second."""

    variant: str
    round: int
    link: str
    status: str = FAILED
    reason: str = ""
    total_s: float | None = None  # start of the command to its exit
    disk_s: float | None = None  # until the disk was in step (QEMU's own way: BLOCK_JOB_READY)
    downtime_ms: float | None = None  # largest hole in the heartbeat
    wire_bytes: int | None = None  # source to destination
    wire_back_bytes: int | None = None
    rate_before: float | None = None
    rate_during: float | None = None  # from the start to the stop of the guest
    wait_p99_ms: float | None = None  # of a batch of 64 records and its fsync, from the start to the stop
    cpu_s: dict = field(default_factory=dict)  # by process
    verified: dict = field(default_factory=dict)  # what guest-verify found
    told: dict = field(default_factory=dict)  # what the migration reported about itself
    emulator: dict = field(default_factory=dict)
    load_before: float | None = None  # of the host, one minute
    timeline: dict = field(default_factory=dict)  # lists of [second, bytes per second]

    @property
    def rate_share(self) -> float | None:
        return self.rate_during / self.rate_before if self.rate_before else None

    @property
    def disturbed(self) -> bool:
        """The host did not keep the emulator's promise: the link was not what it claims to be."""
        return self.emulator.get("overruns", 0) > 0

    @property
    def broken(self) -> bool:
        return self.status == FAILED or (self.status == DONE and not self.verified.get("ok"))

    def to_json(self) -> dict:
        return {**asdict(self), "rate_share": self.rate_share, "disturbed": self.disturbed, "broken": self.broken}


class WanSampler:
    """Reads the emulator's counters four times a second, in a thread, for the timeline."""

    INTERVAL_S = 0.25

    def __init__(self, wan):
        self._path = str(wan.control)
        self._stop = threading.Event()
        self._samples = []  # (time, bytes a to b)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def read(self) -> dict:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(5)
            control.connect(self._path)
            control.sendall(b"counters\n")
            answer = b""
            while not answer.endswith(b"\n"):
                chunk = control.recv(65536)
                if not chunk:
                    raise OSError("the emulator closed its control socket")
                answer += chunk
        return json.loads(answer)

    def _work(self) -> None:
        while not self._stop.wait(self.INTERVAL_S):
            try:
                self._samples.append((time.monotonic(), self.read()["a_to_b"]["bytes"]))
            except OSError:
                return  # the link is gone: the run is over or broken, which others report

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exc):
        self._stop.set()
        self._thread.join()

    def rates(self, began: float) -> list:
        """[second since `began`, bytes per second] between samples."""
        return [[round(t1 - began, 2), round((b1 - b0) / (t1 - t0))]
                for (t0, b0), (t1, b1) in zip(self._samples, self._samples[1:]) if t1 > t0]


def emulator_health(before: dict, after: dict) -> dict:
    """Of both directions together, between two readings of the counters."""
    def grown(name):
        return sum(after[way][name] - before[way][name] for way in ("a_to_b", "b_to_a"))
    packets = grown("delivered_packets")
    return {"late_share": grown("late_packets") / packets if packets else 0.0, "overruns": grown("overruns"),
            "lateness_us_max": max(after[way]["lateness_us_max"] for way in ("a_to_b", "b_to_a")),
            "dropped_queue": grown("dropped_queue")}


def write_timeline(collector, began: float, until: float, lead: float = 10.0, bin_s: float = 1.0) -> list:
    """[second since `began`, bytes per second acknowledged to the guest's writers], from `lead` before."""
    bins = {}
    for line in collector.lines("AW", since=began - lead):
        if line.time < until:
            index = int((line.time - began + lead) // bin_s)
            bins[index] = bins.get(index, 0) + line.numbers()[2] * 4096
    count = int((until - began + lead) // bin_s)
    return [[round(index * bin_s - lead, 2), round(bins.get(index, 0) / bin_s)] for index in range(count)]


def observe(run: Run, collector, *, began: float, ended: float, source_pid: int, before_s: float, sampler) -> None:
    """Everything that is seen from outside of a migration between two times. The guest's stop is its last heartbeat
    through the source, so that the same rule serves every variant."""
    gap = collector.largest_gap(since=began, until=ended + 0.3)
    beats = [beat[0] for beat in collector.heartbeats() if beat[1] == source_pid and beat[0] < ended + 0.3]
    stopped = max(beats) if beats else ended
    run.downtime_ms = round(gap.seconds * 1000, 1) if gap else None
    run.rate_before = collector.write_rate(began - before_s, began)
    run.rate_during = collector.write_rate(began, stopped)
    waits = collector.write_waits_ms(began, stopped)
    run.wait_p99_ms = waits[min(len(waits) - 1, int(len(waits) * 0.99))] if waits else None
    run.timeline = {"write": write_timeline(collector, began, ended), "wire": sampler.rates(began)}


def medians(runs: list) -> dict:
    """{variant: summary} of runs of one link. A run on a disturbed link counts only when there is no other."""
    summary = {}
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == variant]
        done = [run for run in own if run.status == DONE]
        clean = [run for run in done if not run.disturbed] or done
        entry = {"runs": len(own), "completed": len(done), "disturbed": sum(run.disturbed for run in done),
                 "status": own[-1].status if not done else DONE, "reason": own[-1].reason if not done else ""}
        for name in ("total_s", "disk_s", "downtime_ms", "wire_bytes", "wire_back_bytes", "rate_before", "rate_during",
                     "rate_share", "wait_p99_ms"):
            values = [getattr(run, name) for run in clean if getattr(run, name) is not None]
            entry[name] = statistics.median(values) if values else None
        entry["cpu_s"] = {name: statistics.median(run.cpu_s[name] for run in clean if name in run.cpu_s)
                          for name in dict.fromkeys(name for run in clean for name in run.cpu_s)}
        entry["records"] = {name: sum(run.verified.get(name, 0) for run in done)
                            for name in ("acknowledged", "found", "lost", "corrupt", "memory_bad", "files", "files_wrong")}
        summary[variant] = entry
    return summary


def targets(summary: dict) -> list:
    """Ours against the best completed variant of each measure. `passed` is None when there is nothing to compare."""
    ours = summary.get("vmferry")
    if ours is None:
        return []
    others = {name: entry for name, entry in summary.items() if name != "vmferry" and entry["completed"]}

    def best(measure):
        known = [(entry[measure], name) for name, entry in others.items() if entry[measure] is not None]
        return min(known) if known else (None, None)

    found = []
    for measure, title, limit in (("wire_bytes", "bytes on the wire", 0.45), ("total_s", "total time", 0.50)):
        value, name = best(measure)
        ratio = ours[measure] / value if value and ours[measure] is not None else None
        found.append({"name": title, "measure": measure, "value": ours[measure], "against": name, "best": value,
                      "ratio": ratio, "limit": f"at most {limit:.0%} of the best of the others",
                      "passed": None if value is None else ratio is not None and ratio <= limit})
    for measure, title, limit, good in (
            ("downtime_ms", "downtime", "at most 800 ms", lambda value: value <= 800),
            ("rate_share", "the guest's write rate", "at least 80 % of the time before", lambda value: value >= 0.8)):
        value, name = best(measure) if measure == "downtime_ms" else (None, None)
        found.append({"name": title, "measure": measure, "value": ours[measure], "against": name, "best": value,
                      "ratio": None, "limit": limit, "passed": ours[measure] is not None and good(ours[measure])})
    return found
