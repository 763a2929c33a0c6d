#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vmferry peer`: tokens that work once, keys that are pinned, and peers that are refused with the reason on both sides."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import unittest

from daemon_support import MIB, DaemonCase, VmferryError, new_address, run, wait_until


class Pairing(DaemonCase):
    def invite(self, daemon, *options) -> str:
        return daemon.vmferry("peer", "invite", "--address", daemon.listen, *options)["token"]

    def join(self, daemon, token, *options):
        return daemon.vmferry("peer", "join", "-", *options, input_text=token + "\n")

    def refused_join(self, daemon, token, *options, status: int = 1) -> str:
        return self.refused(daemon, "peer", "join", "-", *options, input_text=token + "\n", status=status)

    def test_invite_and_join_make_both_sides_know_each_other(self):
        # Both have to be able to say --peer afterwards, by names of their own choice.
        a, b = self.daemon("a", listen=new_address()), self.daemon("b", listen=new_address())
        plain = [w for w in b.vmferry_command("peer", "invite", "--address", b.listen) if w != "--json"]
        done = run(*plain)
        self.assertEqual(len(done.stdout.split()), 1, "the token alone is on standard output")
        joined = self.join(a, done.stdout.strip(), "--name", "hostb", "--as", "hosta")
        self.assertEqual((joined["name"], joined["as"]), ("hostb", "hosta"))
        self.assertEqual(joined["grants"], "replicate-in, verify, migrate-in")
        for daemon, other in ((a, "hostb"), (b, "hosta")):
            peer = wait_until(lambda: (p := daemon.vmferry("peer", "list")["peers"]) and p[0]["connected"] and p[0], 10, "up")
            self.assertEqual(peer["name"], other)
            self.assertGreater(daemon.vmferry("peer", "ping", other)["rtt_ms"], 0)
        # Either side may open the connection afterwards.
        for daemon, other in ((a, b), (b, a)):
            self.assertEqual(other.stop(), 0)
            other.start()
            wait_until(lambda: daemon.vmferry("peer", "list")["peers"][0]["connected"], 15, "connected again")

    def test_a_token_works_once(self):
        # A token in a chat log must be worth nothing afterwards.
        a, b, c = (self.daemon(n, listen=new_address()) for n in "abc")
        token = self.invite(b)
        self.join(a, token, "--name", "b", "--as", "a")
        error = self.refused_join(c, token, "--name", "b")
        self.assertIn("used already", error)
        self.assertIn("'a'", error)
        self.assertIn("used already", b.vmferry("peer", "list")["refusals"][-1])
        self.assertEqual(b.stop(), 0)
        b.start()
        self.assertIn("used already", self.refused_join(c, token, "--name", "b"), "also after a restart")
        self.assertEqual([p["name"] for p in b.vmferry("peer", "list")["peers"]], ["a"])

    def test_garbage_and_strange_tokens_are_refused(self):
        # The error tells a truncated copy from a token that never was.
        a, b = self.daemon("a", listen=new_address()), self.daemon("b", listen=new_address())
        token = self.invite(b)
        for garbage in ("nonsense", token[:-5], token + "x", token[:20] + "!" + token[21:], "A" * 5000):
            self.assertTrue(self.refused_join(a, garbage, "--name", "b", status=2))
        self.assertIn("this daemon", self.refused_join(b, token, "--name", "me", status=2))
        self.assertIn("not a name", self.refused_join(a, token, "--name", "../x", status=2))
        self.join(a, token, "--name", "b", "--as", "a")  # none of this used it up
        self.assertIn("'b'", self.refused_join(a, self.invite(b), "--name", "other"))
        # Nobody answers there.
        gone = self.invite(b)
        c = self.daemon("c")
        self.assertEqual(b.stop(), 0)
        self.assertIn(b.listen, self.refused_join(c, gone, "--name", "b"))

    def test_an_expired_token_says_so(self):
        # Fifteen minutes are over sooner than one thinks; the clock of the inviter decides.
        a = self.daemon("a", listen=new_address())
        b = self.daemon("b", listen=new_address())
        token = self.invite(b)
        self.assertEqual(b.stop(), 0)
        # The token is in b's record with its time; a clock that is 20 minutes ahead finds it old.
        with open(self.path("clock.c"), "w", encoding="utf-8") as source:
            source.write("""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec* out) {
  static int (*real)(clockid_t, struct timespec*);
  if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(id, out);
  if (id == CLOCK_REALTIME) out->tv_sec += 1200;
  return result;
}
""")
        run("cc", "-shared", "-fPIC", "-o", self.path("clock.so"), self.path("clock.c"), "-ldl")
        b.command = ["env", f"LD_PRELOAD={self.path('clock.so')}", *b.command]
        b.start()
        error = self.refused_join(a, token, "--name", "b")
        self.assertRegex(error, r"expired \d+ s ago")
        self.assertIn("peer invite", error)

    def test_rights_are_what_was_granted(self):
        # A backup host that may hold copies must not be able to start guests, or to overwrite disks.
        a, b = self.daemon("a", self.volume("vda", self.image("a-vda.img", 8 * MIB, MIB)), listen=new_address()), None
        b = self.daemon("b", self.volume("vda", self.image("b-vda.img", 8 * MIB), "role=secondary"), listen=new_address())
        token = self.invite(b, "--grant", "verify")
        joined = self.join(a, token, "--name", "b", "--as", "a")
        self.assertEqual(joined["granted_to_us"], "verify")
        error = self.refused(a, "replicate", "start", "vda", "--peer", "b")
        self.assertIn("replicate-in", error)
        self.assertEqual(b.vmferry("peer", "list")["peers"][0]["grants"], "verify")
        self.assertIn("what", self.refused(b, "peer", "invite", "--address", b.listen, "--grant", "what", status=2))
        for nothing in ("", "  ", ","):  # an unset variable of a script
            error = self.refused(b, "peer", "invite", "--address", b.listen, "--grant", nothing, status=2)
            for right in ("replicate-in", "verify", "migrate-in"):
                self.assertIn(right, error)
        self.assertIn("nowhere", self.refused(b, "peer", "invite", "--address", "nowhere", status=2))

    def test_a_right_that_was_not_granted_is_refused_by_its_name(self):
        # A host that may hold copies only: it is asked for digests and for a running guest all the same.
        a = self.daemon("a", self.volume("vda", self.image("a-vda.img", 8 * MIB, MIB), f"qmp={self.path('qmp.sock')}"),
                        listen=new_address())
        b = self.daemon("b", self.volume("vda", self.image("b-vda.img", 8 * MIB), "role=secondary"), listen=new_address())
        joined = self.join(a, self.invite(b, "--grant", "replicate-in"), "--name", "b", "--as", "a")
        self.assertEqual(joined["granted_to_us"], "replicate-in")
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        error = self.refused(a, "replicate", "verify", "vda")
        self.assertRegex(error, r"right verify\b")
        self.assertIn("right verify", b.log())
        with self.assertRaises(VmferryError) as caught:
            a.vmferry("migrate", "vda", "--peer", "b")
        self.assertEqual(caught.exception.status, 1)
        result = caught.exception.output
        # No QEMU is there that could tell where the guest is.
        self.assertEqual((result["result"], result["owner"], result["guest"]), ("failed", "source", "unknown"))
        self.assertIn("migrate-in", result["error"])
        self.assertEqual((a.volume_status("vda")["role"], b.volume_status("vda")["role"]), ("primary", "secondary"))

    def test_invite_and_join_print_what_they_grant(self):
        # Whoever hands a token out has to see how far it reaches.
        a, b = self.daemon("a", listen=new_address()), self.daemon("b", listen=new_address())
        for options, grants in (([], "replicate-in, verify, migrate-in"), (["--grant", "verify,replicate-in"], "replicate-in, verify"),
                                (["--grant", "migrate-in"], "migrate-in")):
            command = b.vmferry_command("peer", "invite", "--address", b.listen, *options)
            printed = run(*[word for word in command if word != "--json"])
            self.assertIn(f"grants {grants};", printed.stderr)
            self.assertNotIn("grants", printed.stdout)
            self.assertEqual(json.loads(run(*command).stdout)["grants"], grants)
        # The last token grants migrate-in alone; what the joiner grants in turn is everything.
        command = [word for word in a.vmferry_command("peer", "join", "-", "--name", "b", "--as", "a") if word != "--json"]
        joined = run(*command, input=printed.stdout)
        self.assertIn("rights: replicate-in, verify, migrate-in", joined.stdout)
        self.assertEqual(a.vmferry("peer", "list")["peers"][0]["granted_to_us"], "migrate-in")
        self.assertEqual(b.vmferry("peer", "list")["peers"][0]["grants"], "migrate-in")

    def test_remove_ends_the_trust_on_this_side_at_once(self):
        # The point of removing is that the other one is out, whatever it thinks.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertIn("replicate stop", self.refused(b, "peer", "remove", "a"))
        a.vmferry("replicate", "stop", "vda")
        b.vmferry("replicate", "stop", "vda")
        b.vmferry("peer", "remove", "a")
        self.assertEqual(b.vmferry("peer", "list")["peers"], [])
        status = wait_until(lambda: not (p := a.vmferry("peer", "list")["peers"][0])["connected"] and p["last_error"] and p,
                            15, "refused from now on")
        wait_until(lambda: "not paired" in a.vmferry("peer", "list")["peers"][0]["last_error"], 15, status["last_error"])
        self.assertIn("not paired", b.vmferry("peer", "list")["refusals"][-1])
        self.assertIn("'a'", self.refused(b, "peer", "remove", "a"))
        self.assertIn("not paired", self.refused(a, "peer", "ping", "b"))


