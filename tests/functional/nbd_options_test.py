#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Options of the NBD export of a volume: read-only, description, limits of connections and of the handshake's time."""

import errno
import json
import struct
import subprocess
import time
import unittest
from socket import AF_UNIX, socket

import nbd

from daemon_support import BUILD, MIB, DaemonCase, digest, run, wait_until
from nbd_support import FLUSH, OPT_GO, READ, WRITE, go, option, receive, request, simple_reply
from vmlib import Collector, Guest, VhostDisk, Workload

TRIM, WRITE_ZEROES = 4, 6
# libnbd checks what the server would refuse; without these it is sent.
UNCHECKED = 0


class OptionsCase(DaemonCase):
    def connect(self, path, export: bytes | None = b"vda"):
        """A raw client; export None: it has only been greeted."""
        client = socket(AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(10)
        client.connect(str(self.socket(path)))
        if export is not None:
            go(client, export)
        return client

    def closed(self, client, seconds: float) -> float:
        """How long it took the server to close this connection, at most so many seconds."""
        began = time.monotonic()
        client.settimeout(seconds)
        while client.recv(4096):
            pass
        return time.monotonic() - began

    def works(self, client) -> None:
        client.sendall(request(READ, 0, 512, cookie=5))
        self.assertEqual(simple_reply(client), (0, 5))
        receive(client, 512)


class ReadOnly(OptionsCase):
    def shown(self, path) -> dict:
        return json.loads(run("nbdinfo", "--json", self.uri(path)).stdout)["exports"][0]

    def refuses_writes(self, path) -> None:
        """By every command that changes data, from a client that does not look at what was negotiated."""
        client = nbd.NBD()
        client.set_strict_mode(UNCHECKED)
        client.connect_uri(self.uri(path))
        self.assertTrue(client.is_read_only())
        for write in (lambda: client.pwrite(b"x" * 512, 0), lambda: client.zero(4096, 0), lambda: client.trim(4096, 0)):
            with self.assertRaises(nbd.Error) as caught:
                write()
            self.assertEqual(caught.exception.errnum, errno.EPERM, caught.exception)
        client.flush()
        self.assertEqual(len(client.pread(4096, 0)), 4096)
        client.shutdown()
        raw = self.connect(path)
        raw.sendall(request(WRITE, 0, 512, cookie=1, payload=b"x" * 512) + request(FLUSH, 0, 0, cookie=2))
        self.assertEqual([simple_reply(raw) for _ in range(2)], [(errno.EPERM, 1), (0, 2)], "and the session goes on")

    def test_a_read_only_export_of_a_primary_refuses_every_write_with_eperm(self):
        # A backup program that writes by mistake, or a second guest on the same disk, destroys it.
        image, other = self.image("vda.img", 4 * MIB, data=4 * MIB), self.image("vdb.img", 4 * MIB)
        before = digest(image)
        a = self.daemon("a", self.volume("vda", image, "read-only=on"), self.volume("vdb", other, "read-only=off"))
        self.assertEqual(a.volume_status("vda")["role"], "primary")
        self.assertEqual(self.shown(image)["is_read_only"], True)
        self.assertIs(a.vmferry("volume", "show", "vda")["read_only"], True)
        self.refuses_writes(image)
        # QEMU opens it when it asks for reading only, and says why when it does not.
        refused = run("qemu-io", "-f", "raw", "-c", "write 0 512", self.uri(image), check=False)
        self.assertNotEqual(refused.returncode, 0)
        self.assertRegex(refused.stderr, "Permission denied|write permission")
        self.assertIn("read 512/512", run("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", self.uri(image)).stdout)
        run("nbdcopy", self.uri(image), self.path("copy.img"))
        self.assertEqual(digest(self.path("copy.img")), before)
        self.assertNotEqual(run("nbdcopy", self.path("vdb.img"), self.uri(image), check=False).returncode, 0)
        self.assertEqual(digest(image), before)
        self.qemu_io(other, "write -P 1 0 1M", export="vdb")  # only where it was asked for

    def test_read_only_is_kept_over_a_restart_and_taken_back_by_the_next_configuration(self):
        # An option that gets lost with the restart makes a protected disk writable, unnoticed.
        image = self.image("vda.img", 4 * MIB)
        a = self.daemon("a")
        added = a.vmferry("volume", "add", self.volume("vda", image, "read-only=on"))
        self.assertIs(added["read_only"], True)
        self.assertEqual(a.stop(), 0)
        a.start()
        self.refuses_writes(image)
        self.assertEqual(a.stop(), 0)
        # Named on the command line, the settings there are the whole, as with every other one.
        bare = list(a.command)
        file = self.path("vmferry.toml")
        text = f'[[volume]]\nname = "vda"\npath = "{image}"\nnbd = "unix:{self.socket(image)}"\n'
        for value, read_only in (("read-only = false\n", False), ("read-only = true\n", True), ("", False)):
            file.write_text(text + value)
            a.command = [*bare, "--config", str(file)]
            a.start()
            self.assertEqual(self.shown(image)["is_read_only"], read_only, value)
            self.assertEqual(a.stop(), 0)
        for value, told in (('read-only = "maybe"', "read-only 'maybe' is not on or off"),
                            ("read-only = 1", "read-only '1' is not on or off"),
                            ("read-only = [true]", "'read-only' has to be true or false"),
                            ("description = true", "'description' has to be a string or a number")):
            file.write_text(text + value + "\n")
            done = run(BUILD.bin / "vmferryd", "--state-dir", self.path("s"), "--config", file, "--check-config", check=False)
            self.assertEqual(done.returncode, 2, done)
            self.assertIn(f"{file}:5: {told}", done.stderr)

    def test_a_read_only_copy_follows_its_primary_and_is_writable_no_more_when_it_is_promoted(self):
        # The option is about clients: replication that it stopped would be a copy that silently grows old.
        a, b = self.two_daemons(8 * MIB, data=2 * MIB)
        copy, source = self.path("b-vda.img"), self.path("a-vda.img")
        # A secondary without the option negotiates as writable: QEMU opens its disk before the guest arrives.
        self.assertEqual(self.shown(copy)["is_read_only"], False)
        self.assertEqual(b.stop(), 0)
        b.command[-1] += ",read-only=on"
        b.start()
        self.assertEqual(self.shown(copy)["is_read_only"], True)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        self.qemu_io(source, "write -P 0x5a 4M 1M")
        self.in_sync(a)
        self.assertEqual(digest(source), digest(copy))
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])
        self.refuses_writes(copy)
        b.vmferry("promote", "vda")
        self.wait_role(b, "primary")
        self.refuses_writes(copy)
        # And back: what b's daemon sends is what a applies, whatever its own clients may do.
        self.assertEqual(digest(source), digest(copy))


