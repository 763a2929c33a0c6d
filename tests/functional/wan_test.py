#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The WAN emulator against independent instruments: ping, iperf3 and plain sockets.

Every figure of a later benchmark rests on the emulated link, so what it claims (rate, delay, loss, queue, bytes) is
measured here from outside. Runs as root; VMFERRY_BIN names the folder of the binaries. Wants a machine that is not
overloaded; only the test at 1 Gbit/s adapts its bound to what the machine had to spare.
See docs/wan-emulator.md.
"""

import contextlib
import json
import math
import os
import re
import select
import signal
import statistics
import subprocess
import tempfile
import time
import unittest

WAN = os.path.join(os.environ["VMFERRY_BIN"], "vmferry-wan")
ADDRESS_B = "10.77.0.2"
MSS = 1448  # payload of a full segment: 1500 - 20 (IPv4) - 32 (TCP with timestamps)
HEADERS = 52
TRANSFER_SIZE = 16 << 20


def run_wan(*arguments, **options):
    return subprocess.run([WAN, *arguments], capture_output=True, text=True, timeout=20, **options)


class Wan:
    """A running emulator, stopped (and its namespaces with it) at the end of the block."""

    def __init__(self, name="vfwant", **options):
        self.name = f"{name}{os.getpid()}"
        self.folder = tempfile.TemporaryDirectory(prefix="vmferry-wan-")
        self.control = f"unix:{self.folder.name}/control"
        self.arguments = [WAN, "run", "--name", self.name, "--control", self.control, "--die-with-parent"]
        for key, value in {"rate": "100Mbit", "rtt": "20ms", **options}.items():
            self.arguments += ["--" + key.replace("_", "-"), value]

    def __enter__(self):
        self.started = []
        self.process = subprocess.Popen(self.arguments, stdout=subprocess.PIPE, text=True)
        readable, _, _ = select.select([self.process.stdout], [], [], 20)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.process.kill()
            self.process.wait()
            raise AssertionError("no ready line")
        self.ready = json.loads(line)
        return self

    def __exit__(self, *exception):
        # After a failed assertion: an iperf3 whose link has gone spins for ever.
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.process.terminate()
        status = self.process.wait(timeout=20)
        self.process.stdout.close()
        self.folder.cleanup()
        if exception[0] is None and status != 0:
            raise AssertionError(f"emulator ended with {status}")

    def ctl(self, *command):
        done = run_wan("ctl", "--control", self.control, *command)
        return done.returncode, json.loads(done.stdout)

    def counters(self):
        return self.ctl("counters")[1]

    def set(self, **values):
        status, answer = self.ctl("set", *(f"{key}={value}" for key, value in values.items()))
        if status != 0:
            raise AssertionError(answer)

    def start(self, end, *command, **options):
        self.started.append(
            subprocess.Popen(["ip", "netns", "exec", f"{self.name}-{end}", *command], text=True, **options))
        return self.started[-1]

    def ping(self, count, interval, *extra):
        """Round trips in ms in the order of the replies, and the sequence numbers in that order."""
        with self.start("a", "ping", "-i", str(interval), "-c", str(count), "-W", "2", *extra, ADDRESS_B,
                        stdout=subprocess.PIPE) as process:
            output = process.communicate(timeout=60)[0]
        replies = re.findall(r"icmp_seq=(\d+) .*time=([\d.]+) ms", output)
        return [float(time_ms) for _, time_ms in replies], [int(sequence) for sequence, _ in replies]

    @contextlib.contextmanager
    def iperf_server(self):
        server = self.start("b", "iperf3", "-s", "-J", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            probe = "import socket; socket.create_connection(('127.0.0.1', 5201), 1).close()"
            while self.start("b", "python3", "-c", probe, stderr=subprocess.DEVNULL).wait() != 0:
                if time.monotonic() > deadline:
                    raise AssertionError("iperf3 server does not answer")
                time.sleep(0.05)
            yield server
        finally:
            server.terminate()
            server.wait()

    def iperf_start(self, *arguments):
        return self.start("a", "iperf3", "-c", ADDRESS_B, "-J", *arguments, stdout=subprocess.PIPE)

    @staticmethod
    def iperf_result(process):
        with process:
            result = json.loads(process.communicate(timeout=60)[0])
        if "error" in result:
            raise AssertionError(result["error"])
        return result

    def tcp_start(self, seconds, congestion):
        """One connection that is measured for `seconds` after one second to get up to speed."""
        return self.iperf_start("-t", str(seconds), "-O", "1", "-C", congestion, "--get-server-output")

    @staticmethod
    def tcp_mbps(process):
        """Goodput in the median second at the receiver.

        iperf3's own total is up to 4 % too high: it counts what was under way before the first second, and a second in
        which a hole is filled counts what had waited behind it.
        """
        intervals = [interval["sum"] for interval in
                     Wan.iperf_result(process)["server_output_json"]["intervals"]]
        seconds = [interval["bits_per_second"] for interval in intervals
                   if not interval["omitted"] and interval["seconds"] > 0.9]
        return statistics.median(seconds) / 1e6


def wire_share(goodput_mbps, rate_mbps):
    """Goodput as IP bytes on the wire, relative to the rate that was set."""
    return goodput_mbps * (MSS + HEADERS) / MSS / rate_mbps


def namespaces():
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listing.splitlines() if line}


def idle_share(seconds):
    """Share of the machine's processor time that nobody used."""
    def sample():
        with open("/proc/stat", encoding="ascii") as stat:
            values = [int(value) for value in stat.readline().split()[1:]]
        return values[3] + values[4], sum(values)
    idle_before, total_before = sample()
    time.sleep(seconds)
    idle_after, total_after = sample()
    return (idle_after - idle_before) / max(1, total_after - total_before)


