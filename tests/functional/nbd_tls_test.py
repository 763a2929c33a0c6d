#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""TLS on the NBD exports, with clients of other makes: libnbd's programs and both QEMUs, certificates and keys.

Each refusal has a volume of its own, because a daemon writes one line per export in ten seconds about them.
"""

import filecmp
import json
import os
import shutil
import socket
import ssl
import struct
import unittest

from daemon_support import BUILD, MIB, DaemonCase, run
from nbd_support import OPT_ABORT, OPT_GO, OPT_LIST, OPT_STRUCTURED, option, read_option_reply, receive
from vmlib.pki import Authority, psk_file

OPT_EXPORT_NAME, OPT_STARTTLS, OPT_INFO = 1, 5, 6
ACK, ERR_POLICY, ERR_INVALID, ERR_TLS_REQUIRED = 1, 0x80000002, 0x80000003, 0x80000005
GO_DEFAULT = b"\0\0\0\0\0\0"


class TlsCase(DaemonCase):
    def setUp(self):
        super().setUp()
        self.authority = Authority(self.folder / "ca")
        self.server = self.authority.server(self.folder / "server")
        self.alice = self.authority.client(self.folder / "alice", "alice")
        self.keys = psk_file(self.folder / "psk/keys.psk", "bob", "carol")
        self.index = 0

    def credentials(self) -> list:
        return ["--nbd-tls-certificates", str(self.server), "--nbd-tls-psk", str(self.keys)]

    def start(self, *arguments, volumes: int = 1, more: str = "", use_credentials: bool = True):
        """A daemon "a" with vol1..volN, 8 MiB each, on unix sockets."""
        specs = [f"name=vol{n},path={self.folder}/vol{n}.img,size=8M,nbd=unix:{self.folder}/vol{n}.nbd{more}"
                 for n in range(1, volumes + 1)]
        extra = [*(self.credentials() if use_credentials else []), *arguments]
        return self.daemon("a", *specs, extra_args=extra)

    def target(self, n: int = 1) -> str:
        return f"vol{n}?socket={self.folder}/vol{n}.nbd"

    def by_certificate(self, folder, n: int = 1) -> str:
        return f"nbds+unix:///{self.target(n)}&tls-certificates={folder}&tls-hostname=localhost"

    def by_key(self, user: str, file=None, n: int = 1) -> str:
        return f"nbds+unix://{user}@/{self.target(n)}&tls-psk-file={file or self.keys}"

    def refused_client(self, uri: str) -> str:
        """nbdinfo's last words; it must not get in, neither at once nor with its first request."""
        done = run("nbdinfo", "--size", uri, check=False)
        self.assertNotEqual(done.returncode, 0, done.stdout)
        return done.stderr

    def connect(self, n: int = 1):
        connection = socket.socket(socket.AF_UNIX)
        self.addCleanup(connection.close)
        connection.settimeout(10)
        connection.connect(f"{self.folder}/vol{n}.nbd")
        receive(connection, 18)
        connection.sendall(struct.pack(">I", 3))
        return connection

    def ask(self, connection, number: int, data: bytes = b"") -> int:
        connection.sendall(option(number, data))
        while True:
            _, kind, _ = read_option_reply(connection)
            if kind not in (2, 3, 4):  # until the last part of the answer
                return kind

    def starttls(self, connection):
        """The raw connection, wrapped."""
        self.assertEqual(self.ask(connection, OPT_STARTTLS), ACK)
        context = ssl.create_default_context(cafile=self.alice / "ca-cert.pem")
        context.load_cert_chain(self.alice / "client-cert.pem", self.alice / "client-key.pem")
        wrapped = context.wrap_socket(connection, server_hostname="localhost")
        self.addCleanup(wrapped.close)
        return wrapped


