# SPDX-License-Identifier: Apache-2.0
"""Migrations that are refused, given up or cancelled: the guest stays where it is, and the result says where that is."""

import filecmp
import os
import subprocess
import unittest

from migration_support import Lab, MigrationCase, VmferryError, Workload, wait_until

IDLE = Workload(mode="none", mem="0")


class RefusalTest(MigrationCase):
    def assert_runs_at_source(self, lab: Lab) -> None:
        self.assertEqual(lab.daemons["a"].volume_status("vda")["handover_state"], "own")
        self.assertFalse(lab.daemons["b"].volume_status("vda")["may_run"])
        self.assertEqual(lab.guests["a"].qmp.status(), "running")

    def refused(self, lab: Lab, *options, **guest_options) -> str:
        """The error of a migration that must fail before anything was changed."""
        outcome = lab.migrate("a", "b", *options, guest_options=guest_options)
        self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                         (1, "failed", "source", "running-source"), outcome)
        self.assert_runs_at_source(lab)
        return outcome.result["error"]

    def test_what_cannot_work_is_refused_before_it_begins(self):
        # A migration that fails half-way for a reason known beforehand costs the operator an hour of link.
        with self.lab() as lab:
            lab.start_guest("a")
            a = lab.daemons["a"]
            with self.assertRaises(VmferryError) as nobody:
                a.vmferry("migrate", "vda", "--peer", "nobody")
            self.assertEqual(nobody.exception.status, 1)
            self.assertIn("nobody", nobody.exception.output["error"])
            with self.assertRaises(VmferryError) as no_destination:
                a.vmferry("migrate", "vda", "--peer", "b")
            self.assertEqual(no_destination.exception.output["result"], "failed")
            self.assertEqual(no_destination.exception.output["guest"], "running-source")
            self.assertIn("machine type", self.refused(lab, machine="pc"))
            self.assertIn("CPU model", self.refused(lab, cpu="max"))
            self.assertIn("memory is", self.refused(lab, memory_mb=128))
            spare = self.folder / "spare.img"
            spare.write_bytes(bytes(1 << 20))
            self.assertIn("exists only in the QEMU at peer", self.refused(lab, extra_args=(
                "-drive", f"if=none,id=spare,file={spare},format=raw", "-device", "virtio-blk-pci,drive=spare")))
            self.assertRegex(self.refused(lab, "--downtime-limit", "1ms"), "pause cannot be shorter than [0-9]+ ms.*--downtime-limit [0-9]+00ms")
            lab.start_guest("b", incoming=True)
            dry = a.vmferry("migrate", "vda", "--peer", "b", "--dry-run")
            self.assertGreater(dry["pause_ms_min"], 10)
            self.assert_runs_at_source(lab)

    def refusal(self, lab: Lab, side: str) -> dict:
        """What a migration from this side, which must be refused, says at its end."""
        with self.assertRaises(VmferryError) as refused:
            lab.daemons[side].vmferry("migrate", "vda", "--peer", "b" if side == "a" else "a")
        self.assertEqual((refused.exception.status, refused.exception.output["result"]), (1, "failed"))
        return refused.exception.output

    def test_a_refusal_says_who_owns_the_guest_and_where_it_is(self):
        # A script that reads "running-source" at the copy, or of a guest that is paused, acts on the wrong host.
        with self.lab(disk_size="64M", fill=None, workload=IDLE) as lab:
            guest = lab.start_guest("a")
            for words in (("start", "vda", "--peer", "b"), ("wait", "vda")):  # a copy that never heard of its primary knows no owner
                lab.daemons["a"].vmferry("replicate", *words)
            for state, place in (("running", "running-peer"), ("paused", "unknown")):
                if state == "paused":
                    guest.qmp.command("stop")
                found = self.refusal(lab, "a")  # no QEMU waits at b
                self.assertEqual((found["owner"], found["guest"]), ("source", f"{state}-source"), found)
                self.assertNotIn("resolve", found["error"])
                found = self.refusal(lab, "b")
                self.assertEqual((found["owner"], found["guest"]), ("peer", place), found)
                self.assertIn("not primary here", found["error"])
                self.assertEqual("vmferry resolve" in found["error"], place == "unknown", found)
            guest.kill()
            found = self.refusal(lab, "a")
            self.assertEqual((found["owner"], found["guest"]), ("source", "unknown"), found)
            self.assertIn("vmferry resolve", found["error"])

    def test_disks_that_would_stay_behind_or_be_overwritten_are_refused(self):
        # Data that is forgotten at the source, or destroyed at the peer, is missed after the source is gone.
        foreign = self.folder / "vda-b.img"
        foreign.write_bytes(os.urandom(1 << 20))
        spare, medium = self.folder / "spare.img", self.folder / "medium.iso"
        for file in (spare, medium):
            file.write_bytes(bytes(1 << 20))
        with self.lab(disk_size="64M", fill=None, workload=IDLE, disk_options={"reconnect_delay": None}) as lab:
            lab.start_guest("a", extra_args=(
                "-drive", f"if=none,id=spare,file={spare},format=raw", "-device", "virtio-blk-pci,drive=spare,id=spare0",
                "-drive", f"if=none,id=medium,file={medium},format=raw,readonly=on",
                "-device", "virtio-blk-pci,drive=medium,id=medium0"))
            a = lab.daemons["a"]
            error = self.refused(lab)
            self.assertRegex(error, f"device '[^']*spare0[^']*' writes to '{spare}', which is no volume")
            self.assertRegex(error, f"read-only medium '{medium}' of device '[^']*medium0[^']*' is missing at peer 'b'")
            self.assertIn("volume 'vda' holds data at peer 'b' that is no earlier copy; add --overwrite-peer", error)

            lab.start_guest("a")
            lab.start_guest("b")  # booted, not waiting
            found = self.refusal(lab, "a")
            self.assertIn("is not waiting for its first migration; start a fresh one with -incoming defer", found["error"])
            error = self.refused(lab)
            self.assertIn("--overwrite-peer", error)
            self.assertNotEqual(foreign.read_bytes()[:1 << 20], bytes(1 << 20), "what was refused changed nothing")
            dry = a.vmferry("migrate", "vda", "--peer", "b", "--overwrite-peer", "--dry-run")
            self.assertEqual(len([w for w in dry["warnings"] if "no reconnect-delay on QEMU's command line" in w]), 2, dry)
            outcome = lab.migrate("a", "b", "--overwrite-peer", "--quit-source", "--timeout", "1m")
            self.assertEqual((outcome.status, outcome.result["result"]), (0, "done"), outcome)
            lab.guests["b"].quit()
            for daemon in lab.daemons.values():
                daemon.stop()
            self.assertTrue(filecmp.cmp(lab.image("a"), foreign, shallow=False), "the peer holds the guest's disk")

    def test_a_destination_that_cannot_load_the_stream_leaves_the_guest_at_the_source(self):
        # Preflight does not see every device; the guest must survive what is found at the very end, and the next try
        # with a right destination must work.
        with self.lab() as lab:
            lab.start_guest("a", extra_args=("-device", "virtio-balloon-pci"))
            outcome = lab.migrate("a", "b", "--timeout", "1m")
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                             (1, "rolled-back", "source", "running-source"), outcome)
            self.assertIn("could not load", outcome.result["error"])
            wait_until(lambda: lab.daemons["a"].volume_status("vda")["handover_state"] == "own", 20, "own again")
            self.assert_runs_at_source(lab)
            wait_until(lambda: not lab.guests["b"].alive(), 20, "the destination QEMU that failed was ended")
            outcome = lab.migrate("a", "b", "--quit-source", guest_options={"extra_args": ("-device", "virtio-balloon-pci")})
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            self.assert_nothing_lost(lab, "b")

    def test_cancel_in_bulk_and_in_precopy_leaves_the_guest_running(self):
        # Somebody who needs the link for something else must get it back at once, and lose nothing but time.
        with self.lab(rate="100Mbit") as lab:
            lab.start_guest("a")
            before = self.capabilities(lab, "a")
            for phase in ("bulk", "precopy"):
                def cancel(_process, phase=phase):
                    wait_until(lambda: self.phase(lab) == phase, 90, phase)
                    if phase == "bulk":
                        self.assert_status_tells_what_is_left(lab)
                    lab.daemons["a"].vmferry("migrate", "cancel")
                outcome = lab.migrate("a", "b", "--timeout", "3m", during=cancel)
                self.assertEqual((outcome.status, outcome.result["result"], outcome.result["guest"]),
                                 (1, "rolled-back", "running-source"), (phase, outcome))
                self.assertIn("cancelled by the operator", outcome.result["error"])
                self.assertLess(outcome.gap_ms, 2000, phase)
                self.assert_runs_at_source(lab)
                wait_until(lambda: self.capabilities(lab, "a") == before, 10, "the capabilities are restored")
            # The same by the clock. What is left after the two before takes longer, with the memory alone.
            outcome = lab.migrate("a", "b", "--timeout", "3s")
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                             (1, "rolled-back", "source", "running-source"), outcome)
            self.assertRegex(outcome.result["error"], "^not done within 3 s: .*MiB of memory are left")
            self.assertTrue(3 <= outcome.seconds < 8, outcome)
            self.assert_runs_at_source(lab)
            with self.assertRaises(VmferryError) as nothing:
                lab.daemons["a"].vmferry("migrate", "cancel")
            self.assertIn("no migration is under way", nothing.exception.stderr)
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", "3m")
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            self.assert_nothing_lost(lab, "b")

    def assert_status_tells_what_is_left(self, lab: Lab) -> None:
        a = lab.daemons["a"]
        told = wait_until(lambda: (m := a.vmferry("migrate", "status", "vda")["migrations"])[0]["eta_s"] and m, 20,
                          "an estimate of what is left")
        self.assertEqual((len(told), told[0]["volumes"]), (1, ["vda"]))
        # 100 MB of disk, less what was sent, and 256 MiB of memory over 12.5 MB/s; reduced by no more than a hundred.
        self.assertTrue(0.1 < told[0]["eta_s"] < 60, told)
        plain = subprocess.run([w for w in a.vmferry_command("migrate", "status", "vda") if w != "--json"], text=True,
                               capture_output=True, check=True).stdout
        self.assertRegex(plain, r"vda: bulk, .* of memory to send, .*about [0-9]+ s left")
        with self.assertRaises(VmferryError) as nosuch:
            a.vmferry("migrate", "status", "nosuch")
        self.assertEqual(nosuch.exception.status, 1)
        self.assertIn("nosuch", nosuch.exception.output["error"])

    def test_a_source_daemon_that_dies_in_precopy_leaves_the_guest_and_a_whole_result(self):
        # A script that waits for the result gets one that it can read and that says how to go on.
        with self.lab(disk_size="64M", fill=None, workload=Workload(mode="none", mem="64M"), rate="100Mbit") as lab:
            lab.start_guest("a")
            a = lab.daemons["a"]
            # Not those of a fresh QEMU: what was before is known only to the daemon that dies.
            lab.guests["a"].qmp.command("migrate-set-capabilities", {"capabilities": [
                {"capability": "xbzrle", "state": True}]})
            before = self.capabilities(lab, "a")

            def kill(_process):
                self.assertTrue(a.wait_phase("precopy"))
                wait_until(lambda: self.capabilities(lab, "a")["pause-before-switchover"], 20, "the memory is under way")
                a.kill()

            outcome = lab.migrate("a", "b", "--timeout", "2m", during=kill)
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                             (1, "failed", "unknown", "unknown"), outcome)
            self.assert_whole_result(outcome.result)
            self.assertGreater(outcome.result["total_s"], 0)  # of the last that was heard
            for text in ("closed the connection", "vmferry status", "vmferry resolve vda"):
                self.assertIn(text, outcome.result["error"])
            a.start()
            wait_until(lambda: a.volume_status("vda")["handover_state"] == "own", 30, "rolled back")
            self.assert_runs_at_source(lab)
            # With `pause-before-switchover` left on, the operator's own next migration would wait for ever.
            wait_until(lambda: self.capabilities(lab, "a") == before, 10, "the capabilities are restored")


if __name__ == "__main__":
    unittest.main(verbosity=2)
