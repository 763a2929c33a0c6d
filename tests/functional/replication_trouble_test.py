#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `vmferry replicate` says when replication does not run as it should: on both sides, in text too, and without
hanging.

Root only: the file system that fills up is a small tmpfs.
"""

import os
import random
import subprocess
import time
import unittest

import nbd

from daemon_support import MIB, DaemonCase, VmferryError, digest, run, wait_until

SIZE = 32 * MIB


class TroubleCase(DaemonCase):
    def following(self, proxied: bool = False, data: int = 4 * MIB, size: int = SIZE):
        a, b = self.two_daemons(size, data=data, proxied=proxied)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        return a, b

    def text(self, daemon, *words) -> str:
        return run(*[w for w in daemon.vmferry_command(*words) if w != "--json"]).stdout

    def tmpfs(self, name: str, options: str):
        folder = self.path(name)
        folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", options, "vmferry-test", folder)
        self.addCleanup(run, "umount", "-l", folder)
        return folder

    def equal(self, volume: str = "vda") -> bool:
        return digest(self.path(f"a-{volume}.img")) == digest(self.path(f"b-{volume}.img"))

    def assert_growing_rpo(self, daemon) -> None:
        first = daemon.replication("vda")["rpo_s"]
        self.assertIsNotNone(first)
        time.sleep(0.5)
        self.assertGreater(daemon.replication("vda")["rpo_s"], first)


class WhatTheCopySays(TroubleCase):
    """A copy that says in-sync while nothing comes is found out on the day it is needed."""

    def assert_says(self, b, state: str, *words: str) -> dict:
        status = wait_until(lambda: (s := b.replication("vda"))["state"] == state and s, 10, state)
        for word in words:
            self.assertIn(word, status["reason"])
            self.assertIn(word, self.text(b, "replicate", "status"))
        self.assert_growing_rpo(b)
        return status

    def test_that_its_primary_stopped(self):
        a, b = self.following()
        self.assertIsNone(b.replication("vda")["rpo_s"], "only the source knows")
        a.vmferry("replicate", "stop", "vda")
        self.assert_says(b, "disconnected", "'a'", "stopped")
        # Also after the connection came again, by either side.
        for daemon in (a, b):
            self.assertEqual(daemon.stop(), 0)
            daemon.start()
            wait_until(lambda: b.volume_status("vda")["connected"], 20, "connected")
            self.assert_says(b, "disconnected", "'a'", "not known")

    def test_that_its_primary_stopped_while_it_was_away(self):
        a, b = self.following()
        self.assertEqual(b.stop(), 0)
        a.vmferry("replicate", "stop", "vda")
        b.start()
        self.assert_says(b, "disconnected", "'a'")

    def test_that_the_connection_is_lost(self):
        a, b = self.following()
        a.kill()
        self.assert_says(b, "disconnected", "no connection", "'a'")

    def test_that_its_primary_was_refused(self):
        a, b = self.following()
        self.assertEqual(a.stop(), 0)
        self.assertEqual(b.stop(), 0)
        self.path("b-vda.img").rename(self.path("away"))
        self.image("b-vda.img", SIZE, data=MIB, seed=7)
        b.start()
        a.start()
        status = wait_until(lambda: "refuse" in (s := b.replication("vda"))["reason"] and s, 15, "the refusal")
        self.assertEqual(status["state"], "inconsistent")

    def test_that_its_own_disk_is_full(self):
        state = self.tmpfs("b-state", "size=256M")
        a, b = self.following(size=96 * MIB)
        figures = os.statvfs(state)
        used = (figures.f_blocks - figures.f_bfree) * figures.f_frsize
        run("mount", "-o", f"remount,size={used + 4 * MIB}", state)
        a.vmferry("replicate", "pause", "vda")  # all of it in one epoch, larger than what is reserved
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("a-vda.img")))
        for number in range(60):
            client.pwrite(random.Random(number).randbytes(MIB), (8 + number) * MIB)
        client.shutdown()
        a.vmferry("replicate", "resume", "vda")
        wait_until(lambda: a.replication("vda")["state"] == "degraded", 40, "degraded at the primary")
        self.assert_says(b, "degraded", "No space left on device", "staging area")
        for _ in range(10):  # and not only between two attempts
            self.assertEqual(b.replication("vda")["state"], "degraded")
            time.sleep(0.2)
        run("mount", "-o", "remount,size=256M", state)
        self.in_sync(a, timeout="90s")
        status = b.replication("vda")
        self.assertEqual((status["state"], status["reason"], status["rpo_s"]), ("in-sync", "", None))
        self.assertTrue(self.equal())


class Verification(TroubleCase):
    def test_of_a_paused_volume_ends_with_the_reason(self):
        # Somebody who types it the next morning must not wait for ever.
        a, _ = self.following()
        a.vmferry("replicate", "pause", "vda")
        self.assertEqual(a.vmferry("replicate", "verify", "vda", timeout=20)["differences"], [], "nothing lacks")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 8M 1M")
        error = self.refused(a, "replicate", "verify", "vda", timeout=20)
        self.assertIn("paused", error)
        self.assertIn("resume", error)
        a.vmferry("replicate", "resume", "vda")
        self.assertEqual(a.vmferry("replicate", "verify", "vda", timeout=20)["differences"], [])

    def verifying(self, a) -> subprocess.Popen:
        """One that waits for the peer's answer about its first range."""
        self.proxy.stall(True)
        self.descriptors = a.descriptor_count()
        process = subprocess.Popen(a.vmferry_command("replicate", "verify", "vda"), text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        wait_until(lambda: a.descriptor_count() > self.descriptors, 20, "the command is connected")
        time.sleep(0.5)
        self.assertIsNone(process.poll())
        return process

    def assert_ends(self, process, text: str) -> None:
        output, errors = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 1, output)
        self.assertIn(text, output + errors)

    def test_under_way_ends_when_the_volume_is_paused(self):
        a, _ = self.following(proxied=True, size=2 * SIZE)
        process = self.verifying(a)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 8M 1M")
        a.vmferry("replicate", "pause", "vda")
        self.proxy.stall(False)  # the first range is answered; the second waits for what was written
        self.assert_ends(process, "paused")

    def test_under_way_ends_when_replication_does(self):
        a, _ = self.following(proxied=True)
        process = self.verifying(a)
        a.vmferry("replicate", "stop", "vda")
        self.assert_ends(process, "ended before the verification did")

    def test_ends_with_its_client(self):
        # A forgotten one would hold up the next.
        a, _ = self.following(proxied=True)
        process = self.verifying(a)
        self.assertIn("under way", self.refused(a, "replicate", "verify", "vda", timeout=10))
        process.kill()
        process.communicate()
        wait_until(lambda: a.descriptor_count() <= self.descriptors, 20, "the daemon sees that its client left")
        self.proxy.stall(False)
        self.assertEqual(a.vmferry("replicate", "verify", "vda", timeout=20)["differences"], [])

    def test_of_a_disconnected_volume_ends_with_the_reason(self):
        a, b = self.following()
        self.assertEqual(b.stop(), 0)
        wait_until(lambda: not a.volume_status("vda")["connected"], 15, "the loss is seen")
        self.assertIn("not connected", self.refused(a, "replicate", "verify", "vda", timeout=20))


