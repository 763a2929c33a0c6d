#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The command that a reader types first, as it is typed."""

import re
import subprocess
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class DemoTest(unittest.TestCase):
    def test_the_demo_migrates_a_guest_and_loses_no_record(self):
        # Nothing else runs the script: its options, its preparation and its report would rot unnoticed.
        began = time.monotonic()
        done = subprocess.run([ROOT / "tools/demo", "--disk", "256M", "--memory", "256", "--rate", "1Gbit", "--rtt", "20ms"],
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=150)
        print(done.stdout)
        self.assertEqual(done.returncode, 0, done.stdout)
        line = re.search(r"([\d,]+) records acknowledged, ([\d,]+) found, (\d+) lost, (\d+) corrupt", done.stdout)
        self.assertIsNotNone(line, done.stdout)
        acknowledged, found = (int(line[n].replace(",", "")) for n in (1, 2))
        self.assertGreater(acknowledged, 0)
        self.assertEqual(found, acknowledged)
        self.assertEqual((line[3], line[4]), ("0", "0"))
        for figure in ("total time", "downtime seen outside", "bytes on the wire"):
            self.assertIn(figure, done.stdout)
        print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    unittest.main()
