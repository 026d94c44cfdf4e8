"""Archives one backlog of WAL by every contestant in turn, over several rounds, and writes down what it cost.

Usage: python3 benches/side_by_side BINDIR PROGRAMS RESULTS, inside with-s3.sh ceph where S3 is to be measured. BINDIR is
PostgreSQL's, with `archiver` installed into it; PROGRAMS holds this package's; RESULTS is where results are written.
Environment: ROUNDS, SEGMENTS, SWITCHES, FOREGROUND_SECONDS, PAIRS, ONLY (sections and contestants), ARCHIVER_BENCH_BARMAN.
"""

import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import contestants
import report
from cluster import SEGMENT_BYTES, Backlog, Cluster
from machine import Failure, Watch, account, end, folder, own, run, start, wait_for

SECTIONS = ("drain", "fsyncs", "latency", "foreground")
SYNCS = "fsync,fdatasync,syncfs,sync,msync"
PAYLOADS = {"full": 0.95, "a third": 0.33, "nearly empty": 0.0}
FILL = """
CREATE TABLE rows (n bigint, filler text);
CREATE FUNCTION fill(part float8) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
  LOOP
    INSERT INTO rows SELECT n, left(md5(n::text) || 'customer order line ' || md5(random()::text), 84)
      FROM generate_series(1, CASE part WHEN 0 THEN 1 ELSE 300 END) n;
    EXIT WHEN (pg_current_wal_insert_lsn() - '0/0') % 16777216 >= part * 16777216;
  END LOOP; END $$"""


def figure(name, default):
    return int(os.environ.get(name) or default)