class CommandLine(unittest.TestCase):
    # A value that is silently read as something else makes every later measurement wrong.
    def test_bad_values_are_refused_with_the_value_in_the_text(self):
        good = {"name": "vfwantbad", "rate": "10Mbit", "rtt": "10ms"}
        cases = [
            {"rate": "100"}, {"rate": "0Mbit"}, {"rate": "-5Mbit"}, {"rate": "1e3Mbit"}, {"rate": "10mbit"},
            {"rate": "101Gbit"}, {"rate": "7kbit"}, {"rate": "nan"}, {"rate": "1.2.3Mbit"}, {"rate": "Mbit"},
            {"rate": "10Mbit "}, {"rtt": "40"}, {"rtt": "10001ms"}, {"rtt": "infs"}, {"rtt": "5 ms"},
            {"jitter": "6ms"}, {"jitter": "2"}, {"loss": "0.5"}, {"loss": "101%"}, {"loss": "-1%"},
            {"queue": "64K"}, {"queue": "0B"}, {"queue": "2GiB"}, {"queue": "11s"}, {"reorder": "maybe"},
            {"offload": "maybe"}, {"name": "../x"}, {"name": ""}, {"name": "x" * 65}, {"name": "a/b"},
            {"address-a": "10.77.0"}, {"address-b": "10.77.0.1"}, {"control": "/tmp/x"}, {"control": "unix:"},
            {"sysctl": "kernel.hostname=x"}, {"sysctl": "net.ipv4/../../kernel.hostname=x"}, {"sysctl": "net.x"},
            {"seed": "x"}, {"rate": "100Gbit", "queue": "1s"},
        ]
        for case in cases:
            with self.subTest(case=case):
                arguments = [f"--{key}={value}" for key, value in {**good, **case}.items()]
                done = run_wan("run", *arguments)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertEqual(done.stdout, "")
                wanted = "on the way" if len(case) > 1 else list(case.values())[0].split("=")[0]
                if case == {"jitter": "6ms"}:
                    wanted = "6000 us"
                self.assertIn(wanted, done.stderr)
        self.assertFalse({"vfwantbad-a", "vfwantbad-b"} & namespaces())

    # A typing error that is ignored would measure the default.
    def test_unknown_or_missing_options_are_refused(self):
        for arguments in (["run"], ["run", "--name", "x", "--rate", "1Mbit"], ["nonsense"], [],
                          ["run", "--name=x", "--rate=1Mbit", "--rtt=1ms", "--delay=5ms"], ["ctl", "counters"]):
            with self.subTest(arguments=arguments):
                self.assertEqual(run_wan(*arguments).returncode, 2)

    # "Operation not permitted" from the depth of an ioctl sends people to the wrong place.
    def test_says_that_it_needs_root(self):
        def become_nobody():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        binary = os.open(WAN, os.O_RDONLY)
        try:
            done = subprocess.run([f"/proc/self/fd/{binary}", "check"], pass_fds=(binary,), cwd="/", text=True,
                                  preexec_fn=become_nobody, capture_output=True, timeout=20)
        finally:
            os.close(binary)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("must run as root", done.stderr)

    # The commonest fault in containers.
    def test_says_that_the_tun_device_is_missing(self):
        hide = 'mount -t tmpfs none /dev/net && exec "$0" check'
        done = subprocess.run(["unshare", "--mount", "sh", "-c", hide, WAN], capture_output=True, text=True, timeout=20)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("/dev/net/tun", done.stderr)
        self.assertIn("modprobe tun", done.stderr)
        self.assertEqual(json.loads(run_wan("check").stdout), {"ok": True})


