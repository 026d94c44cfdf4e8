"""From raw results to a table and a plot. Also by itself: python3 benches/side_by_side/report.py RESULTS makes both anew
from RESULTS/results.json."""

import json
import sys
from html import escape
from pathlib import Path
from statistics import median

SEGMENT_BYTES = 16 << 20

# What is to be read from it: name, section and key, then who is divided by whom, round by round.
RATIOS = [
    ("time: zstd 1 ÷ limit loop, zstd 1", "seconds", "archiver", "limit-zstd"),
    ("time: lz4 ÷ limit loop, lz4", "seconds", "archiver-lz4", "limit-lz4"),
    ("time: none ÷ basic_archive", "seconds", "archiver-none", "basic_archive"),
    ("time: none ÷ limit loop, uncompressed", "seconds", "archiver-none", "limit-write"),
    ("time: zstd 1 ÷ pgBackRest async", "seconds", "archiver", "pgbackrest-async"),
    ("time: lz4 ÷ pgBackRest async, lz4", "seconds", "archiver-lz4", "pgbackrest-async-lz4"),
    ("CPU: zstd 1 ÷ compressing alone", "cpu_seconds", "archiver", "limit-zstd-memory"),
    ("CPU: zstd 1 ÷ pgBackRest async", "cpu_seconds", "archiver", "pgbackrest-async"),
    ("S3, time: zstd 1 ÷ pgBackRest async, 4 processes", "seconds", "s3-archiver", "s3-pgbackrest-4"),
    ("S3, time: zstd 1 ÷ pgBackRest async, 2 processes", "seconds", "s3-archiver", "s3-pgbackrest-2"),
    ("S3, time: barman-cloud ÷ zstd 1", "seconds", "s3-barman", "s3-archiver"),
    ("S3, time: 40 ms away ÷ beside it", "seconds", "s3-archiver-40ms", "s3-archiver"),
    ("restore: zstd 1 ÷ cp", "restore_seconds", "archiver", "cp"),
    ("restore: zstd 1 ÷ pgBackRest async", "restore_seconds", "archiver", "pgbackrest-async"),
    ("restore from S3: zstd 1 ÷ pgBackRest async, 4 processes", "restore_seconds", "s3-archiver", "s3-pgbackrest-4"),
    ("restore from S3: barman-cloud ÷ zstd 1", "restore_seconds", "s3-barman", "s3-archiver"),
]

NOTES = [
    "CPU is that of the server and of all that it started. Memory is the archiver process's own: all but the modules",
    "start other processes, which are not in it. The fsyncs of the first line are PostgreSQL's own. S3 is a Ceph gateway",
    "on the same machine, over TLS: it takes its share of the same cores. Every file was fetched back, one after the other as",
    "recovery asks for them, with 50 ms in between in which nothing is timed, and compared. The",
    "slow ones had 3 rounds at most.",
]


