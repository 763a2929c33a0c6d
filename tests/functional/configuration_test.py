#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The configuration: one file or the same names as options, every problem at once with its place; help and JSON."""

import json
import os
import re
import unittest

from daemon_support import BUILD, MIB, DaemonCase, new_address, run

VMFERRYD, VMFERRY = BUILD.bin / "vmferryd", BUILD.bin / "vmferry"


class ConfigurationFile(DaemonCase):
    def write(self, text: str):
        path = self.path("vmferry.toml")
        path.write_text(text)
        return path

    def test_a_file_does_what_the_options_of_the_same_names_do(self):
        # A setting that works as an option and is ignored in the file is found at the next reboot of the host.
        one, two, listen = self.image("one.img", 4 * MIB), self.path("two.img"), new_address()
        file = self.write(f"""
state-dir = "{self.folder}/state"
control = "unix:{self.folder}/c.sock"
listen = "{listen}"
log-level = "debug"

[[volume]]
name = "vda"
path = "{one}"
nbd = "unix:{self.folder}/vda.nbd"
cache = "none"
aio = "libaio"
qmp = "{self.folder}/qmp.sock"

[[volume]]
name = "vdb"
path = "{two}"
size = "8M"
role = "secondary"
""")
        checked = run(VMFERRYD, "--config", file, "--check-config")
        self.assertIn("2 volumes", checked.stdout)
        self.assertFalse((self.folder / "state").exists(), "a check must change nothing")
        self.assertFalse(two.exists())
        file.write_text(file.read_text().replace('"debug"', '"warn"'))
        daemon = self.daemon("a", extra_args=["--config", str(file), "--control", f"unix:{self.folder}/a.sock"],
                             control=f"unix:{self.folder}/a.sock", log_level=None)
        volumes = {v["name"]: v for v in daemon.vmferry("volume", "list")["volumes"]}
        self.assertEqual({n: (v["size"], v["role"], v["cache"]) for n, v in volumes.items()},
                         {"vda": (4 * MIB, "primary", "none"), "vdb": (8 * MIB, "secondary", "writeback")})
        self.assertEqual((volumes["vda"]["aio"], volumes["vda"]["qmp"]), ("libaio", f"{self.folder}/qmp.sock"))
        self.assertNotIn(" info ", daemon.log())
        # The command line wins over the file.
        self.assertFalse((self.folder / "c.sock").exists())
        self.assertFalse((self.folder / "state").exists())

    def test_a_relative_path_names_the_same_file_from_every_working_directory(self):
        # Started by hand in one folder and by systemd in /, the daemon would serve another, empty disk.
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        first, second = self.path("first"), self.path("second")
        for folder in (first, second):
            folder.mkdir()
        file = self.write(f"""
[[volume]]
name = "vda"
path = "vda.img"
size = "4M"
nbd = "unix:{self.folder}/vda.nbd"
""")
        os.chdir(first)
        daemon = self.daemon("a", "name=vdb,path=./vdb.img,size=4M", extra_args=["--config", str(file)])
        paths = {v["name"]: v["path"] for v in daemon.vmferry("volume", "list")["volumes"]}
        for name, path in paths.items():
            self.assertTrue(os.path.isabs(path), path)
            self.assertTrue(os.path.samefile(path, first / f"{name}.img"))
        self.assertEqual(len(paths), 2)
        self.assertEqual(daemon.stop(), 0)
        # What was recorded is served without being named again.
        os.chdir(second)
        daemon.command = daemon.command[: daemon.command.index("--config")]
        daemon.start()
        self.assertEqual({v["name"]: v["path"] for v in daemon.vmferry("volume", "list")["volumes"]}, paths)
        self.assertEqual(list(second.iterdir()), [])

    def test_every_problem_is_reported_at_once_with_its_line(self):
        # One problem per try costs the operator a restart for each.
        file = self.write(f"""state-dir = "{self.folder}/state"
colour = "red"
listen = "unix:/x"
log-level = "loud"

[[volume]]
name = "bad name"
path = "/x.img"
size = "1000"

[[volume]]
name = "vdb"
role = "boss"
speed = 9
""")
        for extra in ([], ["--check-config"]):
            done = run(VMFERRYD, "--config", file, *extra, check=False)
            self.assertEqual(done.returncode, 2, done)
            for line, text in ((2, "colour"), (3, "listen"), (4, "log"), (7, "bad name"), (9, "1000"), (11, "path"),
                               (13, "boss"), (14, "speed")):
                self.assertRegex(done.stderr, rf"(?m)^vmferryd: {re.escape(str(file))}:{line}: .*{text}")
            self.assertFalse((self.folder / "state").exists())

    def test_a_broken_file_names_its_line_and_a_missing_one_its_name(self):
        # "parse error" alone sends the operator through the whole file.
        file = self.write('state-dir = "/x"\nlisten = \n')
        done = run(VMFERRYD, "--config", file, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn(f"{file}:2", done.stderr)
        done = run(VMFERRYD, "--config", self.path("no.toml"), "--check-config", check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("no.toml", done.stderr)

    def test_what_only_the_whole_shows_is_found_too(self):
        # Two volumes on one file are two guests that overwrite each other.
        options = ["--state-dir", self.folder / "s"]
        for volumes, text in ((["name=a,path=/x", "name=a,path=/y"], "given twice"),
                              (["name=a,path=/x", "name=b,path=/x"], "used by two volumes"),
                              (["name=a,path=/x,nbd=unix:/n", "name=b,path=/y,nbd=unix:/n"], "used by two volumes")):
            words = [w for v in volumes for w in ("--volume", v)]
            done = run(VMFERRYD, *options, *words, "--check-config", check=False)
            self.assertEqual(done.returncode, 2, done)
            self.assertIn(text, done.stderr)
        done = run(VMFERRYD, "--check-config", check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("--state-dir", done.stderr)
        self.assertEqual(run(VMFERRYD, *options, "--check-config").returncode, 0)

    def test_a_check_looks_at_the_files_too(self):
        # A check that passes before a reboot that fails was worse than none. All cases: unit test ConfigFiles.
        first, gone = self.image("one.img", 4 * MIB), self.path("gone")
        os.link(first, self.path("two.img"))
        file = self.write(f"""state-dir = "{self.folder}/state"
[[volume]]
name = "a"
path = "{first}"
size = "8M"

[[volume]]
name = "b"
path = "{self.path('two.img')}"
nbd = "unix:{gone}/b.nbd"
""")
        done = run(VMFERRYD, "--config", file, "--check-config", "--volume", f"name=c,path={gone}/c.img,size=1M", check=False)
        self.assertEqual(done.returncode, 2, done)
        for place, text in ((f"{file}:5", "size= is 8388608 bytes"), (f"{file}:9", "is the same file as"),
                            (f"{file}:10", f"the folder '{gone}' does not exist"),
                            ("--volume name=c,.*", f"the folder '{gone}' does not exist")):
            self.assertRegex(done.stderr, rf"(?m)^vmferryd: {place}: .*{text}")
        self.assertEqual(len(done.stderr.splitlines()), 4, done.stderr)

    def test_relative_sockets_and_state_are_where_they_were_asked_for(self):
        # The next start, from / by systemd, would have another state: every volume new, every copy made primary.
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        image = self.image("one.img", 4 * MIB)
        daemon = self.daemon("a", f"name=vda,path=one.img,nbd=unix:one.nbd,qmp=q", control=f"unix:{self.folder}/c.sock",
                             extra_args=["--state-dir", "s", "--control", "unix:c.sock"])
        self.assertTrue((self.folder / "s" / "lock").exists())
        shown = daemon.vmferry("volume", "show", "vda")
        self.assertEqual((shown["exports"], shown["qmp"]), ([self.uri(image)], f"{self.folder}/q"))
        self.assertIn("absolute", self.refused(daemon, "volume", "add", f"name=b,path={self.folder}/b,size=1M,nbd=unix:b",
                                               status=2))

    def test_a_daemon_that_cannot_start_says_why_and_ends_with_1(self):
        # A service that dies without a reason in its log is restarted for ever.
        listen = new_address()
        self.daemon("a", listen=listen)
        for options, text in ((["--state-dir", self.folder / "a-state"], "in use by another vmferryd"),
                              (["--state-dir", self.folder / "s", "--listen", listen], "listen"),
                              (["--state-dir", "/proc/none"], "/proc/none")):
            done = run(VMFERRYD, *options, check=False, timeout=20)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn(text, done.stdout + done.stderr)


class HelpAndJson(DaemonCase):
    COMMANDS = ["volume add", "volume list", "volume show", "volume remove", "volume resize", "peer invite", "peer join",
                "peer list", "peer ping", "peer remove", "replicate start", "replicate set", "replicate status",
                "replicate wait", "replicate pause", "replicate resume", "replicate verify", "replicate stop", "migrate",
                "migrate status", "migrate cancel", "migrate watch", "estimate", "promote", "demote", "resolve", "status",
                "events"]

    def test_every_command_has_help_with_an_example_that_parses(self):
        # An example that the program itself refuses is worse than none.
        for words in (c.split() for c in self.COMMANDS):
            with self.subTest(command=words):
                text = run(VMFERRY, *words, "--help").stdout
                example = re.search(r"Example:\s*\n\s*(vmferry .*)", text)
                self.assertIsNotNone(example, text)
                self.assertTrue(example[1].startswith("vmferry " + " ".join(words)), example[1])
                # Nobody listens: status 1 says that it was understood and sent, 2 that it was not.
                done = run(VMFERRY, "--control", "unix:/nonexistent", *example[1].split("<")[0].split()[1:], check=False,
                           input="token\n")
                self.assertEqual(done.returncode, 1, done)
                self.assertIn("no vmferryd answers", done.stderr)
        for group in ("volume", "peer", "replicate"):  # and not one of another group
            examples = re.findall(r"(?m)^  (vmferry .*)", run(VMFERRY, group, "--help").stdout)
            self.assertGreaterEqual(len(examples), 2, group)
            for example in examples:
                self.assertTrue(example.startswith(f"vmferry {group} "), example)
                words = re.split(r"[<>#]", example)[0].split()[1:]
                done = run(VMFERRY, "--control", "unix:/nonexistent", *words, check=False, input="token\n")
                self.assertEqual(done.returncode, 1, done)
        self.assertIn("Example", run(VMFERRYD, "--help").stdout)
        self.assertIn("Example", run(VMFERRY, "--help").stdout)
        for program in (VMFERRY, VMFERRYD):
            self.assertRegex(run(program, "--version").stdout, r"^vmferryd? \d+\.\d+")

    def test_wrong_usage_ends_with_2(self):
        # Scripts tell "you called me wrong" from "it did not work" by this.
        for words in ([], ["volume"], ["volume", "add"], ["fly"], ["replicate", "start", "vda"], ["migrate", "vda"],
                      ["status", "--wrong"], ["resolve", "vda"], ["resolve", "vda", "--run-here", "--run-at-peer"],
                      ["peer", "join"]):
            with self.subTest(words=words):
                self.assertEqual(run(VMFERRY, *words, check=False).returncode, 2)

    def test_json_of_every_command_parses_also_when_it_fails(self):
        # A script that parses must not meet a table or nothing in the case that matters.
        a = self.daemon("a", self.volume("vda", self.image("a.img", 4 * MIB)), listen=new_address())
        succeed = {"volume list": [], "volume show": ["vda"], "volume resize": ["vda", "8M"],
                   "volume add": [self.volume("vdb", self.path("b.img"), "size=4M")], "volume remove": ["vdb"],
                   "peer invite": ["--address", a.listen], "peer list": [], "replicate status": [], "migrate status": [],
                   "promote": ["vda"], "status": [], "demote": ["vda"]}
        fail = {"peer join": ["nonsense", "--name", "x"], "peer ping": ["x"], "peer remove": ["x"],
                "replicate start": ["vda", "--peer", "x"], "replicate set": ["vda", "--rpo", "5s"],
                "replicate wait": ["vda"], "replicate pause": ["vda"], "replicate resume": ["vda"],
                "replicate verify": ["vda"], "replicate stop": ["vda"], "migrate": ["vda", "--peer", "x"],
                "migrate cancel": [], "migrate watch": [], "estimate": ["vda", "--peer", "x"],
                "resolve": ["vda", "--discard-local"]}
        self.assertEqual(set(succeed) | set(fail) | {"events"}, set(self.COMMANDS))
        for command, arguments in {**fail, **succeed}.items():
            with self.subTest(command=command):
                done = run(*a.vmferry_command(*command.split(), *arguments), check=False)
                self.assertEqual(len(done.stdout.splitlines()), 1, done)
                value = json.loads(done.stdout)
                self.assertIsInstance(value, dict)
                if command in succeed:
                    self.assertEqual(done.returncode, 0, done)
                    self.assertNotIn("error", value)
                else:
                    self.assertIn(done.returncode, (1, 2), done)
                    self.assertTrue(value["error"])
                    self.assertIn(value["error"], done.stderr)
                # The same for people: something to read, and no JSON.
                plain = [w for w in a.vmferry_command(*command.split(), *arguments) if w != "--json"]
                if command in ("volume list", "volume show", "peer list", "status", "replicate status"):
                    self.assertNotIn("{", run(*plain).stdout)
        for line in run(*a.vmferry_command("events")).stdout.splitlines():
            self.assertIn("event", json.loads(line))

    def test_a_migration_that_was_never_begun_prints_its_error_and_ends_with_1(self):
        # A script that goes by the status would move the guest's address; and nobody knows where the guest of a volume
        # is that does not exist. What it reads has all its members, whoever could not answer.
        a, b = self.two_daemons(4 * MIB)
        for words, error in ((["vda", "--peer", "b"], "QMP"), (["vda", "--peer", "nobody"], "no peer 'nobody'"),
                             (["vdx", "--peer", "b"], "vdx")):
            for option in ([], ["--dry-run"], ["--background"]):
                with self.subTest(words=words, option=option):
                    command = a.vmferry_command("migrate", *words, *option)
                    done = run(*command, check=False)
                    value = json.loads(done.stdout)
                    self.assertEqual((done.returncode, value["result"]), (1, "failed"), done)
                    self.assert_whole_result(value)
                    self.assertEqual(value["owner"], "unknown" if words[0] == "vdx" else "source", value)
                    self.assertEqual(value["guest"], "unknown")
                    self.assertIn("vmferry resolve", value["error"])
                    self.assertIn("vmferry status", value["error"])
                    self.assertIn(error, value["error"])
                    plain = run(*[w for w in command if w != "--json"], check=False)
                    self.assertEqual((plain.returncode, plain.stdout), (1, ""), plain)
                    self.assertIn(error, plain.stderr)
                    self.assertNotIn("running-source", plain.stderr)

    def test_a_relative_qmp_path_is_that_of_the_caller(self):
        # In the daemon's folder it would be no socket, or the one of another guest.
        a, _b = self.two_daemons(4 * MIB)
        folder = self.path("elsewhere")
        os.mkdir(folder)
        command = a.vmferry_command("migrate", "vda", "--peer", "b", "--qmp", "sub/vm.qmp")
        done = run(*command, check=False, cwd=folder)
        self.assertIn(f"'{folder}/sub/vm.qmp'", json.loads(done.stdout)["error"])

    def test_status_of_migrations_is_of_the_volumes_that_were_named(self):
        # A typing error that reads as "nothing is under way" is believed.
        a = self.daemon("a", self.volume("vda", self.image("a.img", 4 * MIB)))
        self.assertEqual(a.vmferry("migrate", "status", "vda"), {"migrations": []})
        for option in ([], ["--json"]):
            done = run(VMFERRY, "--control", a.control, *option, "migrate", "status", "vda", "nosuch", check=False)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("nosuch", done.stderr)

    def assert_whole_result(self, value: dict) -> None:
        self.assertEqual(set(value), {"result", "owner", "guest", "total_s", "downtime_ms", "rounds", "wire_bytes", "raw_bytes", "error"})
        for figures in (value["wire_bytes"], value["raw_bytes"]):
            self.assertEqual(set(figures), {"disk", "memory"})
            self.assertTrue(all(isinstance(figure, int) for figure in figures.values()), value)
        self.assertTrue(all(isinstance(value[name], (int, float)) for name in ("total_s", "downtime_ms", "rounds")), value)

    def test_a_migration_without_a_daemon_still_ends_with_its_object(self):
        # A script parses the line before it knows that nobody answered.
        for words in (["migrate", "vda", "--peer", "b"], ["migrate", "watch", "vda"]):
            done = run(VMFERRY, "--control", "unix:/nonexistent", "--json", *words, check=False)
            value = json.loads(done.stdout)
            self.assertEqual((done.returncode, value["result"], value["owner"], value["guest"]),
                             (1, "failed", "unknown", "unknown"), done)
            self.assert_whole_result(value)
            for text in ("no vmferryd answers", "vmferry status", "vmferry resolve vda"):
                self.assertIn(text, value["error"])
            self.assertIn(value["error"], done.stderr)

    def test_the_contract_of_status(self):
        # Scripts outside rely on these members.
        a = self.daemon("a", self.volume("vda", self.image("a.img", 4 * MIB)))
        volume = a.vmferry("status")["volumes"][0]
        self.assertLessEqual({"name", "role", "owner", "term", "attempt", "handover_state", "may_run", "reason"}, set(volume))
        self.assertEqual((volume["role"], volume["owner"], volume["may_run"]), ("primary", "self", True))
        shown = a.vmferry("volume", "show", "vda")
        self.assertLessEqual({"name", "size", "role", "term", "path", "exports"}, set(shown))


if __name__ == "__main__":
    os.environ.pop("VMFERRY_CONTROL", None)
    unittest.main(verbosity=2)
