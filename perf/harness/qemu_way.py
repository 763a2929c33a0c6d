# SPDX-License-Identifier: Apache-2.0
"""QEMU's own way of moving a guest with its disk: blockdev-mirror over NBD, then precopy, joined at pre-switchover.

Both QEMUs run inside the namespaces of the emulated link, on raw files. The harness does what a management program
does, in its order: the destination exports its disk; the source mirrors onto it; when the mirror is ready, memory
follows; at pre-switchover, with the guest stopped, the mirror is ended, the export removed, and the migration
continued. It stands between both QEMUs without a round trip of its own, which a real one needs: that favours QEMU.
"""

import os
import subprocess
import time
from pathlib import Path

from measure import DONE, GIVEN_UP, Run, WanSampler, emulator_health, observe
from profiles import QEMU_VARIANTS, Profile, QemuVariant
from vmlib import Build, Collector, Guest, QmpError, RawDisk, Wan

NBD_PORT = 10809
MIGRATION_PORT = 4444
JOB = "mirror0"
# Far above every link here: QEMU's default of 128 MiB/s must not be what is measured.
BANDWIDTH_MAX = 1 << 30


class GiveUp(Exception):
    """Not converged within the limit; the text says in which step."""


class QemuWay:
    def __init__(self, folder, build: Build, profile: Profile, variant: str, link):
        self._folder = Path(folder)
        self._build = build
        self._profile = profile
        self._variant: QemuVariant = QEMU_VARIANTS[variant]
        self._name = variant
        self._link = link
        self._deadline = 0.0

    def image(self, side: str) -> Path:
        return self._folder / f"vda-{side}.img"

    def run(self, number: int) -> Run:
        run = Run(self._name, number, str(self._link), load_before=os.getloadavg()[0])
        self._build.make_disk(self.image("a"), self._profile.disk_size, self._profile.fill)
        subprocess.run(["truncate", "-s", str(self.image("a").stat().st_size), self.image("b")], check=True)
        with Wan(self._folder, self._build, rate=self._link.rate, rtt=self._link.rtt) as wan, \
                Collector(self._folder / "collector") as collector:
            source = self._guest("a", wan.a.namespace, collector, None)
            destination = self._guest("b", wan.b.namespace, collector, "defer")
            try:
                source.start().wait_started(timeout=180)
                time.sleep(self._profile.before_s)
                destination.start()
                self._prepare(source, destination, wan)
                self._measure(run, source, destination, wan, collector)
                if run.status == DONE:
                    run.verified = self._verify(destination, collector)
            finally:
                source.kill()
                destination.kill()
        return run

    def _guest(self, side: str, namespace: str, collector, incoming) -> Guest:
        return Guest(side, self._folder, self._build.qemu("10"), self._build.guest_image(), collector,
                     [RawDisk(self.image(side))], workload=self._profile.workload, memory_mb=self._profile.memory_mb,
                     incoming=incoming, namespace=namespace)

    def _prepare(self, source: Guest, destination: Guest, wan: Wan) -> None:
        """What costs an operator nothing: options of both sides, listeners of the destination."""
        capabilities = [{"capability": name, "state": True} for name in ("events", *self._variant.capabilities)]
        for guest in (source, destination):
            guest.qmp.command("migrate-set-capabilities", {"capabilities": capabilities})
            guest.qmp.command("migrate-set-parameters", {"max-bandwidth": BANDWIDTH_MAX, **dict(self._variant.parameters)})
        source.qmp.command("migrate-set-capabilities", {"capabilities": [
            {"capability": "pause-before-switchover", "state": True}]})
        destination.qmp.command("nbd-server-start", {"addr": {"type": "inet", "data": {
            "host": wan.b.address, "port": str(NBD_PORT)}}})
        destination.qmp.command("block-export-add", {"type": "nbd", "id": "export0", "node-name": "disk0", "name": "vda",
                                                     "writable": True})
        destination.qmp.command("migrate-incoming", {"uri": f"tcp:{wan.b.address}:{MIGRATION_PORT}"})

    def _measure(self, run: Run, source: Guest, destination: Guest, wan: Wan, collector: Collector) -> None:
        with WanSampler(wan) as sampler:
            counters = sampler.read()
            cpu = (source.cpu_seconds(), destination.cpu_seconds())
            began = time.monotonic()
            self._deadline = began + self._profile.give_up_s
            try:
                self._mirror(source, wan)
                run.disk_s = time.monotonic() - began
                self._memory(source, destination, wan)
                run.status = DONE
            except GiveUp as error:
                run.status, run.reason = GIVEN_UP, f"{error} after {self._profile.give_up_s:.0f} s"
            ended = time.monotonic()
            run.cpu_s = {"source QEMU": source.cpu_seconds() - cpu[0], "destination QEMU": destination.cpu_seconds() - cpu[1]}
            if run.status == DONE:
                run.total_s = ended - began
                run.told = {"downtime_ms": source.qmp.command("query-migrate").get("downtime")}
            time.sleep(0.3)  # the beats of the resumed guest
            after = sampler.read()
        run.wire_bytes = after["a_to_b"]["bytes"] - counters["a_to_b"]["bytes"]
        run.wire_back_bytes = after["b_to_a"]["bytes"] - counters["b_to_a"]["bytes"]
        run.emulator = emulator_health(counters, after)
        observe(run, collector, began=began, ended=ended, source_pid=source.pid, before_s=self._profile.before_s,
                sampler=sampler)

    def _mirror(self, source: Guest, wan: Wan) -> None:
        source.qmp.command("blockdev-add", {"driver": "nbd", "node-name": "target0", "export": "vda", "server": {
            "type": "inet", "host": wan.b.address, "port": str(NBD_PORT)}})
        source.qmp.command("blockdev-mirror", {"job-id": JOB, "device": "disk0", "target": "target0", "sync": "full",
                                               "copy-mode": self._variant.copy_mode, "auto-dismiss": True})
        self._wait(source, {"BLOCK_JOB_READY": JOB}, "the mirror was not ready", stop=("BLOCK_JOB_COMPLETED",
                                                                                      "BLOCK_JOB_ERROR"))

    def _memory(self, source: Guest, destination: Guest, wan: Wan) -> None:
        source.qmp.command("migrate", {"uri": f"tcp:{wan.b.address}:{MIGRATION_PORT}"})
        self._wait(source, {"MIGRATION": "pre-switchover"}, "memory had not converged", stop=("BLOCK_JOB_ERROR",))
        source.qmp.command("block-job-cancel", {"device": JOB})  # of a ready mirror: end it with both sides equal
        self._wait(source, {"BLOCK_JOB_COMPLETED": JOB, "BLOCK_JOB_CANCELLED": JOB}, "the mirror had not ended",
                   stop=("BLOCK_JOB_ERROR",))
        destination.qmp.command("block-export-del", {"id": "export0", "mode": "hard"})
        source.qmp.command("migrate-continue", {"state": "pre-switchover"})
        self._wait(destination, {"RESUME": None}, "the guest did not run at the destination")
        self._wait(source, {"MIGRATION": "completed"}, "the source did not end")

    def _wait(self, guest: Guest, wanted: dict, what: str, stop=()) -> None:
        """First of the wanted events; QmpError at one that says that it will not come."""
        def key(event):
            return event.data.get("device") if event.name.startswith("BLOCK_JOB") else event.data.get("status")
        while True:
            try:
                event = guest.qmp.next_event(timeout=self._deadline - time.monotonic())
            except TimeoutError as error:
                raise GiveUp(what) from error
            if event.name in wanted and wanted[event.name] in (None, key(event)):
                if event.data.get("error"):
                    raise QmpError(f"{event.name}: {event.data['error']}")
                return
            if event.name in stop or (event.name == "MIGRATION" and key(event) in ("failed", "cancelled")):
                raise QmpError(f"{event.name} {event.data}: {guest.output()[-300:]}")

    def _verify(self, destination: Guest, collector: Collector) -> dict:
        pages, bad = destination.verify_memory()
        destination.stop_load()
        destination.quit()
        found = self._build.verify(self.image("b"), collector.log_path)
        found.update(memory_pages=pages, memory_bad=bad, guest_errors=collector.errors(), ran_twice=collector.ran_twice())
        found["ok"] = found["ok"] and bad == 0 and not found["guest_errors"] and found["ran_twice"] == 0
        return found
