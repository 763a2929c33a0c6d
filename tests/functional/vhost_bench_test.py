# SPDX-License-Identifier: Apache-2.0
"""vmferry-vhost-bench, our front-end without QEMU, against vmferryd and against qemu-storage-daemon."""

import json
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from vmlib import Build, Daemon, wait_until

BUILD = Build()
BENCH = BUILD.bin / "vmferry-vhost-bench"


class BenchTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-bench-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.image = self.folder / "disk.img"
        with open(self.image, "wb") as file:
            file.truncate(64 << 20)
        self.socket = self.folder / "disk.vhost"

    def load(self, *words, status: int = 0) -> dict:
        done = subprocess.run([BENCH, "--socket", self.socket, "--seconds", "0.5", *words], text=True,
                              capture_output=True, timeout=120, check=False)
        self.assertEqual(done.returncode, status, (words, done.stderr, done.stdout))
        return json.loads(done.stdout) if status == 0 else {"error": done.stderr}

    def check(self, figures: dict) -> None:
        self.assertEqual((figures["errors"], figures["mismatches"]), (0, 0), figures)
        self.assertGreater(figures["requests"], 50, figures)
        self.assertGreater(figures["verified"], 10, figures)
        self.assertGreaterEqual(figures["latency_us"]["p99"], figures["latency_us"]["p50"])

    def test_content_through_vmferryd(self):
        # Every ring layout, several queues and both caches of the store, with every written byte compared.
        for cache in ("writeback", "none"):
            with self.subTest(cache=cache), Daemon("a", self.folder, BUILD, [
                    f"name=vda,path={self.image},vhost-user-blk={self.socket},queues=4,cache={cache}"]) as daemon:
                for words in ([], ["--packed"], ["--no-event-idx"], ["--packed", "--no-event-idx"], ["--queues", "4"],
                              ["--queues", "4", "--packed"], ["--block", "128K", "--depth", "8"], ["--block", "512"]):
                    with self.subTest(words=words):
                        self.check(self.load("--pattern", "randrw", "--verify", "--area", "16M", *words))
                figures = self.load("--pattern", "randread", "--queues", "2")
                share = figures["requests_of_queue"][0] / figures["requests"]
                # Neither starves; how even they are is measured on a quiet machine.
                self.assertTrue(0.1 < share < 0.9, figures["requests_of_queue"])
                shown = daemon.vmferry("volume", "show", "vda")["vhost_user_blk"]
                self.assertEqual((shown["errors"], shown["broken_queues"], shown["inflight"]), (0, 0, 0), shown)
            shutil.rmtree(daemon.state_dir)

    def test_qemu_storage_daemon_is_loaded_the_same_way(self):
        # A front-end that only works with our own back-end would measure our own misunderstandings.
        server = subprocess.Popen([
            BUILD.qemu_bin("10") / "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=file,filename={self.image}",
            "--blockdev", "driver=raw,node-name=disk,file=file",
            "--export", f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={self.socket},writable=on,"
                        "num-queues=2"])
        try:
            wait_until(self.socket.exists, 20, "the socket")
            self.check(self.load("--pattern", "randrw", "--verify", "--area", "16M"))
            self.check(self.load("--pattern", "randrw", "--verify", "--area", "16M", "--queues", "2"))
        finally:
            server.terminate()
            server.wait(20)

    def test_wrong_use_says_what_is_wrong(self):
        self.assertIn("No such file", self.load(status=1)["error"])
        self.assertIn("--queue-size", self.load("--depth", "64", "--queue-size", "32", status=2)["error"])
        with Daemon("a", self.folder, BUILD, [f"name=vda,path={self.image},vhost-user-blk={self.socket},queues=1"]):
            self.assertIn("1 queues", self.load("--queues", "2", status=1)["error"])
            self.assertIn("512", self.load("--block", "100", status=1)["error"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
