# SPDX-License-Identifier: Apache-2.0
"""A running guest on vhost-user-blk moves between two daemons, there and back.

What is new against NBD: the back-end writes into the guest's memory, so QEMU has to be told of every page (the dirty
log), and the rings are stopped and continued at the other side. VMFERRY_MIGRATIONS: how many in a row (default 2).
"""

import os
import shutil
import tempfile
import time
import unittest
from pathlib import Path

from vmlib import Build, Lab, Workload, wait_until

BUILD = Build()
# Reads count here: the disk's files are read again and again into memory that is being migrated.
LOAD = Workload(mode="file", area="32M", hot="4M", mem="64M", warm="64M")


class VhostMigrationTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-vhost-migration-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def check(self, **disk_options) -> None:
        count = int(os.environ.get("VMFERRY_MIGRATIONS", "2"))
        with Lab(self.folder, BUILD, disk_size="256M", fill="100M", memory_mb=256, workload=LOAD, rate="1Gbit",
                 rtt="20ms", vhost=True, disk_options=disk_options) as lab:
            lab.start_guest("a")
            here, there = "a", "b"
            for number in range(count):
                time.sleep(1)
                outcome = lab.migrate(here, there, "--quit-source", "--timeout", "2m")
                self.assertEqual(outcome.status, 0, (number, outcome.result, outcome.stderr))
                self.assertEqual((outcome.result["result"], outcome.result["owner"], outcome.result["guest"]),
                                 ("done", "peer", "running-peer"))
                wait_until(lambda: not lab.guests[here].alive(), 20, "the source QEMU ended")
                print(f"migration {number + 1}: {outcome.seconds:.1f} s, gap {outcome.gap_ms:.0f} ms")
                self.assertLess(outcome.gap_ms, 2000, outcome)
                shown = lab.daemons[there].vmferry("volume", "show", "vda")
                self.assertEqual(shown["vhost_user_blk"]["errors"], 0, shown)
                here, there = there, here
            found = lab.check(here)
            self.assertTrue(found["ok"], found)
            self.assertGreater(found["acknowledged"], 100, found)
            self.assertEqual(found["found"], found["acknowledged"], found)

    def test_disks_in_another_order_are_refused(self):
        # QEMU does not list such disks as block devices: unseen, each would go on with the content of the other.
        with Lab(self.folder, BUILD, disk_size="64M", fill=None, volumes=2, memory_mb=256, rate="1Gbit", rtt="20ms",
                 workload=Workload(area="16M", hot="4M", mem="16M"), vhost=True) as lab:
            lab.start_guest("a")
            lab.names.reverse()
            outcome = lab.migrate("a", "b", "--timeout", "1m")
            lab.names.reverse()
            self.assertEqual((outcome.status, outcome.result["result"], outcome.result["guest"]),
                             (1, "failed", "running-source"), outcome)
            self.assertIn("is on volume 'vda' here and on 'vdb'", outcome.result["error"])
            # In the other order of names another volume's connection asks QEMU, which talks to one client at a time.
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", "2m")
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            found = lab.check("b")
            self.assertTrue(found["ok"], found)
            self.assertEqual(found["found"], found["acknowledged"], found)

    def test_there_and_back_with_a_split_ring(self):
        # A log that is switched on only the first time lets the second migration lose memory.
        self.check(queues=2)

    def test_there_and_back_with_a_packed_ring(self):
        # Its position is one number with two wrap counters, carried in QEMU's stream.
        self.check(packed=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
