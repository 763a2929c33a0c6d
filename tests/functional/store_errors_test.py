#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The backing store fails: the guest gets the right error, the log names volume and offset, and the daemon lives on.

Root only: the file system that fills up is a small tmpfs.
"""

import os
import unittest

import nbd

from daemon_support import BUILD, MIB, Daemon, DaemonCase, digest, new_address, pair, run, wait_until


class StoreErrorCase(DaemonCase):
    def expect_error(self, name: str, call, *arguments) -> None:
        with self.assertRaises(nbd.Error) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.errno, name)

    def tmpfs(self, size: str):
        folder = self.path("small")
        folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={size}", "vmferry-test", folder)
        self.addCleanup(run, "umount", "-l", folder)
        return folder


class StoreErrors(StoreErrorCase):
    def test_a_full_file_system_gives_enospc_and_goes_on_when_there_is_room(self):
        # QEMU stops the guest at ENOSPC and lets the operator make room; any other error reaches the guest's disk driver.
        folder = self.tmpfs("8M")
        image = folder / "thin.img"
        run("truncate", "-s", "64M", image)
        filler = folder / "filler"
        filler.write_bytes(b"f" * 4 * MIB)
        fine = self.image("fine.img", 4 * MIB)
        a = self.daemon("a", f"name=vda,path={image},nbd=unix:{self.path('vda.nbd')}", self.volume("vdb", fine))
        client = nbd.NBD()
        client.connect_unix(str(self.path("vda.nbd")))
        self.addCleanup(self.disconnect, client)
        client.pwrite(b"a" * MIB, 0)
        self.expect_error("ENOSPC", lambda: [client.pwrite(b"b" * MIB, n * MIB) for n in range(1, 16)])
        self.assertEqual(client.pread(MIB, 0), bytearray(b"a" * MIB))
        self.nbd_client(fine, "vdb").pwrite(b"x" * 4096, 0)  # the other volume does not notice
        self.wait_log(a, "No space left on device")
        line = next(line for line in a.log().splitlines() if "No space" in line)
        self.assertIn("thin.img", line)
        self.assertRegex(line, r"offset=\d+")
        filler.unlink()
        client.pwrite(b"c" * MIB, 20 * MIB)
        client.flush()
        self.assertEqual(client.pread(MIB, 20 * MIB), bytearray(b"c" * MIB))

    def test_a_file_that_shrinks_gives_eio_and_never_zeroes(self):
        # Silent zeroes look like a fresh disk to the guest's file system, which then repairs itself to death.
        for cache in ("writeback", "none"):
            with self.subTest(cache=cache):
                image = self.image(f"shrink-{cache}.img", 8 * MIB, data=8 * MIB)
                a = self.daemon(f"a-{cache}", self.volume("vda", image, f"cache={cache}"))
                client = self.nbd_client(image)
                before = client.pread(4096, 0)
                os.truncate(image, 5 * MIB + 1000)
                self.assertEqual(client.pread(4096, 0), before)
                self.expect_error("EIO", client.pread, 4096, 6 * MIB)
                self.expect_error("EIO", client.pread, 8192, 5 * MIB)  # a short read in the middle
                self.expect_error("EIO", client.pwrite, b"x" * 4096, 7 * MIB)
                self.expect_error("EIO", client.zero, 4096, 7 * MIB)
                self.assertEqual(os.stat(image).st_size, 5 * MIB + 1000, "a write must not make the file grow again")
                client.pwrite(b"y" * 4096, MIB)
                self.assertEqual(client.pread(4096, MIB), bytearray(b"y" * 4096))
                self.wait_log(a, "shorter than when it was opened")
                self.assertIn(image.name, next(line for line in a.log().splitlines() if "shorter than" in line))
                self.assertEqual(a.vmferry("status")["volumes"][0]["name"], "vda")

    def test_a_read_only_file_is_refused_with_the_reason(self):
        # Found at the guest's first write it would be a broken guest instead of a message.
        folder = self.tmpfs("4M")
        image = folder / "ro.img"
        image.write_bytes(b"r" * MIB)
        run("mount", "-o", "remount,ro", folder)
        a = self.daemon("a")
        error = self.refused(a, "volume", "add", f"name=vda,path={image}")
        self.assertIn("Read-only file system", error)
        self.assertIn(str(image), error)

    def test_a_copy_without_room_says_so_and_goes_on_when_there_is_some(self):
        # The peer's disk filling up is the most ordinary failure of replication; both sides have to name it.
        folder = self.tmpfs("16M")
        (folder / "filler").write_bytes(b"f" * 10 * MIB)
        image, copy = self.image("a-vda.img", 32 * MIB, data=12 * MIB), folder / "b-vda.img"
        run("truncate", "-s", str(32 * MIB), copy)
        b = self.daemon("b", f"name=vda,path={copy},role=secondary", listen=new_address())
        a = self.daemon("a", self.volume("vda", image), listen=new_address())
        pair(a, b)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        status = wait_until(lambda: (s := a.replication("vda"))["state"] == "degraded" and s, 20, "degraded")
        self.assertIn("No space left on device", status["reason"])
        self.assertIn("No space left on device", b.replication("vda")["reason"])
        self.wait_log(b, "No space left on device")
        self.qemu_io(image, "write -P 0x5a 20M 64k")  # the guest is not held up
        (folder / "filler").unlink()
        self.in_sync(a, timeout="60s")
        self.assertEqual(digest(image), digest(copy))
        self.assertEqual(a.replication("vda")["reason"], "")

    def test_a_full_state_folder_does_not_fail_the_guest(self):
        # Roles and peers on a full /var must not stop the disks.
        folder = self.tmpfs("16M")
        image = self.image("one.img", 4 * MIB)
        a = Daemon("a", folder, BUILD, [self.volume("vda", image)])
        self.daemons.append(a)
        a.start()
        client = self.nbd_client(image)
        with self.assertRaises(OSError), open(folder / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"f" * 4096)
        client.pwrite(b"x" * 4096, 0)
        client.flush()
        self.assertEqual(client.pread(4096, 0), bytearray(b"x" * 4096))
        self.assertEqual(a.volume_status("vda")["may_run"], True)

    def test_a_dead_disk_does_not_keep_the_daemon_from_stopping(self):
        # SIGTERM that never ends, because one of twenty disks is gone, takes the other nineteen with it.
        sick, well = self.image("sick.img", 8 * MIB, data=8 * MIB), self.image("well.img", 8 * MIB)
        a = self.daemon("a", self.volume("vda", sick), self.volume("vdb", well))
        self.nbd_client(well, "vdb").pwrite(b"w" * 4096, 4096)
        os.truncate(sick, 0)
        client = self.nbd_client(sick)
        self.expect_error("EIO", client.pread, 4096, 0)
        self.assertEqual(a.stop(timeout=15), 0)
        self.assertEqual(well.read_bytes()[4096:8192], b"w" * 4096)


class BlockDevices(StoreErrorCase):
    """path= is a disk and no file: a loop device, which fails as its backing file does."""

    def loop(self, backing) -> str:
        device = run("losetup", "--find", "--show", backing).stdout.strip()
        self.addCleanup(run, "losetup", "--detach", device)
        return device

    def served(self, device: str, cache: str):
        a = self.daemon(f"on-{cache}", f"name=vda,path={device},cache={cache},nbd=unix:{self.socket(self.path(cache))}")
        return a, self.path(cache)

    def test_a_disk_is_served_with_its_own_size_and_content(self):
        # Size, zeroing and durability come from other calls than those of a file.
        for cache in ("writeback", "none"):
            with self.subTest(cache=cache):
                image = self.image(f"disk-{cache}.img", 16 * MIB, data=MIB)
                before = image.read_bytes()[:MIB]
                device = self.loop(image)
                a, path = self.served(device, cache)
                shown = a.vmferry("volume", "show", "vda")
                self.assertEqual((shown["size"], shown["path"]), (16 * MIB, device))
                self.assertIn("in use", self.refused(
                    self.daemon(f"other-{cache}"), "volume", "add", f"name=vda,path={device}"))
                self.qemu_io(path, "write -P 0x5a 4M 1M", "write -f -P 0x5b 5000 300", "write -z 8M 1M", "discard 9M 1M",
                             "flush", "read -P 0x5a 4M 1M", "read -P 0x5b 5000 300", "read -P 0 8M 1M")
                client = self.nbd_client(path)
                self.assertEqual(client.pread(5000, 0), before[:5000])
                client.pwrite(b"end!" * 128, 16 * MIB - 512, nbd.CMD_FLAG_FUA)
                # FUA: on the disk itself by now, whatever is in caches above it.
                on_disk = run("dd", f"if={image}", "bs=512", f"skip={16 * MIB // 512 - 1}", "count=1", "iflag=direct", text=False)
                self.assertEqual(on_disk.stdout, b"end!" * 128)
                self.disconnect(client)
                self.assertEqual(a.stop(), 0)
                content = image.read_bytes()
                self.assertEqual(content[:5000] + content[5300:MIB], before[:5000] + before[5300:])
                self.assertEqual(content[4 * MIB:5 * MIB], b"\x5a" * MIB)

    def test_a_disk_that_fails_gives_eio_there_and_only_there(self):
        # Half of the platter is gone: the guest has to be told which reads failed, and must never get zeroes for them.
        image = self.image("sick.img", 16 * MIB, data=16 * MIB)
        good = image.read_bytes()
        device = self.loop(image)
        a, path = self.served(device, "none")
        client = self.nbd_client(path)
        os.truncate(image, 8 * MIB)  # the loop device keeps its 16 MiB and has nothing behind 8
        self.assertEqual(int(run("blockdev", "--getsize64", device).stdout), 16 * MIB)
        for offset in (8 * MIB, 12 * MIB + 512, 16 * MIB - 4096):
            self.expect_error("EIO", client.pread, 4096, offset)
        self.assertEqual(client.pread(MIB, 7 * MIB), good[7 * MIB:8 * MIB])
        done = self.qemu_io(path, "read 12M 64k", check=False)
        self.assertIn("Input/output error", done.stdout + done.stderr)
        self.qemu_io(path, "read 4M 64k", "write -P 0x11 1M 64k", "flush", "read -P 0x11 1M 64k")
        self.wait_log(a, "Input/output error")
        line = next(line for line in a.log().splitlines() if "Input/output error" in line)
        self.assertIn(device, line)
        self.assertIn(str(8 * MIB), line)
        self.assertEqual(a.volume_status("vda")["may_run"], True)
        # The disk is back: so is the volume, without a restart.
        with open(image, "r+b") as file:
            file.seek(8 * MIB)
            file.write(good[8 * MIB:])
        self.assertEqual(client.pread(MIB, 12 * MIB), good[12 * MIB:13 * MIB])

    def test_a_disk_that_loses_a_cached_write_fails_the_flush_and_every_later_one(self):
        # The kernel tells of it once. A flush that succeeds afterwards would be a lie about data that is nowhere.
        folder = self.tmpfs("4M")
        backing = folder / "thin.img"
        run("truncate", "-s", "64M", backing)
        device = self.loop(backing)
        a, path = self.served(device, "writeback")
        client = self.nbd_client(path)
        client.pwrite(b"a" * MIB, 0)
        client.flush()
        for number in range(1, 9):
            client.pwrite(b"b" * MIB, number * MIB)  # into the page cache, which has room
        for _ in range(2):
            with self.assertRaises(nbd.Error) as caught:
                client.flush()
            self.assertIn(caught.exception.errno, ("EIO", "ENOSPC"))
        self.assertEqual(client.pread(MIB, 0), b"a" * MIB)
        self.assertEqual(a.volume_status("vda")["state"], "ready")
        self.wait_log(a, device)
        self.assertEqual(a.stop(), 1, "nor does the end of the daemon claim that all is well")


class Engines(DaemonCase):
    PATTERNS = ["write -P 0x11 0 64k", "write -P 0x22 1000 300", "write -P 0x33 4095 2", "write -P 0x44 65000 70001",
                "write -z 200000 5000", "write -P 0x55 1048575 1", "write -P 0x66 2097000 152", "discard 300k 12345",
                "read -P 0x11 0 1000", "read -P 0x22 1000 300", "read -P 0x11 1300 2795", "read -P 0x33 4095 2",
                "read -P 0x11 4097 60903", "read -P 0x44 65000 70001", "read -P 0 200000 5000", "read -P 0x55 1048575 1",
                "read -P 0x66 2097000 152", "flush", "aio_write -P 0x77 1500k 100k", "aio_write -P 0x78 1600k 3k",
                "aio_flush", "read -P 0x77 1500k 100k", "read -P 0x78 1600k 3k"]

    def test_unaligned_requests_hold_in_every_engine_and_cache_mode(self):
        # Read-modify-write of edges is where O_DIRECT loses the neighbour's bytes.
        digests = set()
        for aio in ("io_uring", "libaio"):
            for cache in ("writeback", "none"):
                with self.subTest(aio=aio, cache=cache):
                    image = self.image(f"{aio}-{cache}.img", 2 * MIB + 512)
                    a = self.daemon(f"{aio}-{cache}", self.volume("vda", image, f"aio={aio}", f"cache={cache}"))
                    shown = a.vmferry("volume", "show", "vda")
                    self.assertEqual((shown["aio"], shown["cache"]), (aio, cache))
                    self.assertIn(f"aio={aio} cache={cache}", a.log())
                    self.qemu_io(image, *self.PATTERNS)
                    self.assertEqual(a.stop(), 0)
                    digests.add(digest(image))
        self.assertEqual(len(digests), 1)

    def test_without_io_uring_libaio_takes_over_and_the_log_says_why(self):
        # Containers often forbid io_uring; a daemon that does not start there, or is silently slow, helps nobody.
        source, library = self.path("deny.c"), self.path("deny.so")
        source.write_text("""
#include <errno.h>
#include <liburing.h>
int io_uring_queue_init_params(unsigned n, struct io_uring* r, struct io_uring_params* p) {
  (void)n; (void)r; (void)p;
  return -EPERM;
}
int io_uring_queue_init(unsigned n, struct io_uring* r, unsigned f) { (void)n; (void)r; (void)f; return -EPERM; }
""")
        run("cc", "-shared", "-fPIC", "-o", library, source)
        image = self.image("one.img", 2 * MIB + 512)
        daemon = self.daemon_with(library, self.volume("vda", image))
        self.assertEqual(daemon.vmferry("volume", "show", "vda")["aio"], "libaio")
        self.assertRegex(daemon.log(), r"aio=libaio reason=\".*(EPERM|not permitted)")
        self.qemu_io(image, *self.PATTERNS)

    def daemon_with(self, library, *volumes):
        daemon = Daemon("a", self.folder, BUILD, volumes)
        daemon.command = ["env", f"LD_PRELOAD={library}", *daemon.command]
        self.daemons.append(daemon)
        return daemon.start()


if __name__ == "__main__":
    unittest.main(verbosity=2)
