#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A migration that would never end, because the guest writes more than the link carries, is refused before it begins, with
the numbers; one that ends is not."""

import contextlib
import os
import random
import re
import shutil
import tempfile
import threading
import time
import unittest
from pathlib import Path

import nbd

from daemon_support import MIB, DaemonCase, VmferryError
from vmlib import Build, Lab, Workload

BUILD = Build()
# Records of the guest are to 40 % noise: of 2 MiB/s about 1 MiB/s is left after compression.
LOAD = Workload(mode="raw", disk_rate="2M", area="96M", hot="8M", mem="16M")


class RunningGuest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-load-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def test_what_never_ends_is_refused_with_the_numbers_and_what_ends_is_done(self):
        # Such a migration runs into its time limit after half an hour, and the guest was slow all the while.
        with Lab(self.folder / "lab", BUILD, disk_size="128M", fill=None, memory_mb=192, workload=LOAD, wan=False) as lab:
            a, b = lab.daemons["a"], lab.daemons["b"]
            lab.start_guest("a")
            time.sleep(5)
            before = [(d.volume_status("vda")["term"], d.volume_status("vda")["group"]) for d in (a, b)]
            for options in (["--dry-run"], []):
                outcome = lab.migrate("a", "b", "--bandwidth", "1Mbit", *options)
                self.assertEqual((outcome.status, outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                                 (1, "failed", "source", "running-source"), outcome)
                error = outcome.result["error"]
                found = re.search(r"makes (\d+) bytes per second to send \(disk (\d+), memory not counted\) and the link "
                                  r"carries (\d+) by the bandwidth that it is given: this never ends", error)
                self.assertIsNotNone(found, error)
                total, disk, link = map(int, found.groups())
                self.assertEqual((total, link), (disk, 125_000))
                self.assertGreater(disk, 400_000, error)
                self.assertLess(disk, 2_200_000, error)
                self.assertLess(outcome.seconds, 20)
            # Nothing was changed by that.
            self.assertEqual([(d.volume_status("vda")["term"], d.volume_status("vda")["group"]) for d in (a, b)], before)
            self.assertEqual((a.volume_status("vda")["handover_state"], b.volume_status("vda")["handover_state"]),
                             ("own", "secondary"))
            self.assertEqual(a.vmferry("replicate", "status")["volumes"], [])
            self.assertEqual(a.vmferry("peer", "list")["peers"][0]["rate_limit"], 0)
            self.assertEqual(lab.guests["a"].qmp.status(), "running")
            # Four times what the guest makes: the same load moves.
            outcome = lab.migrate("a", "b", "--bandwidth", "80Mbit", "--quit-source", "--timeout", "3m")
            self.assertEqual((outcome.status, outcome.result["result"]), (0, "done"), (outcome.result, outcome.stderr))
            found = lab.check("b")
            self.assertTrue(found["ok"], found)


class Writers(DaemonCase):
    """Without a QEMU every migration is refused; the question is whether the load is among the reasons."""

    @contextlib.contextmanager
    def writing(self, blocks: int, content):
        """2 MiB/s in blocks of 64 KiB over `blocks` places."""
        stop = threading.Event()

        def write():
            client = nbd.NBD()
            client.connect_uri(self.uri(self.path("a-vda.img")))
            number, due = 0, time.monotonic()
            while not stop.is_set():
                client.pwrite(content(number), number % blocks * 65536)
                number += 1
                due += 1 / 32
                time.sleep(max(0.0, due - time.monotonic()))
            client.shutdown()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            time.sleep(4)
            yield
        finally:
            stop.set()
            writer.join(10)

    def reasons(self, daemon, *options) -> str:
        with self.assertRaises(VmferryError) as caught:
            daemon.vmferry("migrate", "vda", "--peer", "b", "--dry-run", *options)
        error = caught.exception.output["error"]
        self.assertIn("QMP", error)
        return error

    def test_only_distinct_incompressible_bytes_count(self):
        # A false refusal is worse than none: the operator cannot migrate a guest that would have moved.
        a, _ = self.two_daemons(64 * MIB)
        chance = random.Random(3)
        rows = (("noise over the disk", 1024, lambda _: chance.randbytes(65536), True),
                ("one place again and again", 1, lambda _: chance.randbytes(65536), False),
                ("zeroes", 1024, lambda _: bytes(65536), False),
                ("what compresses", 1024, lambda number: (f"line {number} of a log\n" * 4096).encode()[:65536], False))
        for name, blocks, content, refused in rows:
            with self.subTest(name), self.writing(blocks, content):
                (self.assertIn if refused else self.assertNotIn)("never ends", self.reasons(a, "--bandwidth", "1Mbit"))
                if refused:
                    self.assertNotIn("never ends", self.reasons(a, "--bandwidth", "100Mbit"))
                    self.assertNotIn("never ends", self.reasons(a), "the link's rate is not known")
            time.sleep(11)  # none of it is of the last ten seconds any more
        began = time.monotonic()
        self.assertNotIn("never ends", self.reasons(a, "--bandwidth", "1Mbit"), "nobody writes")
        self.assertLess(time.monotonic() - began, 3, "and nobody waits for a closer look")

    def test_the_cap_of_the_replication_is_that_of_the_migration(self):
        # Without --bandwidth the cap that was given before stays, and is what the writes have to fit into.
        a, _ = self.two_daemons(64 * MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s", "--bandwidth", "1Mbit")
        self.in_sync(a)
        chance = random.Random(4)
        with self.writing(1024, lambda _: chance.randbytes(65536)):
            error = self.reasons(a)
            self.assertIn("never ends", error)
            self.assertIn("carries 125000 by the bandwidth", error)
            # What the link carried under the old cap does not speak against a higher one.
            self.assertNotIn("never ends", self.reasons(a, "--bandwidth", "100Mbit"))


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
