"""Who is measured: how each is set up, what PostgreSQL calls, and how what it stored is fetched back."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from machine import end, folder, run, start, write


@dataclass(frozen=True)
class Tools:
    """What contestants are made of."""

    bindir: Path          # of PostgreSQL, with `archiver`
    programs: Path        # of this package
    barman: Path | None   # Barman's programs and packages, where the servers' user reaches them
    s3: "S3 | None"


class S3:
    """The test server that with-s3.sh runs beside us, if it does."""

    def __init__(self, directory, programs):
        environment = os.environ
        self.endpoint = environment["ARCHIVER_TEST_CEPH"]
        self.key, self.secret = environment["ARCHIVER_TEST_CEPH_KEY"], environment["ARCHIVER_TEST_CEPH_SECRET"]
        self.conf = environment["ARCHIVER_TEST_CEPH_CONF"]
        self.ca = write(directory / "ca.crt", Path(environment["ARCHIVER_TEST_S3_CA"]).read_text(encoding="ascii"), 0o644)
        keys = f"[default]\naws_access_key_id = {self.key}\naws_secret_access_key = {self.secret}\n"
        self.credentials = write(directory / "credentials", keys)
        self.proxy = start([programs / "latency_proxy", self.endpoint.removeprefix("https://"), "40"], signal.SIGKILL,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.distant = f"https://{self.proxy.stdout.readline().strip()}"

    def close(self):
        end(self.proxy, signal.SIGTERM)

    def make(self, bucket):
        run(["curl", "-q", "-sS", "--fail", "--noproxy", "*", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3",
             "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD", "--cacert", self.ca, "--user", f"{self.key}:{self.secret}",
             f"{self.endpoint}/{bucket}"])

    def administer(self, *arguments):
        return run(["radosgw-admin", "-c", self.conf, *arguments], user=None, group=None, extra_groups=None)

    def stored_bytes(self, bucket):
        usage = json.loads(self.administer("bucket", "stats", f"--bucket={bucket}"))["usage"]
        return sum(pool["size"] for pool in usage.values())

    def remove(self, bucket):
        self.administer("bucket", "rm", f"--bucket={bucket}", "--purge-objects", "--bypass-gc")


class Contestant:
    """One way to archive. A run has a directory of its own, and a bucket where `is_remote`."""

    is_remote = False
    has_latency = True    # is measured on an idle server, too
    fetches = 1           # how often one file is asked for before that is a failure

    def __init__(self, name, label, most_rounds=1000):
        self.name, self.label, self.most_rounds = name, label, most_rounds

    def prepare(self, tools, cluster, directory):
        """Before the server starts: its settings."""
        self.tools, self.cluster, self.directory = tools, cluster, directory
        self.archive = directory / "archive"
        folder(self.archive)
        self.bucket = f"bench-{directory.name}"
        if self.is_remote:
            tools.s3.make(self.bucket)
        return {"archive_mode": "on"} | self.settings()

    def settings(self):
        raise NotImplementedError

    def restore_command(self):
        """None where nothing is stored."""
        return f"cp {self.archive}/%f %p"

    def stored_bytes(self):
        if self.is_remote:
            return self.tools.s3.stored_bytes(self.bucket)
        return sum(path.stat().st_size for path in self.archive.rglob("*") if path.is_file())

    def clean(self):
        if self.is_remote:
            self.tools.s3.remove(self.bucket)


class Command(Contestant):
    """An archive_command of a line."""

    def __init__(self, name, label, command, restore, **options):
        super().__init__(name, label, **options)
        self.command, self.restore = command, restore

    def settings(self):
        return {"archive_command": self.command.replace("DIR", str(self.archive))}

    def restore_command(self):
        return self.restore and self.restore.replace("DIR", str(self.archive))


class BasicArchive(Contestant):
    """PostgreSQL's own archive module."""

    def settings(self):
        return {"archive_library": "basic_archive", "basic_archive.archive_directory": self.archive}


class Archiver(Contestant):
    """Us."""

    def __init__(self, name, label, compression=None, is_remote=False, is_distant=False, **options):
        super().__init__(name, label, **options)
        self.compression, self.is_remote, self.is_distant = compression, is_remote, is_distant
        self.has_latency = not is_distant and compression in (None, "none")

    def settings(self):
        storage = f"file://{self.archive}"
        if self.is_remote:
            s3 = self.tools.s3
            endpoint = s3.distant if self.is_distant else s3.endpoint
            storage = f"s3://{self.bucket}/wal?endpoint={endpoint}&ca_file={s3.ca}&credentials_file={s3.credentials}"
        chosen = {"archiver.compression": self.compression} if self.compression else {}
        return {"archive_library": "archiver", "archiver.storage": storage} | chosen

    def restore_command(self):
        return f"{self.tools.bindir}/archiver restore %f %p"


