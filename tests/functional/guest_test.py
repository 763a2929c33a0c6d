# SPDX-License-Identifier: Apache-2.0
"""The test guest itself: what it reports is true, and what is wrong is seen.

Every other test with a guest relies on this: a verifier that cannot fail, or a memory check that never fires, would
make all of them pass. So most of the tests here plant a fault.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from vmlib import Build, Collector, Guest, NbdDisk, RawDisk, Workload, wait_until

RECORD = 4096
BUILD = Build()


def record_at(image: Path, slot: int) -> bytes:
    with open(image, "rb") as file:
        file.seek(slot * RECORD)
        return file.read(RECORD)


def put_at(image: Path, slot: int, data: bytes) -> None:
    with open(image, "r+b") as file:
        file.seek(slot * RECORD)
        file.write(data)


def used_slots(image: Path):
    data = image.read_bytes()
    return [i for i in range(len(data) // RECORD) if any(data[i * RECORD:i * RECORD + 8])]


class BrokenDisk:
    """A raw file of which one record cannot be written."""

    def __init__(self, path: Path, slot: int):
        self.path, self.slot = path, slot

    def blockdev(self, node: str) -> str:
        return json.dumps({
            "driver": "blkdebug", "node-name": node, "image": {"driver": "file", "filename": str(self.path)},
            "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "sector": self.slot * RECORD // 512}]})


class MemoryEditor:
    """Changes the guest's physical memory through QEMU's gdb stub. The guest stands still while connected."""

    def __init__(self, path: Path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._ask("Qqemu.PhyMemMode:1")

    def _ask(self, packet: str) -> None:
        self._socket.sendall(b"$%s#%02x" % (packet.encode(), sum(packet.encode()) & 0xff))
        answer = b""
        while b"$OK#" not in answer:
            if (chunk := self._socket.recv(4096)) == b"" or b"$E" in answer:
                raise RuntimeError(f"gdb stub refused {packet[:40]}: {answer + chunk}")
            answer += chunk
        self._socket.sendall(b"+")

    def write(self, address: int, data: bytes) -> None:
        for at in range(0, len(data), 512):
            part = data[at:at + 512]
            self._ask(f"M{address + at:x},{len(part):x}:{part.hex()}")

    def close(self) -> None:
        self._ask("D")
        self._socket.close()


def load_pages(dump: bytes, page_count: int) -> dict:
    """{physical address: page} of the memory load, found by content: number, generation, weighted sum."""
    found = {}
    for at in range(0, len(dump), 4096):
        number, generation, checksum = struct.unpack_from("<QQQ", dump, at)
        if number < page_count and 0 < generation < 100_000:
            words = struct.unpack_from("<512Q", dump, at)
            total = number ^ generation << 1
            total += sum(word * (2 * i + 1) for i, word in enumerate(words) if i >= 3)
            if total & (1 << 64) - 1 == checksum:
                found[at] = dump[at:at + 4096]
    return found


class InFolder(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-guest-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def raw_image(self, name: str, size_mb: int) -> Path:
        image = self.folder / name
        with open(image, "wb") as file:
            file.truncate(size_mb << 20)
        return image


class VerifierTest(InFolder):
    """The load runs on the host here, with a file as its disk: quick, and the same code as in the guest."""

    @classmethod
    def setUpClass(cls):
        cls.original = Path(tempfile.mkdtemp(prefix="vmferry-guest-"))
        cls.addClassCleanup(shutil.rmtree, cls.original, ignore_errors=True)
        with open(cls.original / "disk.img", "wb") as file:
            file.truncate(16 << 20)
        cls.run_load(cls.original)

    @staticmethod
    def run_load(folder: Path) -> None:
        subprocess.run([BUILD.folder / "guest/guest-workload", f"vf.disk={folder}/disk.img", f"vf.log={folder}/log.txt",
                        "vf.area=16M", "vf.hot=1M", "vf.mem=0", "vf.seconds=1", "vf.disk_rate=8M"],
                       check=True, timeout=30)

    def setUp(self):
        super().setUp()
        self.image = Path(shutil.copy(self.original / "disk.img", self.folder))
        self.log = Path(shutil.copy(self.original / "log.txt", self.folder))

    def verify(self, **options) -> dict:
        return BUILD.verify(self.image, self.log, **options)

    def test_everything_written_is_found(self):
        # A verifier that reports loss where there is none would hide real ones in noise.
        result = self.verify()
        self.assertTrue(result["ok"], result)
        self.assertGreater(result["acknowledged"], 500)
        self.assertEqual(result["found"], result["acknowledged"])

    def test_one_flipped_bit_is_corruption(self):
        # Content damaged on the wire or by a wrong block would pass otherwise.
        for at in (0, 9, 47, 48, 4095):  # magic, run, checksum, first and last byte of the body
            with self.subTest(at=at):
                slot = used_slots(self.image)[5]
                good = record_at(self.image, slot)
                put_at(self.image, slot, good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
                result = self.verify()
                self.assertFalse(result["ok"])
                self.assertEqual(result["corrupt"], 1, result)
                put_at(self.image, slot, good)
        self.assertTrue(self.verify()["ok"])

    def test_a_write_that_never_came_is_lost(self):
        # The plainest failure of all: acknowledged, and the block is still empty at the other side.
        slot = used_slots(self.image)[3]
        put_at(self.image, slot, bytes(RECORD))
        result = self.verify()
        self.assertFalse(result["ok"])
        self.assertGreaterEqual(result["lost"], 1)
        self.assertEqual(result["corrupt"], 0)
        self.assertEqual(result["found"] + result["lost"], result["acknowledged"])

    def test_an_older_version_of_a_block_is_lost(self):
        # A stale block is valid in itself; only the sequence number tells.
        older = self.folder / "older.img"
        shutil.copyfile(self.image, older)
        self.run_load(self.folder)
        newer = record_at(self.image, slot := next(
            i for i in used_slots(older) if record_at(older, i) != record_at(self.image, i)))
        put_at(self.image, slot, record_at(older, slot))
        self.assertGreaterEqual(self.verify()["lost"], 1)
        put_at(self.image, slot, newer)
        self.assertTrue(self.verify()["ok"])

    def test_a_block_in_the_wrong_place_is_corruption(self):
        # References to the wrong block put good records where they do not belong.
        first, second = used_slots(self.image)[1:3]
        put_at(self.image, second, record_at(self.image, first))
        result = self.verify()
        self.assertFalse(result["ok"])
        self.assertEqual(result["misplaced"], 1, result)

    def test_a_hole_before_a_later_fsync_is_reordering(self):
        # After a crash a write may be missing, but not one that a later fsync barrier covered, acknowledged or not.
        lines = self.log.read_text().splitlines(keepends=True)
        acknowledged = [line for line in lines if line.startswith("A ")]
        cut = acknowledged[len(acknowledged) // 2]
        self.log.write_text("".join(line for line in lines if line[0] in "RS")
                            + "".join(acknowledged[:acknowledged.index(cut)]))
        slots = used_slots(self.image)
        before = self.verify()
        self.assertEqual((before["lost"], before["reordered"]), (0, 0), before)
        for slot in slots[len(slots) // 2:]:
            put_at(self.image, slot, bytes(RECORD))
        self.assertGreater(self.verify()["reordered"], 0)

    def test_the_same_numbers_from_two_qemus_are_a_fork(self):
        # Two running guests write different futures; each alone looks right.
        lines = self.log.read_text().splitlines()
        last = [line for line in lines if line.startswith("A ")][-1]
        self.log.write_text("".join(f"1.0 100 {line}\n" for line in lines) + f"2.0 200 {last}\n")
        result = self.verify()
        self.assertFalse(result["ok"])
        self.assertGreater(result["forked"], 0)

    def test_a_log_that_is_not_understood_is_refused(self):
        # An acknowledgement that is skipped is one that is not checked.
        for bad in ("A 0 1\n", "Z 0 1 2\n", "A 7 0 64 10\n", "\n", "1.0 x A 0 0 64 10\n", "S 0 1 0 0 0 0 0 0 0\n"):
            with self.subTest(line=bad):
                log = self.folder / "bad.txt"
                log.write_text(self.log.read_text() + bad)
                with self.assertRaises(RuntimeError):
                    BUILD.verify(self.image, log)

    def test_nothing_acknowledged_proves_nothing(self):
        # A guest that never wrote must not count as one that lost nothing.
        self.log.write_text("".join(f"{line}\n" for line in self.log.read_text().splitlines() if line[0] in "RS"))
        with self.assertRaises(RuntimeError):
            self.verify()

    def test_a_misspelt_option_is_refused(self):
        # Another load than the one asked for would be measured.
        for word in ("vf.disk_rat=2M", "vf.mem=12Q", "vf.mode=", "vf.direct=2", "vf.fsync=-1"):
            with self.subTest(word=word):
                log = self.folder / "refused.txt"
                done = subprocess.run([BUILD.folder / "guest/guest-workload", word, f"vf.log={log}"],
                                      capture_output=True, check=False)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn(f"E bad option '{word}'", log.read_text())


class GuestTest(InFolder):
    def check_boot(self, version: str) -> None:
        image = self.raw_image("disk.img", 128)
        workload = Workload(area="96M", hot="8M", mem="32M")
        with Collector(self.folder / "collect") as collector:
            guest = Guest("a", self.folder, BUILD.qemu(version), BUILD.guest_image(), collector, [RawDisk(image)],
                          workload=workload, memory_mb=256)
            begin = time.monotonic()
            with guest:
                started = guest.wait_started()
                time.sleep(3)
                wait_until(lambda: sum(beat[0] >= started for beat in collector.heartbeats()) > 200 and
                           collector.acknowledged_bytes() > 1000 * RECORD, 60, "beats and records")
                pages, bad = guest.verify_memory()
                beats = [beat for beat in collector.heartbeats() if beat[0] >= started]
                cpu, up = guest.cpu_seconds(), time.monotonic() - begin
                now = time.monotonic()
                rate = collector.write_rate(now - 2, now)
                guest.kill()  # without a chance to write anything more
            gap = collector.largest_gap(started)
            print(f"QEMU {version}: boot {started - begin:.1f} s, cpu {cpu:.1f} s in {up:.1f} s, "
                  f"{len(beats)} heartbeats, largest gap {gap.seconds * 1000:.0f} ms, {rate / 1e6:.2f} MB/s written")
            self.assertEqual((pages, bad), ((32 << 20) // 4096, 0))
            self.assertGreater(len(beats), 200)
            self.assertEqual(collector.errors(), [])
            result = BUILD.verify(image, collector.log_path)
            self.assertTrue(result["ok"], result)
            self.assertGreater(result["acknowledged"], 500)

            slots = used_slots(image)
            put_at(image, slots[0], bytes(RECORD))
            self.assertFalse(BUILD.verify(image, collector.log_path)["ok"])

    def test_boots_writes_and_beats_with_new_qemu(self):
        self.check_boot("10")

    def test_boots_writes_and_beats_with_system_qemu(self):
        self.check_boot("system")

    def test_file_on_ext4_is_verified_in_the_raw_image(self):
        # The verifier never mounts the image: it must find the file's blocks from the guest's own map.
        image = BUILD.make_disk(self.folder / "disk.img", "256M", "100M")
        workload = Workload(mode="file", area="64M", hot="8M", mem="16M", warm="20M")
        with Collector(self.folder / "collect") as collector:
            with Guest("a", self.folder, BUILD.qemu("10"), BUILD.guest_image(), collector, [RawDisk(image)],
                       workload=workload, memory_mb=256) as guest:
                guest.wait_started()
                wait_until(lambda: collector.acknowledged_bytes() > 600 * RECORD, 60, "records")
                guest.stop_load()
            self.assertEqual(collector.errors(), [])
            self.assertGreaterEqual(int(collector.wait_for("R", "warm").text.split()[1]), 20 << 20)
            result = BUILD.verify(image, collector.log_path)
            self.assertTrue(result["ok"], result)
            self.assertGreater(result["acknowledged"], 500)
            extent = next(line.numbers() for line in collector.lines("X"))
            with open(image, "r+b") as file:
                file.seek(extent[2])
                file.write(os.urandom(RECORD))
            self.assertEqual(BUILD.verify(image, collector.log_path)["corrupt"], 1)

    def test_a_write_error_is_reported(self):
        # A guest that swallows I/O errors would make a broken backend look like a slow one.
        image = self.raw_image("disk.img", 64)
        bad_slot = (32 << 20) // RECORD // 4 + 5  # in the hot part, so that it is hit soon
        with Collector(self.folder / "collect") as collector:
            with Guest("a", self.folder, BUILD.qemu("10"), BUILD.guest_image(), collector,
                       [BrokenDisk(image, bad_slot)], workload=Workload(area="32M", hot="1M", mem="0"),
                       memory_mb=192):
                self.assertRegex(collector.wait_for("E", timeout=30).text, "disk 0: .*Input/output error")
            try:
                self.assertFalse(BUILD.verify(image, collector.log_path)["ok"])
            except RuntimeError as error:  # the very first writes hit the bad slot
                self.assertIn("nothing was acknowledged", str(error))

    def test_changed_and_stale_memory_is_reported(self):
        # A migration that loses dirty pages leaves pages that are older, but whole; both kinds must be seen.
        gdb = self.folder / "gdb.sock"
        pages = (4 << 20) // 4096
        with Collector(self.folder / "collect") as collector:
            with Guest("a", self.folder, BUILD.qemu("10"), BUILD.guest_image(), collector, [], memory_mb=160,
                       workload=Workload(mode="none", mem="4M"),
                       extra_args=["-gdb", f"unix:{gdb},server=on,wait=off"]) as guest:
                guest.wait_started()
                collector.wait_for("R", "memory")

                def dump() -> dict:
                    path = self.folder / "memory"
                    guest.qmp.command("pmemsave", {"val": 0, "size": 160 << 20, "filename": str(path)})
                    return load_pages(path.read_bytes(), pages)

                self.assertEqual(guest.verify_memory(), (pages, 0))
                guest.qmp.command("stop")
                older = dump()
                guest.qmp.command("cont")
                self.assertEqual(len(older), pages)
                time.sleep(1)
                guest.qmp.command("stop")
                newer = dump()
                stale = next(at for at in older if newer[at] != older[at])
                changed = next(at for at in older if at != stale)
                editor = MemoryEditor(gdb)
                editor.write(stale, older[stale])
                editor.write(changed + 2000, bytes([newer[changed][2000] ^ 1]))
                editor.close()
                if guest.qmp.status() != "running":
                    guest.qmp.command("cont")
                self.assertEqual(guest.verify_memory(), (pages, 2))
                self.assertTrue(any("checksum right" in text for text in collector.errors()), collector.errors())
                self.assertTrue(any("checksum wrong" in text for text in collector.errors()), collector.errors())

    def test_two_disks_have_a_writer_each(self):
        # Volumes of one VM move as a group; each must be judged by its own records. One is a file, one an export.
        images = [self.raw_image(f"disk{i}.img", 64) for i in range(2)]
        nbd = self.folder / "nbd.sock"
        server = subprocess.Popen([BUILD.qemu_bin("10") / "qemu-nbd", "-f", "raw", "-k", nbd, "-x", "vdb", "-t",
                                   images[1]])
        self.addCleanup(server.wait)
        self.addCleanup(server.terminate)
        while not nbd.exists():
            self.assertIsNone(server.poll())
            time.sleep(0.02)
        with Collector(self.folder / "collect") as collector:
            with Guest("a", self.folder, BUILD.qemu("10"), BUILD.guest_image(), collector,
                       [RawDisk(images[0]), NbdDisk("vdb", unix=nbd)], workload=Workload(area="32M", mem="0"),
                       memory_mb=192) as guest:
                guest.wait_started()
                time.sleep(1)
                guest.stop_load()
            for disk, image in enumerate(images):
                result = BUILD.verify(image, collector.log_path, disk=disk)
                self.assertTrue(result["ok"], result)
            self.assertEqual(BUILD.verify(images[0], collector.log_path, disk=1)["found"], 0)


class MigrationTest(InFolder):
    def test_plain_live_migration_loses_nothing(self):
        # The ground that all of vmferry's migrations are compared with, and proof that the guest survives one.
        image = self.raw_image("disk.img", 128)
        workload = Workload(area="96M", hot="8M", mem="48M")
        stream = self.folder / "migrate.sock"
        with Collector(self.folder / "collect") as collector:
            common = dict(workload=workload, memory_mb=256)
            qemu, kernel = BUILD.qemu("10"), BUILD.guest_image()
            with Guest("a", self.folder, qemu, kernel, collector, [RawDisk(image)], **common) as source, \
                    Guest("b", self.folder, qemu, kernel, collector, [RawDisk(image)], incoming="defer",
                          **common) as target:
                source.wait_started()
                time.sleep(1)
                for side, names in ((source, ["events"]), (target, ["events", "late-block-activate"])):
                    side.qmp.command("migrate-set-capabilities", {
                        "capabilities": [{"capability": name, "state": True} for name in names]})
                source.qmp.command("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 300})
                target.qmp.command("migrate-incoming", {"uri": f"unix:{stream}"})
                begin = time.monotonic()
                source.qmp.command("migrate", {"uri": f"unix:{stream}"})
                source.qmp.wait_event("MIGRATION", lambda data: data["status"] in ("completed", "failed"), timeout=60)
                total = time.monotonic() - begin
                # QEMU says `completed` a moment before it leaves `finish-migrate`.
                source.qmp.wait_status("postmigrate", timeout=20)
                target.qmp.wait_event("RESUME", timeout=20)
                resumed = collector.wait_heartbeat(target.pid)
                collector.wait_for("AW", since=resumed, pid=target.pid, timeout=20)
                pages, bad = target.verify_memory()
                wait_until(lambda: collector.acknowledged_bytes() > 1100 * RECORD, 60, "records")
                wait_until(lambda: collector.heartbeats()[-1][0] > resumed + 1, 60, "a second of beats")
                target.stop_load()
                gap = collector.largest_gap(begin, resumed + 1)
            print(f"migration: {total:.2f} s, heartbeat gap {gap.seconds * 1000:.0f} ms, {pages} pages verified")
            self.assertEqual(bad, 0)
            self.assertEqual(collector.errors(), [])
            self.assertEqual(collector.ran_twice(), 0)
            self.assertEqual((gap.pid_before, gap.pid_after), (source.pid, target.pid))
            result = BUILD.verify(image, collector.log_path, include_written=True)
            self.assertTrue(result["ok"], result)
            self.assertGreater(result["acknowledged"], 1000)


if __name__ == "__main__":
    unittest.main(verbosity=2)