class Status(TroubleCase):
    def test_text_names_the_reason_of_whatever_is_not_in_sync(self):
        # The table is what people look at; a state without its reason sends them to the log.
        a, b = self.following(proxied=True)
        self.assertIn("REASON", self.text(a, "replicate", "status").splitlines()[0])
        a.vmferry("replicate", "pause", "vda")
        self.assertIn("replicate resume", self.text(a, "replicate", "status"))
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 8M 1M")
        error = self.refused(a, "replicate", "wait", "vda", "--timeout", "1s")
        self.assertIn("is paused", error)
        self.assertIn("replicate resume", error)
        a.vmferry("replicate", "resume", "vda")
        self.in_sync(a)
        self.proxy.cut()
        wait_until(lambda: a.replication("vda")["state"] == "disconnected", 10, "the loss is seen")
        self.assertIn("no connection to peer 'b'", self.text(a, "replicate", "status"))
        self.assertIn("no connection to peer 'b'", self.refused(a, "replicate", "wait", "vda", "--timeout", "1s"))

    def test_the_copys_wire_bytes_are_those_of_the_wire(self):
        # With the decoded size there, the two sides never agree, and nobody sees what compression does.
        a, b = self.two_daemons(SIZE)
        with open(self.path("a-vda.img"), "r+b") as file:
            file.write((b"line of a very repetitive log\n" * 40000)[:MIB] * 8)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        sent, received = a.replication("vda"), b.replication("vda")
        self.assertLess(received["wire_bytes"], received["raw_bytes"] // 4)
        self.assertLess(abs(sent["wire_bytes"] - received["wire_bytes"]), sent["wire_bytes"] // 4 + 4096)

    def test_rates_are_those_of_the_guest_and_an_estimate_is_there_while_a_copy_runs(self):
        # A full copy marks every block; counted as the guest's writes it makes every prediction nonsense.
        a, b = self.two_daemons(256 * MIB, data=40 * MIB, proxied=True)
        self.proxy.rate = 8 * MIB
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        rates, estimates = [], []
        for _ in range(30):
            status = a.replication("vda")
            if status["state"] != "initial":
                break
            rates.append(status["dirty_rate"])
            estimates.append(status["estimate_s"])
            time.sleep(0.1)
        self.assertEqual(max(rates), 0, "nobody writes")
        self.assertGreater(max(estimates), 0)
        self.assertIsNotNone(a.vmferry("estimate", "vda", "--peer", "b")["estimate_s"])
        self.in_sync(a)
        self.assertEqual(a.replication("vda")["dirty_rate"], 0)


class KilledPrimary(TroubleCase):
    def test_the_end_of_a_full_copy_survives_the_kill_right_after_it(self):
        # A week's copy, sent again because the host went down a second after it was done.
        a, b = self.following(data=16 * MIB)
        a.kill()
        a.start()
        self.in_sync(a)
        self.assertLess(a.replication("vda")["raw_bytes"], 2 * MIB)
        self.assertTrue(self.equal())


class StoppedAndStarted(TroubleCase):
    """`stop` and `start` with the same peer: the copy there is our own former copy, if nobody has touched it since."""

    def start(self, a) -> None:
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        self.assertTrue(self.equal())

    def test_only_what_changed_is_sent_and_no_consent_is_asked(self):
        # A day of copying, thrown away by a stop for maintenance; and whoever gets used to --overwrite-peer will one day
        # overwrite the wrong disk.
        a, b = self.following(data=16 * MIB)
        for stopped in ((a,), (a, b), (b, a)):
            with self.subTest(stopped=[side.name for side in stopped]):
                for side in stopped:
                    side.vmferry("replicate", "stop", "vda")
                self.qemu_io(self.path("a-vda.img"), f"write -P {len(stopped)} 20M 1M")
                for side in (a, b):  # what is remembered is remembered over restarts
                    self.assertEqual(side.stop(), 0)
                    side.start()
                self.start(a)
                self.assertLess(a.replication("vda")["raw_bytes"], 2 * MIB)
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])

    def test_after_a_crash_what_was_written_in_between_is_sent(self):
        a, b = self.following(data=16 * MIB)
        a.vmferry("replicate", "stop", "vda")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 20M 1M")
        a.kill()
        a.start()
        self.start(a)

    def test_a_copy_that_was_written_since_is_not_overwritten_unasked(self):
        a, b = self.following()
        for side in (a, b):
            side.vmferry("replicate", "stop", "vda")
        b.vmferry("promote", "vda")
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        b.vmferry("demote", "vda")
        precious = digest(self.path("b-vda.img"))
        error = self.refused(a, "replicate", "start", "vda", "--peer", "b")
        self.assertIn("writes that this side never had", error)
        self.assertIn("--overwrite-peer", error)
        self.assertEqual(digest(self.path("b-vda.img")), precious)
        a.vmferry("replicate", "stop", "vda")
        # The other way round only b's writes travel: a has none of its own.
        a.vmferry("demote", "vda")
        b.vmferry("replicate", "stop", "vda")
        b.vmferry("promote", "vda")
        b.vmferry("replicate", "start", "vda", "--peer", "a", "--rpo", "1s")
        self.in_sync(b)
        self.assertTrue(self.equal())
        self.assertEqual(digest(self.path("a-vda.img")), precious)
        self.assertLess(b.replication("vda")["raw_bytes"], 2 * MIB)

    def test_a_copy_whose_file_was_changed_since_is_not_overwritten_unasked(self):
        a, b = self.following()
        for side in (a, b):
            side.vmferry("replicate", "stop", "vda")
        self.assertEqual(b.stop(), 0)
        with open(self.path("b-vda.img"), "r+b") as file:
            file.write(b"edited")
        b.start()
        self.assertIn("--overwrite-peer", self.refused(a, "replicate", "start", "vda", "--peer", "b"))
        self.assertEqual(self.path("b-vda.img").read_bytes()[:6], b"edited")

    def test_overwrite_peer_copies_everything_anew(self):
        # The repair after `verify` found a difference: it must not trust what both sides think they share.
        a, b = self.following()
        with open(self.path("b-vda.img"), "r+b") as file:
            file.write(b"bit rot")
        a.vmferry("replicate", "stop", "vda")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s", "--overwrite-peer")
        self.in_sync(a)
        self.assertTrue(self.equal())

    def test_the_copys_stop_holds_until_both_sides_start_anew(self):
        # Somebody froze it to take a backup of it; a reconnect must not thaw it.
        a, b = self.following()
        b.vmferry("replicate", "stop", "vda")
        wait_until(lambda: "stopped there" in a.replication("vda")["reason"], 10, "the primary knows")
        before = digest(self.path("b-vda.img"))
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 20M 1M")
        for side in (a, b):
            self.assertEqual(side.stop(), 0)
            side.start()
            wait_until(lambda: a.volume_status("vda")["connected"], 20, "connected")
            self.assertIn("stop it here too", self.refused(a, "replicate", "start", "vda", "--peer", "b"))
        self.assertEqual(b.vmferry("replicate", "status")["volumes"], [])
        self.assertEqual(digest(self.path("b-vda.img")), before)
        a.vmferry("replicate", "stop", "vda")
        self.start(a)

    def test_an_unfinished_copy_stays_one(self):
        # Half a disk, called a disk because nobody replicates to it any more.
        a, b = self.two_daemons(SIZE, data=24 * MIB, proxied=True)
        self.proxy.rate = 12 * MIB
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        wait_until(lambda: self.proxy.bytes_to_target > 8 * MIB, 20, "a part of the copy")
        for side in (a, b):
            side.vmferry("replicate", "stop", "vda")
        self.assertIn("--accept-inconsistent", self.refused(b, "promote", "vda"))
        # Run from all the same it belongs to its guest from then on.
        b.vmferry("promote", "vda", "--accept-inconsistent")
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 1M 1M")
        b.vmferry("demote", "vda")
        self.assertIn("--overwrite-peer", self.refused(a, "replicate", "start", "vda", "--peer", "b"))
        self.qemu_io(self.path("b-vda.img"), "read -P 0x66 1M 1M")


