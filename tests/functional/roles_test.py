#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`promote`, `demote` and `resolve` without a migration: at most one side may be written, and no write is lost unseen."""

import json
import subprocess
import threading
import time
import unittest

import nbd

from daemon_support import MIB, DaemonCase, digest, wait_until

SIZE = 32 * MIB


class Watch(DaemonCase):
    def test_status_watch_prints_what_changes(self):
        # An operator who watches a takeover must not look at the state of a minute ago.
        a = self.daemon("a", self.volume("vda", self.image("a.img", 4 * MIB)))
        for option in (["--json"], []):
            command = [w for w in a.vmferry_command("status", "--watch") if w != "--json"] + option
            with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as watch:
                try:
                    self.line_with(watch, "primary")
                    a.vmferry("demote", "vda")
                    line = self.line_with(watch, "secondary")
                    if option:
                        self.assertEqual(json.loads(line)["volumes"][0]["role"], "secondary")
                    a.vmferry("promote", "vda", "--force")
                    self.line_with(watch, "primary")
                finally:
                    watch.kill()

    def line_with(self, watch, text: str) -> str:
        stop = threading.Timer(10, watch.kill)
        stop.start()
        try:
            return next(line for line in watch.stdout if text in line and "vda" in line)
        finally:
            stop.cancel()


class RoleCase(DaemonCase):
    def following(self, proxied: bool = False):
        a, b = self.two_daemons(SIZE, data=8 * MIB, proxied=proxied)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        return a, b

    def may_write(self, side: str) -> bool:
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path(f"{side}-vda.img")))
        try:
            client.pwrite(b"w" * 512, SIZE - 512)
            return True
        except nbd.Error as error:
            self.assertEqual(error.errno, "EPERM")
            return False
        finally:
            client.shutdown()

    def assert_one_writer(self, writer: str) -> None:
        self.assertEqual([side for side in "ab" if self.may_write(side)], [writer])

    def equal(self) -> bool:
        return digest(self.path("a-vda.img")) == digest(self.path("b-vda.img"))


class PlannedChange(RoleCase):
    def test_promote_takes_over_what_was_written_last_and_the_other_follows(self):
        # The ordinary move of a stopped guest: nothing may be missing, and the way back must be as short.
        a, b = self.following()
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 10M 2M")
        b.vmferry("promote", "vda")
        status = self.wait_role(b, "primary")
        self.assertTrue(status["may_run"])
        follower = self.wait_role(a, "secondary")
        self.assertEqual((follower["may_run"], follower["owner"], follower["term"]), (False, "peer", status["term"]))
        self.assert_one_writer("b")
        self.qemu_io(self.path("b-vda.img"), "read -P 0x5a 10M 2M", "write -P 0x66 20M 1M")
        self.in_sync(b)
        self.assertTrue(self.equal())
        self.assertLess(b.replication("vda")["raw_bytes"], 4 * MIB, "both knew what they share")
        # And back again.
        a.vmferry("promote", "vda")
        self.wait_role(b, "secondary")
        self.assert_one_writer("a")
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertLess(a.replication("vda")["raw_bytes"], 4 * MIB)
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])

    def test_promote_of_a_primary_is_done_and_demote_of_a_secondary_too(self):
        # A repeated command of a script is no error.
        a, b = self.following()
        a.vmferry("promote", "vda")
        b.vmferry("demote", "vda")
        self.assert_one_writer("a")

    def test_after_demote_nobody_writes_until_one_is_promoted(self):
        # Maintenance of both: a side that starts by itself would be the surprise.
        a, b = self.following()
        a.vmferry("demote", "vda")
        self.assertFalse(self.may_write("a"))
        self.assertFalse(self.may_write("b"))
        self.assertIn("promote", a.volume_status("vda")["reason"])
        b.vmferry("promote", "vda")
        self.assert_one_writer("b")
        self.in_sync(b)
        self.assertTrue(self.equal())

    def test_a_volume_without_peer_is_demoted_and_promoted(self):
        # Without a peer there is nobody to ask, and the data is the volume's own.
        self.image("a-vda.img", SIZE, data=MIB)
        a = self.daemon("a", self.volume("vda", self.path("a-vda.img")))
        content = digest(self.path("a-vda.img"))
        a.vmferry("demote", "vda")
        self.assertFalse(self.may_write("a"))
        a.vmferry("promote", "vda")
        self.assertEqual(digest(self.path("a-vda.img")), content)
        self.assertTrue(self.may_write("a"))
        a.vmferry("demote", "vda")
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(a.volume_status("vda")["role"], "secondary")
        a.vmferry("promote", "vda")
        self.assertTrue(self.may_write("a"))


