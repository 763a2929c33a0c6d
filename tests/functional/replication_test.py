#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`vmferry replicate` between two daemons: what it says, what it refuses, and that both files are equal in the end."""

import json
import os
import subprocess
import threading
import time
import unittest

import nbd

from daemon_support import MIB, DaemonCase, VmferryError, allocated, digest, new_address, run, wait_until, write_random

SIZE = 64 * MIB


class ReplicationCommands(DaemonCase):
    def assert_equal_files(self, volume: str = "vda") -> None:
        self.assertEqual(digest(self.path(f"a-{volume}.img")), digest(self.path(f"b-{volume}.img")))

    def test_a_copy_is_made_followed_and_ended(self):
        # The life of every replication; each state here is one that an operator's script waits for.
        a, b = self.two_daemons(SIZE, data=16 * MIB)
        started = a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "2s")["volumes"][0]
        self.assertEqual((started["name"], started["peer"], started["mode"]), ("vda", "b", "batch"))
        self.in_sync(a)
        self.assert_equal_files()
        status = a.replication("vda")
        self.assertLessEqual({"name", "peer", "mode", "state", "epoch", "rpo_s", "remaining_bytes", "wire_bytes", "raw_bytes"},
                             set(status))
        self.assertEqual((status["state"], status["remaining_bytes"], status["rpo_s"]), ("in-sync", 0, 0))
        self.assertGreaterEqual(status["raw_bytes"], 16 * MIB)
        self.assertEqual(b.replication("vda")["direction"], "receiving")
        self.assertEqual(b.replication("vda")["state"], "in-sync")
        # Writes arrive by themselves within the promise, and at once when somebody waits.
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 20M 4M", "write -P 0x11 63M 1M")
        wait_until(lambda: digest(self.path("a-vda.img")) == digest(self.path("b-vda.img")), 30, "the epoch arrives by itself")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x77 1M 1M")
        self.in_sync(a, timeout="10s")
        self.assert_equal_files()
        run("nbdcopy", self.uri(self.path("b-vda.img")), self.path("copy.img"))  # through the secondary's export, too
        self.assertEqual(digest(self.path("copy.img")), digest(self.path("a-vda.img")))
        # The secondary is readable and takes no write.
        client = nbd.NBD()
        client.connect_uri(self.uri(self.path("b-vda.img")))
        with self.assertRaises(nbd.Error) as refused:
            client.pwrite(b"x" * 512, 0)
        self.assertEqual(refused.exception.errno, "EPERM")
        client.shutdown()
        a.vmferry("replicate", "stop", "vda")
        self.assertEqual(a.vmferry("replicate", "status")["volumes"], [])
        self.qemu_io(self.path("a-vda.img"), "write -P 0x78 1M 1M")
        self.assertIn("not replicated", self.refused(a, "replicate", "wait", "vda"))

    def test_pause_keeps_what_changed_and_resume_sends_it(self):
        # A pause that forgets or goes on sending are both worse than none.
        a, b = self.two_daemons(SIZE, data=4 * MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        before = digest(self.path("b-vda.img"))
        self.assertEqual(a.vmferry("replicate", "pause", "vda")["volumes"][0]["state"], "paused")
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 8M 3M")
        self.assertIn("paused", self.refused(a, "replicate", "wait", "vda", "--timeout", "2s"))
        waited = a.vmferry("replicate", "wait", "vda", "--state", "paused", "--timeout", "5s")
        self.assertEqual((waited["state"], waited["volumes"][0]["state"]), ("paused", "paused"))
        self.assertEqual(digest(self.path("b-vda.img")), before)
        # At the copy it would have no effect; somebody who backs its file up must not believe that it has.
        for command in ("pause", "resume"):
            self.assertIn(f"{command} at the primary: this side is the copy", self.refused(b, "replicate", command, "vda"))
        status = a.replication("vda")
        self.assertEqual((status["state"], status["remaining_bytes"]), ("paused", 3 * MIB))
        self.assertGreater(status["rpo_s"], 1)
        # Nobody looks at the source alone: a copy that calls itself in sync would be believed.
        b.vmferry("replicate", "wait", "vda", "--state", "paused", "--timeout", "20s")
        copy = b.replication("vda")
        self.assertEqual((copy["state"], copy["direction"]), ("paused", "receiving"))
        self.assertIn("by the other side", copy["reason"])
        self.assertIn("`vmferry replicate resume` there", copy["reason"])
        self.assertGreater(copy["rpo_s"], 1)
        # Also over a restart of either side.
        self.assertEqual(a.stop(), 0)
        wait_until(lambda: b.replication("vda")["state"] == "disconnected", 20, "the copy sees that its source is gone")
        a.start()
        self.assertEqual(a.replication("vda")["state"], "paused")
        b.vmferry("replicate", "wait", "vda", "--state", "paused", "--timeout", "20s")
        self.assertEqual(b.stop(), 0)
        b.start()
        b.vmferry("replicate", "wait", "vda", "--state", "paused", "--timeout", "20s")
        a.vmferry("replicate", "resume", "vda")
        wait_until(lambda: b.replication("vda")["state"] == "in-sync", 20, "the copy hears of the resume")
        self.assertEqual(b.replication("vda")["reason"], "")
        self.in_sync(a)
        self.assert_equal_files()
        self.assertLess(a.replication("vda")["raw_bytes"], 4 * MIB)

    def test_a_state_is_waited_for_until_it_comes_and_a_wrong_one_is_wrong_usage(self):
        # A script that waits for a state that is misspelt would wait for its whole time and then say that it is late.
        a, b = self.two_daemons(SIZE, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        for state in ("pausd", "", "IN-SYNC"):
            error = self.refused(a, "replicate", "wait", "vda", "--state", state, "--timeout", "30s", status=2)
            self.assertIn(f"'{state}'", error)
        for state, act in (("paused", lambda: a.vmferry("replicate", "pause", "vda")), ("disconnected", b.kill)):
            command = a.vmferry_command("replicate", "wait", "vda", "--state", state, "--timeout", "30s")
            waiting = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.addCleanup(waiting.kill)
            time.sleep(1)
            self.assertIsNone(waiting.poll(), "it is not there yet")
            act()
            stdout, stderr = waiting.communicate(timeout=20)
            self.assertEqual(waiting.returncode, 0, stderr)
            self.assertEqual(json.loads(stdout)["state"], state)
            if state == "paused":
                self.assertIn("not initial after 1.0 s", self.refused(a, "replicate", "wait", "vda", "--state", "initial", "--timeout", "1s"))
                a.vmferry("replicate", "resume", "vda")
                self.in_sync(a)

    def test_settings_are_checked_changed_and_kept(self):
        # An RPO that is silently not the one asked for is found after the disaster.
        a, _ = self.two_daemons(SIZE, data=MIB)
        for words, text in ((["--mode", "sync"], "not available"), (["--mode", "magic"], "does not exist"),
                            (["--rpo", "10ms"], "1s"), (["--rpo", "soon"], "soon"), (["--bandwidth", "fast"], "fast")):
            self.assertIn(text, self.refused(a, "replicate", "start", "vda", "--peer", "b", *words, status=2))
        self.assertIn("'nobody'", self.refused(a, "replicate", "start", "vda", "--peer", "nobody"))
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1h")
        self.in_sync(a)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 8M 1M")
        time.sleep(2.5)
        self.assertEqual(a.replication("vda")["remaining_bytes"], MIB, "the RPO of an hour is not over")
        a.vmferry("replicate", "set", "vda", "--rpo", "1s", "--bandwidth", "50Mbit")
        wait_until(lambda: a.replication("vda")["remaining_bytes"] == 0, 20, "the new RPO")
        self.assertEqual(a.vmferry("peer", "list")["peers"][0]["rate_limit"], 50_000_000 // 8)
        self.assertEqual(a.stop(), 0)
        a.start()
        self.assertEqual(a.vmferry("peer", "list")["peers"][0]["rate_limit"], 50_000_000 // 8)
        a.vmferry("replicate", "set", "vda", "--bandwidth", "0")
        self.assertEqual(a.vmferry("peer", "list")["peers"][0]["rate_limit"], 0)

    def test_holes_and_discards_are_holes_at_the_peer(self):
        # A 1 TB disk with 20 GB of files must not take 1 TB there, and what the guest discarded must be given back.
        a, b = self.two_daemons(256 * MIB, data=4 * MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        self.assertLess(allocated(self.path("b-vda.img")), 6 * MIB)
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 32M 32M", "write -z 64M 16M", "write -P 0 96M 16M")
        self.in_sync(a)
        self.assertLess(allocated(self.path("b-vda.img")), 40 * MIB)
        self.assertGreater(allocated(self.path("b-vda.img")), 32 * MIB)
        self.qemu_io(self.path("a-vda.img"), "discard 32M 32M")
        self.in_sync(a)
        self.assertLess(allocated(self.path("b-vda.img")), 6 * MIB)
        self.assert_equal_files()
        self.assertLess(a.replication("vda")["wire_bytes"], 6 * MIB)

    def test_verify_finds_what_was_changed_behind_the_peers_back(self):
        # Without it nobody knows whether the copy is one before it is needed.
        a, b = self.two_daemons(SIZE, data=16 * MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        found = a.vmferry("replicate", "verify", "vda")
        self.assertEqual(found, {"compared_bytes": SIZE, "differences": []})
        write_random(self.path("b-vda.img"), 10 * MIB + 777, 5, seed=9)
        write_random(self.path("b-vda.img"), 40 * MIB, 4096, seed=9)
        with self.assertRaises(VmferryError) as different:
            a.vmferry("replicate", "verify", "vda")
        self.assertEqual(different.exception.status, 1)
        ranges = [(d["volume"], d["offset"], d["offset"] + d["length"]) for d in different.exception.output["differences"]]
        self.assertEqual(len(ranges), 2, ranges)
        for (volume, start, end), place in zip(sorted(ranges), (10 * MIB + 777, 40 * MIB)):
            self.assertEqual(volume, "vda")
            self.assertLessEqual(start, place)
            self.assertGreater(end, place)
        text = run(*[w for w in a.vmferry_command("replicate", "verify", "vda") if w != "--json"], check=False)
        self.assertEqual(text.returncode, 1)
        self.assertIn("vda differs at", text.stdout)
        # The repair that the operations guide names.
        a.vmferry("replicate", "stop", "vda")
        b.vmferry("replicate", "stop", "vda")
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--overwrite-peer")
        self.in_sync(a)
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])
        self.assert_equal_files()

    def test_foreign_data_at_the_peer_is_not_overwritten_unasked(self):
        # A wrong --peer would otherwise destroy another guest's disk.
        a, b = self.two_daemons(SIZE, data=MIB)
        self.assertEqual(b.stop(), 0)
        write_random(self.path("b-vda.img"), 30 * MIB, 4096, seed=3)
        precious = digest(self.path("b-vda.img"))
        b.start()
        error = self.refused(a, "replicate", "start", "vda", "--peer", "b")
        self.assertIn("--overwrite-peer", error)
        self.assertEqual(digest(self.path("b-vda.img")), precious)
        self.wait_log(a, "--overwrite-peer")
        self.assertIn("--overwrite-peer", b.replication("vda")["reason"])
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--overwrite-peer")
        self.in_sync(a)
        self.assert_equal_files()

    def test_a_missing_volume_at_the_peer_comes_with_the_command_to_run_there(self):
        # What to type on the other host is the only useful part of this error.
        a, b = self.two_daemons(SIZE, data=MIB)
        extra = self.image("a-vdx.img", 8 * MIB, MIB)
        a.vmferry("volume", "add", self.volume("vdx", extra))
        error = self.refused(a, "replicate", "start", "vdx", "--peer", "b")
        self.assertIn(f"vmferry volume add name=vdx,path=FILE,size={8 * MIB},role=secondary", error)
        command = error[error.index("vmferry volume add"):].split()[3].strip("'\";,")
        b.vmferry("volume", "add", command.replace("FILE", str(self.path("b-vdx.img"))))
        a.vmferry("replicate", "start", "vdx", "--peer", "b")
        self.in_sync(a, "vdx")
        self.assert_equal_files("vdx")

    def test_a_refused_group_leaves_the_replication_that_there_is(self):
        # Adding a second disk with a mistake in it must not cost the copy of the first.
        a, b = self.two_daemons(SIZE, data=MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        a.vmferry("volume", "add", self.volume("vdx", self.image("a-vdx.img", 8 * MIB, MIB)))
        group = {v["name"]: v["group"] for v in a.vmferry("volume", "list")["volumes"]}

        def assert_refused(text, *options):
            self.assertIn(text, self.refused(a, "replicate", "start", "vda", "vdx", "--peer", "b", *options))
            self.assertEqual({v["name"]: v["group"] for v in a.vmferry("volume", "list")["volumes"]}, group)
            self.qemu_io(self.path("a-vda.img"), f"write -P {len(text)} 8M 1M")
            self.in_sync(a)
            self.assert_equal_files()

        command = f"vmferry volume add name=vdx,path=FILE,size={8 * MIB},role=secondary"
        assert_refused(command)
        assert_refused(command, "--overwrite-peer")
        b.vmferry("volume", "add", self.volume("vdx", self.path("b-vdx.img"), "size=8M", "role=secondary"))
        assert_refused("--overwrite-peer")
        self.assertEqual(b.stop(), 0)
        self.assertIn("'b'", self.refused(a, "replicate", "start", "vda", "vdx", "--peer", "b", "--overwrite-peer"))
        b.start()
        assert_refused("--overwrite-peer")
        a.vmferry("replicate", "start", "vda", "vdx", "--peer", "b", "--overwrite-peer")
        self.in_sync(a, "vda", "vdx")
        self.assert_equal_files()
        self.assert_equal_files("vdx")

    def test_another_size_is_refused_on_both_sides(self):
        # A copy that is too small would lose the end of the disk.
        a, b = self.two_daemons(SIZE, data=MIB)
        extra = self.image("a-vdx.img", 8 * MIB, MIB)
        a.vmferry("volume", "add", self.volume("vdx", extra))
        b.vmferry("volume", "add", self.volume("vdx", self.path("b-vdx.img"), "size=4M", "role=secondary"))
        error = self.refused(a, "replicate", "start", "vdx", "--peer", "b")
        for text in ("vdx", str(8 * MIB), str(4 * MIB)):
            self.assertIn(text, error)
        self.wait_log(b, str(4 * MIB) + " bytes")
        self.assertIn(str(4 * MIB), a.replication("vdx")["reason"])

    def test_several_volumes_are_one_group(self):
        # A database with its log on a second disk needs both of one moment.
        a, b = self.two_daemons(16 * MIB, data=4 * MIB, volumes=("vda", "vdb", "vdc"))
        a.vmferry("replicate", "start", "vda", "vdb", "--peer", "b", "--rpo", "1s")
        a.vmferry("replicate", "start", "vdc", "--peer", "b", "--rpo", "1s")
        self.in_sync(a, "vda", "vdb")
        self.in_sync(a, "vdc")
        for volume in ("vda", "vdb", "vdc"):
            self.assert_equal_files(volume)
        groups = {v["name"]: v["group"] for v in a.vmferry("volume", "list")["volumes"]}
        self.assertEqual(groups["vda"], groups["vdb"])
        self.assertNotEqual(groups["vda"], groups["vdc"])
        self.assertEqual(groups, {v["name"]: v["group"] for v in b.vmferry("volume", "list")["volumes"]})
        self.assertIn("not of one group", self.refused(a, "replicate", "wait", "vda", "vdc", status=2))
        self.assertIn("'vdb'", self.refused(a, "replicate", "start", "vda", "--peer", "b", status=2))
        self.assertIn("replicated", self.refused(a, "volume", "remove", "vda"))
        a.vmferry("replicate", "stop", "vda", "vdb")
        self.qemu_io(self.path("a-vdc.img"), "write -P 0x5a 8M 1M", export="vdc")
        self.in_sync(a, "vdc")
        self.assert_equal_files("vdc")


class InterruptedCopy(DaemonCase):
    """The first full copy, through a relay that counts, cut in the middle."""

    DATA = 48 * MIB

    def start_copy(self):
        a, b = self.two_daemons(SIZE, data=self.DATA, proxied=True)
        self.proxy.rate = 24 * MIB
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        wait_until(lambda: self.proxy.bytes_to_target > self.DATA // 2, 30, "half of the copy", )
        return a, b

    def finish(self, a, before: int) -> None:
        wait_until(lambda: a.replication("vda")["state"] in ("initial", "in-sync", "catching-up"), 30, "it goes on")
        self.in_sync(a, timeout="60s")
        self.assertEqual(digest(self.path("a-vda.img")), digest(self.path("b-vda.img")))
        # Random data: what crossed the relay is the data once, and again only what was not acknowledged: what was in
        # flight (at most the credit window and a segment's second) and framing.
        self.assertLess(self.proxy.bytes_to_target, self.DATA * 1.02 + self.resent_max + MIB)
        self.assertGreater(self.proxy.bytes_to_target, before)

    resent_max = 32 * MIB

    def test_an_uncut_copy_sends_the_data_once(self):
        # The measure for the others.
        a, _ = self.two_daemons(SIZE, data=self.DATA, proxied=True)
        a.vmferry("replicate", "start", "vda", "--peer", "b")
        self.in_sync(a)
        self.assertLess(self.proxy.bytes_to_target, self.DATA * 1.02 + MIB)

    def test_a_cut_link_costs_what_was_in_flight(self):
        # A line that drops once a day would otherwise never carry a terabyte.
        a, _ = self.start_copy()
        before = self.proxy.bytes_to_target
        self.proxy.cut()
        wait_until(lambda: a.replication("vda")["state"] == "inconsistent", 20, "the loss is seen")
        self.assertFalse(a.vmferry("peer", "list")["peers"][0]["connected"])
        self.qemu_io(self.path("a-vda.img"), "write -P 0x5a 60M 1M")  # the guest goes on
        self.proxy.mend()
        self.finish(a, before)

    def test_a_restart_of_the_copy_costs_what_was_in_flight(self):
        # The peer's daemon is upgraded in the middle of a copy of days.
        a, b = self.start_copy()
        before = self.proxy.bytes_to_target
        b.kill()
        b.start()
        self.finish(a, before)

    def test_a_restart_of_the_source_costs_the_epoch_at_most(self):
        # A daemon that starts from nothing after each restart never gets a large disk over.
        a, _ = self.start_copy()
        before = self.proxy.bytes_to_target
        self.assertEqual(a.stop(), 0)
        a.start()
        self.finish(a, before)


class OtherClients(DaemonCase):
    """Clients of other makes on a volume that a peer follows: marks, locks and epochs lie in their way, too."""

    def equal(self) -> bool:
        return digest(self.path("a-vda.img")) == digest(self.path("b-vda.img"))

    def test_nbdcopy_both_ways_and_fio_find_what_they_wrote_and_so_does_the_peer(self):
        # What they do is not what we do: many connections, odd sizes, holes, and a verification of their own.
        a, b = self.two_daemons(SIZE, data=8 * MIB)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        self.in_sync(a)
        uri = self.uri(self.path("a-vda.img"))
        source = self.image("source.img", SIZE, data=20 * MIB, seed=9)  # and a hole behind
        write_random(source, 40 * MIB, 5 * MIB, seed=10)
        for number, flags in enumerate((["--connections=4", "--requests=64"], ["--synchronous", "--flush"])):
            with self.subTest(flags=flags):
                write_random(source, number * 1_000_003, MIB, seed=11 + number)
                run("nbdcopy", *flags, source, uri)
                copy = self.path(f"copy-{number}.img")
                run("nbdcopy", *flags, uri, copy)
                self.assertEqual(digest(copy), digest(source))
                self.in_sync(a)
                self.assertTrue(self.equal())
                # The copy is readable where it is.
                run("nbdcopy", self.uri(self.path("b-vda.img")), self.path("there.img"))
                self.assertEqual(digest(self.path("there.img")), digest(source))
                self.path("there.img").unlink()
        epochs = a.replication("vda")["epoch"]
        run("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned",
            f"--size={SIZE}", f"--io_size={SIZE}", "--rate=16m", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1",
            "--do_verify=1", "--verify_state_save=0", "--randseed=7", cwd=self.folder, timeout=120)
        self.in_sync(a)
        self.assertTrue(self.equal())
        self.assertNotEqual(digest(self.path("b-vda.img")), digest(source))
        self.assertGreater(a.replication("vda")["epoch"], epochs + 1, "epochs were sealed under the load")
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])


class WhileTheGuestWrites(DaemonCase):
    def test_random_writes_trims_and_zeroes_arrive_while_the_link_comes_and_goes(self):
        # The second mark, resumed epochs and discards all meet here; one lost block is one damaged file system.
        a, b = self.two_daemons(SIZE, data=16 * MIB, proxied=True)
        a.vmferry("replicate", "start", "vda", "--peer", "b", "--rpo", "1s")
        stop = threading.Event()
        failures = []

        def write():
            import random
            chance = random.Random(5)
            try:
                client = nbd.NBD()
                client.connect_uri(self.uri(self.path("a-vda.img")))
                while not stop.is_set():
                    offset = chance.randrange(0, SIZE // 512 - 256) * 512
                    length = chance.randrange(1, 256) * 512
                    kind = chance.random()
                    if kind < 0.8:
                        client.pwrite(chance.randbytes(length), offset)
                    elif kind < 0.9:
                        client.zero(length, offset)
                    else:
                        client.trim(length, offset)
                client.shutdown()
            except Exception as error:  # told to the test below
                failures.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        for number in range(4):
            time.sleep(1.2)
            self.proxy.cut()
            if number == 1:
                b.kill()
                b.start()
            time.sleep(0.3)
            self.proxy.mend()
        stop.set()
        writer.join()
        self.assertEqual(failures, [])
        wait_until(lambda: a.vmferry("peer", "list")["peers"][0]["connected"], 20, "connected again")
        self.in_sync(a, timeout="60s")
        self.assertEqual(digest(self.path("a-vda.img")), digest(self.path("b-vda.img")))
        self.assertEqual(a.vmferry("replicate", "verify", "vda")["differences"], [])


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
