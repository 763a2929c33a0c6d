#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One volume that cannot be opened: the daemon serves the others, says why, and takes it back without a restart."""

import os
import unittest

import nbd

from daemon_support import MIB, DaemonCase, digest, new_address, pair, run, wait_until


class FailedVolumeCase(DaemonCase):
    def failed(self, daemon, volume: str, *texts: str) -> str:
        """The reason, after every place was looked at where an operator may look."""
        listed = {v["name"]: v for v in daemon.vmferry("volume", "list")["volumes"]}[volume]
        shown, status = daemon.vmferry("volume", "show", volume), daemon.volume_status(volume)
        self.assertEqual((listed["state"], shown["state"], status["state"], status["may_run"]),
                         ("failed", "failed", "failed", False))
        self.assertEqual(listed["exports"], [])
        noted = [e for e in self.events(daemon) if e["event"] == "volume_failed" and e["volume"] == volume][-1]["reason"]
        for text in (*texts, f"vmferry volume add name={volume},path=", f"vmferry volume remove {volume}"):
            for reason in (listed["error"], shown["error"], status["reason"], noted):
                self.assertIn(text, reason)
        self.assertIn(listed["error"], daemon.log())
        for words in (["status"], ["volume", "list"]):
            plain = [w for w in daemon.vmferry_command(*words) if w != "--json"]
            self.assertRegex(run(*plain).stdout, rf"(?s){volume}\s+failed.*{texts[0]}")
        return listed["error"]

    def retry(self, daemon, volume: str, path, *more: str) -> dict:
        return daemon.vmferry("volume", "add", ",".join([f"name={volume}", f"path={path}", *more]))


