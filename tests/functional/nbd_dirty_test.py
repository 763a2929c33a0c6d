#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Meta contexts vmferry:dirty-PEER and vmferry:epoch: what a backup tool sees of what changed.

A block that is missing from these maps is missing from the backup; nbdinfo, libnbd and QEMU 10 are the readers.
"""

import json
import shutil
import unittest

import nbd

from daemon_support import BUILD, MIB, DaemonCase, digest, run, wait_until

SIZE = 16 * MIB
BLOCK = 4096


class DirtyContexts(DaemonCase):
    def start(self):
        """a with peer b, in sync and paused: from here on b acknowledges nothing."""
        a, b = self.two_daemons(SIZE, data=4 * MIB)
        image = self.folder / "a-vda.img"
        self.assertEqual(self.contexts(image), ["base:allocation"], "without a peer nothing is tracked")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        a.vmferry("replicate", "pause", "vda")
        return a, b, image

    def contexts(self, image) -> list:
        return json.loads(run("nbdinfo", "--json", self.uri(image)).stdout)["exports"][0]["contexts"]

    def map(self, image, context: str) -> list:
        """(offset, length) of the runs with flag 1; the others must have 0, and all together cover the disk."""
        runs = json.loads(run("nbdinfo", "--json", f"--map={context}", self.uri(image)).stdout)
        self.assertEqual(sum(r["length"] for r in runs), SIZE)
        self.assertLessEqual({r["type"] for r in runs}, {0, 1})
        return [(r["offset"], r["length"]) for r in runs if r["type"] == 1]

    def test_nbdinfo_and_libnbd_see_what_the_peer_has_not_acknowledged(self):
        a, _, image = self.start()
        self.assertEqual(self.contexts(image), ["base:allocation", "vmferry:dirty-b", "vmferry:epoch"])
        self.assertEqual(self.map(image, "vmferry:dirty-b"), [])
        self.qemu_io(image, "write -P 1 5M 64k", "write -P 2 1000 10", f"write -z 8M {BLOCK}",
                     f"write -P 3 {SIZE - 512} 512")
        expected = [(0, BLOCK), (5 * MIB, 65536), (8 * MIB, BLOCK), (SIZE - BLOCK, BLOCK)]
        self.assertEqual(self.map(image, "vmferry:dirty-b"), expected)
        self.assertEqual(self.map(image, "vmferry:epoch"), expected, "all of it in the open epoch")

        handle = nbd.NBD()
        for context in ("base:allocation", "vmferry:dirty-b", "vmferry:epoch"):
            handle.add_meta_context(context)
        handle.connect_uri(self.uri(image))
        seen = {}
        handle.block_status(SIZE, 0, lambda name, offset, extents, _error: seen.setdefault(name, (offset, extents)) and 0)
        self.assertEqual(set(seen), {"base:allocation", "vmferry:dirty-b", "vmferry:epoch"})
        self.assertEqual(seen["vmferry:dirty-b"][1][:4], [BLOCK, 1, 5 * MIB - BLOCK, 0])
        one = []
        handle.block_status(MIB, 5 * MIB + 100, lambda name, _offset, extents, _error: one.append((name, extents)) and 0,
                            nbd.CMD_FLAG_REQ_ONE)
        self.assertIn(("vmferry:dirty-b", [65536 - 100, 1]), one)

        # The peer acknowledges: then there is nothing to save any more, on the connection that is open, too.
        a.vmferry("replicate", "resume", "vda")
        self.in_sync(a)
        wait_until(lambda: self.map(image, "vmferry:dirty-b") == [], 10, "all is acknowledged")
        # Without the peer the map would be a guess: the request fails instead of saying "nothing changed".
        a.vmferry("replicate", "stop", "vda")
        with self.assertRaises(nbd.Error):
            handle.block_status(MIB, 0, lambda *_: 0)
        self.assertEqual(self.contexts(image), ["base:allocation"])

    def test_listing_takes_the_namespace_as_a_wildcard(self):
        _, _, image = self.start()
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.set_export_name("vda")
        handle.add_meta_context("vmferry:")
        handle.connect_unix(str(self.socket(image)))
        names = []
        handle.opt_list_meta_context(lambda name: names.append(name) and 0)
        self.assertEqual(names, ["vmferry:dirty-b", "vmferry:epoch"])
        handle.opt_abort()

    def test_qemu_10_reads_the_map_as_a_dirty_bitmap_with_extended_headers(self):
        _, _, image = self.start()
        self.qemu_io(image, "write -P 9 3M 192k")
        options = (f"driver=nbd,export=vda,server.type=unix,server.path={self.socket(image)},"
                   "x-dirty-bitmap=vmferry:dirty-b")
        areas = json.loads(run(BUILD.qemu_bin("10") / "qemu-img", "map", "--output=json", "--image-opts", options).stdout)
        # QEMU shows bit 0 of such a context as "no data".
        self.assertEqual([(area["start"], area["length"]) for area in areas if not area["data"]], [(3 * MIB, 192 * 1024)])

    def test_the_incremental_backup_of_the_documentation_gives_the_disk_as_it_is(self):
        _, _, image = self.start()
        backup = self.folder / "backup.img"
        shutil.copy(self.folder / "b-vda.img", backup)  # the copy, which stands still at its epoch: the full backup
        self.qemu_io(image, "write -P 7 0 1M", "write -P 8 5000000 3000", "write -z 2M 1M", "write -P 9 15M 1M", "flush")
        self.assertNotEqual(digest(backup), digest(image))
        source = nbd.NBD()
        source.connect_uri(self.uri(image))
        read = 0
        with open(backup, "r+b") as file:
            for offset, length in self.map(image, "vmferry:dirty-b"):
                file.seek(offset)
                file.write(source.pread(length, offset))
                read += length
        self.assertEqual(digest(backup), digest(image))
        self.assertEqual(read, 3 * MIB + 2 * BLOCK, "and no more than that was read")

    def test_a_restart_of_the_daemon_forgets_nothing(self):
        a, _, image = self.start()
        self.qemu_io(image, "write -P 7 6M 1M")
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(self.map(image, "vmferry:dirty-b"), [(6 * MIB, MIB)])


if __name__ == "__main__":
    unittest.main(verbosity=2)