class LifeAndControl(unittest.TestCase):
    # Left namespaces pile up over hundreds of benchmark runs, and the next run would find half a link.
    def test_namespaces_live_as_long_as_the_process_and_stale_ones_are_replaced(self):
        with Wan() as wan:
            names = {wan.ready["ns_a"], wan.ready["ns_b"]}
            self.assertEqual(wan.ready["ready"], True)
            self.assertEqual((wan.ready["addr_a"], wan.ready["addr_b"]), ("10.77.0.1", ADDRESS_B))
            self.assertLessEqual(names, namespaces())
            second = run_wan("run", "--name", wan.name, "--rate=1Mbit", "--rtt=1ms")
            self.assertEqual(second.returncode, 1)
            self.assertIn("is running", second.stderr)
            self.assertEqual(len(wan.ping(2, 0.05)[0]), 2, "refusing a second one must not touch the first")
        self.assertFalse(names & namespaces())

        with Wan() as wan:
            wan.process.send_signal(signal.SIGKILL)
            wan.process.wait()
            self.assertLessEqual(names, namespaces())
            with Wan() as again:
                self.assertEqual(len(again.ping(2, 0.05)[0]), 2)
            wan.process.returncode = 0  # ended as intended
        self.assertFalse(names & namespaces())
        self.assertFalse(os.path.exists(f"/run/vmferry-wan/{wan.name}.lock"))

    # A dead device is readable for ever: at real-time priority the emulator would take a core with it.
    def test_ends_with_an_error_when_a_device_is_removed(self):
        with Wan() as wan:
            subprocess.run(["ip", "-n", wan.ready["ns_a"], "link", "del", "wan0"], check=True, timeout=20)
            self.assertEqual(wan.process.wait(timeout=10), 1)
            self.assertFalse({wan.ready["ns_a"], wan.ready["ns_b"]} & namespaces())
            wan.process.returncode = 0  # ended as intended

    # Two links side by side are how variants are compared.
    def test_two_links_with_equal_addresses_do_not_meet(self):
        with Wan(name="vfone", rtt="10ms") as one, Wan(name="vftwo", rtt="30ms") as two:
            self.assertLess(statistics.median(one.ping(10, 0.02)[0]), 20)
            self.assertGreater(statistics.median(two.ping(10, 0.02)[0]), 29)

    # A harness that is misunderstood must hear about it, and a broken one must not stop the wire.
    def test_control_socket_answers_errors_and_survives_abuse(self):
        with Wan(sysctl="net.ipv4.tcp_congestion_control=bbr") as wan:
            for command in (["nonsense"], ["set", "rate"], ["set", "rate=5"], ["set", "colour=red"], ["cut"],
                            ["cut", "-1"], ["cut", "1", "2"], ["set", "rtt=1ms", "jitter=2ms"], ["counters", "x"]):
                status, answer = wan.ctl(*command)
                self.assertEqual((status, list(answer)), (1, ["error"]), command)
            wan.set(rate="1.5Gbit", rtt="250us", loss="0.25%", queue="64KiB", reorder="on", jitter="50us")
            counters = wan.counters()
            self.assertEqual((counters["rate_bps"], counters["rtt_us"], counters["loss"], counters["jitter_us"]),
                             (1500000000, 250, 0.0025, 50))
            wan.set(loss="0")

            import socket
            path = wan.control[len("unix:"):]
            crowd = []
            for _ in range(20):
                client = socket.socket(socket.AF_UNIX)
                client.connect(path)
                crowd.append(client)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                crowd[0].sendall(b"x" * 100000)
            crowd[1].sendall(b"counters\nreset\n")
            crowd[1].settimeout(5)
            self.assertTrue(json.loads(crowd[1].makefile().readline())["rate_bps"])
            self.assertEqual(len(wan.ping(5, 0.02)[0]), 5)
            for client in crowd:
                client.close()
            self.assertEqual(wan.counters()["a_to_b"]["packets"], 5)
            value = subprocess.run(["ip", "netns", "exec", wan.ready["ns_b"], "sysctl", "-n",
                                    "net.ipv4.tcp_congestion_control"], capture_output=True, text=True, check=True)
            self.assertEqual(value.stdout.strip(), "bbr")

    # unlink() of whatever is at the path would delete a user's file for a typing error.
    def test_control_path_that_is_a_file_is_left_alone(self):
        with tempfile.NamedTemporaryFile() as file:
            done = run_wan("run", "--name=vfwantfile", "--rate=1Mbit", "--rtt=1ms", f"--control=unix:{file.name}")
            self.assertEqual(done.returncode, 1)
            self.assertIn(file.name, done.stderr)
            self.assertTrue(os.path.isfile(file.name))
        self.assertFalse({"vfwantfile-a", "vfwantfile-b"} & namespaces())


