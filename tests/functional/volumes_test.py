#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vmferry volume`: what is served, what is refused and why, and what clients see of it."""

import grp
import json
import os
import unittest

import nbd

from daemon_support import MIB, DaemonCase, digest, run, wait_until


class VolumeCommands(DaemonCase):
    def test_added_volumes_are_served_at_once_and_after_a_restart(self):
        # A disk that is gone after the next restart of the daemon takes its guest with it.
        first, second = self.image("one.img", 8 * MIB), self.path("two.img")
        a = self.daemon("a", self.volume("vda", first))
        added = a.vmferry("volume", "add", self.volume("vdb", second, "size=4M", "cache=none"))
        self.assertEqual((added["name"], added["size"], added["role"], added["path"], added["cache"]),
                         ("vdb", 4 * MIB, "primary", str(second), "none"))
        self.assertEqual(second.stat().st_size, 4 * MIB)
        self.assertEqual(added["exports"], [self.uri(second, "vdb")])
        for path, name, size in ((first, "vda", 8 * MIB), (second, "vdb", 4 * MIB)):
            export = json.loads(run("nbdinfo", "--json", self.uri(path, name)).stdout)["exports"][0]
            self.assertEqual(export["export-size"], size)
            # The default export of a volume's socket is the volume.
            default = json.loads(run("nbdinfo", "--json", self.uri(path, "")).stdout)["exports"][0]
            self.assertEqual(default["export-size"], size)
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual([v["name"] for v in a.vmferry("volume", "list")["volumes"]], ["vda", "vdb"])
        shown = a.vmferry("volume", "show", "vdb")
        self.assertEqual((shown["size"], shown["role"], shown["cache"]), (4 * MIB, "primary", "none"))
        run("nbdinfo", self.uri(second, "vdb"))

    def test_the_uri_of_an_export_can_be_given_to_a_client_as_it_is(self):
        # A folder with a blank or an ampersand, and the URI that was printed opens another socket or none.
        a = self.daemon("a")
        for number, name in enumerate(("a b", "a&b", "50%41#x", "h\u00f4te?x=1", "a+b")):
            folder = self.path(name)
            folder.mkdir()
            shown = a.vmferry("volume", "add", f"name=v{number},path={folder}/v.img,size=4M,nbd=unix:{folder}/v.nbd")
            self.assertRegex(shown["exports"][0], r"^[!-~]+$")
            self.assertIn("4194304", run("nbdinfo", "--size", shown["exports"][0]).stdout)
            self.assertIn("read 512/512", run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", shown["exports"][0]).stdout)

    def test_removing_a_volume_keeps_its_data(self):
        # "remove" that deletes, or that leaves the socket answering, surprises in the worst moment.
        image = self.image("one.img", 4 * MIB, data=MIB)
        content = image.read_bytes()
        a = self.daemon("a")
        a.vmferry("volume", "add", self.volume("vda", image))
        self.assertEqual(a.vmferry("volume", "remove", "vda")["path"], str(image))
        self.assertEqual(a.vmferry("volume", "list")["volumes"], [])
        self.assertFalse(self.socket(image).exists())
        self.assertEqual(image.read_bytes(), content)
        a.vmferry("volume", "add", self.volume("vda", image))  # and it can come back
        run("nbdinfo", self.uri(image))

    def test_the_sockets_of_a_volume_belong_to_whom_the_operator_names(self):
        # A QEMU of another user cannot open its disk; and a socket that is open to all gives every user the disk.
        self.folder.chmod(0o711)
        nobody = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups")
        image, closed, vhost = self.image("one.img", 4 * MIB), self.image("two.img", 4 * MIB), self.path("vhost")
        a = self.daemon("a", self.volume("vda", image, "socket-owner=root:nogroup", "socket-mode=0660",
                                         f"vhost-user-blk={vhost}"), self.volume("vdb", closed))
        for restarts in (0, 1):
            for socket in (self.socket(image), vhost):
                found = socket.stat()
                self.assertEqual((found.st_uid, found.st_gid, found.st_mode & 0o777),
                                 (0, grp.getgrnam("nogroup").gr_gid, 0o660), f"{socket} {restarts}")
            self.assertEqual(self.socket(closed).stat().st_mode & 0o777, 0o600)
            run(*nobody, "nbdinfo", self.uri(image, "vda"))
            refused = run(*nobody, "nbdinfo", self.uri(closed, "vdb"), check=False)
            self.assertIn("Permission denied", refused.stderr)
            self.assertEqual(a.stop(), 0)
            a.start()
        for spec, told in (("socket-owner=nobody-of-that-name", "no user 'nobody-of-that-name'"),
                           ("socket-owner=root:", "is not USER, USER:GROUP or :GROUP"),
                           ("socket-mode=0400", "is not an octal mode from 0600 to 0777"),
                           ("socket-mode=0888", "is not an octal mode")):
            self.assertIn(told, self.refused(a, "volume", "add", self.volume("vdc", self.path("three.img"), "size=4M",
                                                                             spec), status=2))

    def test_a_volume_in_use_is_not_removed(self):
        # A guest whose disk vanishes under it loses data that it believes it may still write.
        image = self.image("one.img", 4 * MIB)
        a = self.daemon("a", self.volume("vda", image))
        client = nbd.NBD()
        client.connect_uri(self.uri(image))
        error = self.refused(a, "volume", "remove", "vda")
        self.assertIn("1 client", error)
        client.pwrite(b"x" * 512, 0)
        client.shutdown()
        wait_until(lambda: a.vmferry("volume", "show", "vda")["connections"] == 0, 5, "the client has left")
        a.vmferry("volume", "remove", "vda")

    def test_what_cannot_be_served_is_refused_with_the_reason_and_leaves_nothing_behind(self):
        # An operator repairs what the error names; a half-added volume blocks the second try.
        used = self.image("used.img", 4 * MIB)
        odd = self.path("odd.img")
        odd.write_bytes(b"x" * 1000)
        empty = self.image("empty.img", 0)
        a = self.daemon("a", self.volume("vda", used))
        fine = self.path("fine.img")
        missing = self.path("missing.img")
        cases = [
            (f"name=vdb,path={missing}", 1, str(missing)),
            (f"name=vdb,path={odd}", 2, "512"),
            (f"name=vdb,path={empty}", 2, "empty"),
            (f"name=vdb,path={used}", 1, "already served"),
            (f"name=vdb,path={self.folder}", 2, "neither a regular file nor a block device"),
            (f"name=vda,path={fine},size=4M", 1, "exists already"),
            (f"name=vdb,path={used},size=8M", 1, "used.img"),
            (f"name=../x,path={fine},size=4M", 2, "not a volume name"),
            (f"name=.x,path={fine},size=4M", 2, "not a volume name"),
            (f"name={'x' * 65},path={fine},size=4M", 2, "not a volume name"),
            (f"name=vdb,path={fine},size=1000", 2, "512"),
            (f"name=vdb,path={fine},size=4M,role=boss", 2, "role"),
            (f"name=vdb,path={fine},size=4M,nbd=tcp:0.0.0.0:10809", 2, "loopback"),
            (f"name=vdb,path={fine},size=4M,colour=red", 2, "colour"),
            (f"path={fine},size=4M", 2, "name="),
            ("name=vdb", 2, "path="),
            ("name=vdb,path=fine.img,size=4M", 2, "absolute"),
            ("name=vdb,path=./fine.img,size=4M", 2, "absolute"),
        ]
        for spec, status, text in cases:
            with self.subTest(spec=spec):
                self.assertIn(text, self.refused(a, "volume", "add", spec, status=status))
        self.assertEqual([v["name"] for v in a.vmferry("volume", "list")["volumes"]], ["vda"])
        self.assertFalse(missing.exists())
        # An export that cannot listen is no volume either, and what was made for it is gone again; what was there stays.
        taken = self.path("taken.nbd")
        taken.write_text("a file")
        meta = a.state_dir / "volumes" / "vdb.meta"
        self.assertIn("taken.nbd", self.refused(a, "volume", "add", f"name=vdb,path={fine},size=4M,nbd=unix:{taken}"))
        self.assertFalse(fine.exists())
        self.assertFalse(meta.exists())
        mine = self.image("mine.img", 4 * MIB, data=MIB)
        content = mine.read_bytes()
        self.refused(a, "volume", "add", f"name=vdb,path={mine},nbd=unix:{taken}")
        self.assertEqual(mine.read_bytes(), content)
        meta.mkdir()  # whatever step it is that fails
        self.refused(a, "volume", "add", f"name=vdb,path={fine},size=4M")
        self.assertFalse(fine.exists())
        meta.rmdir()
        a.vmferry("volume", "add", self.volume("vdb", fine, "size=4M"))
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual([v["name"] for v in a.vmferry("volume", "list")["volumes"]], ["vda", "vdb"])

    def test_unknown_volumes_are_named(self):
        # "not found" without the name is useless in a script that handles twenty disks.
        a = self.daemon("a")
        for words in (["volume", "show"], ["volume", "remove"], ["promote"], ["demote"], ["replicate", "pause"]):
            self.assertIn("'vdz'", self.refused(a, *words, "vdz"))
        self.assertIn("'vdz'", self.refused(a, "volume", "resize", "vdz", "8M"))

    def test_the_same_file_is_not_served_by_two_daemons(self):
        # Two daemons on one file are two writers that know nothing of each other.
        image = self.image("one.img", 4 * MIB)
        self.daemon("a", self.volume("vda", image))
        b = self.daemon("b")
        self.assertIn("already served", self.refused(b, "volume", "add", f"name=vda,path={image}"))
        link = self.path("link.img")
        link.symlink_to(image)
        self.assertIn("already served", self.refused(b, "volume", "add", f"name=vda,path={link}"))

    def test_growing_a_volume_with_a_client_connected(self):
        # The guest's old end must stay readable and writable, and the new end be there for the next connection.
        image = self.image("one.img", 4 * MIB, data=MIB)
        a = self.daemon("a", self.volume("vda", image))
        client = nbd.NBD()
        client.connect_uri(self.uri(image))
        client.pwrite(b"e" * 512, 4 * MIB - 512)
        self.assertEqual(a.vmferry("volume", "resize", "vda", "8M")["size"], 8 * MIB)
        self.assertEqual(client.pread(512, 4 * MIB - 512), bytearray(b"e" * 512))
        client.pwrite(b"f" * 512, 0)
        client.shutdown()
        self.assertEqual(os.stat(image).st_size, 8 * MIB)
        again = nbd.NBD()
        again.connect_uri(self.uri(image))
        self.assertEqual(again.get_size(), 8 * MIB)
        again.pwrite(b"g" * 512, 8 * MIB - 512)
        again.shutdown()
        self.assertIn("not larger", self.refused(a, "volume", "resize", "vda", "4M", status=2))
        self.assertIn("512", self.refused(a, "volume", "resize", "vda", "9000000", status=2))
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(a.vmferry("volume", "show", "vda")["size"], 8 * MIB)


    def test_a_grown_volume_starts_again_with_the_arguments_of_before(self):
        # The size= of the unit file is that of the first day; a host that does not come up after a reboot is the price.
        image = self.path("one.img")
        a = self.daemon("a", self.volume("vda", image, "size=4M"))
        a.vmferry("volume", "resize", "vda", "8M")
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(a.vmferry("volume", "show", "vda")["size"], 8 * MIB)

    def test_a_replicated_volume_grows_at_the_peer_first(self):
        # Blocks behind the copy's end would have nowhere to go.
        a, b = self.two_daemons(16 * MIB, data=4 * MIB, volumes=("vda", "vdb"))
        a.vmferry("replicate", "start", "vda", "vdb", "--peer", "b", "--rpo", "1s")
        self.in_sync(a, "vda", "vdb")
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("a-vda.img")))
        self.assertEqual(a.vmferry("volume", "resize", "vda", "48M")["size"], 48 * MIB)
        self.assertEqual(b.vmferry("volume", "show", "vda")["size"], 48 * MIB)
        client.pwrite(b"o" * 4096, 8 * MIB)  # the old connection goes on
        client.shutdown()
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 40M 4M")
        self.in_sync(a, "vda", "vdb")
        for volume, size in (("vda", 48), ("vdb", 16)):
            self.assertEqual(os.stat(self.path(f"b-{volume}.img")).st_size, size * MIB)
            self.assertEqual(digest(self.path(f"a-{volume}.img")), digest(self.path(f"b-{volume}.img")))
        self.assertLess(a.replication("vda")["raw_bytes"], 38 * MIB, "no full copy")
        self.assertIn("primary", self.refused(b, "volume", "resize", "vda", "64M"))
        self.assertIn("not larger", self.refused(a, "volume", "resize", "vda", "32M", status=2))
        for daemon in (a, b):
            self.assertEqual(daemon.stop(), 0)
        a.start()
        self.assertIn("not connected", self.refused(a, "volume", "resize", "vda", "64M"))
        self.assertEqual(a.vmferry("volume", "show", "vda")["size"], 48 * MIB)
        b.start()
        wait_until(lambda: a.volume_status("vda")["connected"], 15, "connected")
        self.in_sync(a, "vda", "vdb")
        self.assertEqual(digest(self.path("a-vda.img")), digest(self.path("b-vda.img")))


if __name__ == "__main__":
    unittest.main(verbosity=2)