class LostPrimary(RoleCase):
    def test_promote_after_the_primary_died_and_it_comes_back(self):
        # The disaster this is for; the dead one must not answer writes over the new one's when it returns.
        a, b = self.following()
        time.sleep(10)  # longer than acknowledged blocks stay dirty in the saved bitmap (5 s), and it is written
        a.kill()
        error = self.refused(b, "promote", "vda")
        self.assertIn("--force", error)
        self.assertFalse(self.may_write("b"))
        b.vmferry("promote", "vda", "--force")
        self.assertTrue(self.may_write("b"))
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        a.start()
        status = self.wait_role(a, "secondary")
        self.assertFalse(status["may_run"])
        self.assertFalse(status["split_brain"], "it had written nothing")
        self.assert_one_writer("b")
        # It held nothing that the copy lacked, so it follows by itself, from where they parted.
        self.in_sync(b)
        self.assertTrue(self.equal())
        self.assertLess(b.replication("vda")["raw_bytes"], 4 * MIB)
        wait_until(lambda: a.volume_status("vda")["handover_state"] == "secondary", 10, "a secondary again")

    def test_writes_that_the_copy_never_had_are_kept_until_the_operator_drops_them(self):
        # They may be the last orders of the day.
        a, b = self.following()
        a.vmferry("replicate", "pause", "vda")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 10M 2M")
        a.kill()
        b.vmferry("promote", "vda", "--force")
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M")
        mine = digest(self.path("a-vda.img"))
        a.start()
        for side in (a, b):
            status = wait_until(lambda: (s := side.volume_status("vda"))["split_brain"] and s, 15, f"seen at {side.name}")
            self.assertIn("split brain", status["reason"])
            self.assertIn("resolve", status["reason"])
            self.assertEqual(side.replication("vda")["state"], "split-brain")
            self.assertIn("resolve", side.replication("vda")["reason"])
            wait_until(lambda: any(e.get("state") == "split-brain" for e in self.events(side)), 5, "the event")
        self.assertEqual(digest(self.path("a-vda.img")), mine)
        self.assertIn("split brain", self.refused(a, "promote", "vda", "--force"))
        a.vmferry("resolve", "vda", "--discard-local")
        b.vmferry("resolve", "vda", "--discard-peer")
        wait_until(lambda: not b.volume_status("vda")["split_brain"], 15, "decided")
        self.in_sync(b)
        self.assertTrue(self.equal())
        self.qemu_io(self.path("b-vda.img"), "read -P 0x66 20M 1M")
        self.assert_one_writer("b")

    def test_unsent_writes_of_a_demoted_primary_stop_the_promotion_there(self):
        # The peer would run an hour-old image as if nothing had happened.
        a, b = self.following(proxied=True)
        self.proxy.cut()
        wait_until(lambda: not a.volume_status("vda")["connected"], 15, "the loss is seen")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 10M 2M")
        a.vmferry("demote", "vda")
        self.proxy.mend()
        wait_until(lambda: b.volume_status("vda")["connected"] and a.volume_status("vda")["connected"], 20, "connected")
        self.assertIn("never came here", self.refused(b, "promote", "vda"))
        # Promoted where the writes are, they arrive: nothing of them was forgotten meanwhile.
        a.vmferry("promote", "vda")
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertLess(a.replication("vda")["raw_bytes"], 4 * MIB)
        self.assert_one_writer("a")

    def split_brain(self):
        a, b = self.following(proxied=True)
        self.proxy.cut()
        wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
        b.vmferry("promote", "vda", "--force")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 10M 2M", "write -P 0x11 30M 4k")
        self.qemu_io(self.path("b-vda.img"), "write -P 0x66 20M 1M", "write -P 0x22 30M 4k")
        self.proxy.mend()
        for side in (a, b):
            wait_until(lambda: side.volume_status("vda")["split_brain"], 20, f"split brain at {side.name}")
        return a, b

    def test_split_brain_is_decided_for_the_new_side(self):
        # Each way out has to end with one image, one writer and replication running.
        a, b = self.split_brain()
        self.assertFalse(a.volume_status("vda")["may_run"], "the superseded side is fenced")
        a.vmferry("resolve", "vda", "--discard-local")
        b.vmferry("resolve", "vda", "--discard-peer")
        self.in_sync(b)
        self.assertTrue(self.equal())
        self.assert_one_writer("b")
        self.qemu_io(self.path("b-vda.img"), "read -P 0x22 30M 4k", "read -P 0x66 20M 1M")

    def test_split_brain_is_decided_for_the_old_side(self):
        # The operator may know that the forced promotion was the mistake.
        a, b = self.split_brain()
        b.vmferry("resolve", "vda", "--discard-local")
        a.vmferry("resolve", "vda", "--discard-peer")
        self.wait_role(a, "primary")
        self.wait_role(b, "secondary")
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assert_one_writer("a")
        self.qemu_io(self.path("a-vda.img"), "read -P 0x11 30M 4k", "read -P 0x5a 10M 2M")

    def test_resolve_refuses_where_there_is_nothing_to_decide(self):
        # A resolve on the wrong host must not throw away the good side.
        a, b = self.following()
        before = digest(self.path("a-vda.img"))
        self.assertIn("nothing to discard", self.refused(a, "resolve", "vda", "--discard-local"))
        a.vmferry("resolve", "vda", "--discard-peer")  # the peer follows already
        self.assertIn("nothing to discard", self.refused(b, "resolve", "vda", "--discard-peer"))
        self.assertEqual(digest(self.path("a-vda.img")), before)
        self.assert_one_writer("a")


