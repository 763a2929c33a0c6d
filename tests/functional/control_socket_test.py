#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The control socket: JSON-RPC 2.0, who may connect, and clients that misbehave."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
import unittest

from daemon_support import MIB, DaemonCase, VmferryError, wait_until

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602


class ControlSocket(DaemonCase):
    def setUp(self):
        super().setUp()
        self.a = self.daemon("a", self.volume("vda", self.image("a.img", 4 * MIB)))

    def connect(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.a.control.removeprefix("unix:"))
        connection.settimeout(10)
        self.addCleanup(connection.close)
        return connection

    def answers(self) -> bool:
        try:
            return self.a.vmferry("status")["volumes"][0]["name"] == "vda"
        except VmferryError:
            return False

    def ask(self, raw, answers=1):
        """Sends raw bytes (or a value as one line); that many answers, parsed."""
        connection = self.connect()
        connection.sendall(raw if isinstance(raw, bytes) else json.dumps(raw).encode() + b"\n")
        with connection.makefile("rb") as lines:
            return [json.loads(lines.readline()) for _ in range(answers)]

    def error(self, raw):
        answer, = self.ask(raw)
        self.assertEqual((answer["jsonrpc"], set(answer)), ("2.0", {"jsonrpc", "id", "error"}))
        self.assertTrue(answer["error"]["message"])
        return answer["error"]["code"], answer["id"]

    def request(self, method, params=None, **more):
        return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params or {}, **more}

    def test_answers_carry_the_id_of_their_request(self):
        # A client with several calls under way tells the answers apart by nothing else.
        for number in (7, "seven", 0, -1):
            answer, = self.ask(self.request("status", id=number))
            self.assertEqual((answer["jsonrpc"], answer["id"]), ("2.0", number))
            self.assertEqual(answer["result"]["volumes"][0]["name"], "vda")
        lines = b"".join(json.dumps(self.request("status", id=n)).encode() + b"\n" for n in range(20))
        self.assertEqual([a["id"] for a in self.ask(lines, 20)], list(range(20)))

    def test_errors_have_the_codes_of_the_specification(self):
        # Client libraries act on the code, not on our words.
        self.assertEqual(self.error(b"{not json\n"), (PARSE_ERROR, None))
        self.assertEqual(self.error(b"[" * 5000 + b"\n"), (PARSE_ERROR, None))
        for wrong in (1, "x", [], {}, {"jsonrpc": "1.0", "id": 1, "method": "status"}, {"jsonrpc": "2.0", "id": 1},
                      {"jsonrpc": "2.0", "id": 1, "method": 5}, {"jsonrpc": "2.0", "id": {}, "method": "status"}):
            self.assertEqual(self.error(wrong)[0], INVALID_REQUEST, wrong)
        self.assertEqual(self.error(self.request("no.such")), (METHOD_NOT_FOUND, 7))
        for method, params in (("volume.show", {}), ("volume.show", {"name": 5}), ("volume.add", {"spec": "x"}),
                               ("promote", {"volumes": "vda"}), ("promote", {"volumes": []}),
                               ("promote", {"volumes": ["vda"], "force": "yes"}),
                               ("promote", {"volumes": ["vda", "vda"]}), ("replicate.wait", {"volumes": [5]}),
                               ("migrate.start", {"volumes": ["vda"], "peer": "b", "qmp": "vm.qmp"}),  # in whose folder?
                               ("migrate.start", {"volumes": ["vda"], "peer": "b", "timeout": "soon"})):
            self.assertEqual(self.error(self.request(method, params)), (INVALID_PARAMS, 7), (method, params))
        self.assertEqual(self.error(self.request("status", params=[1]))[0], INVALID_PARAMS)
        # What the daemon itself refuses is none of these, and says of which kind it is.
        answer, = self.ask(self.request("volume.show", {"name": "vdz"}))
        self.assertLess(answer["error"]["code"], -31999)
        self.assertEqual(answer["error"]["data"]["kind"], "not-found")

    def test_a_notification_is_carried_out_and_not_answered(self):
        # An answer that nobody waits for would be taken for that of the next call.
        lines = json.dumps({"jsonrpc": "2.0", "method": "volume.resize", "params": {"name": "vda", "size": "8M"}}).encode()
        answer, = self.ask(lines + b"\n" + json.dumps(self.request("status")).encode() + b"\n")
        self.assertEqual(answer["id"], 7)
        wait_until(lambda: self.a.vmferry("volume", "show", "vda")["size"] == 8 * MIB, 5, "resized")

    def test_endless_lines_and_vanished_clients_leave_the_daemon_unharmed(self):
        # I9 and I12: a broken monitoring script must not take the guests' disks with it.
        connection = self.connect()
        with self.assertRaises(OSError):
            for _ in range(64):
                connection.sendall(b"x" * MIB)
            while connection.recv(65536):
                pass
            raise ConnectionResetError  # answered with an error and closed: as good
        before = self.a.descriptor_count()
        crowd = [self.connect() for _ in range(200)]
        for member in crowd:
            with contextlib.suppress(OSError):
                member.sendall(b'{"jsonrpc": "2.0", "id": 1, "meth')
        self.assertLess(self.a.descriptor_count(), before + 100)
        for member in crowd:
            member.close()
        wait_until(lambda: self.a.descriptor_count() <= before, 5, "descriptors are given back")
        # Places are free again a moment after the descriptors.
        wait_until(self.answers, 20, "a command is answered again")
        self.assertLess(self.a.memory_kib(), 256 * 1024)

    def test_a_follower_that_stops_reading_is_dropped(self):
        # A terminal stopped with ctrl-s, followed for a week, would otherwise hold every event in our memory.
        follower = self.connect()
        follower.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        status = json.dumps(self.request("status")).encode() + b"\n"
        with self.assertRaises(OSError):
            for _ in range(200_000):  # some 50 MB of answers that nobody reads
                follower.sendall(status * 30)
        self.wait_log(self.a, "does not read its answers")
        self.assertLess(self.a.memory_kib(), 256 * 1024)
        self.assertEqual(self.a.vmferry("status")["volumes"][0]["role"], "primary")

    def test_only_the_owner_reaches_socket_and_state(self):
        # Whoever reaches the socket may overwrite every disk of the host.
        path = self.a.control.removeprefix("unix:")
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        for folder, _, files in os.walk(self.a.state_dir):
            self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700, folder)
            for name in files:
                self.assertEqual(stat.S_IMODE(os.lstat(os.path.join(folder, name)).st_mode) & 0o077, 0, name)
        self.assertEqual(stat.S_IMODE(os.stat(self.socket(self.path("a.img"))).st_mode), 0o600)
        # Also when somebody opened the folder up: credentials decide.
        os.chmod(self.folder, 0o755)
        os.chmod(self.a.state_dir, 0o755)
        os.chmod(path, 0o666)
        code = ("import socket,sys; s=socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1]);"
                "s.sendall(b'{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"status\",\"params\":{}}\\n');"
                "sys.exit(0 if s.recv(100) == b'' else 9)")
        done = subprocess.run(["/usr/bin/python3", "-c", code, path], user=65534, group=65534, capture_output=True,
                              text=True, timeout=20, check=False)
        self.assertTrue(done.returncode == 0 or "ConnectionReset" in done.stderr or "BrokenPipe" in done.stderr, done)
        self.wait_log(self.a, "control client refused: user 65534")

    def test_a_crash_leaves_a_socket_that_the_next_start_replaces(self):
        # A stale socket that has to be deleted by hand keeps every guest of the host from starting.
        self.a.kill()
        self.assertTrue(os.path.exists(self.a.control.removeprefix("unix:")))
        self.a.start()
        self.assertEqual(self.a.vmferry("status")["volumes"][0]["name"], "vda")

    def test_sigterm_during_calls_ends_them_and_the_daemon(self):
        # A following client must not keep the daemon from its restart.
        follower = subprocess.Popen(self.a.vmferry_command("events", "--follow"), stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True)
        self.assertIn("started", follower.stdout.readline())
        os.kill(self.a.pid, signal.SIGTERM)
        self.assertEqual(self.a.stop(timeout=5), 0)
        self.assertEqual(follower.wait(5), 1)
        self.assertIn("vmferryd closed the connection", follower.stderr.read())
        follower.stdout.close()
        follower.stderr.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