class Clients(TlsCase):
    def test_libnbd_copies_both_ways_by_certificate_and_by_key(self):
        # A server that only its own client understands is of no use; nbdcopy opens several connections.
        a = self.start()
        self.assertEqual(a.vmferry("volume", "show", "vol1")["exports"],
                         [f"nbds+unix:///{self.target()}"])
        content = self.image("content.img", 8 * MIB, 8 * MIB)
        back = self.folder / "back.img"
        for uri in (self.by_certificate(self.alice), self.by_key("bob"), self.by_key("carol")):
            run("nbdcopy", "--connections=4", content, uri)
            self.assertTrue(filecmp.cmp(content, self.folder / "vol1.img", shallow=False))
            run("nbdcopy", "--connections=4", "--request-size=1048576", uri, back)
            self.assertTrue(filecmp.cmp(content, back, shallow=False))
            with open(content, "r+b") as file:
                file.write(os.urandom(MIB))
        export = json.loads(run("nbdinfo", "--json", self.by_certificate(self.alice)).stdout)
        self.assertEqual(export["TLS"], True)

    def test_both_qemus_read_and_write_by_certificate_and_by_key(self):
        # Guests' disks: QEMU insists on other things in a certificate than GnuTLS' own programs do.
        self.start()
        for tools in ("/usr/bin", BUILD.qemu_bin("10")):
            for number, objects in enumerate((["tls-creds-x509,id=t,endpoint=client,dir=" + str(self.alice), "localhost"],
                                              [f"tls-creds-psk,id=t,endpoint=client,dir={self.keys.parent},username=bob"])):
                image = (f"driver=nbd,export=vol1,server.type=unix,server.path={self.folder}/vol1.nbd,tls-creds=t"
                         + (f",tls-hostname={objects[1]}" if len(objects) > 1 else ""))
                words = ("--object", objects[0], "--image-opts")
                done = run(f"{tools}/qemu-io", *words, "-c", f"write -P {17 + number} 1M 3M", "-c",
                           f"read -P {17 + number} 1M 3M", "-c", "write -z 2M 64k", "-c", "read -P 0 2M 64k", "-c",
                           "flush", image)
                self.assertNotIn("failed", done.stdout + done.stderr)
                self.assertIn("8 MiB", run(f"{tools}/qemu-img", "info", *words, image).stdout)

    def test_tcp_beyond_loopback_is_served_with_required_tls(self):
        # This is what encryption is for: a server that only listens on loopback cannot be reached by the other host.
        image = self.folder / "vda.img"
        port = 10809 + os.getpid() % 20000
        a = self.daemon("a", f"name=vda,path={image},size=8M,nbd=tcp:0.0.0.0:{port}", extra_args=self.credentials())
        uri = f"nbds://localhost:{port}/vda?tls-certificates={self.alice}"
        self.assertEqual(run("nbdinfo", "--size", uri).stdout.strip(), str(8 * MIB))
        self.assertIn("server requires TLS", self.refused_client(f"nbd://localhost:{port}/vda"))
        # A client takes neither the certificate of another authority nor that of a server that it did not ask for.
        # (Over a unix socket libnbd 1.14 does not look.)
        doubting = self.authority.client(self.folder / "doubting", "alice")
        shutil.copy(Authority(self.folder / "foreign").certificate, doubting / "ca-cert.pem")
        self.assertIn("certificate", self.refused_client(f"nbds://localhost:{port}/vda?tls-certificates={doubting}"))
        self.assertIn("certificate", self.refused_client(f"nbds://127.0.0.2:{port}/vda?tls-certificates={self.alice}"))
        self.assertEqual(a.stop(), 0)
        # Without the credentials the recorded volume must not come back in plaintext.
        a.command = a.command[:3]
        a.start()
        self.wait_log(a, "not on loopback")
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)

    def test_each_export_takes_only_the_clients_whose_certificates_it_names(self):
        # One CA signs for every host of the site; the backup server's certificate must not open a guest's disk for writing.
        a = self.start(volumes=1)
        for n, names in ((2, "alice"), (3, "backup:hosta"), (4, "alice:backup")):
            a.vmferry("volume", "add", f"name=vol{n},path={self.folder}/vol{n}.img,size={n}M,nbd=unix:{self.folder}/vol{n}.nbd,"
                                       f"tls-allow={names}")
        clients = {name: self.authority.client(self.folder / f"c-{name}", name) for name in ("backup", "hosta", "mallory")}
        clients["alice"] = self.alice
        allowed = {1: set(clients), 2: {"alice"}, 3: {"backup", "hosta"}, 4: {"alice", "backup"}}
        for n, names in allowed.items():
            for name, folder in clients.items():
                with self.subTest(export=n, client=name):
                    uri = self.by_certificate(folder, n)
                    image = (f"driver=nbd,export=vol{n},server.type=unix,server.path={self.folder}/vol{n}.nbd,tls-creds=t,"
                             "tls-hostname=localhost")
                    qemu = ["qemu-img", "info", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}",
                            "--image-opts", image]
                    listed = json.loads(run("nbdinfo", "--list", "--json", uri.replace(f"vol{n}?", "?")).stdout)["exports"]
                    if name in names:
                        size = n * MIB if n > 1 else 8 * MIB
                        self.assertEqual(run("nbdinfo", "--size", uri).stdout.strip(), str(size))
                        self.assertIn(f"{size} bytes", run(*qemu).stdout)
                        self.assertEqual([e["export-name"] for e in listed], [f"vol{n}"])
                    else:
                        self.assertIn("policy", self.refused_client(uri))
                        self.assertNotEqual(run(*qemu, check=False).returncode, 0)
                        self.assertEqual(listed, [], "it does not even hear that the export is there")
        self.wait_log(a, "is not in tls-allow of export 'vol2'")

    def test_optional_tls_serves_both_kinds_and_protects_the_exports_that_name_their_clients(self):
        a = self.start("--nbd-tls", "allow", volumes=1)
        a.vmferry("volume", "add",
                  f"name=vol2,path={self.folder}/vol2.img,size=4M,nbd=unix:{self.folder}/vol2.nbd,tls-allow=alice:bob")
        self.assertEqual(run("nbdinfo", "--size", f"nbd+unix:///{self.target(1)}").stdout.strip(), str(8 * MIB))
        self.assertEqual(run("nbdinfo", "--size", self.by_key("carol", n=1)).stdout.strip(), str(8 * MIB))
        for uri in (self.by_certificate(self.alice, 2), self.by_key("bob", n=2)):
            self.assertEqual(run("nbdinfo", "--size", uri).stdout.strip(), str(4 * MIB))
        self.assertIn("TLS", self.refused_client(f"nbd+unix:///{self.target(2)}"))
        self.assertIn("policy", self.refused_client(self.by_key("carol", n=2)))
        self.wait_log(a, "client 'carol' is not in tls-allow of export 'vol2'")
        connection = self.connect(2)
        self.assertEqual(self.ask(connection, OPT_INFO, GO_DEFAULT), ERR_TLS_REQUIRED)
        connection.sendall(option(OPT_LIST))
        self.assertEqual(read_option_reply(connection)[1], ACK, "an export that this client may not use is not listed")
        # The names are kept over a restart: a list that got lost would open the export to everybody.
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertIn("policy", self.refused_client(self.by_key("carol", n=2)))
        self.assertEqual(run("nbdinfo", "--size", self.by_key("bob", n=2)).stdout.strip(), str(4 * MIB))