def spread(values, digits):
    """Median and the range: `1.5 (1.2–1.9)`."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


def table(heads, rows):
    if not rows:
        return []
    lines = ["| " + " | ".join(cells) + " |" for cells in [heads, *rows]]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:], ""]


def percentile(values, part):
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


class Report:
    def __init__(self, results):
        self.results, self.machine, self.labels = results, results["machine"], results["labels"]
        self.segments = self.machine["segments"]
        self.gib = self.segments * SEGMENT_BYTES / (1 << 30)
        self.drains = results.get("drain", {})
        self.order = [name for name in self.labels if name in self.drains]

    def of(self, name, key, per=lambda value: value):
        """That figure of every round."""
        return [per(run[key]) for run in self.drains.get(name, {}).values() if key in run]

    def ratios(self):
        rows = []
        for name, key, upper, lower in RATIOS:
            pairs = [(self.drains.get(each, {}), each) for each in (upper, lower)]
            rounds = sorted(set(pairs[0][0]) & set(pairs[1][0]), key=int)
            if rounds:
                values = [pairs[0][0][number][key] / pairs[1][0][number][key] for number in rounds]
                rows.append((name, values))
        for name, each in self.results.get("foreground", {}).items():
            rows.append((f"clients' tps: {self.labels[name]} ÷ `/bin/true`",
                         [pair["with"] / pair["without"] for pair in each.values()]))
        return [[name, spread(values, 2), ", ".join(f"{value:.2f}" for value in values)]
                for name, values in rows if values]

    def draining(self):
        rows = []
        for name in self.order:
            fsyncs = self.results.get("fsyncs", {}).get(name)
            memory = "–"
            if self.of(name, "peak_rss_kb"):
                memory = " / ".join(f"{max(self.of(name, key)) / 1024:.0f}" for key in ("peak_rss_kb", "peak_rss_anon_kb"))
            stored = [value for value in self.of(name, "stored_bytes") if value]
            rows.append([
                self.labels[name],
                spread(self.of(name, "seconds", lambda seconds: self.segments / seconds), 1),
                spread(self.of(name, "seconds"), 2),
                spread(self.of(name, "cpu_seconds", lambda seconds: seconds / self.gib), 2),
                memory,
                f"{median(stored) / (1 << 20):.0f} MiB" if stored else "–",
                "–" if fsyncs is None else f"{fsyncs:.1f}",
                spread(self.of(name, "restore_seconds", lambda seconds: seconds * 1000 / self.segments), 0),
            ])
        return table(["", "segments/s", "seconds", "CPU s per GiB", "peak RSS / anonymous, MiB", "stored", "fsyncs per file",
                      "restore, ms per segment"], rows)

    def latency(self):
        found = self.results.get("latency", {})
        payloads = list(dict.fromkeys(payload for each in found.values() for payload in each))
        rows = []
        for name, each in found.items():
            cells = [f"{percentile(each[payload], 0.5) * 1000:.0f} / {percentile(each[payload], 0.99) * 1000:.0f}"
                     if each[payload] else "–" for payload in payloads]
            rows.append([self.labels[name], *cells])
        alone = [second for run in self.drains.get("limit-zstd", {}).values() for second in run["alone_seconds_each"]]
        if rows and alone:
            limit = f"{percentile(alone, 0.5) * 1000:.0f} / {percentile(alone, 0.99) * 1000:.0f}"
            rows.append(["limit: zstd 1, stored, one file at a time", limit, *[""] * (len(payloads) - 1)])
        return table(["", *payloads], rows)

    def foreground(self):
        rows = [[self.labels[name], *(spread([pair[side] for pair in each.values()], 0) for side in ("with", "without"))]
                for name, each in self.results.get("foreground", {}).items()]
        return table(["", "tps", "tps beside `/bin/true`"], rows)

    def introduction(self):
        machine = self.machine
        ratio = f" that `zstd -1` makes {machine['zstd_ratio']} times smaller" if "zstd_ratio" in machine else ""
        return [
            "# Side by side", "",
            "Made by `make bench`; raw figures: [results.json](results.json). Figures are medians (lowest–highest).", "",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['file_system']},",
            f"Linux {machine['kernel']}, {machine['system']}; {machine['postgresql']}, {machine['pgbackrest']}.",
            f"Rounds: {machine['rounds']}, of {self.segments} segments of 16 MiB{ratio}.",
            f"Load of the machine when it began: {machine['load_before']}.", ""]

    def markdown(self):
        parts = self.introduction()
        if drains := self.draining():
            parts += ["## Draining a backlog", "", "![segments per second](drain.svg)", "", *drains, *NOTES, ""]
        if ratios := self.ratios():
            parts += ["## Ratios", "", *table(["", "median (lowest–highest)", "round by round"], ratios)]
        if latency := self.latency():
            parts += ["## One segment on an idle server", "",
                      "From `.ready` to `.done` in ms, p50 / p99, by how much of the segment is filled.", "", *latency]
        if foreground := self.foreground():
            parts += ["## Beside clients", "", "pgbench, scale 50, 2 clients.", "", *foreground]
        return "\n".join(parts).rstrip() + "\n"

    def svg(self):
        """Segments per second, a bar for each contestant with a line from the lowest to the highest."""
        names = [name for name in self.order if name not in ("true", "limit-read")]
        rates = {name: self.of(name, "seconds", lambda seconds: self.segments / seconds) for name in names}
        most = max(max(each) for each in rates.values())
        left, width, step, top = 330, 520, 24, 52
        height = top + step * len(names) + 16
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {height}" font-family="sans-serif" font-size="13">',
            f'<rect width="940" height="{height}" fill="#fff"/>',
            '<text x="16" y="24" font-size="16" fill="#222">Segments of 16 MiB archived per second; more is better</text>',
            f'<text x="16" y="42" font-size="11" fill="#666">{self.segments} segments of pgbench’s WAL, '
            f'{self.machine["cores"]} cores; medians of {self.machine["rounds"]} rounds, and the range</text>']
        for number, name in enumerate(names):
            low, middle, high = (left + value * width / most
                                 for value in (min(rates[name]), median(rates[name]), max(rates[name])))
            y = top + step * number
            is_ours = "archiver" in name.split("-")
            colour = "#b8b8b8" if name.startswith("limit") else "#2f6fb5" if is_ours else "#9fc3a6"
            label = escape(self.labels[name].replace("*", "").replace("`", ""))
            range_line = f"M{low:.1f} {y + 9.5}H{high:.1f}M{low:.1f} {y + 6}v7M{high:.1f} {y + 6}v7"
            out += [f'<text x="{left - 8}" y="{y + 14}" text-anchor="end" fill="#222">{label}</text>',
                    f'<rect x="{left}" y="{y + 2}" width="{middle - left:.1f}" height="15" fill="{colour}"/>',
                    f'<path d="{range_line}" stroke="#222" fill="none"/>',
                    f'<text x="{high + 8:.1f}" y="{y + 14}" fill="#222">{median(rates[name]):.1f}</text>']
        return "\n".join([*out, "</svg>"]) + "\n"


def write(results, folder):
    """Raw results, table and plot."""
    text = json.dumps(results, indent=1)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    found = Report(json.loads(text))  # in which the numbers of rounds are texts
    (folder / "results.md").write_text(found.markdown(), encoding="utf-8")
    if found.order:
        (folder / "drain.svg").write_text(found.svg(), encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write(json.loads((place / "results.json").read_text(encoding="utf-8")), place)