class Regrouping(TroubleCase):
    """A change of groups that fails half-way leaves what there was, and says why."""

    def small_state(self, name: str):
        folder = self.tmpfs(f"{name}-state", "nr_inodes=64")

        def fill():
            with self.assertRaises(OSError):
                for number in range(100):
                    (folder / f"filler{number}").touch()

        def empty():
            for filler in folder.glob("filler*"):
                filler.unlink()

        return fill, empty

    def two(self, small: str):
        fill, empty = self.small_state(small)
        return *self.two_daemons(SIZE, data=MIB, volumes=("vda", "vdb")), fill, empty

    def assert_told(self, daemon, volume: str) -> None:
        self.assertIn("No space left on device", daemon.volume_status(volume)["reason"])
        failed = [e for e in self.events(daemon) if e["event"] == "regroup_failed"]
        self.assertIn("No space left on device", failed[-1]["reason"])
        self.assertIn(volume, failed[-1]["volumes"])

    def test_at_the_primary_leaves_the_replication_that_there_is(self):
        # The volume would refuse every command until a restart, and its copy grow old.
        a, b, fill, empty = self.two("a")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        fill()
        for words in (("vda", "vdb", "--overwrite-peer"), ("vdb",)):
            error = self.refused(a, "replicate", "start", *words, "--peer", "b")
            self.assertIn("No space left on device", error)
            self.assert_told(a, "vdb")
            self.qemu_io(self.path("a-vda.img"), f"write -P {len(words)} 8M 1M")
            self.in_sync(a)
            self.assertTrue(self.equal())
            self.qemu_io(self.path("a-vdb.img"), "write -P 1 8M 1M", export="vdb")
        self.assertIn("No space left on device", self.refused(a, "replicate", "stop", "vda"))
        self.in_sync(a)
        empty()
        a.vmferry("replicate", "start", "vda", "vdb", "--peer", "b", "--overwrite-peer")
        self.in_sync(a, "vda", "vdb")
        for volume in ("vda", "vdb"):
            self.assertTrue(self.equal(volume))
            self.assertNotIn("No space", a.volume_status(volume)["reason"])

    def test_at_the_copy_leaves_it_usable_and_tells_the_primary(self):
        a, b, fill, empty = self.two("b")
        fill()
        self.assertIn("No space left on device", self.refused(a, "replicate", "start", "vda", "--peer", "b"))
        self.assert_told(b, "vda")
        b.vmferry("promote", "vda")
        b.vmferry("demote", "vda")
        empty()
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertTrue(self.equal())