class Refusals(TlsCase):
    def test_who_proves_nothing_is_refused_and_the_log_says_why(self):
        # Each of these would read and write the disk of a guest.
        a = self.start(volumes=7)
        foreign = Authority(self.folder / "foreign").client(self.folder / "mallory", "alice")
        shutil.copy(self.alice / "ca-cert.pem", foreign)
        bare = self.folder / "bare"
        bare.mkdir()
        shutil.copy(self.alice / "ca-cert.pem", bare)
        stranger = psk_file(self.folder / "stranger.psk", "dave")
        wrong = psk_file(self.folder / "wrong.psk", "bob")
        cases = [
            (self.by_certificate(foreign, 1), "has to be signed by the server's ca-cert.pem"),
            (self.by_certificate(bare, 2), "presented no certificate"),
            (self.by_certificate(self.authority.client(self.folder / "old", "alice", expired=True), 3), "has expired"),
            (self.by_certificate(self.authority.client(self.folder / "web", "alice", purpose="serverAuth"), 4),
             "not for TLS clients"),
            (self.by_key("bob", wrong, 5), "key of the client's user 'bob'"),
            (self.by_key("dave", stranger, 6), "user 'dave' is not in the file"),
        ]
        for uri, reason in cases:
            with self.subTest(reason):
                self.refused_client(uri)
                self.wait_log(a, reason)
        self.assertIn("server requires TLS", self.refused_client(f"nbd+unix:///{self.target(7)}"))
        for n in range(1, 8):
            self.assertEqual(run("nbdinfo", "--size", self.by_certificate(self.alice, n)).stdout.strip(), str(8 * MIB))

    def test_a_revoked_certificate_is_refused(self):
        # Without this a lost laptop stays welcome until its certificate expires.
        self.authority.revoke(self.server, self.alice / "client-cert.pem")
        a = self.start()
        self.refused_client(self.by_certificate(self.alice))
        self.wait_log(a, "certificate revoked")
        other = self.authority.client(self.folder / "other", "other")
        run("nbdinfo", "--size", self.by_certificate(other))

    def test_a_server_without_tls_says_so(self):
        self.start(use_credentials=False)
        connection = self.connect()
        self.assertEqual(self.ask(connection, OPT_STARTTLS), ERR_POLICY)
        self.assertEqual(self.ask(connection, OPT_GO, GO_DEFAULT), ACK, "and the session goes on without")