class FailedVolumes(FailedVolumeCase):
    def test_one_missing_file_does_not_stop_the_others_and_is_taken_back_without_a_restart(self):
        # A mount that is late took the disks of every other guest down with it.
        images = {v: self.image(f"{v}.img", 4 * MIB, data=MIB) for v in ("vda", "vdb", "vdc")}
        a = self.daemon("a", *[self.volume(v, path) for v, path in images.items()])
        self.assertEqual(a.stop(), 0)
        good = digest(images["vdb"])
        images["vdb"].rename(self.path("away"))
        a.start()
        self.failed(a, "vdb", str(images["vdb"]), "is missing", "bring the file back")
        for volume in ("vda", "vdc"):
            self.assertEqual(a.volume_status(volume)["state"], "ready")
            run("nbdinfo", self.uri(images[volume], volume))
        with self.assertRaises(nbd.Error):
            nbd.NBD().connect_uri(self.uri(images["vdb"], "vdb"))
        self.assertFalse(images["vdb"].exists())
        # Whatever needs it says why it cannot be had.
        for words in (["promote", "vdb"], ["demote", "vdb"], ["volume", "resize", "vdb", "8M"],
                      ["replicate", "pause", "vdb"], ["replicate", "start", "vdb", "--peer", "x"]):
            error = self.refused(a, *words)
            if "no peer" not in error:
                self.assertIn("is missing", error)
        # A try before it is back changes nothing; the same afterwards serves it, with the settings of before.
        self.assertIn("is missing", self.refused(a, "volume", "add", f"name=vdb,path={images['vdb']}"))
        self.failed(a, "vdb", "is missing")
        self.assertFalse(images["vdb"].exists())
        self.path("away").rename(images["vdb"])
        back = self.retry(a, "vdb", images["vdb"])
        self.assertEqual((back["state"], back["role"], back["exports"]), ("ready", "primary", [self.uri(images["vdb"], "vdb")]))
        self.assertEqual(digest(images["vdb"]), good)
        self.qemu_io(images["vdb"], "write -P 7 0 64k", export="vdb")
        self.assertIn("volume_recovered", [e["event"] for e in self.events(a)])
        self.assertIn("exists already", self.refused(a, "volume", "add", f"name=vdb,path={images['vdb']}"))
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual({v["name"]: v["state"] for v in a.vmferry("volume", "list")["volumes"]},
                         {v: "ready" for v in images})

    def test_a_daemon_without_any_usable_volume_starts(self):
        # It is needed to say what is wrong, and to repair it.
        image = self.image("vda.img", 4 * MIB)
        a = self.daemon("a", self.volume("vda", image))
        self.assertEqual(a.stop(), 0)
        image.unlink()
        a.start()
        self.failed(a, "vda", "is missing")
        # Given up, the same name may be made anew.
        self.assertEqual(a.vmferry("volume", "remove", "vda")["path"], str(image))
        self.assertEqual(a.vmferry("volume", "list")["volumes"], [])
        self.assertFalse((a.state_dir / "volumes" / "vda.meta").exists())
        self.assertEqual(a.vmferry("volume", "add", self.volume("vda", image, "size=4M"))["state"], "ready")

    def test_every_way_to_fail_names_what_it_is(self):
        # "cannot start" without the file sends the operator through all of them.
        names = ("none", "folder", "odd", "shrunk", "twice", "taken", "newer", "meta", "fine")
        images = {n: self.image(f"{n}.img", 4 * MIB) for n in names}
        a = self.daemon("a", *[self.volume(n, path) for n, path in images.items()])
        self.assertEqual(a.stop(), 0)
        meta = {n: a.state_dir / "volumes" / f"{n}.meta" for n in names}
        images["none"].unlink()
        images["folder"].unlink()
        images["folder"].mkdir()
        os.truncate(images["odd"], 1000)
        os.truncate(images["shrunk"], 0)
        images["twice"].unlink()
        images["twice"].symlink_to(images["fine"])
        self.socket(images["taken"]).write_text("a file")
        meta["meta"].unlink()
        meta["meta"].mkdir()
        # A record of a newer version, as after a downgrade. It is refused, never overwritten.
        content = bytearray(meta["newer"].read_bytes())
        content[:8] = b"VMRD" + (9).to_bytes(2, "little") + (9).to_bytes(2, "little")
        content[8:24] = b"TRKS" + (0).to_bytes(4, "little") + (1).to_bytes(8, "little")
        meta["newer"].write_bytes(self.with_checksum(content))
        a.start()
        self.failed(a, "none", str(images["none"]), "is missing")
        self.failed(a, "folder", str(images["folder"]), "neither a regular file nor a block device")
        self.failed(a, "odd", str(images["odd"]), "1000 bytes", "512")
        self.failed(a, "shrunk", str(images["shrunk"]), "is empty")
        self.failed(a, "twice" if a.volume_status("twice")["state"] == "failed" else "fine", "already served")
        self.failed(a, "taken", "taken.nbd")
        self.failed(a, "meta", str(meta["meta"]), "metadata", "move the file away")
        self.failed(a, "newer", str(meta["newer"]), "version", "move the file away")
        ready = [v["name"] for v in a.vmferry("volume", "list")["volumes"] if v["state"] == "ready"]
        self.assertEqual(len(ready), 1, ready)
        self.assertIn(ready[0], ("fine", "twice"))
        # What it told to do helps.
        meta["newer"].rename(self.path("moved"))
        self.assertEqual(self.retry(a, "newer", images["newer"])["state"], "ready")
        self.socket(images["taken"]).unlink()
        self.assertEqual(self.retry(a, "taken", images["taken"])["state"], "ready")
        # It may also be somewhere else now.
        elsewhere = self.image("elsewhere.img", 4 * MIB)
        self.assertEqual(self.retry(a, "none", elsewhere)["path"], str(elsewhere))

    @staticmethod
    def with_checksum(content: bytearray) -> bytes:
        """The first slot of a durable record with its checksum (docs/on-disk.md, section 1)."""
        table = []
        for byte in range(256):
            value = byte
            for _ in range(8):
                value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
            table.append(value)
        size = int.from_bytes(content[12:16], "little")
        crc = 0xFFFFFFFF
        for byte in content[:60] + content[64:64 + size]:
            crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
        content[60:64] = (crc ^ 0xFFFFFFFF).to_bytes(4, "little")
        return bytes(content)

    def test_the_volumes_of_one_guest_fail_together_and_come_back_together(self):
        # A guest that runs with one disk of two writes what fits nothing at the copy.
        a, b = self.two_daemons(8 * MIB, data=MIB, volumes=("vda", "vdb"))
        a.vmferry("replicate", "start", "vda", "vdb", "--peer", "b", "--rpo", "1s")
        self.in_sync(a, "vda", "vdb")
        for daemon, role in ((b, "secondary"), (a, "primary")):
            with self.subTest(daemon=daemon.name):
                image = self.path(f"{daemon.name}-vdb.img")
                good = digest(image)
                self.assertEqual(daemon.stop(), 0)
                image.rename(self.path("away"))
                daemon.start()
                self.failed(daemon, "vdb", str(image), "is missing")
                self.failed(daemon, "vda", "it is of one guest with 'vdb'", str(image))
                self.assertEqual(daemon.volume_status("vda")["role"], role)
                # The other side hears the reason, and nothing is copied over anything.
                if daemon is b:
                    wait_until(lambda: "has failed" in str(a.replication("vda").get("reason")), 15, "the reason at the peer")
                self.assertIn("belongs to peer", self.refused(daemon, "peer", "remove", "b" if daemon is a else "a"))
                self.path("away").rename(image)
                self.retry(daemon, "vda", self.path(f"{daemon.name}-vda.img"))
                self.assertEqual(daemon.volume_status("vdb")["state"], "ready")
                wait_until(lambda: a.volume_status("vda")["connected"], 15, "connected again")
                self.in_sync(a, "vda", "vdb")
                self.assertEqual(digest(image), good)
        self.assertLess(a.replication("vda")["raw_bytes"], MIB, "no full copy")
        self.qemu_io(self.path("a-vda.img"), "write -P 9 1M 64k")
        self.in_sync(a, "vda", "vdb")
        self.assertEqual(digest(self.path("a-vda.img")), digest(self.path("b-vda.img")))

    def test_one_volume_of_a_group_can_be_given_up(self):
        # A disk that is lost for good must not keep the other one of its guest from ever being served again.
        a, _ = self.two_daemons(4 * MIB, volumes=("vda", "vdb"))
        a.vmferry("replicate", "start", "vda", "vdb", "--peer", "b", "--rpo", "1s")
        self.in_sync(a, "vda", "vdb")
        self.assertEqual(a.stop(), 0)
        self.path("a-vdb.img").unlink()
        a.command = a.command[: a.command.index("--volume")]
        a.start()
        self.failed(a, "vda", "it is of one guest with 'vdb'")
        a.vmferry("volume", "remove", "vdb")
        status = wait_until(lambda: (s := a.volume_status("vda"))["state"] == "ready" and s, 5, "vda is served")
        self.assertEqual((status["role"], status["peer"], status["may_run"]), ("primary", "", True))
        self.qemu_io(self.path("a-vda.img"), "write -P 9 0 64k")
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual([v["name"] for v in a.vmferry("status")["volumes"]], ["vda"])

    def test_a_migration_or_copy_that_needs_it_says_so(self):
        # "there is no volume" sends the operator to make a second one.
        a, b = self.two_daemons(4 * MIB)
        self.assertEqual(b.stop(), 0)
        self.path("b-vda.img").unlink()
        b.start()
        error = self.refused(a, "replicate", "start", "vda", "--peer", "b")
        self.assertIn("has failed", error)
        self.assertIn(str(self.path("b-vda.img")), error)

    def test_metadata_that_was_cut_off_or_lost_means_a_full_copy_never_a_stale_one(self):
        # Zeroes in place of the lost part would say that nothing is dirty there: a copy that is silently stale.
        size = 256 * MIB
        for kept in (None, 0, 1000, 100_000, 264_000):
            with self.subTest(kept=kept):
                for name in ("a-vda.img", "b-vda.img"):
                    self.path(name).unlink(missing_ok=True)
                a, b = self.two_daemons(size, data=4 * MIB)
                a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
                self.in_sync(a)
                self.assertEqual(b.stop(), 0)
                self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 200M 1M")
                self.assertEqual(a.stop(), 0)
                meta = a.state_dir / "volumes" / "vda.meta"
                self.assertGreater(meta.stat().st_size, 264_000)
                if kept is None:
                    meta.unlink()
                else:
                    os.truncate(meta, kept)
                a.start()
                self.assertEqual(a.volume_status("vda")["state"], "ready")
                self.assertEqual(a.vmferry("volume", "show", "vda")["dirty_bytes"], size)
                self.assertIn("tracking=wholly-dirty", a.log())
                b.start()
                self.in_sync(a)
                self.assertEqual(digest(self.path("a-vda.img")), digest(self.path("b-vda.img")))
                for daemon in (a, b):
                    self.assertEqual(daemon.stop(), 0)
                    for path in sorted(daemon.state_dir.rglob("*"), reverse=True):
                        path.rmdir() if path.is_dir() else path.unlink()