class SplitBrain(TroubleCase):
    def split_brain(self):
        a, b = self.following(proxied=True)
        self.proxy.cut()
        wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
        b.vmferry("promote", "vda", "--force")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 10M 2M")
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        self.proxy.mend()
        for side in (a, b):
            wait_until(lambda: side.volume_status("vda")["split_brain"], 20, f"split brain at {side.name}")
        return a, b

    def test_replication_is_not_stopped_before_it_is_decided(self):
        # Without its peer a side could never again be told from one that has the right data.
        a, b = self.split_brain()
        for side in (a, b):
            error = self.refused(side, "replicate", "stop", "vda")
            self.assertIn("vmferry resolve vda --discard-local", error)
            self.assertIn("vmferry resolve vda --discard-peer", error)
        a.vmferry("resolve", "vda", "--discard-local")
        b.vmferry("resolve", "vda", "--discard-peer")
        self.in_sync(b)
        self.assertTrue(self.equal())
        a.vmferry("replicate", "stop", "vda")
        b.vmferry("replicate", "stop", "vda")

    def test_the_way_out_does_not_need_the_other_side(self):
        # The other host may be gone for good: a refusal must not keep what is left from being used.
        a, b = self.split_brain()
        a.kill()
        wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
        b.vmferry("resolve", "vda", "--discard-peer")
        b.vmferry("replicate", "stop", "vda")
        self.assertEqual(b.vmferry("replicate", "status")["volumes"], [])
        self.assertTrue(b.volume_status("vda")["may_run"])
        self.qemu_io(self.path("b-vda.img"), "read -P 0x66 20M 1M", "write -P 0x67 21M 1M")


