#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`--metrics`: figures that are true, in a form that Prometheus reads, from a port that strangers may reach."""

import re
import socket
import unittest
import urllib.error
import urllib.request

from daemon_support import MIB, DaemonCase, new_address, pair, wait_until


class Metrics(DaemonCase):
    def scrape(self, address: str) -> dict:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            self.assertIn("version=0.0.4", answer.headers["Content-Type"])
            text = answer.read().decode()
        values, typed = {}, set()
        for line in text.splitlines():
            if line.startswith("#"):
                typed.add(line.split()[2])
                continue
            found = re.fullmatch(r'([a-z_]+)(\{[a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*\})? ([-+.e0-9]+)', line)
            self.assertIsNotNone(found, line)
            self.assertIn(found[1], typed, "HELP and TYPE come first")
            values[found[1] + (found[2] or "")] = float(found[3])
        return values

    def test_figures_follow_what_happens(self):
        # A dashboard of constants is worse than none.
        address = new_address()
        b = self.daemon("b", self.volume("vda", self.image("b-vda.img", 16 * MIB), "role=secondary"), listen=new_address())
        a = self.daemon("a", self.volume("vda", self.image("a-vda.img", 16 * MIB, MIB)), listen=new_address(),
                        extra_args=["--metrics", address])
        pair(a, b)
        self.qemu_io(self.path("a-vda.img"), "write -P 1 0 2M")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        values = self.scrape(address)
        self.assertEqual(values['vmferry_volume_size_bytes{volume="vda"}'], 16 * MIB)
        self.assertEqual(values['vmferry_volume_written_bytes_total{volume="vda"}'], 2 * MIB)
        self.assertEqual(values['vmferry_volume_primary{volume="vda"}'], 1)
        self.assertEqual(values['vmferry_peer_connected{peer="b"}'], 1)
        self.assertEqual(values['vmferry_replication_state{volume="vda",peer="b",direction="sending",state="in-sync"}'], 1)
        self.assertGreater(values['vmferry_replication_raw_bytes_total{volume="vda"}'], MIB)
        self.assertEqual(values['vmferry_replication_remaining_bytes{volume="vda"}'], 0)
        b.kill()
        wait_until(lambda: self.scrape(address)['vmferry_peer_connected{peer="b"}'] == 0, 15, "the loss is seen")

    def test_other_requests_are_refused_and_silent_clients_leave(self):
        # Whoever reaches the port must get nothing else and hold nothing.
        address = new_address()
        a = self.daemon("a", extra_args=["--metrics", address])
        for path in ("/", "/metrics/x", "/../state"):
            with self.assertRaises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://{address}{path}", timeout=10)
            self.assertEqual(refused.exception.code, 404)
            refused.exception.close()
        with self.assertRaises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{address}/metrics", data=b"x", timeout=10)
        self.assertEqual(refused.exception.code, 405)
        refused.exception.close()
        host, port = address.split(":")
        before = a.descriptor_count()
        clients = [socket.create_connection((host, int(port)), timeout=10) for _ in range(40)]
        for client in clients:
            client.settimeout(30)
            self.addCleanup(client.close)
        clients[0].sendall(b"GET /" + b"x" * 20000)
        self.assertIn(clients[0].recv(100)[:12], (b"HTTP/1.1 431",))
        for client in clients[1:]:
            self.assertEqual(client.recv(10), b"")  # closed at once, or after the time limit of some seconds
        wait_until(lambda: a.descriptor_count() <= before, 20, "descriptors are given back")
        self.assertIn("vmferry_build_info", " ".join(self.scrape(address)))


if __name__ == "__main__":
    unittest.main(verbosity=2)
