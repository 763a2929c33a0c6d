# SPDX-License-Identifier: Apache-2.0
"""What is measured: guests, loads, links and variants."""

from dataclasses import dataclass

from vmlib import Workload


@dataclass(frozen=True)
class Profile:
    """before_s: how long the guest's write rate is taken before the migration; give_up_s: a migration that takes longer
    counts as one that does not converge."""

    name: str
    memory_mb: int
    disk_size: str
    fill: str
    workload: Workload
    before_s: float
    give_up_s: float
    rounds: int
    variants: tuple


# The load is the default of tests/guest/workload/options.h: 2 MB/s of 4 KiB records over 448 MiB, 4 MB/s of memory.
FULL = Profile("full", 512, "2G", "1140M", Workload(mode="file", warm="150M"), before_s=60, give_up_s=180, rounds=3,
               variants=("vmferry", "plain-wb", "zstd-wb", "plain-bg", "zstd-bg"))
QUICK = Profile("quick", 256, "256M", "100M", Workload(mode="file", area="32M", hot="4M", mem="64M", warm="32M"),
                before_s=15, give_up_s=120, rounds=1, variants=("vmferry", "plain-wb"))


@dataclass(frozen=True)
class QemuVariant:
    """QEMU's own way: copy_mode of blockdev-mirror, and how the memory travels."""

    title: str
    copy_mode: str  # background | write-blocking
    capabilities: tuple = ()
    parameters: tuple = ()  # pairs


ZSTD = {"capabilities": ("multifd",), "parameters": (("multifd-channels", 2), ("multifd-compression", "zstd"))}
QEMU_VARIANTS = {
    "plain-wb": QemuVariant("QEMU: plain, write-blocking mirror", "write-blocking"),
    "zstd-wb": QemuVariant("QEMU: multifd + zstd, write-blocking mirror", "write-blocking", **ZSTD),
    "xbzrle-wb": QemuVariant("QEMU: xbzrle, write-blocking mirror", "write-blocking", ("xbzrle",),
                             (("xbzrle-cache-size", 256 << 20),)),
    "plain-bg": QemuVariant("QEMU: plain, background mirror", "background"),
    "zstd-bg": QemuVariant("QEMU: multifd + zstd, background mirror", "background", **ZSTD),
}
TITLES = {"vmferry": "vmferry", **{name: variant.title for name, variant in QEMU_VARIANTS.items()}}
