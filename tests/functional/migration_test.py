# SPDX-License-Identifier: Apache-2.0
"""A running guest moves between two daemons over an emulated link: there and back, and not at all where it cannot.

VMFERRY_MIGRATIONS: how many in a row (default 2, the long campaign 10). Refusals: migration_refusal_test.py. Faults on
the way: faults_test.py.
"""

import filecmp
import json
import os
import re
import subprocess
import time
import unittest
from pathlib import Path

from migration_support import Lab, MigrationCase, VmferryError, Workload, wait_until


class ThereAndBackTest(MigrationCase):
    def test_migrations_in_a_row_lose_nothing_and_leak_nothing(self):
        # State of one migration that is left over breaks the next one, or the host after the hundredth.
        count = int(os.environ.get("VMFERRY_MIGRATIONS", "2"))
        with self.lab() as lab:
            lab.start_guest("a")
            here, there = "a", "b"
            figures = []
            for number in range(count):
                time.sleep(1)
                outcome = lab.migrate(here, there, "--quit-source", "--timeout", "2m")
                self.assertEqual(outcome.status, 0, (number, outcome.result, outcome.stderr))
                self.assertEqual((outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                                 ("done", "peer", "running-peer"))
                self.assertLess(outcome.gap_ms, 2000, outcome)
                self.assert_figures(outcome)
                wait_until(lambda: not lab.guests[here].alive(), 20, "the source QEMU ended")
                self.assert_follows(lab, leader=there, follower=here)
                # Both sides have been source and destination from the second migration on.
                if number % 2 == 1:
                    figures.append({side: (d.descriptor_count(), d.memory_kib()) for side, d in lab.daemons.items()})
                print(f"migration {number + 1}: {outcome.seconds:.1f} s, gap {outcome.gap_ms:.0f} ms, "
                      f"descriptors and memory {figures[-1] if figures else ''}", flush=True)
                here, there = there, here
            for side in ("a", "b"):
                descriptors = [figure[side][0] for figure in figures]
                memory = [figure[side][1] for figure in figures]
                self.assertLessEqual(max(descriptors), descriptors[0] + 2, descriptors)
                # Indexes and buffers fill up to their limits in the first round trips; after that nothing may be added.
                self.assertLess(max(memory), 192 * 1024, memory)
                if len(memory) >= 5:
                    self.assertLessEqual(memory[-1], max(memory[-3:-1]) + 12 * 1024, memory)
                self.assertEqual(self.children(lab.daemons[side].pid), [], "a daemon starts no process")
            self.assert_nothing_lost(lab, here)
            self.assert_copy_is_equal(lab)

    def assert_figures(self, outcome) -> None:
        """Each of them is there and is true, as far as it can be seen from outside."""
        result = outcome.result
        self.assert_whole_result(result)
        self.assertIsNone(result["error"])
        for name in ("total_s", "downtime_ms", "rounds"):
            self.assertGreater(result[name], 0, result)
        for place in ("disk", "memory"):
            self.assertGreater(result["wire_bytes"][place], 0, result)
            self.assertGreater(result["raw_bytes"][place], 0, result)
        self.assertLess(abs(result["downtime_ms"] - outcome.gap_ms), 150, outcome)
        self.assertLess(abs(result["total_s"] - outcome.seconds), 2, outcome)

    def test_a_cap_is_obeyed_and_an_explicit_qmp_socket_is_used(self):
        # Who shares the link with others gives the cap for their sake; and a guest whose socket is not in the daemon's
        # configuration can be moved all the same.
        with self.lab() as lab:
            named = self.folder / "named.qmp"
            lab.start_guest("a", extra_args=("-qmp", f"unix:{named},server=on,wait=off"))
            lab.guests["a"].qmp_path("daemon").unlink()  # what the configuration names leads nowhere
            seen = []

            def sample(process):
                while process.poll() is None:
                    seen.append((time.monotonic(), lab.wan.counters()["a_to_b"]["bytes"]))
                    time.sleep(0.2)

            outcome = lab.migrate("a", "b", "--qmp", str(named), "--bandwidth", "80Mbit", "--quit-source", during=sample)
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            # Over any two seconds: the bucket that evens bursts out is smaller than a tenth of that.
            rates = [(later[1] - earlier[1]) / (later[0] - earlier[0]) for index, earlier in enumerate(seen)
                     for later in seen[index + 1:] if 2 <= later[0] - earlier[0] < 2.5]
            print(f"80Mbit: at most {max(rates) * 8 / 1e6:.1f} Mbit/s over two seconds, of {len(rates)}", flush=True)
            self.assertLess(max(rates), 1.05 * 10e6)
            self.assertGreater(max(rates), 0.7 * 10e6, "the cap was never reached, so nothing was shown")
            self.assert_nothing_lost(lab, "b")

    def test_the_source_qemu_that_is_kept_waits_with_its_own_settings(self):
        # What is left of a migration in either QEMU breaks the next one that its operator starts by hand.
        with self.lab(disk_size="64M", fill=None, workload=Workload(mode="none", mem="0")) as lab:
            lab.start_guest("a")
            before = self.capabilities(lab, "a")
            lab.guests["a"].qmp.command("stop")  # the harder case: at b nobody says `cont`
            outcome = lab.migrate("a", "b", "--timeout", "1m")
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"]), (0, "done", "peer"), outcome)
            self.assertEqual(lab.guests["a"].qmp.status(), "postmigrate")
            self.assertEqual(lab.guests["b"].qmp.status(), "paused")
            for side in ("a", "b"):
                wait_until(lambda side=side: self.capabilities(lab, side) == before, 10, f"the capabilities at {side}")
            lab.guests["b"].qmp.command("cont")
            lab.collector.wait_heartbeat(lab.guests["b"].pid, timeout=20)

    def assert_follows(self, lab: Lab, leader: str, follower: str) -> None:
        status = lab.daemons[leader].volume_status("vda")
        self.assertEqual((status["role"], status["may_run"]), ("primary", True), status)
        status = wait_until(lambda: (s := lab.daemons[follower].volume_status("vda"))["role"] == "secondary" and s, 20,
                            "the source follows")
        self.assertFalse(status["may_run"], status)
        waited = lab.daemons[leader].vmferry("replicate", "wait", "vda", "--timeout", "30s")
        self.assertEqual(waited["volumes"][0]["direction"], "sending", waited)

    def assert_copy_is_equal(self, lab: Lab) -> None:
        # assert_nothing_lost has stopped the daemon of the leader, and a clean stop does not wait for the peer.
        for side in ("a", "b"):
            for guest in (lab.guests.get(side),):
                if guest is not None:
                    guest.quit()
        leader = lab.daemons["a"] if not lab.daemons["a"].alive() else lab.daemons["b"]
        leader.start()
        leader.vmferry("replicate", "wait", "vda", "--timeout", "30s")
        self.assertEqual(leader.vmferry("replicate", "verify", "vda")["differences"], [])
        for side in ("a", "b"):
            lab.daemons[side].stop()
        self.assertTrue(filecmp.cmp(lab.image("a"), lab.image("b"), shallow=False), "the copy differs from the original")

    def children(self, pid: int) -> list:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def test_two_volumes_move_as_one(self):
        # A guest whose second disk is of another moment than its first has lost its order of writes.
        with self.lab(volumes=2, metrics=True) as lab:
            lab.start_guest("a")
            seen = {"status of a": set(), "status of b": set(), "metrics": set()}

            def watch(process):
                while process.poll() is None:
                    for side in ("a", "b"):
                        phases = {v["phase"] for v in lab.daemons[side].vmferry("status")["volumes"]}
                        seen[f"status of {side}"] |= phases
                    seen["metrics"] |= self.phases_in_metrics(lab)

            outcome = lab.migrate("a", "b", "--quit-source", during=watch)
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            # Short ones may fall between two looks; the events have them all.
            for place, phases in seen.items():
                self.assertLessEqual({"precopy"} if place == "status of b" else {"bulk", "precopy"}, phases, (place, seen))
            self.assertEqual({v["phase"] for v in lab.daemons["a"].vmferry("status")["volumes"]}, {"done"})
            self.assertEqual(self.phases_in_metrics(lab), {"done"})
            self.assertEqual(self.phases_in_events(lab), ["preflight", "bulk", "converge", "precopy", "switchover",
                                                          "handover", "running", "done"])
            self.assertEqual({v["role"] for v in lab.daemons["b"].vmferry("status")["volumes"]}, {"primary"})
            self.assert_nothing_lost(lab, "b")

    def phases_in_metrics(self, lab: Lab) -> set:
        # Those that are being formed into one group have no phase for a moment.
        found = re.findall(r'vmferry_migration_phase\{volume="vd[ab]",phase="([a-z-]+)"\} 1\n', lab.scrape("a"))
        self.assertIn(len(found), (0, 1, 2))
        return set(found)

    def phases_in_events(self, lab: Lab) -> list:
        done = subprocess.run(lab.daemons["a"].vmferry_command("events"), text=True, capture_output=True, check=True)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        return [event["phase"] for event in events if event["event"] == "migration_phase"]

    def test_background_returns_at_once_and_detach_leaves_nothing_behind(self):
        # A script that starts a migration and goes on must be able to follow and find its end; and a host that is to be
        # switched off must not be needed any more.
        with self.lab() as lab:
            lab.start_guest("a")
            lab.start_guest("b", incoming=True)
            started = lab.daemons["a"].vmferry("migrate", "vda", "--peer", "b", "--background", "--detach", "--quit-source")
            self.assertEqual(started["result"], "started")
            self.assertNotEqual(self.phase(lab), "", "it returned while the migration was under way")
            # Whoever watches meanwhile, also in the moment in which the group is formed, disturbs nothing (I12).
            for number in range(60):
                daemon = lab.daemons["ab"[number % 2]]
                daemon.volume_status("vda")
                daemon.vmferry("replicate", "status")
                daemon.vmferry("migrate", "status")
            result = lab.daemons["a"].vmferry("migrate", "watch")
            self.assertEqual(result["result"], "done", result)
            wait_until(lambda: lab.daemons["a"].volume_status("vda")["role"] == "secondary", 20, "secondary")
            time.sleep(2)
            for side in ("a", "b"):
                self.assertEqual(lab.daemons[side].vmferry("replicate", "status")["volumes"], [], side)
            # A way back stays open, and needs no second full copy.
            lab.daemons["b"].vmferry("replicate", "start", "vda", "--peer", "a")
            lab.daemons["b"].vmferry("replicate", "wait", "vda", "--timeout", "30s")
            status = lab.daemons["b"].replication("vda")
            self.assertLess(status["raw_bytes"], 64 << 20, status)
            self.assertEqual(lab.daemons["a"].replication("vda")["direction"], "receiving")
            self.assert_nothing_lost(lab, "b")


class OldQemuTest(MigrationCase):
    def test_control_flow_with_the_qemu_of_debian_12(self):
        # QEMU before 8.1 names capabilities differently and exits when a stream does not load; the guest is idle, because
        # this version loses pages of a busy one without KVM.
        with self.lab(qemu="system", disk_size="64M", fill=None, memory_mb=128, workload=Workload(mode="none", mem="0")) as lab:
            lab.start_guest("a")
            lab.guests["a"].qmp.command("stop")
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", "2m")
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"]), (0, "done", "peer"),
                             (outcome.result, outcome.stderr))
            self.assertEqual(lab.guests["b"].qmp.status(), "paused")
            lab.guests["b"].qmp.command("cont")
            wait_until(lambda: not lab.guests["a"].alive(), 20, "the source QEMU ended")
            lab.collector.wait_heartbeat(lab.guests["b"].pid, timeout=20)
            self.assertEqual(lab.daemons["b"].volume_status("vda")["handover_state"], "running")

    def test_a_stream_that_does_not_load_ends_this_qemu_and_the_guest_goes_on(self):
        # Before 9.1 the destination exits on it, so its daemon learns of the failure from a dead process.
        with self.lab(qemu="system", disk_size="64M", fill=None, memory_mb=128, workload=Workload(mode="none", mem="0")) as lab:
            lab.start_guest("a", extra_args=("-device", "virtio-balloon-pci"))
            outcome = lab.migrate("a", "b", "--timeout", "1m")
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["guest"]),
                             (1, "rolled-back", "running-source"), outcome)
            wait_until(lambda: lab.daemons["a"].volume_status("vda")["handover_state"] == "own", 20, "own again")
            wait_until(lambda: lab.guests["a"].qmp.status() == "running", 20, "the guest goes on")
            self.assertFalse(lab.guests["b"].alive())