class UnfinishedCopy(RoleCase):
    def test_an_inconsistent_copy_is_promoted_only_when_that_is_accepted(self):
        # Half a disk that comes up by itself is a guest with a broken file system.
        a, b = self.two_daemons(SIZE, data=24 * MIB, proxied=True)
        self.proxy.rate = 12 * MIB
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        wait_until(lambda: self.proxy.bytes_to_target > 8 * MIB, 20, "a part of the copy")
        a.kill()
        wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
        self.assertEqual(b.replication("vda")["state"], "inconsistent")
        self.assertIn("--accept-inconsistent", self.refused(b, "promote", "vda", "--force"))
        self.assertFalse(self.may_write("b"))
        b.vmferry("promote", "vda", "--force", "--accept-inconsistent")
        self.assertTrue(self.may_write("b"))


class ReplacedCopy(RoleCase):
    def test_a_copy_whose_file_was_replaced_is_no_copy_until_it_is_made_anew(self):
        # An image from somewhere else, promoted because the record calls it consistent, is a guest with another disk.
        a, b = self.following()
        image = self.path("b-vda.img")
        self.assertEqual(a.stop(), 0)
        self.assertEqual(b.stop(), 0)
        image.rename(self.path("away"))
        self.image("b-vda.img", SIZE, data=MIB, seed=7)
        for _ in range(2):  # what was found is not forgotten by a further restart
            b.start()
            status = b.replication("vda")
            self.assertEqual((status["state"], status["consistent"]), ("inconsistent", False))
            self.assertIn("'vda'", status["reason"])
            self.assertIn("--accept-inconsistent", self.refused(b, "promote", "vda", "--force"))
            self.assertFalse(self.may_write("b"))
            self.assertEqual(b.stop(), 0)
        b.start()
        a.start()
        # It may be precious: overwritten only when that is asked for.
        wait_until(lambda: "--overwrite-peer" in a.replication("vda").get("reason", ""), 20, "the copy is refused")
        self.assertEqual(b.replication("vda")["state"], "inconsistent")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--overwrite-peer")
        self.in_sync(a)
        self.assertTrue(self.equal())
        status = b.replication("vda")
        self.assertEqual((status["state"], status["consistent"], status["reason"]), ("in-sync", True, ""))
        a.kill()
        b.vmferry("promote", "vda", "--force")
        self.assertTrue(self.may_write("b"))

    def test_a_replaced_copy_is_promoted_when_that_is_accepted(self):
        # The operator may know better: it is the restored backup that is wanted.
        a, b = self.following()
        a.kill()
        self.assertEqual(b.stop(), 0)
        self.path("b-vda.img").unlink()
        content = self.image("b-vda.img", SIZE, data=MIB, seed=7).read_bytes()
        b.start()
        self.assertIn("--accept-inconsistent", self.refused(b, "promote", "vda", "--force"))
        b.vmferry("promote", "vda", "--force", "--accept-inconsistent")
        self.assertEqual(self.path("b-vda.img").read_bytes(), content)
        self.assertTrue(self.may_write("b"))


