# SPDX-License-Identifier: Apache-2.0
"""Text for the terminal, report.html and picture.svg, from what results.json holds."""

import html as escape_html
import re

import svg
from measure import DONE
from profiles import TITLES

MB = 1e6
# (key of a summary, heading, unit, scale, digits)
MEASURES = (("total_s", "total time", "s", 1, 1), ("wire_bytes", "bytes on the wire", "MB", MB, 0),
            ("downtime_ms", "downtime seen outside", "ms", 1, 0), ("rate_share", "write rate kept", "%", 0.01, 0),
            ("wait_p99_ms", "p99 wait of 64 records + fsync", "ms", 1, 0))


def number(value, scale: float = 1, digits: int = 1) -> str:
    return "-" if value is None else f"{value / scale:,.{digits}f}"


def text_line(run) -> str:
    head = f"   round {run.round}  {run.variant:10}"
    if run.status != DONE:
        return f"{head} {run.status}: {run.reason.splitlines()[0] if run.reason else ''} " \
               f"(wire {number(run.wire_bytes, MB, 0)} MB, write rate {number(run.rate_share, 0.01, 0)} %)"
    found = run.verified
    return (f"{head} {run.total_s:6.1f} s  wire {run.wire_bytes / MB:6.0f} MB  gap {number(run.downtime_ms, 1, 0):>5} ms  "
            f"write rate {number(run.rate_share, 0.01, 0):>4} %  {found.get('acknowledged', 0):,} records: "
            f"{found.get('lost')} lost, {found.get('corrupt')} corrupt"
            + (f"  BROKEN {found}" if run.broken else "") + ("  (overruns: link disturbed)" if run.disturbed else ""))


def rows(link: dict) -> list:
    """Cells of the table of one link, headings first."""
    table = [["variant", "done", *(f"{title}, {unit}" for _key, title, unit, _scale, _digits in MEASURES),
              "disk in step, s", "CPU daemons / QEMUs, s", "records lost / corrupt", "files wrong"]]
    for name, entry in link["summary"].items():
        cpu = entry["cpu_s"]
        daemons = sum(value for key, value in cpu.items() if "vmferryd" in key)
        qemus = sum(value for key, value in cpu.items() if "QEMU" in key)
        done = f"{entry['completed']} of {entry['runs']}"
        if not entry["completed"]:
            done += f" ({entry['status']})"
        records = entry["records"]
        table.append([TITLES[name], done, *(number(entry[key], scale, digits) for key, _t, _u, scale, digits in MEASURES),
                      number(entry["disk_s"]), f"{daemons:.1f} / {qemus:.1f}" if cpu else "-",
                      f"{records['lost']} / {records['corrupt']} of {records['acknowledged']:,}" if entry["completed"]
                      else "-",
                      f"{records['files_wrong']} of {records['files']:,}" if entry["completed"] else "-"])
    return table


def target_text(target: dict) -> str:
    verdict = {True: "PASS", False: "FAIL", None: "nothing to compare with"}[target["passed"]]
    key = target["measure"]
    _key, _title, unit, scale, digits = next(measure for measure in MEASURES if measure[0] == key)
    text = f"{target['name']}: {number(target['value'], scale, digits)} {unit}"
    if target["best"] is not None:
        text += f"; best of the others {number(target['best'], scale, digits)} {unit} ({target['against']})"
    if target["ratio"] is not None:
        text += f", {target['ratio']:.0%} of it"
    return f"{verdict}  {text}; wanted: {target['limit']}"


def text_table(link: dict) -> str:
    table = rows(link)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    lines += ["", *(target_text(target) for target in link["targets"]), ""]
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d646c; --line: #d9dde2; --page: #ffffff;
  --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa2ab; --line: #3a4048; --page: #16181b;
  --good: #57c47a; --bad: #f2857c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
p.note { color: var(--soft); max-width: 75ch; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem 2rem; }
svg { width: 100%; height: auto; } .good { color: var(--good); } .bad { color: var(--bad); }
ul.targets { list-style: none; padding: 0; }
"""


def escape(text) -> str:
    return escape_html.escape(str(text))


def _table(table: list) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bars(link: dict) -> str:
    plots = []
    for key, title, unit, scale, _digits in MEASURES[:4]:
        entries = []
        for name, entry in link["summary"].items():
            single = [run[key] / scale for run in link["runs"]
                      if run["variant"] == name and run["status"] == DONE and run[key] is not None]
            value = entry[key] / scale if entry[key] is not None else None
            entries.append(svg.Bar(name, TITLES[name], value, single, "" if entry["completed"] else entry["status"]))
        plots.append(f"<div><h3>{escape(title)}, {unit}</h3>{svg.bars(entries)}</div>")
    return f'<div class="plots">{"".join(plots)}</div>'


def _timelines(link: dict) -> str:
    parts = []
    for kind, title, scale, unit in (("write", "The guest's disk writes during the first round", 2**20, "MiB/s"),
                                     ("wire", "The link from source to destination, first round", 1e6 / 8, "Mbit/s")):
        lines = []
        for name in link["summary"]:
            run = next((run for run in link["runs"] if run["variant"] == name and run["timeline"].get(kind)), None)
            if run:
                lines.append(svg.Line(name, TITLES[name], [(at, value / scale) for at, value in run["timeline"][kind]]))
        if lines:
            parts.append(f"<h3>{escape(title)}, {unit}</h3>{svg.lines(lines, unit)}")
    return "".join(parts)


def picture(link: dict, others: int = 1) -> str:
    """A drawing of its own for pages that show no HTML: the guest's writes and the bars, ours and the best `others`."""
    ranked = sorted((name for name, entry in link["summary"].items() if name != "vmferry" and entry["completed"]),
                    key=lambda name: link["summary"][name]["total_s"])
    shown = {"vmferry", *ranked[:others]}
    chosen = {**link, "summary": {name: entry for name, entry in link["summary"].items() if name in shown}}
    titles, drawings = [], []
    for found in re.finditer(r"<h3>(.*?)</h3>(<svg.*?</svg>)", _bars(chosen) + _timelines(chosen), re.DOTALL):
        titles.append(found[1])
        drawings.append(found[2])
    parts, top, column = [], 10, 0
    for title, drawing in zip(titles, drawings):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
        left = 10 + column * 540
        parts.append(f'<text class="head" x="{left}" y="{top + 14}">{title}</text>'
                     + drawing.replace("<svg ", f'<svg x="{left}" y="{top + 22}" width="{width}" height="{height}" ', 1))
        column = 1 - column if width < 600 else 0
        if column == 0:
            top += height + 44
    # Viewers of SVG outside browsers know no variables and no colour schemes: the light colours, written out.
    rules = svg.STYLE[:svg.STYLE.index(" @media")] + " .head { fill: var(--ink); font-size: 14px; font-weight: 600; }"
    drawing = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1070 {top:.0f}" font-family="sans-serif">'
               f'<style>{rules}</style><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n')
    colours = dict(re.findall(r"--(\w+): (#\w+)", STYLE[:STYLE.index("@media")]))
    return re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], drawing)


