# SPDX-License-Identifier: Apache-2.0
"""Migrations of a running guest in which the link is cut or a process is killed: exactly one side may run the guest
afterwards and does, or `status` says which one may and `resolve` finishes it; no acknowledged record is lost.

usage: faults_test.py [SEED..SEED] [--campaign PART]

A seed decides phase, fault and delay; of 30 in a row 8 strike in bulk or converge, 8 in precopy and 14 between
pre-switchover and running. --campaign PART (0, 1, 2): those seeds of $VMFERRY_SEEDS (default 0..29) whose tens leave
the remainder PART, so that three ctest entries share one range.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmlib import Build, Lab, QmpError, VmferryError, Workload, wait_until

LOAD = Workload(mode="file", area="32M", hot="4M", mem="64M")
FAULTS = ("cut", "source-daemon", "destination-daemon", "destination-qemu")
PHASES = 8 * (("bulk", "converge"),) + 8 * (("precopy",),) + 7 * (("switchover",), ("handover",))
SETTLE_SECONDS = 90
CUT_SECONDS = (3, 12, 35)  # TCP alone; a new connection; longer than the limits of the handover
DOWN_SECONDS = 1
STATE = re.compile(r"group=\S+ state=(\S+)")


class Fault:
    """One migration with one fault. run() returns a line about it; an AssertionError says what went wrong."""

    def __init__(self, seed: int, folder: Path, build: Build):
        chance = random.Random(seed)
        self.seed = seed
        self.fault = chance.choice(FAULTS)
        self.phases = PHASES[seed % len(PHASES)]
        self.phase = chance.choice(self.phases)
        self.delay = chance.random() * 0.3
        self.cut_seconds = chance.choice(CUT_SECONDS)
        self.struck = False
        self.states = {}
        self.lab = Lab(folder, build, disk_size="256M", fill="100M", memory_mb=256, workload=LOAD, rate="1Gbit",
                       rtt="20ms")

    def __str__(self) -> str:
        states = ", ".join(f"{side}: {state}" for side, state in self.states.items())
        fault = f"cut({self.cut_seconds}s)" if self.fault == "cut" else self.fault
        return f"seed={self.seed} fault={fault} phase={self.phase} delay={self.delay * 1000:.0f}ms ({states})"

    def expect(self, condition: bool, what: str, *details) -> None:
        if not condition:
            raise AssertionError(f"{self}: {what} {details or ''}")

    def run(self) -> str:
        with self.lab as lab:
            lab.start_guest("a")
            outcome = lab.migrate("a", "b", "--timeout", "2m", during=self.strike)
            self.expect(self.struck, "the phase was never reached", outcome.result, outcome.stderr)
            end = self.settle()
            return f"{self}: {outcome.result.get('result')}; {end}"

    def strike(self, process) -> None:
        """Waits for the phase on the source's events, then a moment, then does it."""
        lab = self.lab
        if not lab.daemons["a"].wait_phase(self.phase):
            return
        time.sleep(self.delay)
        self.struck = True
        if self.fault == "cut":
            lab.wan.cut(self.cut_seconds)
        elif self.fault == "destination-qemu":
            lab.guests["b"].kill()
        else:
            lab.daemons["a" if self.fault == "source-daemon" else "b"].kill()
        for side, daemon in lab.daemons.items():
            self.states[side] = (STATE.findall(daemon.log()) or ["?"])[-1]
        # Not when the command has ended: it waits for the answer of a peer that is to come back.
        time.sleep(DOWN_SECONDS)
        for daemon in lab.daemons.values():
            if not daemon.alive():
                daemon.start()

    def status(self) -> dict:
        return {side: daemon.volume_status("vda") for side, daemon in self.lab.daemons.items()}

    def runs(self, side: str) -> bool:
        guest = self.lab.guests.get(side)
        try:
            return guest is not None and guest.alive() and guest.qmp.status() == "running"
        except (QmpError, OSError):
            return False  # it ended while it was asked

    def settle(self) -> str:
        """Waits until one side runs the guest; where its QEMU died after the handover, does what `status` proposes."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            running = [side for side in ("a", "b") if self.runs(side)]
            self.expect(len(running) <= 1, "two guests run", self.status())
            state = self.status()
            may = [side for side in state if state[side]["may_run"]]
            self.expect(len(may) <= 1, "two sides may run", state)
            settled = {"own", "running", "secondary", "aborted"} >= {s["handover_state"] for s in state.values()}
            if settled and may and may == running:
                return self.check_running(may[0])
            dead = "b" in may and not self.lab.guests["b"].alive()
            if dead and state["b"]["handover_state"] in ("started", "running"):
                return self.boot_from_disks(state)
            self.expect(time.monotonic() < deadline, f"not settled within {SETTLE_SECONDS} s", running, state)
            time.sleep(0.1)

    def check_running(self, side: str) -> str:
        # The other guest must not come to life later either.
        time.sleep(1)
        other = "b" if side == "a" else "a"
        self.expect(self.runs(side) and not self.runs(other), "the guest did not stay where it was", self.status())
        found = self.lab.check(side)
        self.expect(found["ok"], "what was acknowledged", found)
        return f"guest runs at {side}, {found['acknowledged']} records acknowledged, 0 lost"

    def boot_from_disks(self, state: dict) -> str:
        """The guest was started at b and its QEMU is dead: b has the newest disks, and says so."""
        lab = self.lab
        self.expect("boot it here from its disks" in state["b"]["reason"] or state["b"]["handover_state"] == "running",
                    "status does not say what to do", state)
        self.expect(not state["a"]["may_run"] and not self.runs("a"), "a runs what belongs to b", state)
        lab.daemons["b"].vmferry("resolve", "vda", "--run-here")
        wait_until(lambda: self.status()["a"]["handover_state"] == "secondary", 30, f"{self}: a follows b")
        self.expect(lab.collector.ran_twice() == 0, "the guest ran at both places")
        found = lab.verify_disks("b")
        self.expect(found["ok"], "what was acknowledged", found)
        lab.start_guest("b")
        return f"its QEMU was dead after the handover: booted at b, {found['acknowledged']} records acknowledged, 0 lost"


def seeds_of(arguments) -> list:
    text = arguments.seeds or os.environ.get("VMFERRY_SEEDS", "0..29")
    first, last = (int(number) for number in text.split(".."))
    return [seed for seed in range(first, last + 1)
            if arguments.campaign is None or seed // 10 % 3 == arguments.campaign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="?", help="A..B (default: $VMFERRY_SEEDS, or 0..29)")
    parser.add_argument("--campaign", type=int, choices=(0, 1, 2), help="this third of the range")
    parser.add_argument("--keep", action="store_true", help="keep the folders of seeds that failed")
    arguments = parser.parse_args()
    build, failures = Build(), []
    seeds = seeds_of(arguments)
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix=f"vmferry-fault-{seed}-"))
        began = time.monotonic()
        fault = Fault(seed, folder, build)
        try:
            print(f"ok   {fault.run()} [{time.monotonic() - began:.0f} s]", flush=True)
        except (AssertionError, RuntimeError, TimeoutError, VmferryError, subprocess.SubprocessError) as error:
            failures.append(seed)
            print(f"FAIL {fault}\n     {type(error).__name__}: {error} [{time.monotonic() - began:.0f} s]", flush=True)
            if arguments.keep:
                print(f"     kept: {folder}", flush=True)
                continue
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(seeds)} faults, {len(failures)} failed {failures or ''}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