class StagingArea(FailedVolumeCase):
    """groups/ID.staging: made on behalf of a peer, whose group it is."""

    def staging(self, daemon):
        found = list((daemon.state_dir / "groups").glob("*.staging"))
        self.assertEqual(len(found), 1, found)
        return found[0]

    def test_a_link_in_its_place_is_refused_and_its_target_stays_as_it_was(self):
        # Followed, it would have the daemon write a peer's data over whatever file of the host the link names.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertEqual(b.stop(), 0)
        staging = self.staging(b)
        # What it leads to would be a good staging area: only that it is a link speaks against it.
        elsewhere = staging.rename(self.path("elsewhere"))
        before = digest(elsewhere)
        staging.symlink_to(elsewhere)
        b.start()
        self.failed(b, "vda", str(staging), "symbolic link", "remove it")
        self.assertEqual((digest(elsewhere), b.volume_status("vda")["may_run"]), (before, False))
        # A link to nothing makes nothing.
        self.assertEqual(b.stop(), 0)
        elsewhere.rename(self.path("away"))
        b.start()
        self.failed(b, "vda", str(staging), "symbolic link")
        self.assertFalse(elsewhere.exists())
        # Given up and begun anew, the link goes and what it led to stays.
        self.path("away").rename(elsewhere)
        b.vmferry("volume", "remove", "vda")
        self.assertFalse(staging.is_symlink())
        self.assertEqual(digest(elsewhere), before)

    def test_a_link_that_is_put_there_while_the_daemon_runs_is_neither_followed_nor_passed_on(self):
        # A change of the group gives the staging area a second name: of the link, not of what it leads to.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        staging = self.staging(b)
        elsewhere = staging.rename(self.path("elsewhere"))
        staging.symlink_to(elsewhere)
        links = os.stat(elsewhere).st_nlink
        error = self.refused(b, "replicate", "stop", "vda")
        self.assertIn("symbolic link", error)
        self.assertEqual(os.stat(elsewhere).st_nlink, links)
        # Back in its place, all goes on as before.
        staging.unlink()
        elsewhere.rename(staging)
        def followed() -> bool:
            copies = b.vmferry("replicate", "status")["volumes"]
            return any((v["name"], v["state"]) == ("vda", "in-sync") for v in copies)
        wait_until(followed, 30, "the copy is taken back")


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