class Delay(unittest.TestCase):
    # Round trips decide how migrations converge; half a millisecond is the promise.
    def test_round_trip_is_what_was_set(self):
        with Wan() as wan:
            for rtt_ms in (0, 2, 20, 150):
                wan.set(rtt=f"{rtt_ms}ms")
                times, _ = wan.ping(40, 0.01)
                self.assertEqual(len(times), 40)
                median = statistics.median(times)
                print(f"  rtt set {rtt_ms} ms, median {median:.2f} ms")
                self.assertGreaterEqual(min(times), rtt_ms)
                self.assertLessEqual(median, rtt_ms * 1.05 + 1)

    # Jitter that reorders makes TCP see loss that nobody asked for.
    def test_jitter_spreads_but_reorders_only_when_asked(self):
        with Wan(rtt="40ms", jitter="10ms") as wan:
            times, order = wan.ping(200, 0.004)
            print(f"  jitter 10 ms each way: {min(times):.1f} .. {max(times):.1f} ms")
            self.assertEqual(order, sorted(order))
            self.assertEqual(len(order), 200)
            self.assertGreaterEqual(min(times), 20)
            self.assertLessEqual(statistics.quantiles(times, n=50)[-1], 62)
            self.assertGreater(max(times) - min(times), 12)
            wan.set(reorder="on")
            times, order = wan.ping(200, 0.004)
            self.assertEqual(len(order), 200)
            self.assertNotEqual(order, sorted(order))