class Protocol(TlsCase):
    def test_nothing_but_starttls_and_abort_is_answered_before_tls(self):
        # proto.md, FORCEDTLS; a size given away in plaintext is the beginning of more.
        self.start()
        connection = self.connect()
        for number, data in ((OPT_LIST, b""), (OPT_INFO, GO_DEFAULT), (OPT_GO, GO_DEFAULT), (OPT_STRUCTURED, b""),
                             (10, b"nonsense"), (99, b"x" * 20000)):
            self.assertEqual(self.ask(connection, number, data), ERR_TLS_REQUIRED, number)
        self.assertEqual(self.ask(connection, OPT_STARTTLS, b"data"), ERR_INVALID)
        self.assertEqual(self.ask(connection, OPT_ABORT), ACK)
        connection = self.connect()
        connection.sendall(option(OPT_EXPORT_NAME, b""))
        self.assertEqual(connection.recv(1), b"", "EXPORT_NAME has no error reply: the connection ends")

    def test_a_second_starttls_is_refused_and_what_was_said_in_plaintext_does_not_count(self):
        self.start("--nbd-tls", "allow")
        connection = self.connect()
        self.assertEqual(self.ask(connection, OPT_STRUCTURED), ACK)
        wrapped = self.starttls(connection)
        self.assertEqual(self.ask(wrapped, OPT_STARTTLS), ERR_INVALID)
        # Still structured replies? Then SET_META_CONTEXT would be answered.
        self.assertEqual(self.ask(wrapped, 10, struct.pack(">II", 0, 0)), ERR_INVALID)
        self.assertEqual(self.ask(wrapped, OPT_GO, GO_DEFAULT), ACK)

    def test_plaintext_behind_starttls_is_not_taken_for_what_the_client_says_through_tls(self):
        # The STARTTLS injection of mail servers: an attacker's options, executed as the authenticated client's.
        self.start("--nbd-tls", "allow")
        connection = self.connect()
        connection.sendall(option(OPT_STARTTLS) + option(OPT_STRUCTURED))
        self.assertEqual(connection.recv(100), b"", "closed, without an acknowledgement")
        # Split so that the server has answered already: then it is a TLS handshake that makes no sense.
        connection = self.connect()
        self.assertEqual(self.ask(connection, OPT_STARTTLS), ACK)
        connection.sendall(option(OPT_STRUCTURED))
        rest = b""
        while part := connection.recv(100):
            rest += part
        self.assertNotIn(b"\x00\x03\xe8\x89\x04\x55\x65\xa9", rest, "no option is answered in plaintext")

    def test_a_client_that_stalls_in_the_tls_handshake_keeps_nobody_out(self):
        self.start()
        for _ in range(20):
            self.assertEqual(self.ask(self.connect(), OPT_STARTTLS), ACK)
        run("nbdinfo", "--size", self.by_key("bob"))

    def test_the_end_of_a_session_is_said_through_tls(self):
        # Without close_notify a client cannot tell the end from a cut by somebody else.
        self.start()
        wrapped = self.starttls(self.connect())
        self.assertEqual(self.ask(wrapped, OPT_GO, GO_DEFAULT), ACK)
        wrapped.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0))
        self.assertEqual(wrapped.recv(1), b"")  # ssl.SSLEOFError without the close_notify