def _targets(link: dict) -> str:
    items = "".join(f'<li class="{"good" if target["passed"] else "bad" if target["passed"] is False else ""}">'
                    f"{escape(target_text(target))}</li>" for target in link["targets"])
    return f'<ul class="targets">{items}</ul>'


def _runs(link: dict) -> str:
    table = [["run", "status", "total, s", "wire, MB", "gap, ms", "write rate, KiB/s before / meanwhile",
              "late packets", "overruns", "load before"]]
    for run in link["runs"]:
        emulator = run["emulator"]
        table.append([f"{TITLES[run['variant']]}, round {run['round']}",
                      run["status"] + (" BROKEN" if run["broken"] else ""), number(run["total_s"]),
                      number(run["wire_bytes"], MB, 0), number(run["downtime_ms"], 1, 0),
                      f"{number(run['rate_before'], 1024, 0)} / {number(run['rate_during'], 1024, 0)}",
                      f"{emulator['late_share']:.2%}" if emulator else "-", str(emulator.get("overruns", "-")),
                      number(run["load_before"])])
    reasons = "".join(f"<p>{escape(TITLES[run['variant']])}, round {run['round']}: "
                      f"{escape(run['reason'].splitlines()[0])}</p>" for run in link["runs"] if run["reason"])
    return _table(table) + reasons


def _block_cell(cell: dict) -> str:
    table = [["server", "IOPS", "MB/s", "mean, us", "p99, us", "CPU s/GB"]]
    for name, found in cell["medians"].items():
        table.append([name, number(found["iops"], 1, 0), number(found["mb_s"], 1, 0), number(found["mean_us"], 1, 0),
                      number(found["p99_us"], 1, 0), number(found.get("cpu_s_per_gb"), 1, 2)])
    targets = "".join(
        f'<li class="{"good" if target["passed"] else "bad"}">{"PASS" if target["passed"] else "FAIL"} '
        f"{escape(target['name'])}: {target['quartiles'][1]:.2f} of {escape(target['against'])}, quartiles "
        f"{target['quartiles'][0]:.2f} to {target['quartiles'][2]:.2f}; wanted: "
        f"{'at most' if target['at_most'] else 'at least'} {target['limit']}</li>" for target in cell["targets"])
    return f'<h3>{escape(cell["cell"])}</h3>{_table(table)}<ul class="targets">{targets}</ul>'


def html(results: dict) -> str:
    machine = results["machine"]
    parts = [f"<h1>vmferry: measurements, profile {escape(results['profile'])}</h1>",
             f'<p class="note">{escape(results["began"])}, {results["seconds"]:.0f} s, <code>{escape(results["command"])}'
             f"</code>. {escape(machine['cpu'])}, {machine['cores']} cores, {machine['memory_mib']:,} MiB, Linux "
             f"{escape(machine['kernel'])}; {escape(machine['qemu'])}; vmferry {escape(machine['vmferry'])}.</p>",
             '<p class="note">Bytes: IP bytes from source to destination counted by the emulated link. Time: start of the '
             "command to its exit. Downtime: largest hole in a 5 ms heartbeat seen from outside. Write rate: from the start "
             "to the stop of the guest, against the time before. Medians; dots are single runs. The method and its "
             "limits: docs/performance.md.</p>"]
    for link in results["sections"].get("migration", {}).get("links", []):
        if "summary" not in link:
            continue  # its first run is not done yet
        parts += [f"<h2>Live migration, {escape(link['link'])}</h2>", _targets(link), _table(rows(link)), _bars(link),
                  _timelines(link), "<h3>All runs</h3>", _runs(link)]
    cells = results["sections"].get("block", {}).get("cells", [])
    if cells:
        parts += ["<h2>NBD servers on one file</h2>", *(_block_cell(cell) for cell in cells)]
    cells = results["sections"].get("vhost", {}).get("cells", [])
    if cells:
        parts += ["<h2>vhost-user-blk back-ends on one file</h2>", *(_block_cell(cell) for cell in cells)]
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>vmferry: measurements</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{svg.STYLE}</style></head>'
            f"<body>{''.join(parts)}</body></html>\n")