class Loss(unittest.TestCase):
    # Loss that is off by a factor turns "BBR wins at 0.5 %" into a statement about another link.
    def test_loss_rate_is_within_binomial_bounds_and_repeats_with_the_seed(self):
        orders = []
        share = 0.05
        for seed in ("7", "7", "8"):
            with Wan(loss="5%", seed=seed, rtt="1ms") as wan:
                _, order = wan.ping(1000, 0.001, "-W", "0.2")
                orders.append(order)
                for direction in ("a_to_b", "b_to_a"):
                    counters = wan.counters()[direction]
                    sent = counters["packets"]
                    bound = 4.5 * math.sqrt(sent * share * (1 - share))
                    self.assertLessEqual(abs(counters["dropped_loss"] - sent * share), bound, counters)
                    self.assertEqual(counters["delivered_packets"], sent - counters["dropped_loss"])
                lost = wan.counters()["a_to_b"]["dropped_loss"] + wan.counters()["b_to_a"]["dropped_loss"]
                self.assertEqual(len(order), 1000 - lost)
        print(f"  loss set 5 % each way, {lost} of 1000 pings lost (expected {1000 * (1 - (1 - share) ** 2):.0f})")
        self.assertEqual(orders[0], orders[1])
        self.assertNotEqual(orders[0], orders[2])

    # The reason to offer loss at all; if both did equally well, the loss would not be random per packet.
    def test_bbr_fills_a_lossy_link_where_cubic_collapses(self):
        with contextlib.ExitStack() as stack:
            running = {}
            for congestion in ("cubic", "bbr"):
                wan = stack.enter_context(Wan(name=congestion, rate="20Mbit", rtt="60ms", loss="0.5%"))
                stack.enter_context(wan.iperf_server())
                running[congestion] = wan.tcp_start(6, congestion)
            mbps = {congestion: Wan.tcp_mbps(process) for congestion, process in running.items()}
        print(f"  20 Mbit/s, 60 ms, 0.5 %: cubic {mbps['cubic']:.1f}, bbr {mbps['bbr']:.1f} Mbit/s")
        self.assertGreater(mbps["bbr"], 0.75 * 20)
        self.assertGreater(mbps["bbr"], 2 * mbps["cubic"])


class Rate(unittest.TestCase):
    # The rate is the denominator of every result.
    def test_tcp_gets_the_rate_that_was_set(self):
        with contextlib.ExitStack() as stack:
            running = []
            for rate, congestion in ((20, "cubic"), (20, "bbr"), (100, "cubic"), (100, "bbr")):
                wan = stack.enter_context(Wan(name=f"{congestion}{rate}-", rate=f"{rate}Mbit", queue="50ms"))
                stack.enter_context(wan.iperf_server())
                running.append((rate, congestion, wan.tcp_start(4, congestion)))
            for rate, congestion, process in running:
                share = wire_share(Wan.tcp_mbps(process), rate)
                print(f"  {rate} Mbit/s, {congestion}: {100 * share:.1f} % of the rate")
                self.assertGreaterEqual(share, 0.95)
                self.assertLessEqual(share, 1.01)

    # The reverse path has its own queue and transmitter; sharing one would halve bidirectional traffic.
    def test_both_directions_have_the_rate_at_once(self):
        with Wan(rate="50Mbit", rtt="10ms") as wan, wan.iperf_server():
            result = wan.iperf_result(wan.iperf_start("-t", "3", "-O", "1", "--bidir"))["end"]
            for key in ("sum_received", "sum_received_bidir_reverse"):
                self.assertGreaterEqual(wire_share(result[key]["bits_per_second"] / 1e6, 50), 0.85)

    # What the harness compares against QEMU's own way runs here too.
    def test_one_gigabit_at_20_ms(self):
        best = 0
        for _ in range(3):
            idle = idle_share(0.5)
            with Wan(rate="1Gbit", rtt="20ms") as wan, wan.iperf_server():
                share = wire_share(wan.tcp_mbps(wan.tcp_start(3, "cubic")), 1000)
                late = wan.counters()["a_to_b"]["late_packets"] / wan.counters()["a_to_b"]["packets"]
            print(f"  1 Gbit/s, 20 ms: {100 * share:.1f} % of the rate, {100 * late:.2f} % late, "
                  f"machine {100 * idle:.0f} % idle before")
            best = max(best, share)
            if best >= 0.9:
                break
        # Sender, receiver and emulator need more than one core; on a machine in use they cannot have it.
        self.assertGreaterEqual(best, 0.9 if idle > 0.9 else 0.5)
        self.assertLessEqual(best, 1.01)


