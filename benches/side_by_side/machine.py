"""What the operating system tells and does: processor time, memory, the moment a status file appears."""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# Servers refuse to run as root, and everything beside them runs as they do.
AS_POSTGRES = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


class Failure(Exception):
    """What a person has to be told; the run goes on without the contestant that failed."""


def wait_for(what, condition, seconds=60, pause=0.01):
    """Asks until the answer is true, and answers it."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise Failure(f"waited in vain for {what}, {seconds} s")
        time.sleep(pause)
    return answer


def run(arguments, seconds=120, **options):
    """Runs a program to its end as the servers' user, and answers what it said."""
    options = {"check": True, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL} | AS_POSTGRES | options
    try:
        return subprocess.run([str(argument) for argument in arguments], timeout=seconds, **options).stdout
    except subprocess.CalledProcessError as error:
        raise Failure(f"{error}\n{error.stdout or ''}{error.stderr or ''}") from error
    except subprocess.TimeoutExpired as error:
        raise Failure(str(error)) from error


def folder(path):
    """An empty folder of the servers' user."""
    path.mkdir(mode=0o700)
    own(path)
    return path


def own(path):
    """Gives a file to the servers' user."""
    if AS_POSTGRES:
        shutil.chown(path, AS_POSTGRES["user"], AS_POSTGRES["group"])


def write(path, text, mode=0o600):
    """A file of the servers' user."""
    path.write_text(text)
    path.chmod(mode)
    own(path)
    return path


def start(arguments, ends_with_us, **options):
    """Starts a program that gets the signal `ends_with_us` where this one ends without ending it."""
    options = {"stdin": subprocess.DEVNULL} | AS_POSTGRES | options
    arguments = [str(argument) for argument in arguments]
    return subprocess.Popen(arguments, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, ends_with_us), **options)


def end(process, number, seconds=60):
    """Ends what `start` started."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stat_of(pid):
    """The fields of /proc/PID/stat behind the name, so that 0 is the state; nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def children(pid):
    """The processes whose parent that is."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := stat_of(entry.name)) and int(stat[1]) == pid:
            found.append(int(entry.name))
    return found


def memory_kb(pid):
    """VmHWM, the most that a process ever had in memory, and RssAnon, what it has now that is not a file's or shared."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) for name in ("VmHWM", "RssAnon") if name in fields} or None


def archiver_of(postmaster):
    """The archiver process of a server, once there is one."""
    for pid in children(postmaster):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"postgres: archiver"):
                return pid
    return None


class Cgroup:
    """Processor time of everything started `inside`, by a control group of its own: version 2, else cpuacct of version 1."""

    def __init__(self, mount, is_v2):
        self.is_v2 = is_v2
        self.folder = mount / f"archiver-bench-{os.getpid()}"
        self.folder.mkdir()
        own_line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines()
                        if (line.startswith("0::") if is_v2 else "cpuacct" in line.split(":")[1].split(",")))
        before = mount / own_line.split(":", 2)[2].lstrip("/")
        self.before = before if before.is_dir() else mount

    @contextlib.contextmanager
    def inside(self):
        """What is started here is counted."""
        (self.folder / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (self.before / "cgroup.procs").write_text("0")

    def cpu_seconds(self):
        if not self.is_v2:
            return int((self.folder / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def pids(self):
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def close(self):
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class Descendants:
    """The same without control groups: from /proc, in the kernel's ticks of 10 ms. All who descend from us stay ours, since
    we take the orphans, and count even when they have ended, since we do not reap those."""

    def __init__(self):
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    inside = staticmethod(contextlib.nullcontext)

    def stats(self):
        stats = {int(entry.name): stat_of(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()}
        found = {os.getpid()}
        while more := {pid for pid, stat in stats.items() if stat and int(stat[1]) in found} - found:
            found |= more
        return {pid: stats[pid] for pid in found - {os.getpid()}}

    def cpu_seconds(self):
        return sum(int(field) for stat in self.stats().values() for field in stat[11:15]) / os.sysconf("SC_CLK_TCK")

    def pids(self):
        return [pid for pid, stat in self.stats().items() if stat[0] != "Z"]

    def close(self):
        pass


def account():
    """The best account of processor time that there is here."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    groups = [(fields[1], True) for fields in mounts if fields[2] == "cgroup2"]
    groups += [(fields[1], False) for fields in mounts if fields[2] == "cgroup" and "cpuacct" in fields[3].split(",")]
    for mount, is_v2 in groups:
        try:
            found = Cgroup(Path(mount), is_v2)
        except OSError:
            continue
        try:
            with found.inside():
                run(["true"])
            found.cpu_seconds()
            return found
        except (OSError, KeyError):
            found.close()
    return Descendants()


class Watch:
    """Names that appear in a directory, each with the time at which it did."""

    IN_MOVED_TO, IN_CREATE = 0x80, 0x100

    def __init__(self, directory):
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(directory), self.IN_MOVED_TO | self.IN_CREATE) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {directory}")
        self.seen = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)

    def wait(self, name, seconds, meanwhile=lambda: None):
        """The time at which that name appeared; `meanwhile` is called now and then."""
        deadline = time.monotonic() + seconds
        while name not in self.seen:
            if time.monotonic() > deadline:
                raise Failure(f"waited in vain for {name}, {seconds} s")
            select.select([self.fd], [], [], 0.02)
            self.read()
            meanwhile()
        return self.seen[name]

    def read(self):
        now = time.monotonic()
        with contextlib.suppress(BlockingIOError):
            events, at = os.read(self.fd, 1 << 16), 0
            while at < len(events):
                length = struct.unpack_from("iIII", events, at)[3]
                self.seen.setdefault(os.fsdecode(events[at + 16:at + 16 + length].rstrip(b"\0")), now)
                at += 16 + length


def end_by_exception(number, _):
    """Signals end this program as an error does: by its `finally` clauses."""
    raise SystemExit(128 + number)


for ending in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(ending, end_by_exception)
