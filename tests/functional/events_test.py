#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vmferry events`: what happened, in order, once, for people and for scripts."""

import json
import subprocess
import threading
import unittest

from daemon_support import MIB, DaemonCase, run, wait_until


class Follower:
    """`vmferry events --follow --json` of one daemon."""

    def __init__(self, daemon):
        self.events = []
        self._process = subprocess.Popen(daemon.vmferry_command("events", "--follow"), text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def wait(self, event: str, **fields) -> dict:
        def find():
            return next((e for e in self.events if e["event"] == event and all(e.get(k) == v for k, v in fields.items())), None)
        return wait_until(find, 20, f"{event} {fields}")

    def close(self):
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()


class Events(DaemonCase):
    def test_the_life_of_a_replication_in_order(self):
        # Who finds the copy broken on Monday has to see when it broke.
        a, b = self.two_daemons(16 * MIB, data=MIB, proxied=True)
        followers = {}
        for daemon in (a, b):
            followers[daemon.name] = Follower(daemon)
            self.addCleanup(followers[daemon.name].close)
        at_a, at_b = followers["a"], followers["b"]
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        at_b.wait("group_joined", volumes=["vda"], peer="a")
        self.in_sync(a)
        at_a.wait("replication_state", volumes=["vda"], state="in-sync")
        self.proxy.cut()
        at_a.wait("peer_disconnected", peer="b")
        at_b.wait("peer_disconnected", peer="a")
        at_a.wait("replication_state", state="disconnected")
        self.proxy.mend()
        self.in_sync(a)
        a.vmferry("replicate", "pause", "vda")
        at_a.wait("replication_state", state="paused")
        a.vmferry("replicate", "resume", "vda")
        b.vmferry("promote", "vda")
        at_b.wait("ownership_changed", role="primary")
        at_a.wait("ownership_changed", role="secondary")
        self.in_sync(b)
        at_b.wait("replication_state", state="in-sync")
        for follower in (at_a, at_b):
            numbers = [e["seq"] for e in follower.events]
            self.assertEqual(numbers, list(range(1, len(numbers) + 1)), "in order, none twice, none missing")
            self.assertEqual([e["time"] for e in follower.events], sorted(e["time"] for e in follower.events))
            self.assertEqual(follower.events[0]["event"], "started")
        states = [e["state"] for e in at_a.events if e["event"] == "replication_state"]
        for earlier, later in zip(states, states[1:]):
            self.assertNotEqual(earlier, later, states)
        order = [{"event": "peer_added"}, {"event": "peer_connected"}, {"event": "replication_state", "state": "in-sync"},
                 {"event": "peer_disconnected"}]
        first = [next(i for i, e in enumerate(at_a.events) if wanted.items() <= e.items()) for wanted in order]
        self.assertEqual(first, sorted(first), at_a.events)
        # Without --follow: the same, and an end; for people: one line each.
        self.assertEqual(self.events(a)[: len(at_a.events)], at_a.events)
        text = run(*[w for w in a.vmferry_command("events") if w != "--json"]).stdout.splitlines()
        self.assertGreaterEqual(len(text), len(at_a.events))
        self.assertRegex(text[0], r"^\d{4}-\d\d-\d\dT[\d:.]+Z started ")

    def test_refusals_and_volumes_are_events_too(self):
        # An alert is only useful when it carries what to do.
        a, b = self.two_daemons(16 * MIB, data=MIB)
        a.vmferry("volume", "add", self.volume("vdx", self.path("x.img"), "size=4M"))
        self.refused(a, "replicate", "start", "vdx", "--peer", "b")
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        a.vmferry("replicate", "stop", "vda")
        b.vmferry("replicate", "stop", "vda")
        a.vmferry("volume", "remove", "vda")
        a.vmferry("replicate", "stop", "vdx")
        a.vmferry("peer", "remove", "b")
        names = [e["event"] for e in self.events(a)]
        for name in ("volume_added", "peer_refused", "replication_state", "volume_removed", "peer_removed"):
            self.assertIn(name, names)
        refused = next(e for e in self.events(a) if e["event"] == "peer_refused")
        self.assertIn("vmferry volume add", refused["reason"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
