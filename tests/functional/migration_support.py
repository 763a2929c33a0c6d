# SPDX-License-Identifier: Apache-2.0
"""What the tests of migrations share: a lab of two daemons, an emulated link and a guest, small enough for 8 s a move."""

import shutil
import tempfile
import unittest
from pathlib import Path

from vmlib import Build, Lab, QmpError, VmferryError, Workload, wait_until  # noqa: F401  (re-exported)

BUILD = Build()
LOAD = Workload(mode="file", area="32M", hot="4M", mem="64M")


class MigrationCase(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="vmferry-migration-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def lab(self, **options) -> Lab:
        settings = {"disk_size": "256M", "fill": "100M", "memory_mb": 256, "workload": LOAD, "rate": "1Gbit", "rtt": "20ms"}
        return Lab(self.folder, BUILD, **{**settings, **options})

    def phase(self, lab: Lab) -> str:
        migrations = lab.daemons["a"].vmferry("migrate", "status")["migrations"]
        return next((m["phase"] for m in migrations if m["under_way"]), "")

    def capabilities(self, lab: Lab, side: str) -> dict:
        listed = lab.guests[side].qmp.command("query-migrate-capabilities")
        return {entry["capability"]: entry["state"] for entry in listed}

    def assert_whole_result(self, result: dict) -> None:
        """Every member of the contract, and no other."""
        self.assertEqual(set(result), {"result", "owner", "guest", "total_s", "downtime_ms", "rounds", "wire_bytes",
                                       "raw_bytes", "error"})
        for figures in (result["wire_bytes"], result["raw_bytes"]):
            self.assertEqual(set(figures), {"disk", "memory"})

    def assert_nothing_lost(self, lab: Lab, side: str) -> None:
        found = lab.check(side)
        self.assertTrue(found["ok"], found)
        self.assertGreater(found["acknowledged"], 100, found)
        self.assertEqual(found["found"], found["acknowledged"], found)
