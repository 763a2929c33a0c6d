#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The program that a daemon runs when a guest has arrived (--on-running): once, at the destination, and never in the way."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from vmlib import Build, Lab, Workload, wait_until

BUILD = Build()
LOAD = Workload(mode="file", area="8M", hot="2M", mem="16M")


class HookCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-hooks-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.notes = self.folder / "notes"

    def hook(self, name: str, script: str) -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        return path

    def lab(self, **options) -> Lab:
        return Lab(self.folder / "lab", BUILD, disk_size="64M", fill="8M", memory_mb=192, workload=LOAD, wan=False, **options)

    def with_hook(self, lab: Lab, side: str, hook: Path) -> None:
        """The daemon again, with the hook."""
        daemon = lab.daemons[side]
        self.assertEqual(daemon.stop(), 0)
        daemon.command += ["--on-running", str(hook)]
        daemon.start()

    def events(self, daemon, name: str) -> list:
        done = subprocess.run(daemon.vmferry_command("events"), text=True, capture_output=True, check=True, timeout=20)
        return [e for e in map(json.loads, done.stdout.splitlines()) if e["event"] == name]

    def children(self, daemon) -> list:
        """Of all threads: a worker starts the program."""
        found = []
        for task in Path(f"/proc/{daemon.pid}/task").iterdir():
            found += (task / "children").read_text().split()
        return found

    def noted(self) -> list:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


class OnRunning(HookCase):
    def test_it_runs_once_at_the_destination_after_the_guest_and_knows_what_arrived(self):
        # Run too early it sends traffic to a guest that does not answer, run at the source it takes it away again.
        with self.lab() as lab:
            for side in "ab":
                self.with_hook(lab, side, self.hook(f"note-{side}", f"""
echo "side={side} pid=$$ stamp=$(date +%s.%N) arguments=$* $(env | sort | grep VMFERRY_ | tr '\\n' ' ')" >> {self.notes}
echo "a line for the log"; printf 'odd \\033[31m bytes\\n' >&2"""))
            lab.start_guest("a")
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", "2m")
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            ended = wait_until(lambda: self.events(lab.daemons["b"], "hook_ended"), 20, "the hook ended")
            status = lab.daemons["b"].volume_status("vda")
            self.assertEqual((len(self.noted()), len(ended)), (1, 1), self.noted())
            note = self.noted()[0]
            for text in ("side=b ", "arguments=running vda ", "VMFERRY_EVENT=running ", "VMFERRY_VOLUMES=vda ",
                         "VMFERRY_PEER=a ", f"VMFERRY_ATTEMPT={status['attempt']} ", "VMFERRY_GUEST=running "):
                self.assertIn(text, note)
            self.assertEqual((ended[0]["volumes"], ended[0]["peer"], ended[0]["attempt"]), (["vda"], "a", status["attempt"]))
            # After RESUME: what the destination's QEMU says of itself, with its own clock.
            self.assertEqual(lab.guests["b"].qmp.status(), "running")
            resumed = [e.qemu_time for e in lab.guests["b"].qmp.events if e.name == "RESUME"]
            self.assertEqual(len(resumed), 1)
            self.assertGreater(float(note.split("stamp=")[1].split()[0]), resumed[0])
            log = lab.daemons["b"].log()
            self.assertIn("hook output: a line for the log", log)
            self.assertNotIn("\033", log)
            # Not again: neither by a restart nor by the way back, which is the other side's.
            self.assertEqual(lab.daemons["b"].stop(), 0)
            lab.daemons["b"].start()
            time.sleep(2)
            self.assertEqual(len(self.noted()), 1, self.noted())
            outcome = lab.migrate("b", "a", "--quit-source", "--timeout", "2m")
            self.assertEqual(outcome.status, 0, (outcome.result, outcome.stderr))
            wait_until(lambda: self.events(lab.daemons["a"], "hook_ended"), 20, "the hook of the way back ended")
            self.assertEqual([note.split()[0] for note in self.noted()], ["side=b", "side=a"])
            for side in "ab":
                self.assertEqual(self.children(lab.daemons[side]), [], side)
            found = lab.check("a")
            self.assertTrue(found["ok"], found)

    def test_one_that_hangs_is_killed_and_one_that_was_cut_off_runs_once_more(self):
        # A hook that waits for a dead name server must neither keep the migration waiting nor stay for ever.
        with self.lab() as lab:
            self.with_hook(lab, "b", self.hook("hang", f"echo $$ >> {self.notes}\ntrap '' TERM\nsleep 1000 &\nwait"))
            self.addCleanup(self.kill_noted)
            lab.start_guest("a")
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", "2m")
            self.assertEqual((outcome.status, outcome.result["result"]), (0, "done"), (outcome.result, outcome.stderr))
            b = lab.daemons["b"]
            wait_until(lambda: len(self.noted()) == 1, 10, "the hook runs")
            began = time.monotonic()
            self.assertEqual(b.volume_status("vda")["handover_state"], "running", "nobody waits for it")
            # Killed: it was begun and is not known to have ended, so that it is run again, and then never more.
            b.kill()
            b.start()
            wait_until(lambda: len(self.noted()) == 2, 10, "the hook runs again")
            failed = wait_until(lambda: self.events(b, "hook_failed"), 45, "the hook is killed")
            self.assertGreater(time.monotonic() - began, 28)
            self.assertIn("was killed: it had not ended after 30.0 s", failed[0]["reason"])
            self.assertEqual(self.children(b), [])
            self.assertFalse(Path(f"/proc/{self.noted()[1]}").exists())
            self.assertEqual(b.volume_status("vda")["may_run"], True)
            self.assertEqual(lab.guests["b"].qmp.status(), "running")
            b.kill()
            b.start()
            time.sleep(2)
            self.assertEqual(len(self.noted()), 2, self.noted())

    def kill_noted(self):
        """What the daemon that was killed could not kill."""
        for pid in map(int, self.noted()):
            try:
                if b"hang" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.killpg(pid, signal.SIGKILL)
            except OSError:
                pass


class Refusal(HookCase):
    def check(self, hook, *options) -> subprocess.CompletedProcess:
        return subprocess.run([BUILD.bin / "vmferryd", "--state-dir", self.folder / "state", "--on-running", hook, *options],
                              text=True, capture_output=True, timeout=20, check=False)

    def test_a_hook_that_others_could_have_written_is_refused(self):
        # It runs with the daemon's rights.
        hook = self.hook("hook", "true")
        self.assertEqual(self.check(hook, "--check-config").returncode, 0)
        hook.chmod(0o722)
        done = self.check(hook, "--check-config")
        self.assertEqual(done.returncode, 2)
        self.assertIn("may be written by others", done.stderr)
        self.assertIn(f"chmod go-w {hook}", done.stderr)
        started = self.check(hook)
        self.assertEqual(started.returncode, 1)
        self.assertIn("may be written by others", started.stdout + started.stderr)
        file = self.folder / "vmferryd.toml"
        file.write_text(f'state-dir = "{self.folder}/state"\non-running = "{hook}"\n')
        done = subprocess.run([BUILD.bin / "vmferryd", "--config", file, "--check-config"], text=True, capture_output=True,
                              timeout=20, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn(f"{file}:2: on-running", done.stderr)


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
