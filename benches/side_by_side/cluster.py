"""Throw-away clusters, and a backlog of real WAL."""

import os
import shutil
import signal
import subprocess
import time

from machine import Failure, Watch, archiver_of, end, folder, memory_kb, run, start, wait_for, write

SEGMENT_BYTES = 16 << 20
# Less than a server needs to replay a segment; whoever fetches ahead does it meanwhile.
REPLAY_SECONDS = 0.05

COMMON = {
    "listen_addresses": "",
    "wal_level": "replica",
    "shared_buffers": "256MB",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "64GB",
}

# pgbench's own rows end in blanks, which would flatter any compression: two in three get text as people store it.
FILLER = """
UPDATE pgbench_accounts SET filler = left(md5(aid::text) || w[1 + aid % 12] || w[1 + aid % 7] || md5((aid * 7)::text), 84)
FROM (SELECT '{customer,pending,shipped,invoice,https://example.test/a/,null,2026-01-,order line,Zurich,Straße,true,EUR}'
             ::text[]) AS words(w)
WHERE aid % 3 <> 0"""
HISTORY = """\\set a random(1, 1000000)
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
  VALUES (1, 1, :a, :a % 97, now(), left(md5((:a)::text), 22));
"""


class Cluster:
    """A cluster in a directory of its own, whose only socket lies there, too."""

    def __init__(self, directory, bindir):
        self.directory, self.bindir = folder(directory), bindir
        self.data, self.log = directory / "data", directory / "log"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {
            "PGHOST": str(directory), "PGUSER": "postgres", "PGDATABASE": "postgres"}
        self.server = None
        run([bindir / "initdb", "-D", self.data, "-k", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale",
             "--no-sync"])
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(f"unix_socket_directories = '{directory}'\ninclude 'bench.conf'\n")

    @property
    def status(self):
        return self.data / "pg_wal/archive_status"

    def start(self, settings, account=None):
        lines = (f"{name} = '{value}'\n" for name, value in (COMMON | settings).items())
        write(self.data / "bench.conf", "".join(lines))
        with open(self.log, "ab") as log:
            arguments = [self.bindir / "postgres", "-D", self.data]
            options = {"cwd": "/", "stdout": log, "stderr": log, "env": self.environment}
            if account:
                with account.inside():
                    self.server = start(arguments, signal.SIGQUIT, **options)
            else:
                self.server = start(arguments, signal.SIGQUIT, **options)
        wait_for("the server", lambda: self.server.poll() is not None or self.answers(), pause=0.02)
        if self.server.poll() is not None:
            raise Failure(f"the server does not start:\n{self.tail()}")

    def answers(self):
        return subprocess.run([self.bindir / "pg_isready", "-q"], env=self.environment, check=False).returncode == 0

    def stop(self, number=signal.SIGQUIT):
        """Immediately, unless told otherwise: a fast stop would complete a segment, which the archiver then waits for."""
        if self.server:
            end(self.server, number)
            self.server = None

    def psql(self, *queries, seconds=120):
        commands = [argument for query in queries for argument in ("-c", query)]
        arguments = [self.bindir / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *commands]
        return run(arguments, seconds, env=self.environment).strip()

    def pgbench(self, *arguments, seconds=600):
        return run([self.bindir / "pgbench", *arguments], seconds, env=self.environment, cwd=self.directory)

    def archiver(self):
        return wait_for("the archiver process", lambda: archiver_of(self.server.pid))

    def tail(self):
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-15:])

    def forget_archiving(self):
        """As if nothing had ever been archived."""
        for entry in os.scandir(self.status):
            os.unlink(entry.path)
        for left in (self.data / "archiver.established", self.data / "pg_stat_tmp/archiver.state"):
            left.unlink(missing_ok=True)

    def drain(self, names, account, seconds=600):
        """Has the archiver find those segments ready, and waits until all are archived: seconds, CPU seconds, memory."""
        archiver, memory = self.archiver(), {"VmHWM": 0, "RssAnon": 0}

        def look():
            for name, kb in (memory_kb(archiver) or {}).items():
                memory[name] = max(memory[name], kb)

        with Watch(self.status) as watch:
            for name in names:
                write(self.status / f"{name}.ready", "")
            os.sync()
            cpu, began = account.cpu_seconds(), time.monotonic()
            os.kill(archiver, signal.SIGHUP)  # wakes it
            ended = max(watch.wait(f"{name}.done", seconds, look) for name in reversed(names))
            cpu = account.cpu_seconds() - cpu
            look()
        return {"seconds": ended - began, "cpu_seconds": cpu,
                "peak_rss_kb": memory["VmHWM"], "peak_rss_anon_kb": memory["RssAnon"]}


