# SPDX-License-Identifier: Apache-2.0
"""Guests, QEMUs and what they report: shared by functional tests, the demo and the performance harness.

    build = Build()                                    # build folder: QEMU >= 9, kernel, verifier
    with Collector(folder) as collector:
        with Guest("a", folder, build.qemu("10"), build.guest_image(), collector, [RawDisk(image)]) as guest:
            guest.wait_started()
            ...
            guest.stop_load()
        print(build.verify(image, collector.log_path), collector.largest_gap())

Standard library only (python 3.11). Nothing here knows vmferry: a disk is a file, an NBD export or a vhost-user-blk socket.
"""

from .build import Build
from .collector import Collector, Gap, LogLine
from .daemons import Daemon, VmferryError, Wan, pair, wait_until
from .guest import Guest, NbdDisk, RawDisk, VhostDisk, Workload
from .lab import Lab, Outcome
from .qmp import Qmp, QmpError

__all__ = ["Build", "Collector", "Daemon", "Gap", "Guest", "Lab", "LogLine", "NbdDisk", "Outcome", "Qmp", "QmpError", "RawDisk",
           "VhostDisk", "VmferryError", "Wan", "Workload", "pair", "wait_until"]