class LostPeerTest(MigrationCase):
    def test_the_operator_takes_the_guest_back_when_the_peer_never_answers(self):
        # After GO only the peer knows whether the guest runs there; with the peer gone for good, the operator decides,
        # and a peer that comes back after all must give way.
        with self.lab(rtt="200ms") as lab:
            lab.start_guest("a")
            a, b = lab.daemons["a"], lab.daemons["b"]

            def lose_peer(process):
                self.assertTrue(a.wait_phase("handover"))
                b.kill()  # 100 ms before GO arrives
                lab.guests["b"].kill()
                process.kill()

            lab.migrate("a", "b", "--downtime-limit", "2s", during=lose_peer)
            status = a.volume_status("vda")
            self.assertEqual((status["handover_state"], status["owner"], status["may_run"]), ("go-sent", "unknown", False))
            self.assertIn("resolve VOLUME --run-here --force", status["reason"])
            self.assertNotEqual(lab.guests["a"].qmp.status(), "running")
            with self.assertRaises(VmferryError) as unforced:
                a.vmferry("resolve", "vda", "--run-here")
            self.assertIn("--force", unforced.exception.stderr)
            a.vmferry("resolve", "vda", "--run-here", "--force")
            wait_until(lambda: lab.guests["a"].qmp.status() == "running", 30, "the guest goes on at a")
            b.start()
            wait_until(lambda: b.volume_status("vda")["connected"], 30, "b is back")
            wait_until(lambda: not b.volume_status("vda")["may_run"], 30, "b gives way")
            if b.volume_status("vda")["handover_state"] == "superseded":
                b.vmferry("resolve", "vda", "--discard-local")
            wait_until(lambda: b.volume_status("vda")["handover_state"] == "secondary", 30, "b follows again")
            a.vmferry("replicate", "wait", "vda", "--timeout", "60s")
            outcome = lab.migrate("a", "b", "--quit-source", "--downtime-limit", "2s")
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            self.assert_nothing_lost(lab, "b")


    def test_the_operator_leaves_the_guest_at_the_peer_where_it_runs(self):
        # The peer runs the guest and cannot say so; the operator has seen it, and wants the source to follow it later.
        with self.lab(rtt="400ms", disk_size="64M", fill=None, workload=Workload(mode="none", mem="0")) as lab:
            lab.start_guest("a")
            a, b = lab.daemons["a"], lab.daemons["b"]

            def cut(_process):
                self.assertTrue(a.wait_phase("handover"))
                wait_until(lambda: lab.guests["b"].qmp.status() == "running", 20, "the guest runs at b", interval=0.002)
                lab.wan.cut(60)  # its word needs 200 ms
                status = a.volume_status("vda")
                self.assertEqual((status["handover_state"], status["owner"], status["may_run"]), ("go-sent", "unknown", False))
                self.assertIn("--run-at-peer", status["reason"])
                a.vmferry("resolve", "vda", "--run-at-peer")
                status = a.volume_status("vda")
                self.assertEqual((status["role"], status["owner"], status["may_run"]), ("secondary", "peer", False))
                lab.wan.cut(0)

            outcome = lab.migrate("a", "b", "--downtime-limit", "3s", during=cut)
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"]), (0, "done", "peer"), outcome)
            self.assertEqual(lab.guests["a"].qmp.status(), "postmigrate")
            wait_until(lambda: a.volume_status("vda")["connected"], 60, "the link heals")
            b.vmferry("replicate", "wait", "vda", "--timeout", "60s")
            self.assertEqual(a.replication("vda")["direction"], "receiving")
            self.assertEqual((a.volume_status("vda")["handover_state"], b.volume_status("vda")["handover_state"]),
                             ("secondary", "running"))
            self.assertEqual(lab.guests["b"].qmp.status(), "running")
            self.assertEqual(b.vmferry("replicate", "verify", "vda")["differences"], [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
