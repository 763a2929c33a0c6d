#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Listening sockets of NBD exports that come from the service manager, handed over by systemd's own program.

systemd-socket-activate makes the sockets and becomes the program it starts, when the first client comes. Between it and the
daemon stands a shell that starts vmferryd again each time it has ended, under the same sockets, as systemd does.
"""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
import unittest

import nbd

from daemon_support import BUILD, MIB, DaemonCase, run, wait_until
from vmlib import Daemon
from vmlib.pki import Authority

# Ends when the daemon did not end cleanly. LISTEN_PID is that of the process which takes the sockets.
AGAIN = 'while sh -c \'LISTEN_PID=$$ exec "$@"\' sh "$@"; do :; done'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ActivatedDaemon(Daemon):
    """`sockets`: (name, what -l takes). start() does not wait: the first client starts it."""

    def __init__(self, case, sockets, volumes, again: bool = False, options=(), **more):
        super().__init__("a", case.folder, BUILD, volumes, **more)
        self._log_start = 0
        self.activate = ["systemd-socket-activate", *[w for _, address in sockets for w in ("-l", str(address))],
                         *(["--fdname=" + ":".join(name for name, _ in sockets)] if sockets[0][0] else []), *options]
        self.command = [*self.activate, *(["sh", "-c", AGAIN, "sh"] if again else []), *self.command]

    def log(self) -> str:
        """Of this start only."""
        return super().log()[self._log_start:]

    def start(self, timeout: float = 20.0):
        self._log_start = len(super().log())
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True)
        wait_until(lambda: "Listening on" in self.log() or not self.alive(), timeout, "it listens")
        return self

    def daemon_pid(self) -> int:
        """Of vmferryd itself, wherever it stands below the shell."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(self.control.removeprefix("unix:"))
            return int.from_bytes(control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")

    def wait_ready(self) -> None:
        wait_until(lambda: self._answers() or not self.alive(), 20, "the daemon is ready")

    def end(self) -> None:
        """The shell before the daemon, so that no other one is started."""
        if self.alive():
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class ActivationCase(DaemonCase):
    def activated(self, sockets, *volumes: str, **options) -> ActivatedDaemon:
        daemon = ActivatedDaemon(self, sockets, volumes, **options)
        self.addCleanup(daemon.end)
        return daemon.start()

    def spec(self, name: str = "vda", *more: str) -> str:
        return ",".join([f"name={name}", f"path={self.folder}/{name}.img", "size=8M", *more])

    def unix(self, name: str = "vda"):
        return self.folder / f"{name}.socket"

    def unix_uri(self, name: str = "vda") -> str:
        return f"nbd+unix:///{name}?socket={self.unix(name)}"


class Sockets(ActivationCase):
    def test_the_first_client_starts_the_daemon_and_is_served_on_the_socket_of_systemd(self):
        # With a socket unit a guest may be started before the daemon is, and finds its disk all the same.
        a = self.activated([("vda", self.unix())], self.spec())
        self.assertFalse(a.state_dir.exists())
        self.assertEqual(run("nbdinfo", "--size", self.unix_uri()).stdout.strip(), str(8 * MIB))
        a.wait_ready()
        self.assertEqual(a.vmferry("volume", "show", "vda")["exports"], [self.unix_uri()])
        self.assertIn("8 MiB", run("qemu-img", "info", self.unix_uri()).stdout)
        done = run("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "read -P 7 0 1M", self.unix_uri())
        self.assertNotIn("failed", done.stdout + done.stderr)
        before = os.stat(self.unix()).st_ino
        self.assertEqual(a.stop(), 0)
        # It is systemd's file; without it nobody could connect until the socket unit is restarted.
        self.assertTrue(stat.S_ISSOCK(os.lstat(self.unix()).st_mode))
        self.assertEqual(os.stat(self.unix()).st_ino, before)

    def test_a_restart_under_the_same_socket_is_not_seen_by_clients(self):
        # Between two daemons the socket stays: who connects meanwhile waits instead of being refused.
        a = self.activated([("vda", self.unix())], self.spec(), again=True)
        run("nbdinfo", "--size", self.unix_uri())
        a.wait_ready()
        inode = os.stat(self.unix()).st_ino
        pids = set()
        stop = threading.Event()
        failures, successes = [], []

        def ask():
            while not stop.is_set():
                client = nbd.NBD()
                try:
                    client.connect_uri(self.unix_uri())
                    successes.append(client.get_size())
                except nbd.Error as error:
                    failures.append(str(error))
        crowd = threading.Thread(target=ask)
        options = f"driver=nbd,server.type=unix,server.path={self.unix()},export=vda,reconnect-delay=30"
        guest = subprocess.Popen(["qemu-io", "--image-opts", options], text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(guest.stdout.close)
        wait_until(lambda: a.vmferry("volume", "show", "vda")["connections"] == 1, 10, "the guest is connected")
        for number in range(4):
            pid = a.daemon_pid()
            pids.add(pid)
            guest.stdin.write(f"write -P {number + 1} {number}M 1M\n")
            guest.stdin.flush()
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: self._other_daemon(a, pid), 20, "another daemon")
        guest.stdin.write("".join(f"read -P {n + 1} {n}M 1M\n" for n in range(4)) + "quit\n")
        guest.stdin.close()
        output = guest.stdout.read()
        self.assertEqual(guest.wait(60), 0)
        for word in ("failed", "error", "Error"):
            self.assertNotIn(word, output)
        self.assertEqual(output.count("read 1048576/1048576"), 4, output)
        self.assertEqual(len(pids), 4)
        self.assertEqual(os.stat(self.unix()).st_ino, inode)
        # New clients, all the time: none is refused. One whose handshake is cut by the end of a daemon is no refusal.
        crowd.start()
        pid = a.daemon_pid()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: self._other_daemon(a, pid), 20, "another daemon")
        time.sleep(0.5)
        stop.set()
        crowd.join()
        self.assertGreater(len(successes), 10)
        self.assertEqual([f for f in failures if "refused" in f or "No such file" in f], [])

    def _other_daemon(self, daemon, pid) -> bool:
        try:
            return daemon.daemon_pid() != pid
        except OSError:
            return False

    def test_one_volume_may_have_several_sockets_and_each_volume_its_own(self):
        # A socket that is given to the wrong volume hands a guest another one's disk.
        port, six = free_port(), free_port()
        a = self.activated([("vda", self.unix("vda")), ("vdb", self.unix("vdb")), ("vda", f"127.0.0.1:{port}"),
                            ("vda", f"[::1]:{six}")], self.spec("vda"), self.spec("vdb", "size=4M").replace("size=8M,", ""),
                           self.spec("vdc", f"nbd=unix:{self.folder}/vdc.socket"))
        for uri, name, size in ((self.unix_uri("vdb"), "vdb", 4), (self.unix_uri("vda"), "vda", 8),
                                (f"nbd://127.0.0.1:{port}/", "vda", 8), (f"nbd://[::1]:{six}/", "vda", 8),
                                (self.unix_uri("vdc"), "vdc", 8)):
            listed = json.loads(run("nbdinfo", "--list", "--json", uri).stdout)["exports"]
            self.assertEqual([(e["export-name"], e["export-size"]) for e in listed], [(name, size * MIB)], uri)
        a.wait_ready()
        self.assertEqual(a.vmferry("volume", "show", "vda")["exports"],
                         [self.unix_uri("vda"), f"nbd://127.0.0.1:{port}/vda", f"nbd://[::1]:{six}/vda"])
        self.assertEqual(a.stop(), 0)
        self.assertTrue(self.unix("vda").exists())
        self.assertFalse(self.unix("vdc").exists(), "that one was its own")

    def test_nbd_may_say_the_same_as_the_socket_unit(self):
        # The same configuration with and without the socket unit: no second listener, which would find the path in use.
        a = self.activated([("vda", self.unix())], self.spec("vda", f"nbd=unix:{self.unix()}"))
        run("nbdinfo", self.unix_uri())
        a.wait_ready()
        self.assertEqual(a.vmferry("volume", "show", "vda")["exports"], [self.unix_uri()])
        self.assertEqual(a.stop(), 0)
        self.assertTrue(self.unix().exists())

    def test_a_recorded_volume_keeps_its_socket_and_cannot_be_removed_under_it(self):
        # Removed, its socket would go on taking clients that nobody answers, and the next start would fail.
        plain = self.daemon("a")
        plain.vmferry("volume", "add", self.spec())
        self.assertEqual(plain.stop(), 0)
        a = self.activated([("vda", self.unix())])
        run("nbdinfo", self.unix_uri())
        a.wait_ready()
        error = self.refused(a, "volume", "remove", "vda")
        self.assertIn(str(self.unix()), error)
        self.assertIn(".socket unit", error)
        run("nbdinfo", self.unix_uri())
        self.assertEqual(a.stop(), 0)
        # What came by a socket is not recorded: without it the volume has no export again.
        plain.start()
        self.assertEqual(plain.vmferry("volume", "show", "vda")["exports"], [])
        plain.vmferry("volume", "remove", "vda")

    def test_a_failed_volume_gets_its_socket_when_it_is_repaired(self):
        # The socket is there all the time; it must not be lost with the first try.
        image = self.folder / "vda.img"
        plain = self.daemon("a", self.spec())
        self.assertEqual(plain.stop(), 0)
        image.rename(self.folder / "away.img")
        a = self.activated([("vda", self.unix())])
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.connect(str(self.unix()))  # starts it, and waits
        a.wait_ready()
        self.assertEqual(a.vmferry("volume", "show", "vda")["state"], "failed")
        (self.folder / "away.img").rename(image)
        a.vmferry("volume", "add", f"name=vda,path={image}")
        client.settimeout(10)
        self.assertEqual(client.recv(8), b"NBDMAGIC")
        self.assertEqual(run("nbdinfo", "--size", self.unix_uri()).stdout.strip(), str(8 * MIB))


class Refusals(ActivationCase):
    def start_fails(self, sockets, *volumes: str, status: int = 2, connect=None, **options) -> str:
        """The daemon's last words, when it ends with this status at the first client."""
        a = self.activated(sockets, *volumes, **options)
        if connect is None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(sockets[0][1]))
                self.assertEqual(a._process.wait(20), status, a.log())
        else:
            connect()
            self.assertEqual(a._process.wait(20), status, a.log())
        return a.log()

    def test_a_name_that_is_no_volume_is_refused_with_the_names_that_are(self):
        # A slip of the pen in the socket unit, and the guest waits for a disk that never answers.
        said = self.start_fails([("vdx", self.unix())], self.spec("vda"), self.spec("vdb"), status=1)
        self.assertIn(f"socket named 'vdx' (unix:{self.unix()})", said)
        self.assertIn("FileDescriptorName=", said)
        self.assertIn("there are: vda, vdb", said)
        self.assertFalse((self.folder / "vda.img").exists(), "nothing was made yet")
        self.assertTrue(self.unix().exists())
        self.unix().unlink()
        # Without FileDescriptorName= at all.
        self.assertIn("socket named 'unknown'", self.start_fails([("", self.unix())], self.spec("vda"), status=1))
        self.unix().unlink()
        self.assertIn("(there is none)", self.start_fails([("vda", self.unix())], status=1))

    def test_a_descriptor_that_is_no_listening_stream_socket_is_refused(self):
        # Accept=yes, ListenDatagram=, ListenFIFO=: nothing that could be accepted on.
        port = free_port()

        def datagram():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"x", ("127.0.0.1", port))

        said = self.start_fails([("vda", f"127.0.0.1:{port}")], self.spec(), options=["--datagram"], connect=datagram)
        self.assertIn("descriptor 3 'vda': it is no listening stream socket: the .socket unit needs ListenStream= and "
                      "Accept=no", said)
        # One that systemd accepted on itself comes as descriptor 3 as well, and so does a file.
        ends = socket.socketpair()
        file = open(self.folder / "file", "w+b")
        for end in (ends[0], file):
            done = self.passed_by_hand([end.fileno()], "vda", self.spec())
            self.assertEqual(done.returncode, 2)
            self.assertIn("it is no listening stream socket", done.stderr)
            end.close()
        ends[1].close()
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0vmferry-test-" + self.folder.name)
            abstract.listen()
            done = self.passed_by_hand([abstract.fileno()], "vda", self.spec())
            self.assertEqual(done.returncode, 2)
            self.assertIn("without an absolute path", done.stderr)
        # More announced than there are.
        done = self.passed_by_hand([], "vda", self.spec(), count=1)
        self.assertEqual(done.returncode, 2)
        self.assertIn("LISTEN_FDS: the sockets of the service manager cannot be taken", done.stderr)

    def passed_by_hand(self, descriptors, names: str, *volumes: str, count: int | None = None):
        """--check-config of a daemon with these descriptors, for what systemd-socket-activate cannot make."""
        moves = " ".join(f"{3 + n}<&{d}" for n, d in enumerate(descriptors)) or "3<&-"
        words = [str(BUILD.bin / "vmferryd"), "--state-dir", str(self.folder / "s"), "--check-config"]
        for volume in volumes:
            words += ["--volume", volume]
        environment = dict(os.environ, LISTEN_FDS=str(len(descriptors) if count is None else count), LISTEN_FDNAMES=names)
        return subprocess.run(["bash", "-c", f'LISTEN_PID=$$ exec "$@" {moves}', "bash", *words], env=environment, text=True,
                              capture_output=True, pass_fds=descriptors, timeout=20, check=False)

    def test_an_address_other_than_that_of_nbd_is_refused(self):
        # Two addresses for one export: one of them is wrong, and only the operator knows which.
        said = self.start_fails([("vda", self.unix())], self.spec("vda", f"nbd=unix:{self.folder}/other.nbd"))
        self.assertIn(f"volume 'vda': nbd= says unix:{self.folder}/other.nbd, but the service manager passed "
                      f"unix:{self.unix()} for it: leave nbd= out", said)
        self.assertFalse((self.folder / "other.nbd").exists())

    def test_a_tcp_socket_beyond_loopback_needs_required_tls(self):
        # ListenStream=10809 listens on every address; without TLS the network reads and writes the disk.
        port = free_port()

        def connect():
            with contextlib.suppress(ConnectionResetError):  # it ended before we had said hello
                socket.create_connection(("127.0.0.1", port), 5).close()

        for more in ((), ("nbd-tls=off",)):
            said = self.start_fails([("vda", f"0.0.0.0:{port}")], self.spec("vda", *more), connect=connect)
            self.assertIn(f"the service manager's socket tcp:0.0.0.0:{port} is not on loopback", said)
            self.assertIn("nbd-tls 'require'", said)
        authority = Authority(self.folder / "ca")
        server = authority.server(self.folder / "server")
        alice = authority.client(self.folder / "alice", "alice")
        mallory = authority.client(self.folder / "mallory", "mallory")
        a = self.activated([("vda", f"0.0.0.0:{port}")], self.spec("vda", "tls-allow=alice"),
                           extra_args=["--nbd-tls-certificates", str(server)])
        uri = f"nbds://localhost:{port}/vda?tls-certificates="
        self.assertEqual(run("nbdinfo", "--size", f"{uri}{alice}").stdout.strip(), str(8 * MIB))
        self.assertNotEqual(run("nbdinfo", "--size", f"{uri}{mallory}", check=False).returncode, 0)
        self.assertNotEqual(run("nbdinfo", "--size", f"nbd://localhost:{port}/vda", check=False).returncode, 0)
        a.wait_ready()
        self.assertEqual(a.stop(), 0)
        # A recorded volume is looked at again: it was accepted under another configuration.
        b = self.activated([("vda", f"0.0.0.0:{port}")])
        connect()
        b.wait_ready()
        shown = b.vmferry("volume", "show", "vda")
        self.assertEqual((shown["state"], shown["exports"]), ("failed", []))
        self.assertIn("tls", shown["error"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
