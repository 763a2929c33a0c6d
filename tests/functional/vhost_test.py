# SPDX-License-Identifier: Apache-2.0
"""A QEMU guest on vhost-user-blk: every ring layout, several queues, and a daemon that is killed under load.

VMFERRY_VHOST_KILLS: how often (default 3, the long campaign 20).
"""

import os
import shutil
import statistics
import tempfile
import time
import unittest
from pathlib import Path

from vmlib import Build, Collector, Daemon, Guest, VhostDisk, Workload, wait_until

BUILD = Build()


class VhostCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-vhost-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.image = self.folder / "vda.img"
        self.socket = self.folder / "vda.vhost"

    def daemon(self, queues: int = 4) -> Daemon:
        with open(self.image, "ab") as file:
            file.truncate(128 << 20)
        return Daemon("a", self.folder, BUILD, [f"name=vda,path={self.image},vhost-user-blk={self.socket},queues={queues}"])

    def guest(self, collector, version: str = "10", disk_rate: str = "2M", **disk) -> Guest:
        workload = Workload(area="96M", hot="8M", mem="16M", disk_rate=disk_rate)
        return Guest("a", self.folder, BUILD.qemu(version), BUILD.guest_image(), collector,
                     [VhostDisk(self.socket, **disk)], workload=workload, memory_mb=256, cpus=2)

    def assert_nothing_lost(self, collector, least: int) -> None:
        self.assertEqual(collector.errors(), [])
        found = BUILD.verify(self.image, collector.log_path)
        self.assertTrue(found["ok"], found)
        self.assertGreater(found["acknowledged"], least, found)
        self.assertEqual(found["found"], found["acknowledged"], found)


class RingsTest(VhostCase):
    def check(self, version: str = "10", **disk) -> None:
        with self.daemon(disk.get("queues", 1)) as daemon, Collector(self.folder / "collect") as collector:
            shown = daemon.vmferry("volume", "show", "vda")
            self.assertEqual(shown["exports"], [f"vhost-user-blk:{self.socket}"])
            with self.guest(collector, version, **disk) as guest:
                guest.wait_started()
                time.sleep(2)
                pages, bad = guest.verify_memory()
                guest.stop_load()
                shown = daemon.vmferry("volume", "show", "vda")
                self.assertEqual(shown["connections"], 1)
            self.assertGreater(pages, 0)
            self.assertEqual(bad, 0)
            figures = shown["vhost_user_blk"]
            self.assertEqual((figures["errors"], figures["broken_queues"], figures["inflight"]), (0, 0, 0), figures)
            self.assertGreater(shown["written_bytes"], 1 << 20)
            wait_until(lambda: daemon.vmferry("volume", "show", "vda")["connections"] == 0, 5, "the guest is gone")
            print(f"QEMU {version} {disk}: {figures}")
            self.assert_nothing_lost(collector, 200)
            return figures

    def test_split_ring_with_one_queue(self):
        # What every guest since 2016 uses.
        self.check()

    def test_packed_ring_with_one_queue(self):
        # The layout of newer guests: another reading of every descriptor.
        self.check(packed=True)

    def test_four_queues_split(self):
        # A queue that is never looked at leaves the requests of one processor waiting for ever.
        figures = self.check(queues=4)
        self.assertGreaterEqual(sum(1 for count in figures["requests_of_queue"] if count > 0), 2, figures)

    def test_four_queues_packed(self):
        self.check(queues=4, packed=True)

    def test_without_indirect_descriptors_and_event_index(self):
        # Long chains through the ring itself, and the old way to ask for notifications.
        self.check(options=",indirect_desc=off,event_idx=off")

    def test_the_qemu_of_debian_12(self):
        # 7.2 speaks the protocol without the later features: no status, rings enabled another way.
        self.check(version="system")


class RestartTest(VhostCase):
    def check(self, **disk) -> None:
        kills = int(os.environ.get("VMFERRY_VHOST_KILLS", "3"))
        daemon = self.daemon().start()
        self.addCleanup(daemon.kill)
        with Collector(self.folder / "collect") as collector, self.guest(collector, disk_rate="16M", **disk) as guest:
            guest.wait_started()
            restarts = []
            for number in range(kills):
                time.sleep(1)
                daemon.kill()
                time.sleep(0.2 * number)
                acknowledged = len(collector.errors())
                began = time.monotonic()
                daemon.start()
                wait_until(lambda: daemon.vmferry("volume", "show", "vda")["vhost_user_blk"]["requests"] > 0, 30,
                           "requests after the restart")
                # The command line and its polling are in this figure too.
                seconds = time.monotonic() - began
                print(f"kill {number + 1}: first request {seconds * 1000:.0f} ms after exec")
                restarts.append(seconds)
                self.assertEqual(len(collector.errors()), acknowledged)
            # With the command line and a busy machine in it; what each took is printed above.
            self.assertLess(statistics.median(restarts), 1.5, restarts)
            time.sleep(1)
            # An orderly restart goes the same way.
            self.assertEqual(daemon.stop(), 0)
            daemon.start()
            time.sleep(1)
            pages, bad = guest.verify_memory()
            guest.stop_load()
            self.assertGreater(pages, 0)
            self.assertEqual(bad, 0)
            self.assertTrue(guest.alive())
        self.assertEqual(daemon.stop(), 0)
        self.assert_nothing_lost(collector, 300)
        for word in ("I/O error", "Buffer I/O", "blk_update_request"):
            self.assertNotIn(word, guest.console())

    def test_killed_under_load_with_a_split_ring(self):
        # The daemon dies with requests in flight: the guest must see a pause, no error, and nothing may be missing.
        self.check(queues=2)

    def test_killed_under_load_with_a_packed_ring(self):
        # Nobody but the in-flight region knows how far a packed ring was.
        self.check(queues=2, packed=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