class Configuration(TlsCase):
    def check(self, *arguments) -> str:
        done = run(BUILD.bin / "vmferryd", "--state-dir", self.folder / "state", "--check-config", *arguments, check=False)
        return "" if done.returncode == 0 else done.stderr

    def test_what_cannot_be_safe_is_refused_with_what_to_do(self):
        # A wrong word in one of these would serve a disk to the network.
        volume = f"name=vda,path={self.folder}/a.img,size=8M"
        certificates = ["--nbd-tls-certificates", str(self.server)]
        cases = [
            (["--volume", volume + ",nbd=tcp:0.0.0.0:10809"], "not on loopback"),
            (["--nbd-tls", "allow", *certificates, "--volume", volume + ",nbd=tcp:0.0.0.0:10809"], "not on loopback"),
            (["--nbd-tls", "off", *certificates, "--volume", volume + ",nbd=tcp:[::]:10809"], "not on loopback"),
            ([*certificates, "--volume", volume + ",nbd=tcp:0.0.0.0:10809,nbd-tls=allow"], "not on loopback"),
            (["--nbd-tls", "require"], "needs nbd-tls-certificates or nbd-tls-psk"),
            (["--nbd-tls", "maybe"], "not require, allow or off"),
            (["--volume", volume + ",nbd=unix:/tmp/x,tls-allow=alice"], "nbd-tls is off"),
            ([*certificates, "--volume", volume + ",tls-allow=alice"], "nbd=, which is missing"),
            ([*certificates, "--volume", volume + ",nbd=unix:/tmp/x,tls-allow=alice::bob"], "empty or overlong name"),
        ]
        for arguments, text in cases:
            with self.subTest(arguments=arguments):
                self.assertIn(text, self.check(*arguments))
        self.assertEqual(self.check(*certificates, "--volume", volume + ",nbd=tcp:0.0.0.0:10809"), "")

    def test_unusable_files_are_named_with_what_is_wrong(self):
        # Found at the start, not by the first client at night.
        def broken(change) -> str:
            folder = self.folder / f"broken{self.index}"
            self.index += 1
            shutil.copytree(self.server, folder)
            change(folder)
            return self.check("--nbd-tls-certificates", str(folder))

        other = self.authority.server(self.folder / "other-server")
        self.assertIn("ca-cert.pem': No such file", broken(lambda f: (f / "ca-cert.pem").unlink()))
        self.assertIn("server-key.pem' holds a secret", broken(lambda f: os.chmod(f / "server-key.pem", 0o644)))
        self.assertIn("not the key of", broken(lambda f: shutil.copy(other / "server-key.pem", f)))
        self.assertIn("no readable PEM", broken(lambda f: (f / "server-cert.pem").write_text("garbage")))
        self.assertIn("is empty", broken(lambda f: (f / "ca-cert.pem").write_text("")))
        self.assertIn("no readable PEM", broken(lambda f: (f / "ca-crl.pem").write_text("garbage")))
        expired = self.authority.server(self.folder / "expired", expired=True)
        self.assertIn("server-cert.pem has expired", self.check("--nbd-tls-certificates", str(expired)))
        for text, problem in (("bob\n", "line 1"), ("bob:12\n", "1 bytes"), ("bob:zz\n", "not hexadecimal"),
                              (f"a:{'00' * 32}\na:{'11' * 32}\n", "line 2")):
            file = self.folder / "bad.psk"
            file.write_text(text)
            os.chmod(file, 0o600)
            self.assertIn(problem, self.check("--nbd-tls-psk", str(file)))


if __name__ == "__main__":
    unittest.main(verbosity=2)