class Bench:
    """One call of `make bench`."""

    def __init__(self, directory, bindir, programs):
        self.directory, self.began = directory, time.monotonic()
        self.rounds, self.segments = figure("ROUNDS", 7), figure("SEGMENTS", 64)
        self.switches = figure("SWITCHES", 20)
        self.foreground_seconds, self.pairs = figure("FOREGROUND_SECONDS", 10), figure("PAIRS", 2)
        words = os.environ.get("ONLY", "").split()
        self.sections = [word for word in words if word in SECTIONS] or SECTIONS
        self.patterns = [word for word in words if word not in SECTIONS] or ["*"]
        self.failures, self.runs = [], 0
        self.programs = folder(directory / "programs")
        for name in ("limit_loop", "latency_proxy"):
            shutil.copy(programs / name, self.programs)
            own(self.programs / name)
        self.s3 = contestants.S3(directory, self.programs) if "ARCHIVER_TEST_CEPH" in os.environ else None
        self.tools = contestants.Tools(bindir, self.programs, self.barman(), self.s3)
        self.account = account()
        self.clusters = []
        self.field = list(filter(self.takes_part, contestants.ALL))
        self.contestants = [each for each in self.field if isinstance(each, contestants.Contestant)]
        self.results = {"machine": self.machine(), "labels": {each.name: each.label for each in contestants.ALL}}

    def takes_part(self, each):
        return (any(fnmatch(each.name, pattern) for pattern in self.patterns)
                and (self.s3 or not getattr(each, "is_remote", False))
                and (self.tools.barman or not isinstance(each, contestants.Barman)))

    def say(self, text):
        print(f"[{time.monotonic() - self.began:6.0f} s] {text}", flush=True)

    def close(self):
        for cluster in self.clusters:
            cluster.stop()
        if self.s3:
            self.s3.close()
        self.account.close()

    def barman(self):
        """A copy of Barman's programs that the servers' user can run: it was installed for another user's Python."""
        kept = Path(os.environ.get("ARCHIVER_BENCH_BARMAN") or "/nowhere")
        version = run(["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        packages = kept.parent / f"lib/python{version}/site-packages"
        if not packages.is_dir():
            self.say("Barman is left out: it is not here, or was installed for another Python than Debian's")
            return None
        copy = folder(self.directory / "barman")
        copy.chmod(0o755)
        shutil.copytree(packages, copy / "packages")
        (copy / "bin").mkdir(mode=0o755)
        for name in ("barman-cloud-wal-archive", "barman-cloud-wal-restore"):
            shutil.copy(kept / name, copy / "bin")
        return copy

    def machine(self):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        system = re.search(r'PRETTY_NAME="(.*)"', Path("/etc/os-release").read_text())
        return {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
            "kernel": platform.release(),
            "system": system[1] if system else "",
            "file_system": run(["findmnt", "-n", "-o", "FSTYPE", "-T", self.directory]).strip(),
            "postgresql": run([self.tools.bindir / "postgres", "--version"]).strip(),
            "pgbackrest": run(["pgbackrest", "version"]).strip(),
            "cpu_account": type(self.account).__name__.lower(),
            "rounds": self.rounds,
            "segments": self.segments,
            "load_before": round(os.getloadavg()[0], 2),
        }

    @contextmanager
    def judging(self, what):
        """A contestant that fails is told and left out; the others go on."""
        try:
            yield
        except (Failure, OSError, ValueError) as failure:
            self.failures.append(what)
            self.say(f"{what}: failed: {failure}")

    @contextmanager
    def archiving(self, contestant, cluster, settings=None):
        """A server that archives by that contestant to a new place, which is removed afterwards."""
        self.runs += 1
        directory = folder(self.directory / f"run{self.runs}")
        cluster.forget_archiving()
        try:
            cluster.start((settings or {}) | contestant.prepare(self.tools, cluster, directory), self.account)
            yield
        except Failure as failure:
            raise Failure(f"{failure}; the server's log ends with:\n{cluster.tail()}") from failure
        finally:
            cluster.stop()
            self.quiet()
            contestant.clean()
            shutil.rmtree(directory)

    def quiet(self):
        """Waits until nothing works in the background any more."""
        known = {os.getpid()} | ({self.s3.proxy.pid} if self.s3 else set())
        wait_for("the end of what works in the background", lambda: not set(self.account.pids()) - known, 90)

    def run(self):
        """Measures section by section, and tells the end of each."""
        if {"drain", "fsyncs"} & set(self.sections):
            self.say(f"making a backlog of {self.segments} segments")
            backlog = Backlog(self.directory / "backlog", self.tools.bindir, self.segments)
            self.clusters.append(backlog.cluster)
            sample = run(["sh", "-c", f"cat {backlog.wal}/* | zstd -1 -q | wc -c"])
            self.results["machine"]["zstd_ratio"] = round(self.segments * SEGMENT_BYTES / int(sample), 2)
            if "drain" in self.sections:
                self.drain(backlog)
                yield "drain"
            if "fsyncs" in self.sections:
                self.fsyncs(backlog)
                yield "fsyncs"
            backlog.cluster.stop()
            shutil.rmtree(backlog.wal)
            shutil.rmtree(backlog.cluster.directory)
        if "latency" in self.sections:
            self.latency()
            yield "latency"
        if "foreground" in self.sections:
            self.foreground()
            yield "foreground"

    def drain(self, backlog):
        self.results["drain"] = found = {}
        for number in range(1, self.rounds + 1):
            for each in self.field:
                if isinstance(each, contestants.Limit):
                    measure = self.limit
                elif number <= each.most_rounds:
                    measure = self.one_drain
                else:
                    continue
                with self.judging(f"{each.name}, round {number}"):
                    result = measure(backlog, each)
                    found.setdefault(each.name, {})[number] = result
                    self.say(f"round {number}: {each.name}: " + ", ".join(
                        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in result.items() if not isinstance(value, list)))

    def one_drain(self, backlog, contestant):
        with self.archiving(contestant, backlog.cluster, backlog.settings):
            result = backlog.cluster.drain(backlog.names, self.account)
            backlog.cluster.stop()
            self.quiet()
            if command := contestant.restore_command():
                result["stored_bytes"] = contestant.stored_bytes()
                result |= backlog.restore(command, contestant.fetches, self.account, self.directory / "restored")
        return result

    def limit(self, backlog, limit, workers=2):
        scratch = folder(self.directory / "scratch")
        try:
            os.sync()
            before = getrusage(RUSAGE_CHILDREN)
            result = json.loads(run([self.programs / "limit_loop", limit.mode, backlog.wal, scratch, workers]))
            after = getrusage(RUSAGE_CHILDREN)
            result["cpu_seconds"] = sum(after[:2]) - sum(before[:2])
        finally:
            shutil.rmtree(scratch)
        if limit.mode == "zstd" and workers == 2:
            # One file at a time: the latency that nobody beats.
            result["alone_seconds_each"] = self.limit(backlog, limit, 1)["seconds_each"]
        return result

    def fsyncs(self, backlog):
        """Counted in a run that is not timed; a call for several files counts once."""
        self.results["fsyncs"] = counts = {}
        names = backlog.names[:16]
        for contestant in self.contestants:
            with self.judging(f"{contestant.name}, fsyncs"), \
                    self.archiving(contestant, backlog.cluster, backlog.settings):
                counted = self.directory / f"strace{self.runs}"
                tracer = start(["strace", "-f", "-c", "-q", "-e", f"trace={SYNCS}", "-o", counted, "-p",
                                backlog.cluster.archiver()], signal.SIGTERM, user=None, group=None, extra_groups=None)
                try:
                    pid = backlog.cluster.archiver()
                    wait_for("strace", lambda: "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text())
                    backlog.cluster.drain(names, self.account)
                    # Counted by the server once the last status file is durable.
                    wait_for("the last fsync", lambda: int(backlog.cluster.psql(
                        "SELECT archived_count FROM pg_stat_archiver")) >= len(names))
                finally:
                    end(tracer, signal.SIGINT)
                lines = [line.split() for line in counted.read_text().splitlines()]
                calls = sum(int(line[3]) for line in lines if line and line[-1] in SYNCS.split(","))
                counts[contestant.name] = calls / len(names)
                self.say(f"{contestant.name}: {counts[contestant.name]:.2f} fsyncs per file")

    def latency(self):
        """From `.ready` to `.done` on a server that does nothing else."""
        self.results["latency"] = latencies = {}
        cluster = Cluster(self.directory / "idle", self.tools.bindir)
        self.clusters.append(cluster)
        cluster.start({})
        cluster.psql(FILL)
        cluster.stop(signal.SIGINT)
        for contestant in self.contestants:
            if not contestant.has_latency:
                continue
            with self.judging(f"{contestant.name}, latency"), \
                    self.archiving(contestant, cluster, {"max_wal_size": "512MB"}), Watch(cluster.status) as watch:
                found = {payload: [] for payload in PAYLOADS}
                for number in range(self.switches + 1):
                    for payload, part in PAYLOADS.items():
                        name = cluster.psql("TRUNCATE rows", f"SELECT fill({part})",
                                            "SELECT pg_walfile_name(pg_switch_wal())").split()[-1]
                        # After three failures PostgreSQL waits a minute, which is to be seen as such.
                        ready, done = watch.wait(f"{name}.ready", 60), watch.wait(f"{name}.done", 150)
                        if number:  # the first is spent on connecting
                            found[payload].append(done - ready)
                latencies[contestant.name] = found
                middle = {payload: round(sorted(each)[len(each) // 2] * 1000, 1) for payload, each in found.items()}
                self.say(f"{contestant.name}: p50 in ms {middle}")
        cluster.stop()
        shutil.rmtree(cluster.directory)

    def foreground(self):
        """What is left for clients while WAL is archived, beside an archive_command that does nothing."""
        wanted = ("basic_archive", "pgbackrest-async", "archiver", "s3-archiver")
        measured = [contestant for contestant in self.contestants if contestant.name in wanted]
        if not measured:
            return
        self.results["foreground"] = rates = {}
        cluster = Cluster(self.directory / "busy", self.tools.bindir)
        self.clusters.append(cluster)
        settings = {"shared_buffers": "1GB", "max_wal_size": "2GB", "autovacuum": "on"}
        cluster.start(settings | {"fsync": "off"})
        cluster.pgbench("-i", "-q", "-s", "50")
        cluster.psql("VACUUM ANALYZE", "CHECKPOINT")
        cluster.stop(signal.SIGINT)
        os.sync()
        base = next(each for each in contestants.ALL if each.name == "true")
        for number in range(1, min(self.rounds, self.pairs) + 1):
            for contestant in measured:
                with self.judging(f"{contestant.name}, foreground"):
                    pair = {}
                    # The other way round in every second pair: what comes second finds larger tables.
                    for side in (base, contestant) if number % 2 else (contestant, base):
                        with self.archiving(side, cluster, settings):
                            pair["with" if side is contestant else "without"] = self.tps(cluster)
                    rates.setdefault(contestant.name, {})[number] = pair
                    self.say(f"pair {number}: {contestant.name}: {pair['with']:.0f} tps, without {pair['without']:.0f}")
        cluster.stop()
        shutil.rmtree(cluster.directory)


    def tps(self, cluster):
        cluster.psql("CHECKPOINT")
        os.sync()
        said = cluster.pgbench("-n", "-c", "2", "-j", "2", "-T", self.foreground_seconds, "-s", "50",
                               seconds=self.foreground_seconds + 60)
        cluster.psql("CHECKPOINT")  # little is left to recover from
        return float(re.search(r"tps = ([\d.]+)", said)[1])


def main():
    bindir, programs, results = map(Path, sys.argv[1:])
    results.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="archiver-bench."))
    directory.chmod(0o755)
    bench = None
    try:
        bench = Bench(directory, bindir.resolve(), programs.resolve())
        for section in bench.run():
            bench.say(f"{section}: measured")
            report.write(bench.results, results)
        print((results / "results.md").read_text())
    finally:
        if bench:
            bench.close()
        shutil.rmtree(directory, ignore_errors=True)
    verdict = f"failed: {', '.join(bench.failures)}" if bench.failures else "ok"
    print(f"bench: {verdict}, {time.monotonic() - bench.began:.0f} s")
    sys.exit(1 if bench.failures else 0)


main()
