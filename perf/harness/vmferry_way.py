# SPDX-License-Identifier: Apache-2.0
"""The same guest, moved by vmferry: QEMUs on unix sockets only, one daemon at each end of the emulated link."""

import os
import subprocess
import time
from pathlib import Path

from measure import DONE, GIVEN_UP, Run, WanSampler, emulator_health, observe
from profiles import Profile
from vmlib import Build, Lab

LOG_TAIL = 4000


class VmferryWay:
    def __init__(self, folder, build: Build, profile: Profile, link):
        self._folder = Path(folder)
        self._build = build
        self._profile = profile
        self._link = link

    def image(self, side: str) -> Path:
        return self._folder / f"vda-{side}.img"

    def run(self, number: int) -> Run:
        run = Run("vmferry", number, str(self._link), load_before=os.getloadavg()[0])
        lab = Lab(self._folder, self._build, rate=self._link.rate, rtt=self._link.rtt,
                  disk_size=self._profile.disk_size, fill=self._profile.fill, memory_mb=self._profile.memory_mb,
                  workload=self._profile.workload)
        with lab:
            source = lab.start_guest("a")
            time.sleep(self._profile.before_s)
            with WanSampler(lab.wan) as sampler:
                self._measure(run, lab, source, sampler)
            if run.status == DONE:
                run.verified = lab.check("b")
            else:
                run.reason += "".join(f"\n--- vmferryd {name}\n{daemon.log()[-LOG_TAIL:]}"
                                      for name, daemon in lab.daemons.items() if run.broken)
        return run

    def _measure(self, run: Run, lab: Lab, source, sampler: WanSampler) -> None:
        counters = sampler.read()
        processes = {"source vmferryd": lab.daemons["a"], "destination vmferryd": lab.daemons["b"], "source QEMU": source}
        cpu = {name: process.cpu_seconds() for name, process in processes.items()}
        began = time.monotonic()
        try:
            outcome = lab.migrate("a", "b", timeout=self._profile.give_up_s)
        except subprocess.TimeoutExpired:
            run.status, run.reason = GIVEN_UP, f"not done after {self._profile.give_up_s:.0f} s"
            outcome = None
        began = outcome.began if outcome else began
        ended = outcome.ended if outcome else time.monotonic()
        processes["destination QEMU"] = lab.guests["b"]
        run.cpu_s = {name: process.cpu_seconds() - cpu.get(name, 0.0) for name, process in processes.items()
                     if process.alive()}
        after = sampler.read()
        if outcome:
            run.told = outcome.result
            if outcome.status == 0 and outcome.result.get("result") == "done":
                run.status, run.total_s = DONE, outcome.seconds
            else:
                run.reason = f"status {outcome.status}: {outcome.result.get('error')} {outcome.stderr.strip()}"
        run.wire_bytes = after["a_to_b"]["bytes"] - counters["a_to_b"]["bytes"]
        run.wire_back_bytes = after["b_to_a"]["bytes"] - counters["b_to_a"]["bytes"]
        run.emulator = emulator_health(counters, after)
        observe(run, lab.collector, began=began, ended=ended, source_pid=source.pid, before_s=self._profile.before_s,
                sampler=sampler)