class PgBackRest(Contestant):
    """pgBackRest, called for each file; `is_async`: which does several at once, in the background."""

    fetches = 3           # "unable to move missing source": what fetches ahead may take a file from under the caller

    def __init__(self, name, label, is_async=True, compression="zst", processes=2, is_remote=False, **options):
        super().__init__(name, label, **options)
        self.is_async, self.compression, self.processes, self.is_remote = is_async, compression, processes, is_remote
        self.has_latency = compression == "zst" and (not is_remote or processes == 4)

    def settings(self):
        where = [f"repo1-path={self.archive}"]
        if self.is_remote:
            s3 = self.tools.s3
            where = ["repo1-type=s3", "repo1-path=/wal", f"repo1-s3-bucket={self.bucket}", "repo1-s3-endpoint=localhost",
                     f"repo1-storage-port={s3.endpoint.rpartition(':')[2]}", f"repo1-storage-ca-file={s3.ca}",
                     "repo1-s3-region=us-east-1", "repo1-s3-uri-style=path",
                     f"repo1-s3-key={s3.key}", f"repo1-s3-key-secret={s3.secret}"]
        for name in ("spool", "lock", "log"):
            where.append(f"{name}-path={folder(self.directory / name)}")
        level = ["compress-level=1"] if self.compression == "zst" else []
        lines = ["[global]", *where, f"archive-async={'y' if self.is_async else 'n'}", f"process-max={self.processes}",
                 f"compress-type={self.compression}", *level, "log-level-console=warn", "log-level-file=off",
                 "[main]", f"pg1-path={self.cluster.data}", f"pg1-socket-path={self.cluster.directory}", "pg1-user=postgres"]
        conf = write(self.directory / "pgbackrest.conf", "\n".join(lines) + "\n")
        self.program = f"pgbackrest --config={conf} --stanza=main"
        run(["sh", "-c", f"{self.program} --no-online stanza-create"], cwd=self.directory)
        return {"archive_command": f"{self.program} archive-push %p"}

    def restore_command(self):
        return f"{self.program} archive-get %f %p"


class Barman(Contestant):
    """Barman's cloud programs."""

    is_remote = True

    def settings(self):
        s3, barman = self.tools.s3, self.tools.barman
        lines = ["#!/bin/sh", f"export AWS_SHARED_CREDENTIALS_FILE={s3.credentials} AWS_CA_BUNDLE={s3.ca}",
                 "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required",
                 f"export PYTHONPATH={barman}/packages PYTHONDONTWRITEBYTECODE=1",
                 f'exec /usr/bin/python3 {barman}/bin/"$@"']
        self.program = write(self.directory / "barman", "\n".join(lines) + "\n", 0o700)
        self.place = f"s3://{self.bucket}/wal main"
        return {"archive_command": f"{self.program} barman-cloud-wal-archive --endpoint-url {s3.endpoint} "
                                   f"--zstd --compression-level low {self.place} %p"}

    def restore_command(self):
        return f"{self.program} barman-cloud-wal-restore --endpoint-url {self.tools.s3.endpoint} {self.place} %f %p"


@dataclass(frozen=True)
class Limit:
    """What the machine itself can do with the same files, without PostgreSQL: a mode of benches/limit_loop.rs."""

    name: str
    label: str

    @property
    def mode(self):
        return self.name.removeprefix("limit-")


# Rounds of those that take long and are in few ratios.
SLOW = 3

# In the order of a round. Who is compared with whom stands side by side: the machine may be busier a minute later.
ALL = [
    Command("true", "archive_command `true`: PostgreSQL's own share", "/bin/true", None),
    Limit("limit-read", "limit: read only"),
    Command("cp", "`cp`, no fsync", "cp %p DIR/%f", "cp DIR/%f %p"),
    BasicArchive("basic_archive", "basic_archive"),
    Archiver("archiver-none", "**archiver**, none", "none"),
    Limit("limit-write", "limit: stored uncompressed"),
    PgBackRest("pgbackrest-async-lz4", "pgBackRest async, lz4, 2 processes", compression="lz4"),
    Archiver("archiver-lz4", "**archiver**, lz4", "lz4"),
    Limit("limit-lz4", "limit: lz4, stored"),
    PgBackRest("pgbackrest-async", "pgBackRest async, zst 1, 2 processes"),
    Archiver("archiver", "**archiver**, default settings: zstd 1"),
    Limit("limit-zstd", "limit: zstd 1, stored"),
    Limit("limit-zstd-memory", "limit: zstd 1, stored nowhere"),
    PgBackRest("pgbackrest-sync", "pgBackRest, zst 1", is_async=False, most_rounds=SLOW),
    Command("zstd-command", "`zstd -1` and `sync` in archive_command", "zstd -1 -q %p -o DIR/%f && sync DIR/%f",
            "zstd -dqc DIR/%f >%p", most_rounds=SLOW),
    Archiver("archiver-gzip", "**archiver**, gzip 1", "gzip", most_rounds=SLOW),
    PgBackRest("s3-pgbackrest-2", "S3: pgBackRest async, zst 1, 2 processes", is_remote=True),
    PgBackRest("s3-pgbackrest-4", "S3: pgBackRest async, zst 1, 4 processes", is_remote=True, processes=4),
    Archiver("s3-archiver", "S3: **archiver**, default settings: zstd 1", is_remote=True),
    Archiver("s3-archiver-40ms", "S3, 40 ms away: **archiver**, zstd 1", is_remote=True, is_distant=True),
    Barman("s3-barman", "S3: barman-cloud-wal-archive, zstd 1", most_rounds=SLOW),
]
