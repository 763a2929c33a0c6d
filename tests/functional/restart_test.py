#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a daemon remembers over a clean stop and over SIGKILL, and what it sends again then."""

import os
import subprocess
import threading
import time
import unittest

import nbd

from daemon_support import MIB, DaemonCase, digest, new_address, pair, wait_until

SIZE = 256 * MIB
REGION = 4 * MIB  # of the activity log


class Restart(DaemonCase):
    def following(self, data: int = 64 * MIB):
        a, b = self.two_daemons(SIZE, data=data)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        return a, b

    def equal(self) -> bool:
        return digest(self.path("a-vda.img")) == digest(self.path("b-vda.img"))

    def test_a_clean_stop_is_quick_and_costs_nothing(self):
        # An upgrade of the daemon that re-sends terabytes, or hangs until systemd kills it, is no upgrade.
        a, b = self.following()
        before = {d.name: (d.volume_status("vda")["role"], d.volume_status("vda")["term"], d.volume_status("vda")["group"],
                           d.vmferry("peer", "list")["peers"][0]["name"]) for d in (a, b)}
        for daemons in ((a,), (b,), (a, b)):
            for daemon in daemons:
                began = time.monotonic()
                self.assertEqual(daemon.stop(timeout=30), 0)
                self.assertLess(time.monotonic() - began, 9, "below the 10 s after which clients are cut off")
            for daemon in daemons:
                daemon.start()
            wait_until(lambda: a.vmferry("peer", "list")["peers"][0]["connected"], 15, "connected again")
            self.in_sync(a)
            self.assertEqual(a.volume_status("vda")["connected"], True)
        after = {d.name: (d.volume_status("vda")["role"], d.volume_status("vda")["term"], d.volume_status("vda")["group"],
                          d.vmferry("peer", "list")["peers"][0]["name"]) for d in (a, b)}
        self.assertEqual(after, before)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 100M 1M")
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertEqual(a.replication("vda")["raw_bytes"], MIB)

    def test_a_copy_of_an_old_file_travels_as_references_after_a_restart(self):
        # A guest that unpacks a backup or clones a directory must not send what the peer has since last week.
        a, b = self.following(data=8 * MIB)
        for daemon in (a, b):
            self.assertEqual(daemon.stop(), 0)
        for daemon in (b, a):
            daemon.start()
        wait_until(lambda: a.vmferry("peer", "list")["peers"][0]["connected"], 15, "connected again")
        self.in_sync(a)
        wait_until(lambda: a.replication("vda")["index_complete"], 20, "the index is complete")
        before = a.replication("vda")
        self.assertEqual(before["index_blocks"], 8 * MIB // 4096)
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("a-vda.img")))
        for at in range(0, 8 * MIB, MIB):
            client.pwrite(client.pread(MIB, at), 100 * MIB + at)
        client.shutdown()
        self.in_sync(a)
        after = a.replication("vda")
        self.assertTrue(self.equal())
        self.assertEqual(after["reference_bytes"] - before["reference_bytes"], 8 * MIB)
        self.assertLess(after["wire_bytes"] - before["wire_bytes"], 100_000)
        self.assertEqual(b.replication("vda")["reference_mismatches"], 0)

    def test_dirty_blocks_survive_a_clean_stop(self):
        # What was written while the peer was away is exactly what it lacks.
        a, b = self.following()
        self.assertEqual(b.stop(), 0)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 100M 3M", "write -P 0x5b 200M 64k")
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(a.vmferry("volume", "show", "vda")["dirty_bytes"], 3 * MIB + 65536)
        b.start()
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertEqual(a.replication("vda")["raw_bytes"], 3 * MIB + 65536)

    def test_a_client_that_waits_does_not_hold_the_stop_up(self):
        # A guest stays connected for months; the stop has to come to an end all the same, with its write answered.
        a, _ = self.following(data=MIB)
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("a-vda.img")))
        client.pwrite(b"x" * 4096, 0)
        began = time.monotonic()
        self.assertEqual(a.stop(timeout=30), 0)
        self.assertLess(time.monotonic() - began, 9, "below the 10 s after which clients are cut off")
        with self.assertRaises(nbd.Error):
            client.pwrite(b"y" * 4096, 0)
        self.assertEqual(self.path("a-vda.img").read_bytes()[:4096], b"x" * 4096)

    def test_a_guest_with_reconnect_delay_does_not_notice_a_restart(self):
        # An error at a clean restart makes the guest's file system read-only: every upgrade would need downtime.
        image = self.image("vda.img", SIZE)
        a = self.daemon("a", self.volume("vda", image))
        options = f"driver=nbd,server.type=unix,server.path={self.socket(image)},export=vda,reconnect-delay=60"
        writes = [f"write -P {1 + n % 250} {n * 64}k 64k" for n in range(3000)]
        reads = [f"read -P {1 + n % 250} {n * 64}k 64k" for n in range(3000)]
        guest = subprocess.Popen(["qemu-io", "--image-opts", options], text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = []
        reader = threading.Thread(target=lambda: output.append(guest.stdout.read()))
        reader.start()
        feeder = threading.Thread(target=lambda: (guest.stdin.write("\n".join([*writes, *reads, "quit", ""])), guest.stdin.close()))
        feeder.start()
        restarts = 0
        while guest.poll() is None and restarts < 5:
            time.sleep(0.15)
            self.assertEqual(a.stop(timeout=30), 0)
            a.start()
            restarts += 1
        feeder.join()
        self.assertEqual(guest.wait(60), 0)
        reader.join()
        guest.stdout.close()
        self.assertGreaterEqual(restarts, 2)
        for word in ("failed", "error", "Error"):
            self.assertNotIn(word, output[0], output[0][-500:])
        self.assertEqual(output[0].count("wrote 65536/65536"), 3000)
        self.assertEqual(output[0].count("read 65536/65536"), 3000)

    def hammer(self, seconds: float):
        """Writes 64 KiB to places within 16 regions until the export is gone; the places that were acknowledged."""
        acknowledged = {}
        stop = threading.Event()

        def write():
            client = nbd.NBD()
            client.connect_uri(self.uri(self.path("a-vda.img")))
            number = 0
            try:
                while not stop.is_set():
                    number += 1
                    place = (number * 37 % 1024) * 65536  # 64 MiB: 16 regions
                    content = number.to_bytes(8, "big") * 8192
                    client.pwrite(content, place)
                    acknowledged[place] = content
            except nbd.Error:
                pass

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(seconds)
        return thread, stop, acknowledged

    def test_sigkill_under_load_loses_no_write_and_sends_active_regions_again(self):
        # I2: without the activity log a crash is a full copy, or worse, a peer that silently lacks the last writes.
        a, b = self.following()
        time.sleep(10)  # the first copy is clean in the saved bitmap, too
        writer, stop, acknowledged = self.hammer(1.5)
        wait_until(lambda: len(acknowledged) > 100, 30, "writes are acknowledged")
        a.kill()
        writer.join()
        stop.set()
        self.assertGreater(len(acknowledged), 100)
        a.start()
        dirty = a.vmferry("volume", "show", "vda")["dirty_bytes"]
        self.assertGreater(dirty, 0)
        self.assertLessEqual(dirty, 16 * REGION)
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertLessEqual(a.replication("vda")["raw_bytes"], 16 * REGION)
        with open(self.path("b-vda.img"), "rb") as copy:
            for place, content in acknowledged.items():
                copy.seek(place)
                # Or the one write that was under way: it was never answered and may be there or not.
                self.assertGreaterEqual(int.from_bytes(copy.read(8), "big"), int.from_bytes(content[:8], "big"), place)

    def test_sigkill_of_both_again_and_again_ends_equal(self):
        # One forgotten block per crash is a damaged file system after a month.
        a, b = self.following(data=8 * MIB)
        for number in range(4):
            writer, stop, _ = self.hammer(0.4)
            for daemon in ((a,), (b,), (a, b), (b, a))[number]:
                daemon.kill()
            stop.set()
            writer.join()
            for daemon in (a, b):
                if not daemon.alive():
                    daemon.start()
        wait_until(lambda: a.vmferry("peer", "list")["peers"][0]["connected"], 20, "connected again")
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])

    def test_a_file_changed_behind_the_daemons_back_is_copied_anew(self):
        # Somebody ran fsck on the image while the daemon was down: our bitmap knows nothing of it.
        a, b = self.following(data=8 * MIB)
        self.assertEqual(a.stop(), 0)
        with open(self.path("a-vda.img"), "r+b") as file:
            file.seek(50 * MIB)
            file.write(b"changed")
        a.start()
        self.assertEqual(a.vmferry("volume", "show", "vda")["dirty_bytes"], SIZE)
        self.in_sync(a)
        self.assertTrue(self.equal())

    def test_a_recorded_volume_whose_file_is_missing_is_not_made_anew(self):
        # An empty file instead of the disk that is not mounted yet is copied over the peer's good one.
        first, second = self.path("a-vda.img"), self.path("a-vdb.img")
        b = self.daemon("b", *[self.volume(v, self.path(f"b-{v}.img"), "size=16M", "role=secondary") for v in ("vda", "vdb")],
                        listen=new_address())
        a = self.daemon("a", self.volume("vda", first, "size=16M"), listen=new_address())
        a.vmferry("volume", "add", self.volume("vdb", second, "size=16M"))
        pair(a, b)
        for volume, path in (("vda", first), ("vdb", second)):
            self.qemu_io(path, "write -P 0x5a 0 8M", export=volume)
            a.vmferry("replicate", "start", volume, "--peer", "b", "--rpo", "1s")
            self.in_sync(a, volume)
        good = digest(first)
        for daemon, volume in ((a, "vda"), (a, "vdb"), (b, "vda")):
            with self.subTest(daemon=daemon.name, volume=volume):
                image = self.path(f"{daemon.name}-{volume}.img")
                self.assertEqual(daemon.stop(), 0)
                image.rename(self.path("away"))
                for _ in range(2):  # nor does the failed start change that
                    daemon.start()
                    failed = daemon.volume_status(volume)
                    self.assertEqual(failed["state"], "failed")
                    for text in (str(image), "bring the file back", f"volume remove {volume}"):
                        self.assertIn(text, failed["reason"])
                    self.assertFalse(image.exists())
                    self.assertEqual(daemon.stop(), 0)
                self.path("away").rename(image)
                daemon.start()
                self.in_sync(a, volume)
                self.assertEqual(digest(image), good)
                self.assertEqual(digest(self.path(f"b-{volume}.img")), good)

    def test_the_role_of_the_command_line_counts_on_the_first_day_only(self):
        # After a handover the old command line is still in the unit file: it must neither demote nor promote anybody.
        a, b = self.following(data=MIB)
        for daemon in (a, b):
            self.assertEqual(daemon.stop(), 0)
            at = daemon.command.index("--volume") + 1
            words = [word for word in daemon.command[at].split(",") if not word.startswith("role=")]
            daemon.command[at] = ",".join([*words, "role=secondary" if daemon is a else "role=primary"])
            daemon.start()
        for daemon, role in ((a, "primary"), (b, "secondary")):
            status = daemon.volume_status("vda")
            self.assertEqual((status["role"], status["may_run"]), (role, role == "primary"), status)
            self.assertEqual(daemon.vmferry("volume", "show", "vda")["role"], role)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 1M 64k")
        refused = self.qemu_io(self.path("b-vda.img"), "write -P 0x66 1M 64k", check=False)
        self.assertIn("ermi", refused.stdout + refused.stderr)  # EPERM
        self.in_sync(a)
        self.assertTrue(self.equal())

    def test_a_volume_that_could_not_be_made_is_still_new_at_the_next_start(self):
        # Recorded before its file was there, a mistyped folder would be taken for a disk that is missing for ever after.
        image, other = self.path("later") / "vda.img", self.path("later") / "vdb.img"
        a = self.daemon("a", self.volume("vda", image, "size=4M"), self.volume("vdb", other, "size=4M", "role=secondary"))
        for volume, path, role in (("vda", image, "primary"), ("vdb", other, "secondary")):
            failed = a.volume_status(volume)
            self.assertEqual((failed["state"], failed["role"]), ("failed", role))
            self.assertIn(str(path), failed["reason"])
        image.parent.mkdir()
        self.assertEqual(a.vmferry("volume", "add", f"name=vdb,path={other}")["role"], "secondary")
        self.assertEqual(other.stat().st_size, 4 * MIB)
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(image.stat().st_size, 4 * MIB)
        self.assertEqual({v["name"]: v["state"] for v in a.vmferry("status")["volumes"]}, {"vda": "ready", "vdb": "ready"})

    def test_damaged_state_stops_the_start_with_the_file_named(self):
        # A daemon that starts with an empty state makes every secondary a primary.
        a, _ = self.following(data=MIB)
        self.assertEqual(a.stop(), 0)
        state = a.state_dir / "state"
        content = bytearray(state.read_bytes())
        for offset in range(0, len(content), 512):
            content[offset] ^= 0xFF
        state.write_bytes(content)
        with self.assertRaises(RuntimeError) as refused:
            a.start()
        self.assertIn("node state", str(refused.exception))


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