class Bytes(unittest.TestCase):
    # "Bytes on the wire" of a migration is read from these counters.
    def test_counters_match_what_iperf3_sent_plus_headers(self):
        for offload in ("on", "off"):
            with Wan(rate="200Mbit", rtt="4ms", queue="1s", offload=offload) as wan, wan.iperf_server():
                wan.ctl("reset")
                end = wan.iperf_result(wan.iperf_start("-n", "20M"))["end"]
                payload = end["sum_received"]["bytes"]
                time.sleep(0.2)
                counters = wan.counters()["a_to_b"]
            self.assertEqual(end["sum_sent"]["retransmits"], 0)
            carried = counters["delivered_bytes"] - counters["delivered_packets"] * HEADERS
            print(f"  offload {offload}: iperf3 {payload}, counted {carried} + {counters['delivered_packets']} headers")
            # The receiver stops reading while the last window is on its way, the sender counts what it handed to the
            # kernel; the control connection and SYN options come on top: a few kilobytes.
            self.assertGreaterEqual(carried, payload)
            self.assertLessEqual(carried, end["sum_sent"]["bytes"] + 8192)
            # Full segments, as on a real wire, whether or not the kernel handed over super-packets.
            self.assertLessEqual(counters["delivered_packets"], carried / MSS * 1.02 + 100)
            self.assertGreaterEqual(counters["delivered_packets"], carried / MSS)
            self.assertEqual(counters["bytes"], counters["delivered_bytes"])
            self.assertEqual((counters["dropped"], counters["overruns"], counters["in_flight_bytes"]), (0, 0, 0))

    # Exact, because the payload is known to the byte: one segment counted twice or not at all shows here.
    def test_counters_are_exact_for_a_known_transfer(self):
        for offload in ("on", "off"):
            with Wan(rate="500Mbit", rtt="4ms", queue="1s", offload=offload) as wan:
                self.transfer(wan)
                counters = wan.counters()["a_to_b"]
            # The SYN is 8 bytes longer than other headers. A late machine may make TCP probe its tail: up to 3 segments.
            excess = counters["bytes"] - counters["packets"] * HEADERS - TRANSFER_SIZE - 8
            self.assertIn(excess, [probes * MSS for probes in range(4)], counters)

    # A wrong header in the middle of a cut-up super-packet shows as damage or as a connection that stands still.
    def test_content_survives_segmentation_loss_and_jitter(self):
        for options in ({"rate": "1Gbit"}, {"rate": "300Mbit", "jitter": "1ms", "reorder": "on"}):
            with Wan(rtt="4ms", loss="1%", sysctl="net.ipv4.tcp_congestion_control=bbr", **options) as wan:
                self.transfer(wan)
                counters = wan.counters()["a_to_b"]
                self.assertGreater(counters["dropped_loss"], 50)
                self.assertEqual(counters["dropped_device"], 0)
                self.assertLess(counters["delivered_bytes"], counters["bytes"])
                self.assertEqual(counters["delivered_packets"] + counters["dropped_loss"], counters["packets"])
                self.assertEqual(counters["offered_packets"], counters["packets"] + counters["dropped_queue"])

    def transfer(self, wan):
        """TRANSFER_SIZE random bytes from a to b, compared by hash; returns when the connection is closed."""
        receive = ("import socket,hashlib; s=socket.create_server(('10.77.0.2',9)); print('up',flush=True);"
                   "c=s.accept()[0]; h=hashlib.sha256()\n"
                   "while (d:=c.recv(1<<20)): h.update(d)\n"
                   "c.close(); print(h.hexdigest())")
        # Waits for the receiver's end of stream: then everything has arrived and been acknowledged.
        send = ("import socket,hashlib,os; s=socket.create_connection(('10.77.0.2',9));"
                f"d=os.urandom({TRANSFER_SIZE}); s.sendall(d); s.shutdown(1); s.recv(1);"
                "print(hashlib.sha256(d).hexdigest())")
        with wan.start("b", "python3", "-c", receive, stdout=subprocess.PIPE) as receiver:
            self.assertEqual(receiver.stdout.readline(), "up\n")
            with wan.start("a", "python3", "-c", send, stdout=subprocess.PIPE) as sender:
                sent = sender.communicate(timeout=30)[0]
            received = receiver.communicate(timeout=30)[0]
        time.sleep(0.05)
        self.assertEqual(len(sent), 65)
        self.assertEqual(sent, received)