class Backlog:
    """A cluster whose pg_wal holds so many segments of pgbench's WAL, which every contestant archives anew.

    The WAL is that of a busy server: full-page images after checkpoints, updates and inserts of half-compressible rows.
    """

    SCALE = 20

    def __init__(self, directory, bindir, segments):
        self.cluster = cluster = Cluster(directory, bindir)
        settings = {"wal_keep_size": "64GB", "synchronous_commit": "off"}
        cluster.start(settings | {"fsync": "off"})
        cluster.pgbench("-i", "-q", "-s", self.SCALE)
        cluster.psql(FILLER, "VACUUM ANALYZE", seconds=300)
        write(cluster.directory / "history.sql", HISTORY)
        first = cluster.psql("SELECT pg_walfile_name(pg_switch_wal())")
        deadline = time.monotonic() + 600
        while True:
            full = sorted(name for name in os.listdir(cluster.data / "pg_wal") if len(name) == 24 and name > first)
            current = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())")
            self.names = [name for name in full if name < current][:segments]
            if len(self.names) == segments:
                break
            if time.monotonic() > deadline:
                raise Failure(f"pgbench wrote {len(self.names)} segments in 600 s")
            cluster.psql("CHECKPOINT")
            cluster.pgbench("-n", "-c", "8", "-j", "2", "-T", "5", "-s", self.SCALE,
                            "-b", "tpcb-like@7", "-f", "history.sql@3")
        cluster.psql("CHECKPOINT")
        cluster.stop(signal.SIGINT)
        self.settings = {"wal_keep_size": "64GB", "wal_recycle": "off", "archive_mode": "on"}
        # The same files for whoever reads them without PostgreSQL.
        self.wal = folder(directory / "wal")
        for name in self.names:
            os.link(self.path(name), self.wal / name)

    def path(self, name):
        return self.cluster.data / "pg_wal" / name

    @property
    def gib(self):
        return len(self.names) * SEGMENT_BYTES / (1 << 30)

    def restore(self, command, tries, account, out):
        """Fetches every segment in order, as recovery asks for it, with pauses as if it replayed them, and compares it.
        Answers the seconds of the fetching, and how often a file had to be asked for again."""
        folder(out)
        fetched, seconds, again = self.cluster.data / "pg_wal/RECOVERYXLOG", 0, 0
        # By these two, who fetches ahead tells a recovery; we stand for the server.
        signs = [write(self.cluster.data / "recovery.signal", ""),
                 write(self.cluster.data / "postmaster.pid", f"{os.getpid()}\n")]
        try:
            with account.inside():
                for name in self.names:
                    began = time.monotonic()
                    line = command.replace("%f", name).replace("%p", "pg_wal/RECOVERYXLOG")
                    for left in reversed(range(tries)):
                        try:
                            run(["sh", "-c", line], cwd=self.cluster.data)
                            break
                        except Failure:
                            if not left:
                                raise
                            again += 1
                    seconds += time.monotonic() - began
                    os.rename(fetched, out / name)
                    time.sleep(REPLAY_SECONDS)
            for name in self.names:
                run(["cmp", self.path(name), out / name])
        finally:
            for sign in signs:
                sign.unlink()
            shutil.rmtree(out)
        return {"restore_seconds": seconds, "restore_retries": again}
