# SPDX-License-Identifier: Apache-2.0
"""The demo behind tools/demo: one guest, one migration over an emulated WAN, every record verified."""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/functional"))

from vmlib import Build, Lab, Workload  # noqa: E402  (the path above is where it lives)


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def say(text: str) -> None:
    print(text, flush=True)


def link_bytes(rate: str) -> float:
    """Bytes per second of a rate as vmferry-wan takes it: 100Mbit, 1.5Gbit, 512kbit."""
    found = re.fullmatch(r"([0-9.]+)([kMG])bit", rate)
    if found is None:
        raise SystemExit(f"tools/demo: --rate '{rate}' is not a rate such as 20Mbit")
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]] / 8


def milliseconds(time_text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)(us|ms|s)", time_text)
    if found is None:
        raise SystemExit(f"tools/demo: --rtt '{time_text}' is not a time such as 60ms")
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


def load_for(link: float, small: bool) -> Workload:
    """A guest that writes faster than the link carries never moves, whoever moves it: at most half of the link."""
    return Workload(mode="file", disk_rate=str(int(min(2 << 20, link / 6))), mem_rate=str(int(min(4 << 20, link / 3))),
                    **({"area": "32M", "hot": "4M"} if small else {"warm": "150M"}))


def report(outcome, found: dict, rate_before: float, rate_during: float) -> None:
    result = outcome.result
    raw = sum(result["raw_bytes"].values())
    wire = outcome.wire_bytes
    say("")
    say(f"  total time                {outcome.seconds:.1f} s")
    say(f"  downtime seen outside     {outcome.gap_ms:.0f} ms (vmferry says {result['downtime_ms']:.0f} ms)")
    say(f"  bytes on the wire         {mib(wire)} for {mib(raw)} of disk and memory ({wire / max(raw, 1):.0%})")
    say(f"  the guest's disk writes   {rate_before / 2**20:.2f} MiB/s before, {rate_during / 2**20:.2f} MiB/s meanwhile")
    say(f"  memory                    {found['memory_pages']:,} pages checked by the guest, {found['memory_bad']} bad")
    say(f"  {found['acknowledged']:,} records acknowledged, {found['found']:,} found, {found['lost']} lost, "
        f"{found['corrupt']} corrupt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--rate", default="100Mbit", help="of the emulated link, each way")
    parser.add_argument("--rtt", default="40ms")
    parser.add_argument("--loss", default=None)
    parser.add_argument("--memory", type=int, default=512, help="of the guest, MiB")
    parser.add_argument("--disk", default="2G")
    parser.add_argument("--keep", action="store_true", help="keep the folder with images and logs")
    arguments = parser.parse_args()

    build = Build()
    folder = Path(tempfile.mkdtemp(prefix="vmferry-demo-"))
    say("== preparing QEMU, kernel and disk")
    build.qemu("10")
    build.guest_image()
    fill = "1140M" if arguments.disk == "2G" else "100M"
    link = link_bytes(arguments.rate)
    workload = load_for(link, small=arguments.disk != "2G")
    minutes = 15 + int(2 * (2 << 30) / link / 60)  # twice of everything as it is
    lab = Lab(folder, build, rate=arguments.rate, rtt=arguments.rtt, loss=arguments.loss, disk_size=arguments.disk,
              fill=fill, memory_mb=arguments.memory, workload=workload)
    try:
        with lab:
            say(f"== booting a guest with {arguments.memory} MiB of memory and a {arguments.disk} disk on host a")
            lab.start_guest("a")
            settled = time.monotonic()
            time.sleep(10)
            say(f"== migrating it to host b over {arguments.rate}, {arguments.rtt} round trip, while it writes")
            outcome = lab.migrate("a", "b", "--quit-source", "--timeout", f"{minutes}m", "--downtime-limit",
                                  f"{300 + milliseconds(arguments.rtt):.0f}ms", timeout=minutes * 60 + 60)
            if outcome.status != 0:
                lab.keep_logs()
                say(f"the migration failed: {outcome.result.get('error')} {outcome.stderr}")
                return 1
            rate_before = lab.collector.write_rate(settled, outcome.began)
            rate_during = lab.collector.write_rate(outcome.began, outcome.ended)
            time.sleep(3)
            say("== verifying every record on host b's disk")
            found = lab.check("b")
            report(outcome, found, rate_before, rate_during)
            say("")
            say("  the guest runs on host b, nothing is lost" if found["ok"] else f"  FAILED: {found}")
            return 0 if found["ok"] else 1
    finally:
        if arguments.keep:
            say(f"images and logs: {folder}")
        else:
            lab.remove()


if __name__ == "__main__":
    sys.exit(main())