class Refusals(DaemonCase):
    def test_another_key_at_the_peers_address_is_refused_on_both_sides(self):
        # Somebody else answers at the address: neither may hand out blocks, and both logs have to say why.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertEqual(b.stop(), 0)
        impostor = self.daemon("c", listen=b.listen)
        peer = wait_until(lambda: "key" in (p := a.vmferry("peer", "list")["peers"][0])["last_error"] and p, 20, "noticed")
        self.assertFalse(peer["connected"])
        refusals = wait_until(lambda: impostor.vmferry("peer", "list")["refusals"], 10, "noticed there, too")
        self.assertRegex(" ".join(refusals), "key|not paired|refuses")
        self.assertEqual(a.replication("vda")["state"], "disconnected")
        self.assertEqual(impostor.stop(), 0)
        b.start()
        wait_until(lambda: a.vmferry("peer", "list")["peers"][0]["connected"], 20, "the right one is taken")
        self.in_sync(a)

    def test_a_state_folder_that_went_back_in_time_is_refused(self):
        # An old term: a restored backup of the daemon's state must not claim the volume that was handed over since.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertEqual(a.stop(), 0)
        shutil.copytree(a.state_dir, self.path("backup"))
        a.start()
        wait_until(lambda: b.volume_status("vda")["connected"], 15, "connected")
        b.vmferry("promote", "vda")
        self.wait_role(a, "secondary")
        a.vmferry("promote", "vda")  # term 2 is a's, b has seen it
        self.wait_role(b, "secondary")
        self.in_sync(a)
        self.assertEqual(a.stop(), 0)
        shutil.rmtree(a.state_dir)
        shutil.copytree(self.path("backup"), a.state_dir)
        a.start()
        self.wait_log(b, "refused")
        self.wait_log(a, "refuse")
        wait_until(lambda: "term" in a.replication("vda")["reason"], 15, "the reason at the primary")
        wait_until(lambda: "term" in b.replication("vda")["reason"], 15, "the reason at the copy")

    def tls(self, daemon, name="stranger", identity=None):
        """A TLS 1.3 connection with a fresh key of our own, or with that of a state folder."""
        new = ["-newkey", "ed25519", "-nodes", "-keyout", self.path(f"{name}.key")]
        run("openssl", "req", "-x509", *(["-new", "-key", identity] if identity else new), "-out", self.path(f"{name}.crt"),
            "-subj", "/CN=vmferry", "-days", "3650")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.path(f"{name}.crt"), identity or self.path(f"{name}.key"))
        host, port = daemon.listen.split(":")
        connection = context.wrap_socket(socket.create_connection((host, int(port)), timeout=10))
        self.addCleanup(connection.close)
        return connection

    def read_all(self, connection) -> bytes:
        answer = b""
        connection.settimeout(10)
        with contextlib.suppress(OSError):
            while data := connection.recv(4096):
                answer += data
        return answer

    def test_strangers_get_a_reason_and_nothing_else(self):
        # A port scanner, an old client or a wrong key: refused, logged within bounds, and no state changed.
        b = self.daemon("b", self.volume("vda", self.image("b-vda.img", 8 * MIB)), listen=new_address())
        stranger = self.tls(b)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        self.read_all(stranger)
        polite = self.tls(b, "polite")
        polite.sendall(frame(HELLO, hello(1, 1)))
        self.assertIn(b"not paired", self.read_all(polite))
        self.wait_log(b, "refused=")
        host, port = b.listen.split(":")
        plain = socket.create_connection((host, int(port)), timeout=10)
        plain.sendall(b"\0" * 1000)
        self.read_all(plain)
        plain.close()
        # TLS 1.2 and a client without a key are no peers.
        for options in (["-tls1_2"], ["-tls1_3"]):
            done = subprocess.run(["openssl", "s_client", "-connect", b.listen, *options], input="x\n", text=True,
                                  capture_output=True, timeout=20, check=False)
            self.assertNotIn("vmferry volume", done.stdout)
        for _ in range(100):
            socket.create_connection((host, int(port)), timeout=10).close()
        self.assertEqual(b.vmferry("peer", "list")["peers"], [])
        self.assertLessEqual(len(b.vmferry("peer", "list")["refusals"]), 16)
        self.assertLess(b.log().count("refused="), 40)

    def test_a_newer_protocol_is_refused_with_both_versions_named(self):
        # "connection closed" would leave the operator searching the network for what is an upgrade in the wrong order.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        self.assertEqual(a.stop(), 0)
        # With a's own key, as a later version of it would: only the version differs.
        newer = self.tls(b, identity=a.state_dir / "identity.pem")
        newer.sendall(frame(HELLO, hello(9, 12)))
        answer = self.read_all(newer)
        self.assertRegex(answer, rb"version.*9.*12")
        peer = wait_until(lambda: "version" in (p := b.vmferry("peer", "list")["peers"][0])["last_error"] and p, 10, "told")
        self.assertFalse(peer["connected"])
        self.wait_log(b, "9..12")
        a.start()
        wait_until(lambda: b.vmferry("peer", "list")["peers"][0]["connected"], 15, "the right version is taken")

    def test_broken_frames_of_a_paired_peer_end_its_connection_only(self):
        # I11: a peer that was taken over may send anything.
        a, b = self.two_daemons(8 * MIB, data=MIB)
        self.assertEqual(a.stop(), 0)
        key = a.state_dir / "identity.pem"
        good = hello(1, 1)
        for number, bytes_ in enumerate((frame(HELLO, good[:10]), frame(HELLO, good)[:-3], b"X" * 64,
                                         frame(HELLO, good) + frame(999, b""), frame(HELLO, good) + frame(HELLO, good),
                                         frame(HELLO, good) + b"\xff" * 100, frame(HELLO, b"\0" * len(good)))):
            connection = self.tls(b, f"bad-{number}", identity=key)
            connection.sendall(bytes_)
            connection.shutdown(socket.SHUT_WR)
            self.read_all(connection)
        self.assertEqual(b.volume_status("vda")["role"], "secondary")
        a.start()
        wait_until(lambda: b.vmferry("peer", "list")["peers"][0]["connected"], 15, "the real one is taken")


HELLO = 1


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def frame(kind: int, payload: bytes) -> bytes:
    """docs/replication-protocol.md section 2."""
    header = struct.pack("<4sHHI", b"VMF1", kind, 1, len(payload))
    return header + struct.pack("<I", crc32c(header)) + payload


def hello(lowest: int, highest: int) -> bytes:
    text = b"later"
    return (struct.pack("<HHQQ", lowest, highest, 7, 0) + b"n" * 16 + b"b" * 16 + struct.pack("<H", len(text)) + text +
            struct.pack("<H", 0))


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