class FuzzyCopy(RoleCase):
    """An epoch that was read back while its blocks were being overwritten is no moment that ever was (I7)."""

    def write_on(self, stop: threading.Event) -> None:
        """One block after the other over the same places, as fast as it goes, until the daemon is gone."""
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("a-vda.img")))
        number = 0
        try:
            while not stop.is_set():
                number += 1
                client.pwrite(number.to_bytes(8, "little") * 512, (number * 7919 % 2048) * 4096)
                self.written = number
        except nbd.Error:
            pass  # the daemon was killed

    def lost_while_fuzzy(self, b) -> dict:
        """Cuts the link until the last epoch that came through is none of one moment; what b says of it then."""
        for _ in range(20):
            wait_until(lambda: not b.replication("vda")["consistent"], 30, "an epoch under load")
            self.proxy.cut()
            wait_until(lambda: not b.volume_status("vda")["connected"], 15, "the loss is seen")
            if not (status := b.replication("vda"))["consistent"]:
                return status
            self.proxy.mend()  # one more was applied in between, and nothing was written during it
        return self.fail("no epoch under load was fuzzy")

    def test_a_copy_of_a_running_guest_is_promoted_only_when_that_is_accepted(self):
        # Called consistent, it would be booted from without a check of its file systems, and come up wrong weeks later.
        a, b = self.following(proxied=True)
        stop = threading.Event()
        writer = threading.Thread(target=self.write_on, args=(stop,))
        writer.start()
        self.addCleanup(writer.join, 10)
        self.addCleanup(stop.set)
        status = self.lost_while_fuzzy(b)
        a.kill()
        writer.join(10)
        self.assertGreater(self.written, 200, "there was a load")
        self.assertEqual((status["state"], status["consistent"]), ("disconnected", False), status)
        error = self.refused(b, "promote", "vda", "--force")
        self.assertIn("--accept-inconsistent", error)
        self.assertEqual(b.volume_status("vda")["role"], "secondary")
        self.assertFalse(self.may_write("b"))
        b.vmferry("promote", "vda", "--force", "--accept-inconsistent")
        self.assertTrue(self.may_write("b"))

    def test_a_quiet_guest_makes_it_consistent_again(self):
        # The other side of the same judgement: an operator who is asked for the word every time gives it unread.
        a, b = self.following()
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 1M 1M")
        self.in_sync(a)
        wait_until(lambda: b.replication("vda")["consistent"], 20, "consistent when nobody writes")
        a.kill()
        b.vmferry("promote", "vda", "--force")
        self.assertTrue(self.may_write("b"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
