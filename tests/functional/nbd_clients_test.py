#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The NBD export against clients of other makes: nbdinfo, nbdcopy, qemu-img, qemu-io, fio, libnbd.

What they refuse or misread shows nowhere in our own tests. VMFERRY_BIN names the folder of the binaries.
"""

import errno
import filecmp
import json
import os
import sys
import tempfile
import unittest

import nbd

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from nbd_support import Server, run  # noqa: E402
from vmlib import Build  # noqa: E402

MIB = 1 << 20
SIZE = 64 * MIB


def make_image(path):
    """64 MiB: data, a hole, data of a pattern, a hole to the end."""
    with open(path, "wb") as file:
        file.write(os.urandom(3 * MIB))
        file.seek(20 * MIB)
        file.write(b"vmferry!" * (MIB // 8))
        file.truncate(SIZE)


class FileExport(unittest.TestCase):
    """A raw file, once through the page cache and once with O_DIRECT."""

    options = ()

    def setUp(self):
        self.server = Server("vda=DIR/disk.img", "spare=ram:1048576", options=self.options)
        make_image(self.server.path("disk.img"))
        self.server.__enter__()
        self.addCleanup(self.server.__exit__, None, None, None)
        self.image = self.server.path("disk.img")

    def test_nbdinfo_sees_the_export_as_it_is(self):
        for uri in (self.server.uri("vda"), self.server.uri(), self.server.tcp_uri("vda")):
            export = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
            self.assertEqual(export["export-size"], SIZE)
            self.assertEqual(export["contexts"], ["base:allocation"])
            self.assertEqual(export["description"], "test vda")
            self.assertEqual(export["block_size_maximum"], 32 * MIB)
            self.assertEqual(export["block_size_minimum"], 1)
            for name in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
                self.assertTrue(export[f"can_{name}"], name)
            self.assertFalse(export["is_read_only"])

    def test_nbdinfo_lists_every_export(self):
        listed = json.loads(run("nbdinfo", "--json", "--list", self.server.uri()).stdout)["exports"]
        self.assertEqual([export["export-name"] for export in listed], ["vda", "spare"])

    def test_nbdinfo_map_finds_the_holes(self):
        extents = json.loads(run("nbdinfo", "--json", "--map", self.server.uri("vda")).stdout)
        self.assertEqual(sum(extent["length"] for extent in extents), SIZE)
        holes = {extent["offset"]: extent["length"] for extent in extents if extent["type"] == 3}
        self.assertEqual(holes, {3 * MIB: 17 * MIB, 21 * MIB: 43 * MIB})

    def test_nbdcopy_reads_and_writes_the_whole_disk(self):
        copy = self.server.path("copy.img")
        run("nbdcopy", self.server.uri("vda"), copy)
        self.assertTrue(filecmp.cmp(copy, self.image, shallow=False))
        other = self.server.path("other.img")
        with open(other, "wb") as file:
            file.write(os.urandom(SIZE))
        for flags in (["--connections=4", "--requests=64"], ["--synchronous"]):
            run("nbdcopy", *flags, other, self.server.uri("vda"))
            self.assertTrue(filecmp.cmp(other, self.image, shallow=False))
            with open(other, "r+b") as file:
                file.write(os.urandom(MIB))

    def test_qemu_img_compares_and_converts(self):
        uri = self.server.uri("vda")
        copy = self.server.path("copy.img")
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, copy)
        with open(copy, "r+b") as file:
            file.write(b"different")
        self.assertEqual(run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, copy, check=False).returncode, 1)
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", copy, uri)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, copy)
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout)
        self.assertEqual(mapped[-1]["start"] + mapped[-1]["length"], SIZE)

    def test_qemu_io_writes_patterns_zeroes_and_discards(self):
        result = run("qemu-io", "-f", "raw", "-t", "none", self.server.uri("vda"),
                     "-c", "write -P 0xa5 1M 1M", "-c", "read -P 0xa5 1M 1M",
                     "-c", "write -P 0x11 4097 511", "-c", "read -P 0x11 4097 511",
                     "-c", "write -z -u 1M 64k", "-c", "read -P 0 1M 64k", "-c", "read -P 0xa5 1088k 64k",
                     "-c", "discard 1536k 64k", "-c", "read -P 0 1536k 64k", "-c", "write -f -P 0x77 2M 4k",
                     "-c", "flush", "-c", "read -P 0x77 2M 4k")
        self.assertNotIn("failed", result.stdout + result.stderr)
        with open(self.image, "rb") as file:
            file.seek(2 * MIB)
            self.assertEqual(file.read(4096), b"\x77" * 4096)

    def test_qemu_10_uses_extended_headers_for_effects_beyond_4_gib(self):
        # With 32-bit lengths a 9 GiB zero write is refused by qemu-io (-n: not split) or cut in pieces.
        qemu = Build().qemu_bin("10")
        image = self.server.path("big.img")
        server = Server(f"big={image}", options=self.options)
        with open(image, "wb") as file:
            file.truncate(12 << 30)
        with server:
            result = run(qemu / "qemu-io", "-f", "raw", "-c", "write -P 7 5G 1M", "-c", "write -n -z -u 1G 9G",
                         "-c", "read -P 0 5G 1M", "-c", "write -P 9 11G 4k", server.uri("big"))
            self.assertNotIn("failed", result.stdout + result.stderr)
            self.assertNotIn("cannot", result.stdout + result.stderr)
            areas = json.loads(run(qemu / "qemu-img", "map", "--output=json", server.uri("big")).stdout)
            self.assertEqual([(area["start"], area["data"]) for area in areas],
                             [(0, False), (11 << 30, True), ((11 << 30) + 4096, False)])

    def test_discard_frees_space_and_no_hole_keeps_it(self):
        handle = nbd.NBD()
        handle.connect_uri(self.server.uri("vda"))
        handle.pwrite(b"x" * 8 * MIB, 32 * MIB)
        handle.flush()
        full = os.stat(self.image).st_blocks
        handle.zero(4 * MIB, 32 * MIB, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        self.assertGreaterEqual(os.stat(self.image).st_blocks, full - 64)
        handle.trim(4 * MIB, 36 * MIB, nbd.CMD_FLAG_FUA)
        self.assertLessEqual(os.stat(self.image).st_blocks, full - 4 * MIB // 512 + 64)
        self.assertEqual(handle.pread(8 * MIB, 32 * MIB), bytes(8 * MIB))
        handle.shutdown()

    def test_fio_verifies_random_writes(self):
        with tempfile.TemporaryDirectory() as folder:  # fio leaves a state file where it runs
            run("sh", "-c", f"cd {folder} && exec fio --name=v --ioengine=nbd --uri='{self.server.uri('vda')}' "
                "--rw=randwrite --bsrange=512-64k --bs_unaligned --size=64m --io_size=48m --iodepth=32 "
                "--verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --randseed=7")


class DirectFileExport(FileExport):
    options = ("--cache", "none")


class Libnbd(unittest.TestCase):
    """Single commands, flags and errors through libnbd."""

    @classmethod
    def setUpClass(cls):
        cls.server = Server("ram=ram:67108864", "failing=ram:16777216:failing", "ro=ram:1048576",
                            options=("--read-only", "ro"))
        cls.server.__enter__()

    @classmethod
    def tearDownClass(cls):
        cls.server.__exit__(None, None, None)

    def open(self, name, strict=True, structured=True):
        handle = nbd.NBD()
        if not strict:
            handle.set_strict_mode(0)
        handle.add_meta_context("base:allocation")
        handle.set_request_structured_replies(structured)
        handle.connect_uri(self.server.uri(name))
        self.addCleanup(handle.shutdown)
        return handle

    def assertError(self, number, call, *arguments):
        with self.assertRaises(nbd.Error) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.errnum, number, str(caught.exception))

    def test_fast_zero_is_refused_with_content_unchanged(self):
        handle = self.open("ram")
        handle.pwrite(b"keep" * 1024, 0)
        self.assertError(errno.ENOTSUP, handle.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
        self.assertEqual(handle.pread(4096, 0), b"keep" * 1024)
        handle.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
        self.assertEqual(handle.pread(4096, 0), bytes(4096))

    def test_fua_is_accepted_on_every_command(self):
        handle = self.open("ram", strict=False)
        fua = nbd.CMD_FLAG_FUA
        handle.pwrite(b"f" * 4096, 0, fua)
        self.assertEqual(bytes(handle.pread(4096, 0, fua)), b"f" * 4096)
        handle.zero(4096, 0, fua)
        handle.trim(4096, 0, fua)
        handle.cache(4096, 0, fua)
        handle.flush(fua)
        handle.block_status(4096, 0, lambda *arguments: 0, fua)

    def test_df_reads_come_in_one_chunk(self):
        handle = self.open("ram")
        handle.pwrite(b"d" * 65536, 4096)
        for size in (1, 512, 65536, 32 * MIB):
            chunks = []
            handle.pread_structured(size, 4096, lambda data, offset, status, error: chunks.append((len(data), offset)),
                                    nbd.CMD_FLAG_DF)
            self.assertEqual(chunks, [(size, 4096)])

    def test_req_one_gives_one_extent(self):
        handle = self.open("ram")
        seen = []
        handle.block_status(1000, 5, lambda name, offset, extents, error: seen.append((name, offset, extents)),
                            nbd.CMD_FLAG_REQ_ONE)
        self.assertEqual(seen, [("base:allocation", 5, [1000, 0])])

    def test_payload_of_32_mib_in_both_directions(self):
        handle = self.open("ram")
        data = os.urandom(MIB) * 32
        handle.pwrite(data, 17)
        self.assertEqual(bytes(handle.pread(32 * MIB, 17)), data)

    def test_wrong_requests_get_the_right_error_and_the_session_goes_on(self):
        for structured in (True, False):
            handle = self.open("ram", strict=False, structured=structured)
            size = handle.get_size()
            self.assertError(errno.EINVAL, handle.pread, 512, size)
            self.assertError(errno.ENOSPC, handle.pwrite, b"x" * 512, size - 511)
            self.assertError(errno.ENOSPC, handle.zero, 512, size)
            self.assertError(errno.EINVAL, handle.trim, 512, size)
            self.assertError(errno.EINVAL, handle.cache, 512, size)
            handle.pwrite(b"ok" * 256, 0)
            self.assertEqual(bytes(handle.pread(512, 0)), b"ok" * 256)

    def test_errors_of_the_disk_arrive_as_they_are(self):
        for structured in (True, False):
            handle = self.open("failing", structured=structured)
            for mebibyte, number in enumerate((errno.EIO, errno.ENOSPC, errno.EPERM, errno.ENOMEM, errno.EIO)):
                self.assertError(number, handle.pread, 4096, mebibyte * MIB)
                self.assertError(number, handle.pwrite, b"x" * 4096, mebibyte * MIB)
                self.assertError(number, handle.trim, 4096, mebibyte * MIB)
                self.assertError(number, handle.cache, 4096, mebibyte * MIB)
            handle.pwrite(b"x" * 4096, 8 * MIB)
            self.assertEqual(bytes(handle.pread(4096, 8 * MIB)), b"x" * 4096)

    def test_read_only_export_refuses_writes(self):
        handle = self.open("ro", strict=False)
        self.assertTrue(handle.is_read_only())
        self.assertError(errno.EPERM, handle.pwrite, b"x", 0)
        self.assertError(errno.EPERM, handle.zero, 1, 0)
        self.assertError(errno.EPERM, handle.trim, 1, 0)
        self.assertEqual(bytes(handle.pread(1, 0)), b"\0")

    def test_unknown_export_and_option_leave_the_handshake_usable(self):
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_uri(self.server.uri("nosuch"))
        with self.assertRaises(nbd.Error):
            handle.opt_go()
        handle.set_export_name("ram")
        handle.opt_go()
        self.assertEqual(handle.get_size(), 64 * MIB)
        handle.shutdown()


if __name__ == "__main__":
    unittest.main(verbosity=2)
