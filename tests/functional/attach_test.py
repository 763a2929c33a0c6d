#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""attach and detach: volumes as block devices of a real kernel, in a guest, because they may hang."""

import json
import re
import shutil
import tempfile
import time
import unittest

from daemon_support import BUILD, MIB
from vmlib.guest_shell import GuestShell

PROGRAMS = (BUILD.bin / "vmferryd", BUILD.bin / "vmferry", "fio", "mkfs.ext4", "e2fsck", "resize2fs", "blkdiscard",
            "blockdev", "setpriv")
CONTROL = "--control unix:/tmp/a/control.sock"
BIN = "/usr/local/bin"  # busybox's shell prefers its own applets of these names
PF_MEMALLOC_NOIO = 0x00080000  # include/linux/sched.h
REQUEST_TIMEOUT = 3  # seconds; the default is too long for a test


class AttachTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp(prefix="vmferry-attach-")
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.guest = GuestShell(folder, BUILD, [str(p) for p in PROGRAMS], modules=("ext4",), later=("nbd",))
        cls.addClassCleanup(cls.guest.stop)
        cls.guest.start()

    def setUp(self):
        # nbds_max=2: the kernel makes further devices when they are asked for.
        self.sh("rm -rf /tmp/a /tmp/b /tmp/*.img; mkdir /tmp/a; [ -e /sys/module/nbd ] || insmod /lib/modules/nbd.ko nbds_max=2")
        self.pids = {}
        self.addCleanup(self.clean_up)

    def clean_up(self):
        """Whatever a failed test left behind: the next one begins in an empty kernel."""
        self.guest.run("killall -9 fio; cd /tmp; umount /mnt; "
                       f"for d in /sys/block/nbd*/pid; do n=${{d%/pid}}; vmferry {CONTROL} detach /dev/${{n##*/}} --force; "
                       "vmferry --control unix:/tmp/b/control.sock detach /dev/${n##*/} --force; done; "
                       "killall -TERM vmferryd; while pidof vmferryd; do sleep 0.1; done")

    def sh(self, script: str, timeout: float = 60.0) -> str:
        return self.guest.sh(script, timeout)

    def start(self, *volumes: str, name: str = "a", prefix: str = "") -> None:
        options = " ".join(f"--volume {v}" for v in volumes)
        self.sh(f"{prefix} vmferryd --state-dir /tmp/{name} {options} >>/tmp/{name}.log 2>&1 & echo $! >/tmp/{name}.pid\n"
                f"for i in $(seq 200); do vmferry --control unix:/tmp/{name}/control.sock status >/dev/null 2>&1 && exit 0; "
                f"sleep 0.1; done; tail -20 /tmp/{name}.log; exit 1")

    def end(self, signal: str, name: str = "a") -> None:
        self.sh(f"pid=$(cat /tmp/{name}.pid); kill -{signal} $pid; "
                "for i in $(seq 200); do kill -0 $pid 2>/dev/null || exit 0; sleep 0.1; done; exit 1")

    def vmferry(self, words: str) -> dict:
        return json.loads(self.sh(f"vmferry {CONTROL} --json {words}"))

    def refused(self, words: str, *texts: str, status: int = 1, control: str = CONTROL) -> str:
        got, output = self.guest.run(f"vmferry {control} {words}")
        self.assertEqual(got, status, output)
        for text in texts:
            self.assertIn(text, output)
        return output

    def attach(self, volume: str = "vda", *options: str) -> str:
        words = " ".join(options) or f"--request-timeout {REQUEST_TIMEOUT}s"
        return self.vmferry(f"attach {volume} {words}")["device"]

    def attachment(self, volume: str = "vda") -> dict:
        return self.vmferry(f"volume show {volume}")["attachment"]

    def wait_connected(self, volume: str = "vda", seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while self.attachment(volume)["state"] != "connected":
            self.assertLess(time.monotonic(), deadline, self.attachment(volume))
            time.sleep(0.2)

    def start_fio(self, target: str, *options: str, rate: int = 100) -> None:
        """Random verified writes for some seconds, then everything is read back and compared."""
        words = " ".join(options)
        self.sh(f"fio --name=load --filename={target} --rw=randrw --bsrange=4k-16k --size=24m --iodepth=8 "
                f"--ioengine=libaio --direct=1 --verify=xxhash --verify_fatal=1 --rate_iops={rate} {words} "
                ">/tmp/fio.out 2>&1 & echo $! >/tmp/fio.pid; sleep 2; kill -0 $(cat /tmp/fio.pid)")

    def fio_status(self, timeout: float = 90.0):
        """(exit status, output) once it has ended. Its parent is gone, so the status is in its output."""
        deadline = time.monotonic() + timeout
        while self.guest.run("kill -0 $(cat /tmp/fio.pid)")[0] == 0:
            self.assertLess(time.monotonic(), deadline, "fio hangs: " + self.guest.kernel_log())
            time.sleep(0.5)
        output = self.sh("cat /tmp/fio.out")
        found = re.search(r"err=\s*(\d+)", output)
        return int(found[1]) if found else -1, output

    def test_without_the_module_it_says_modprobe(self):
        # The first thing that an operator meets on a fresh host.
        self.sh("rmmod nbd")
        self.start("name=vda,path=/tmp/vda.img,size=8M")
        self.refused("attach vda", "modprobe nbd nbds_max=16")
        self.assertIsNone(self.attachment())
        self.sh("insmod /lib/modules/nbd.ko nbds_max=2")
        self.assertEqual(self.attach(), "/dev/nbd0")

    def test_wrong_use_says_what_to_do(self):
        self.start("name=vda,path=/tmp/vda.img,size=8M", "name=vdb,path=/tmp/vdb.img,size=8M",
                   "name=copy,path=/tmp/copy.img,size=8M,role=secondary", "name=tiny,path=/tmp/tiny.img,size=512")
        self.refused("attach vdx", "there is no volume 'vdx'")
        self.refused("attach vda --device /dev/sda", "give /dev/nbd0 to /dev/nbd1023", status=2)
        self.refused("attach vda --device /dev/nbd0p1", "give /dev/nbd0", status=2)
        self.refused("attach vda --connections 17", "1 to 16", status=2)
        self.refused("attach vda --dead-timeout 5s", "--request-timeout", status=2)
        self.refused("attach vda --dead-timeout soon", "soon", status=2)
        self.refused("attach copy", "secondary here", "vmferry promote copy")
        self.refused("attach tiny", "512 bytes", "vmferry volume resize tiny", status=2)
        self.refused("detach vda", "nothing is attached as 'vda'")
        self.refused("detach /dev/nbd0", "nothing is attached as '/dev/nbd0'")
        self.assertEqual(self.attach("vda"), "/dev/nbd0")
        self.refused("attach vda", "attached already, as /dev/nbd0")
        self.refused("attach vdb --device /dev/nbd0", "/dev/nbd0 is volume 'vda'", "vmferry detach vda")
        self.refused("volume remove vda", "vmferry detach vda")
        self.refused("migrate vda --peer hostb", "attached as /dev/nbd0", "vmferry detach vda")
        self.refused("demote vda", "attached as /dev/nbd0", "vmferry detach vda")
        for path in ("/dev/nbd0", "/dev/nbd0p1"):
            self.refused(f"volume add name=loop,path={path}", "would wait for itself", status=2)
        # Another user of the driver: here a second daemon.
        self.start("name=other,path=/tmp/other.img,size=8M", name="b")
        other = "--control unix:/tmp/b/control.sock"
        self.refused("attach other --device /dev/nbd0", "attached to something else", control=other)
        self.assertEqual(self.sh(f"vmferry {other} attach other"), "/dev/nbd1")
        self.refused("attach vdb --device /dev/nbd1", "attached to something else")
        self.assertEqual(self.attach("vdb"), "/dev/nbd2")  # beyond nbds_max
        self.assertIn("volume 'vda' is attached as /dev/nbd0, connected", self.sh(f"vmferry {CONTROL} volume list"))
        # An ordinary user's daemon.
        self.end("TERM", name="b")
        self.sh("rm -rf /tmp/b; mkdir -m 0777 /tmp/home")
        self.start("name=mine,path=/tmp/home/m.img,size=8M", name="home/b", prefix=f"{BIN}/setpriv --reuid=65534 --clear-groups")
        self.refused("attach mine", "CAP_SYS_ADMIN", control="--control unix:/tmp/home/b/control.sock")
        self.end("TERM", name="home/b")
        self.sh("rm -rf /tmp/home")

    def test_a_file_system_verified_io_and_discard(self):
        self.start("name=vda,path=/tmp/vda.img,size=64M")
        device = self.attach("vda", "--connections 2")
        self.assertEqual(self.sh(f"{BIN}/blockdev --getsize64 --getss {device}").split(), [str(64 * MIB), "512"])
        self.assertEqual(self.sh(f"ls -d /sys/block/{device[5:]}/mq/* | wc -l"), "2")
        self.assertEqual(self.vmferry("volume show vda")["connections"], 2)
        # PR_SET_IO_FLUSHER: without it the daemon may wait for its own device when memory is short.
        flags = int(self.sh("cut -d' ' -f9 /proc/$(cat /tmp/a.pid)/stat"))
        self.assertEqual(flags & PF_MEMALLOC_NOIO, PF_MEMALLOC_NOIO)
        self.sh(f"mkfs.ext4 -q {device} && mount {device} /mnt")
        self.start_fio("/mnt/load", "--fsync=16", rate=300)
        error, output = self.fio_status()
        self.assertEqual(error, 0, output)
        self.refused("detach vda", "mounted at /mnt", "--force")
        self.sh(f"umount /mnt && e2fsck -fn {device}")
        self.assertGreater(int(self.sh("stat -c %b /tmp/vda.img")), 24 * 1024)
        self.sh(f"{BIN}/blkdiscard {device}")
        self.assertEqual(self.sh("stat -c %b /tmp/vda.img"), "0")
        # What was written, buffered and never synced, is in the volume after detach.
        self.sh(f"head -c 5000000 /dev/urandom >/tmp/random; cat /tmp/random >{device}; vmferry {CONTROL} detach {device}")
        self.sh("head -c 5000000 /tmp/vda.img | cmp - /tmp/random")
        self.assertIsNone(self.attachment())
        self.assertEqual(self.vmferry("volume show vda")["connections"], 0)

    def test_resize_while_mounted(self):
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        device = self.attach()
        self.sh(f"mkfs.ext4 -q {device} && mount {device} /mnt && echo kept >/mnt/file")
        self.vmferry("volume resize vda 64M")
        self.assertEqual(self.sh(f"{BIN}/blockdev --getsize64 {device}"), str(64 * MIB))
        self.sh(f"resize2fs {device}")
        self.sh("head -c 40000000 /dev/urandom >/mnt/large && sync && cat /mnt/file")
        self.sh(f"umount /mnt && e2fsck -fn {device} && vmferry {CONTROL} detach vda")

    def test_a_killed_daemon_costs_no_io_error(self):
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        device = self.attach("vda", "--connections 2", f"--request-timeout {REQUEST_TIMEOUT}s")
        self.start_fio(device)
        for signal in ("KILL", "TERM"):
            self.end(signal)
            time.sleep(1)
            self.start("name=vda,path=/tmp/vda.img,size=32M")
            self.wait_connected()
            time.sleep(2)
        error, output = self.fio_status()
        self.assertEqual(error, 0, output)
        self.assertEqual(self.attachment()["device"], device)
        self.assertEqual(self.vmferry("volume show vda")["connections"], 2)
        self.assertIn("attachment_connected", self.sh(f"vmferry {CONTROL} events"))
        self.sh(f"vmferry {CONTROL} detach vda")

    def test_a_daemon_that_stands_still_is_connected_anew(self):
        # The kernel gives up connections without an answer, and says so; nobody but the daemon can replace them.
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        device = self.attach("vda", "--request-timeout 2s")
        self.start_fio(device)
        self.sh("kill -STOP $(cat /tmp/a.pid); sleep 5; kill -CONT $(cat /tmp/a.pid)")
        error, output = self.fio_status()
        self.assertEqual(error, 0, output)
        self.wait_connected()
        self.assertIn("attachment_connected", self.sh(f"vmferry {CONTROL} events"))

    def test_without_a_daemon_io_fails_after_the_dead_timeout_and_comes_back(self):
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        device = self.attach("vda", "--request-timeout 1s --dead-timeout 3s")
        self.end("KILL")
        status, output = self.guest.run(f"time timeout 30 dd if={device} of=/dev/null bs=4096 count=1 iflag=direct")
        self.assertNotEqual(status, 0, output)
        self.assertRegex(output, r"real\s+0m [2-9]\.|real\s+0m 1[0-5]\.")
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        self.wait_connected()
        self.sh(f"dd if={device} of=/dev/null bs=4096 count=1 iflag=direct")

    def test_detach_under_load(self):
        self.start("name=vda,path=/tmp/vda.img,size=32M")
        device = self.attach()
        self.start_fio(device, "--time_based", "--runtime=60")
        self.refused("detach vda", "(fio)", f"{device} is in use", "--force")
        self.assertEqual(self.guest.run("kill -0 $(cat /tmp/fio.pid)")[0], 0, "a refusal changes nothing")
        self.sh(f"vmferry {CONTROL} detach vda --force")
        error, output = self.fio_status()
        self.assertIn(error, (5, 108), output)
        self.assertIsNone(self.attachment())
        self.assertEqual(self.attach(), device)
        self.sh(f"dd if={device} of=/dev/null bs=1M count=1 iflag=direct")

    def test_after_a_reboot_it_is_attached_again(self):
        # A reboot is a record without a device: made by taking the record back.
        self.start("name=vda,path=/tmp/vda.img,size=16M")
        device = self.attach()
        self.sh("cp /tmp/a/state /tmp/state")
        self.sh(f"vmferry {CONTROL} detach vda")
        self.end("TERM")
        self.sh("cp /tmp/state /tmp/a/state; rmmod nbd")
        self.start("name=vda,path=/tmp/vda.img,size=16M")
        deadline = time.monotonic() + 10
        while "modprobe nbd" not in (self.attachment()["error"] or ""):
            self.assertLess(time.monotonic(), deadline, self.attachment())
            time.sleep(0.2)
        self.sh("insmod /lib/modules/nbd.ko nbds_max=2")
        self.wait_connected()
        self.assertEqual(self.sh(f"{BIN}/blockdev --getsize64 {device}"), str(16 * MIB))


if __name__ == "__main__":
    unittest.main(verbosity=2)