class GuestOfAFormerPrimary(TroubleCase):
    """A guest that still runs where it must not: its disk may fail, but it may not turn into another one."""

    def connected(self, side: str) -> nbd.NBD:
        return self.nbd_client(self.path(f"{side}-vda.img"))

    @staticmethod
    def promoted(daemon) -> bool:
        try:
            daemon.vmferry("promote", "vda")
        except VmferryError:
            return False
        return True

    def assert_cut_off(self, client) -> None:
        for request in (lambda: client.pread(MIB, 20 * MIB), lambda: client.pwrite(b"x" * 512, 0), client.flush):
            with self.assertRaises(nbd.Error) as refused:
                request()
            self.assertIn(refused.exception.errno, ("ESHUTDOWN", "EPERM"))

    def test_gets_errors_after_its_writes_were_discarded(self):
        a, b = self.following(proxied=True)
        guest = self.connected("a")
        self.proxy.cut()
        wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
        b.vmferry("promote", "vda", "--force")
        guest.pwrite(b"A" * MIB, 20 * MIB)
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        self.proxy.mend()
        for side in (a, b):
            wait_until(lambda: side.volume_status("vda")["split_brain"], 20, f"split brain at {side.name}")
        self.assertEqual(guest.pread(MIB, 20 * MIB), b"A" * MIB, "until it is decided its own data is there")
        a.vmferry("resolve", "vda", "--discard-local")
        self.assert_cut_off(guest)
        b.vmferry("resolve", "vda", "--discard-peer")
        self.in_sync(b)
        self.assert_cut_off(guest)
        self.assertEqual(self.connected("a").pread(MIB, 20 * MIB), b"f" * MIB, "who comes now sees the copy")
        self.assertTrue(self.equal())
        # Not even when this side is the primary again: the guest's memory is that of another disk.
        wait_until(lambda: self.promoted(a), 15, "promoted; it may first have to learn the term of the resolve")
        self.assert_cut_off(guest)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x67 21M 1M")

    def test_gets_errors_once_the_new_primarys_data_arrives(self):
        a, b = self.following()
        guest = self.connected("a")
        guest.pwrite(b"A" * MIB, 20 * MIB)
        b.vmferry("promote", "vda")
        follower = self.connected("a")
        self.assertEqual(guest.pread(MIB, 20 * MIB), b"A" * MIB)
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        self.in_sync(b)
        self.assert_cut_off(guest)
        self.assertEqual(follower.pread(MIB, 20 * MIB), b"f" * MIB)

    def test_goes_on_when_nothing_came_in_between(self):
        # Demoted and promoted again for maintenance, with the guest paused.
        a, b = self.following()
        guest = self.connected("a")
        guest.pwrite(b"A" * MIB, 20 * MIB)
        a.vmferry("demote", "vda")
        a.vmferry("promote", "vda")
        self.assertEqual(guest.pread(MIB, 20 * MIB), b"A" * MIB)
        guest.pwrite(b"B" * MIB, 20 * MIB)


class Superseded(TroubleCase):
    def test_a_former_primary_that_follows_is_a_secondary_also_when_nothing_is_written(self):
        # `superseded` asks the operator to resolve something; there is nothing to resolve.
        a, b = self.following()
        time.sleep(10)  # longer than acknowledged blocks stay dirty in the saved bitmap (5 s), and it is written
        a.kill()
        b.vmferry("promote", "vda", "--force")
        a.start()
        status = wait_until(lambda: (s := a.volume_status("vda"))["handover_state"] == "secondary" and s, 20, "secondary")
        self.assertEqual((status["role"], status["owner"], status["split_brain"]), ("secondary", "peer", False))
        wait_until(lambda: a.replication("vda")["state"] == "in-sync", 20, "the copy is in sync")
        self.in_sync(b)
        self.assertTrue(self.equal())


if __name__ == "__main__":
    unittest.main(verbosity=2)