class ReadOnlyGuest(DaemonCase):
    def test_a_guest_sees_a_read_only_disk_on_vhost_user_blk(self):
        # Without VIRTIO_BLK_F_RO the guest finds out by I/O errors, and its journal replay ends in a panic.
        image, vhost = self.image("vda.img", 128 * MIB), self.path("vda.vhost")
        a = self.daemon("a", f"name=vda,path={image},vhost-user-blk={vhost},read-only=on")
        before = digest(image)
        with Collector(self.path("collect")) as collector:
            workload = Workload(area="64M", hot="8M", mem="16M", disk_rate="2M")
            with Guest("a", self.folder, BUILD.qemu(), BUILD.guest_image(), collector, [VhostDisk(vhost)], workload=workload,
                       memory_mb=256) as guest:
                collector.wait_for("R", "started", pid=guest.pid, timeout=90)
                errors = wait_until(collector.errors, 30, "the guest's writes fail")
                shown = a.vmferry("volume", "show", "vda")
        # The guest's own kernel refused them (EPERM): none came here.
        print(errors[:2], shown["vhost_user_blk"])
        self.assertEqual((shown["written_bytes"], shown["vhost_user_blk"]["errors"]), (0, 0), shown)
        self.assertEqual(digest(image), before)


class Description(OptionsCase):
    def listed(self, path) -> dict:
        return {e["export-name"]: e.get("description") for e in
                json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix://?socket={self.socket(path)}").stdout)["exports"]}

    def test_a_description_is_listed_and_told_to_clients_that_ask(self):
        # With 30 exports on a host, the name alone does not say whose disk it is.
        one, two, three = (self.image(f"{n}.img", 4 * MIB) for n in ("one", "two", "three"))
        text = "web server, disk 1 (H\u00f4tel \u20ac \U0001F600)"
        file = self.path("vmferry.toml")
        file.write_text(f'[[volume]]\nname = "vda"\npath = "{one}"\nnbd = "unix:{self.socket(one)}"\ndescription = "{text}"\n')
        a = self.daemon("a", self.volume("vdb", two), extra_args=["--config", str(file)])
        a.vmferry("volume", "add", self.volume("vdc", three, "description=" + text.replace(",", ",,")))
        for restarted in (False, True):
            self.assertEqual(self.listed(one), {"vda": text})
            self.assertEqual(self.listed(two), {"vdb": "vmferry volume vdb"})  # what it says when nothing was given
            self.assertEqual(self.listed(three), {"vdc": text})
            self.assertEqual(a.vmferry("volume", "show", "vdc")["description"], text)
            client = nbd.NBD()
            client.set_full_info(True)
            client.connect_uri(self.uri(one))
            self.assertEqual((client.get_canonical_export_name(), client.get_export_description()), ("vda", text))
            client.shutdown()
            self.assertIn(text, run("nbdinfo", "--list", f"nbd+unix://?socket={self.socket(one)}").stdout)
            if not restarted:
                self.assertEqual(a.stop(), 0)
                a.start()

    def test_what_could_forge_a_list_of_exports_is_refused(self):
        # A description with a line end or an escape sequence writes into the terminal of whoever lists the exports.
        a = self.daemon("a")
        spec = f"name=vda,path={self.folder}/x.img,size=4M,description="
        for text, told in (("", "description is empty"), ("a" * 257, "257 bytes"), ("\u00e9" * 129, "258 bytes"),
                           ("a\nb", "not plain UTF-8"), ("a\x1b[2Jb", "not plain UTF-8"), ("a\u0085b", "not plain UTF-8"),
                           ("a\u202eb", "not plain UTF-8"), ("a\u2028b", "not plain UTF-8")):
            with self.subTest(text=text):
                self.assertIn(told, self.refused(a, "volume", "add", spec + text, status=2))
        # Bytes that are no text at all come by the command line only.
        done = subprocess.run([BUILD.bin / "vmferryd", "--state-dir", self.path("s"), "--check-config", "--volume",
                               spec.encode() + b"a\xff"], capture_output=True, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"not plain UTF-8", done.stderr)
        a.vmferry("volume", "add", spec + "\u00e9" * 128)


class Limits(OptionsCase):
    def check(self, *arguments) -> str:
        done = run(BUILD.bin / "vmferryd", "--state-dir", self.path("s"), "--check-config", *arguments, check=False)
        return "" if done.returncode == 0 else done.stderr

    def test_one_connection_too_many_is_closed_at_once_and_the_others_work_on(self):
        # A client that leaks connections takes the memory and descriptors of every guest on the host.
        image, other = self.image("vda.img", 4 * MIB), self.image("vdb.img", 4 * MIB)
        a = self.daemon("a", self.volume("vda", image), self.volume("vdb", other), extra_args=["--nbd-connections", "4"])
        clients = [self.connect(image) for _ in range(4)]
        for _ in range(3):
            fifth = self.connect(image, export=None)
            self.assertEqual(fifth.recv(1), b"", "closed without a greeting")
        self.wait_log(a, "4 connections are open, which is the limit")
        self.assertEqual(a.log().count("which is the limit"), 1, "a crowd must not fill the log")
        self.assertNotEqual(run("nbdinfo", "--size", self.uri(image), check=False).returncode, 0)
        run("nbdinfo", "--size", self.uri(other, "vdb"))  # each export has its own limit
        for client in clients:
            self.works(client)
        self.assertEqual(a.vmferry("volume", "show", "vda")["connections"], 4)
        # A place that becomes free is given away again.
        clients[0].close()
        wait_until(lambda: a.vmferry("volume", "show", "vda")["connections"] == 3, 5, "the place is free")
        self.assertEqual(run("nbdinfo", "--size", self.uri(image)).stdout.strip(), str(4 * MIB))

    def test_a_client_that_stalls_in_the_handshake_is_closed_after_the_time_and_others_work_meanwhile(self):
        # Descriptors of clients that say nothing add up until nobody gets in.
        image = self.image("vda.img", 4 * MIB)
        self.daemon("a", self.volume("vda", image), extra_args=["--nbd-handshake-timeout", "2s"])
        busy = self.connect(image)
        began = time.monotonic()
        stalled = []
        for said in (b"", b"\0\0", struct.pack(">I", 3), struct.pack(">I", 3) + option(OPT_GO, b"\0\0\0\0\0\0")[:9],
                     struct.pack(">I", 3) + option(99)):  # answered, and then nothing more
            client = self.connect(image, export=None)
            client.sendall(said)
            stalled.append(client)
        while time.monotonic() < began + 1.5:
            self.works(busy)
            self.assertEqual(run("nbdinfo", "--size", self.uri(image)).stdout.strip(), str(4 * MIB))
        for client in stalled:
            self.closed(client, 5)
            self.assertGreater(time.monotonic() - began, 1.9, "not before its time")
        self.assertLess(time.monotonic() - began, 4)
        time.sleep(1)
        self.works(busy)  # the time is the handshake's, not that of a session

    def test_a_handshake_of_many_small_steps_gets_no_more_time(self):
        # A byte now and then must not keep the place for ever.
        image = self.image("vda.img", 4 * MIB)
        self.daemon("a", self.volume("vda", image), extra_args=["--nbd-handshake-timeout", "2s"])
        client = self.connect(image, export=None)
        began = time.monotonic()
        client.sendall(struct.pack(">I", 3))
        with self.assertRaises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < began + 6:
                client.sendall(option(99))
                time.sleep(0.2)
        self.assertLess(time.monotonic() - began, 4)

    def test_stalled_handshakes_do_not_keep_clients_out_when_all_places_are_taken(self):
        # With four places four silent connections would be enough to lock a guest out, for as long as one likes.
        image = self.image("vda.img", 4 * MIB)
        self.daemon("a", self.volume("vda", image), extra_args=["--nbd-connections", "4"])
        busy = self.connect(image)
        stalled = [self.connect(image, export=None) for _ in range(3)]
        self.assertEqual(self.connect(image, export=None).recv(1), b"", "they may be at work: a newcomer has to wait")
        time.sleep(1.2)
        self.assertEqual(run("nbdinfo", "--size", self.uri(image)).stdout.strip(), str(4 * MIB))
        self.closed(stalled[0], 2)  # the oldest gave way
        self.works(busy)

    def test_limits_out_of_range_are_all_reported_at_once_with_their_line(self):
        # One problem per start costs a restart each; a limit of nought locks every guest out.
        file = self.path("vmferry.toml")
        file.write_text('state-dir = "/s"\nnbd-connections = 0\nnbd-handshake-timeout = "1h"\n[[volume]]\nname = "vda"\n'
                        'path = "/x.img"\nread-only = "x"\ndescription = ""\n')
        done = run(BUILD.bin / "vmferryd", "--config", file, "--check-config", check=False)
        self.assertEqual(done.returncode, 2)
        for line, text in ((2, "nbd-connections '0' is not a number from 1 to 65535"),
                           (3, "nbd-handshake-timeout '1h' is not a time from 1s to 10m"),
                           (7, "read-only 'x' is not on or off"), (8, "description is empty")):
            self.assertIn(f"vmferryd: {file}:{line}: {text}", done.stderr)
        for key, values in (("--nbd-connections", ("65536", "-1", "1k", "99999999999999999999")),
                            ("--nbd-handshake-timeout", ("999ms", "601s", "0", "soon", "200d"))):
            for value in values:
                with self.subTest(key=key, value=value):
                    self.assertIn(key.strip("-") + f" '{value}' is not", self.check(f"{key}={value}"))
        for arguments in (("--nbd-connections", "1"), ("--nbd-connections", "65535"), ("--nbd-handshake-timeout", "1s"),
                          ("--nbd-handshake-timeout", "10m"), ("--nbd-handshake-timeout", "30")):
            self.assertEqual(self.check(*arguments), "")


if __name__ == "__main__":
    unittest.main(verbosity=2)