class QueueAndCut(unittest.TestCase):
    # A queue of another length is another link: it sets the round trip under load and when loss begins.
    def test_full_queue_adds_its_own_delay_and_drops_the_rest(self):
        with Wan(rate="20Mbit", rtt="20ms", queue="200ms") as wan, wan.iperf_server():
            for queue, queue_ms in (("200ms", 200), ("125KiB", 51.2)):
                wan.set(queue=queue)
                flood = wan.iperf_start("-u", "-b", "26M", "-l", "1400", "-t", "3")
                time.sleep(1.6)
                wan.ctl("reset")
                times, _ = wan.ping(100, 0.01)
                counters = wan.counters()["a_to_b"]
                self.iperf_end(flood)
                print(f"  queue {queue}: round trip under load {statistics.median(times):.1f} ms, "
                      f"{100 * counters['dropped_queue'] / counters['offered_packets']:.0f} % dropped")
                # A ping is shorter than the packets that just did not fit, so it finds the queue full.
                self.assertAlmostEqual(statistics.median(times), 20 + queue_ms, delta=0.05 * queue_ms + 3)
                self.assertGreater(counters["dropped_queue"] / counters["offered_packets"], 0.1)

    def iperf_end(self, process):
        with process:
            process.communicate(timeout=60)

    # TCP fills the queue by itself: the delay a user of the link sees during a migration.
    def test_cubic_fills_the_queue(self):
        with Wan(rate="20Mbit", rtt="20ms", queue="150ms") as wan, wan.iperf_server():
            load = wan.iperf_start("-t", "3", "-C", "cubic")
            time.sleep(0.8)
            times, _ = wan.ping(100, 0.02)
            self.iperf_end(load)
        print(f"  cubic with a queue of 150 ms: round trip up to {max(times):.0f} ms")
        self.assertGreater(max(times), 20 + 0.85 * 150)
        self.assertLess(statistics.quantiles(times, n=50)[-1], 20 + 150 + 10)

    # Reconnect and resume are tested with cuts; one that leaks packets or lasts longer tests something else.
    def test_cut_stops_everything_for_its_time_then_traffic_resumes(self):
        with Wan(rtt="20ms") as wan:
            with wan.start("a", "ping", "-D", "-i", "0.01", "-c", "250", ADDRESS_B,
                           stdout=subprocess.PIPE) as process:
                time.sleep(0.6)
                self.assertEqual(wan.ctl("cut", "1.2"), (0, {"ok": True}))
                before = wan.counters()
                time.sleep(0.5)
                after = wan.counters()
                output = process.communicate(timeout=30)[0]
            for direction in ("a_to_b", "b_to_a"):
                self.assertEqual(before[direction]["delivered_packets"], after[direction]["delivered_packets"])
            self.assertGreater(after["a_to_b"]["dropped_cut"], 10)
            self.assertGreater(before["cut_seconds_left"], 1)
            arrivals = [float(stamp) for stamp in re.findall(r"\[([\d.]+)\] .*icmp_seq", output)]
            gap = max(later - earlier for earlier, later in zip(arrivals, arrivals[1:]))
            print(f"  cut of 1.2 s: largest gap {gap:.3f} s")
            self.assertGreaterEqual(gap, 1.2)
            self.assertLess(gap, 1.4)
            self.assertGreater(len(arrivals), 80)

            # Both ways, packets on their way included, and healed by hand.
            wan.set(rtt="1s")
            with wan.start("a", "ping", "-c", "1", "-W", "2", ADDRESS_B, stdout=subprocess.DEVNULL) as process:
                time.sleep(0.3)
                wan.ctl("cut", "60")
                time.sleep(0.4)
                wan.ctl("cut", "0")
                self.assertEqual(process.wait(timeout=30), 1)
            self.assertEqual(wan.counters()["cut_seconds_left"], 0)
            wan.set(rtt="10ms")
            self.assertEqual(len(wan.ping(3, 0.02)[0]), 3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
