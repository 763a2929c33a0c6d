#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The NBD export against clients that vanish, stall, crowd or talk nonsense: no crash, no leak, others go on."""

import errno
import os
import random
import signal
import socket
import struct
import sys
import time
import unittest

import nbd

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from nbd_support import (DISC, FLUSH, OPT_GO, OPT_LIST, READ, WRITE, Server, go, option, read_option_reply,  # noqa: E402
                         receive, request, run, simple_reply)
from vmlib import wait_until  # noqa: E402

MIB = 1 << 20
ERR_SHUTDOWN = 0x80000007


def listens(path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def vanish(server, dice, count):
    """Clients that close at a random byte of a stream of reads, a write and a flush; some with a reset."""
    for _ in range(count):
        connection = server.connect()
        go(connection, dice.choice([b"vda", b"ram"]))
        stream = b"".join(request(READ, dice.randrange(256) * 65536, 65536, cookie=i) for i in range(dice.randrange(30)))
        stream += request(WRITE, 0, 65536, payload=bytes(65536)) + request(FLUSH, 0, 0)
        connection.setblocking(False)  # when its replies fill the buffers it leaves without reading them
        try:
            connection.send(stream[:dice.randrange(1, len(stream) + 1)])
        except BlockingIOError:
            pass
        connection.close()


class Abuse(unittest.TestCase):
    def serve(self, *options):
        server = Server("vda=DIR/disk.img", "ram=ram:67108864", "slow=ram:1048576:slow", options=options)
        with open(server.path("disk.img"), "wb") as file:
            file.truncate(64 * MIB)
        server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)
        return server

    def assertUsable(self, server):
        handle = nbd.NBD()
        handle.connect_uri(server.uri("ram"))
        handle.pwrite(b"usable", 0)
        self.assertEqual(bytes(handle.pread(6, 0)), b"usable")
        handle.shutdown()

    def test_1000_disconnects_in_mid_request_leak_nothing(self):
        server = self.serve()
        dice = random.Random(5)
        vanish(server, dice, 100)  # fills the pools
        server.wait_idle()
        fds, resident = server.fd_count(), server.resident_kib()
        vanish(server, dice, 1000)
        server.wait_idle()
        self.assertEqual(server.fd_count(), fds)
        self.assertLess(server.resident_kib(), resident + 16 * 1024)
        self.assertUsable(server)

    def test_200_connections_work_at_once(self):
        server = self.serve()
        fds = server.fd_count()
        handles = []
        for index in range(200):
            handle = nbd.NBD()
            if index % 2:
                handle.connect_uri(server.uri("ram"))
            else:
                handle.connect_uri(server.tcp_uri("ram"))
            handles.append(handle)
        cookies = []
        for index, handle in enumerate(handles):  # all in flight together
            cookies.append(handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([index]) * 4096), index * 4096))
        for handle, cookie in zip(handles, cookies):
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
        for index, handle in enumerate(handles):
            other = handles[199 - index]
            self.assertEqual(bytes(other.pread(4096, index * 4096)), bytes([index]) * 4096)
        self.assertEqual(server.stats()["connections"], 200)
        for handle in handles:
            handle.shutdown()
        server.wait_idle()
        self.assertEqual(server.fd_count(), fds)

    def test_40_stalled_handshakes_do_not_block_the_41st(self):
        server = self.serve()
        stages = [b"", b"\0", struct.pack(">I", 3), struct.pack(">I", 3) + option(OPT_GO, b"\0\0\0\0\0\0")[:9],
                  struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, OPT_GO, 5000)]
        for index in range(40):
            connection = server.connect()
            receive(connection, 18)
            connection.sendall(stages[index % len(stages)])
        started = time.monotonic()
        self.assertUsable(server)
        self.assertLess(time.monotonic() - started, 8, "a handshake that stalls is ended after 10 s")
        self.assertEqual(server.stats()["handshakes"], 40)

    def test_more_handshakes_than_allowed_push_out_the_oldest(self):
        server = self.serve()
        for _ in range(300):
            server.connect()
        self.assertUsable(server)
        self.assertLessEqual(server.stats()["handshakes"], 256)
        self.assertGreaterEqual(server.stats()["refused"], 44)

    def test_2000_fuzzed_handshakes_end_without_a_trace(self):
        """Random bytes, and valid options with random changes, which reach deeper."""
        server = self.serve()
        dice = random.Random(11)
        fds, resident = server.fd_count(), server.resident_kib()
        name = struct.pack(">I", 3) + b"vda"
        options = [option(8), option(OPT_LIST), option(10, name + struct.pack(">II", 1, 15) + b"base:allocation"),
                   option(9, name + struct.pack(">I", 0)), option(OPT_GO, name + b"\0\1\0\3"), option(5), option(77, b"x" * 50)]
        for index in range(2000):
            if index % 4 == 0:
                stream = bytearray(dice.randbytes(dice.randrange(1, 300)))
            else:
                stream = bytearray(struct.pack(">I", dice.choice([3, 3, 3, 1, 0])))
                for _ in range(dice.randrange(1, 8)):
                    stream += dice.choice(options)
                for _ in range(dice.randrange(0, 4)):
                    stream[dice.randrange(len(stream))] ^= 1 << dice.randrange(8)
                stream += request(dice.randrange(9), dice.randrange(1 << 27), dice.randrange(1 << 17))
            connection = server.connect()
            try:
                connection.sendall(stream)
                if index % 8 == 0:
                    connection.settimeout(0.02)
                    connection.recv(65536)
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                pass
            connection.close()
        server.wait_idle()
        self.assertEqual(server.fd_count(), fds)
        self.assertLess(server.resident_kib(), resident + 40 * 1024)
        self.assertUsable(server)

    def test_disc_completes_outstanding_requests(self):
        server = self.serve()
        connection = server.connect()
        go(connection, b"slow")
        connection.sendall(request(WRITE, 0, 4096, cookie=7, payload=b"w" * 4096) + request(DISC, 0, 0))
        self.assertEqual(simple_reply(connection), (0, 7))
        self.assertEqual(connection.recv(1), b"")
        other = server.connect()
        go(other, b"slow")
        other.sendall(request(READ, 0, 4096, cookie=8))
        self.assertEqual(simple_reply(other), (0, 8))
        self.assertEqual(receive(other, 4096), b"w" * 4096)

    def test_too_large_write_is_drained_and_refused(self):
        server = self.serve()
        connection = server.connect()
        go(connection, b"ram")
        size = 33 * MIB
        connection.sendall(request(WRITE, 0, size, cookie=1) + bytes(size) + request(READ, 0, 512, cookie=2))
        self.assertEqual(simple_reply(connection), (errno.EINVAL, 1))
        self.assertEqual(simple_reply(connection), (0, 2))
        self.assertEqual(receive(connection, 512), bytes(512))

    def test_memory_stays_within_the_limit_of_a_client_that_never_reads(self):
        server = self.serve("--connection-bytes", str(40 * MIB), "--server-bytes", str(80 * MIB))
        greedy = []
        for _ in range(4):
            connection = server.connect()
            go(connection, b"ram")
            connection.setblocking(False)
            for index in range(64):
                try:
                    connection.send(request(READ, 0, 8 * MIB, cookie=index))
                except BlockingIOError:
                    break
            greedy.append(connection)
        time.sleep(0.5)
        self.assertLessEqual(server.stats()["inflight"], 81 * MIB)
        self.assertLess(server.resident_kib(), 300 * 1024)
        for connection in greedy:
            connection.close()
        server.wait_idle()
        self.assertUsable(server)

    def test_shutdown_answers_what_comes_meanwhile(self):
        server = self.serve("--drain-grace-ms", "3000")
        working, haggling = server.connect(), server.connect()
        go(working, b"slow")
        receive(haggling, 18)
        haggling.sendall(struct.pack(">I", 3) + option(99))
        read_option_reply(haggling)
        working.sendall(request(WRITE, 0, 4096, cookie=1, payload=bytes(4096)))
        wait_until(lambda: (stats := server.stats())["inflight"] > 0 or stats["requests"] > 0, 20, "the write is there")
        server.stopping = True
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(server.socket), 20, "it stops")
        working.sendall(request(READ, 0, 512, cookie=2))
        haggling.sendall(option(OPT_GO, struct.pack(">I", 0) + b"\0\0"))
        answers = dict(reversed(simple_reply(working)) for _ in range(2))
        self.assertEqual(answers, {1: 0, 2: errno.ESHUTDOWN})
        self.assertEqual(read_option_reply(haggling)[1], ERR_SHUTDOWN)
        self.assertEqual(working.recv(1), b"")
        self.assertEqual(server.process.wait(10), 0)

    def test_a_client_library_is_told_eshutdown_while_the_server_drains(self):
        # libnbd, not a socket of ours: its program can tell an orderly end from a broken disk.
        server = self.serve()
        busy, late = nbd.NBD(), nbd.NBD()
        for handle in (busy, late):
            handle.connect_uri(server.uri("slow"))
        cookie = busy.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b"w" * 4096)), 0)
        while busy.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:  # until it is on its way
            busy.poll(10)
        server.stopping = True
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        for refused in (lambda: late.pread(512, 0), lambda: late.pwrite(b"x" * 512, 0)):
            with self.assertRaises(nbd.Error) as caught:
                refused()
            self.assertEqual(caught.exception.errnum, errno.ESHUTDOWN, caught.exception)
        while not busy.aio_command_completed(cookie):  # raises when it failed
            busy.poll(1000)
        with self.assertRaises(nbd.Error) as caught:  # no newcomer either
            nbd.NBD().connect_uri(server.uri("ram"))
        self.assertEqual(server.process.wait(10), 0)

    def test_qemu_io_survives_a_crowd(self):
        server = self.serve()
        dice = random.Random(3)
        crowd = [server.connect() for _ in range(50)]
        for connection in crowd:
            connection.sendall(dice.randbytes(40))
        run("qemu-io", "-f", "raw", server.uri("ram"), "-c", "write -P 1 0 1M", "-c", "read -P 1 0 1M")


if __name__ == "__main__":
    unittest.main(verbosity=2)
