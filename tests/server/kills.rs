//! Kills at every moment of a file's way into the archive: no segment is lost, and none is recorded twice.

use crate::cluster::{Cluster, Stop, catalogue, figure, paths, text, wait_until};
use crate::gates::{Gate, Gates};
use nix::sys::signal::{Signal, kill};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

const SEGMENTS_BEFORE_A_KILL: u32 = 3;
/// After the kills.
const IMMEDIATE_STOPS: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Postmaster,
    Archiver,
    /// All of them, by an immediate stop.
    Server,
}

/// At which moment a kill came, by what it left on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// A file in staging, and nothing published without its line.
    Staged,
    /// A published file without a line.
    BetweenStoreAndLine,
    /// A line that was not durable yet, of a file that was not answered for.
    BetweenLineAndAnswer,
    /// Something else.
    Missed,
}

/// The test's own copies of the segments, taken from pg_wal once they are complete.
struct Copies<'a> {
    cluster: &'a Cluster,
    directory: PathBuf,
    names: BTreeSet<String>,
}

impl<'a> Copies<'a> {
    fn of(cluster: &'a Cluster) -> Self {
        Copies { cluster, directory: cluster.create_directory("copies"), names: BTreeSet::new() }
    }

    /// Copies what has become complete since the last time. Nothing is removed from pg_wal meanwhile.
    fn take(&mut self) {
        let complete = self.cluster.status_files("ready").into_iter().chain(self.cluster.status_files("done"));
        for name in complete.filter(|name| !self.names.contains(name)).collect::<Vec<_>>() {
            fs::copy(self.cluster.pg_wal(&name), self.directory.join(&name)).expect("copy a segment");
            self.names.insert(name);
        }
    }

    /// Each of them is in the archive, identical.
    #[track_caller]
    fn assert_archived(&self) {
        let restored = self.cluster.path("restored-file");
        for name in &self.names {
            let output = self.cluster.restore(name, &restored);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
            let is_equal = fs::read(&restored).expect("read") == fs::read(self.directory.join(name)).expect("read");
            assert!(is_equal, "{name} differs from the copy that was taken when it was complete");
        }
    }
}

fn staged(cluster: &Cluster) -> Vec<PathBuf> {
    paths(&cluster.archive().join("main/.staging"))
}

/// What a killed archiver that was held at `gate` has left on disk.
fn moment(cluster: &Cluster, gates: &Gates, gate: Gate) -> Moment {
    let lines = catalogue(&cluster.archive());
    let has_unrecorded = cluster.stored().keys().any(|name| !lines.contains(name));
    let ready = cluster.status_files("ready");
    if has_unrecorded {
        Moment::BetweenStoreAndLine
    } else if !staged(cluster).is_empty() {
        Moment::Staged
    } else if gate == Gate::Recorded && gates.has_held(gate) && lines.iter().any(|name| ready.contains(name)) {
        Moment::BetweenLineAndAnswer
    } else {
        Moment::Missed
    }
}

/// Kills while a file is held at `gate`, sees what that left, and brings the server back. PostgreSQL starts another
/// archiver ten seconds after the one before, not sooner; `by_itself` waits for that, else the server is started anew.
fn strike(cluster: &Cluster, gates: &Gates, victim: Victim, gate: Gate, by_itself: bool) -> Moment {
    let archiver = cluster.running_archiver();
    let mark = cluster.log_mark();
    match victim {
        Victim::Postmaster => cluster.kill_postmaster(),
        Victim::Server => drop(cluster.stop(Stop::Immediate)),
        Victim::Archiver => {
            kill(archiver, Signal::SIGKILL).expect("kill the archiver");
            wait_until("the archiver is gone", || cluster.processes().iter().all(|(pid, _)| *pid != archiver));
        }
    }
    let moment = moment(cluster, gates, gate);
    gates.open(gate);
    match victim {
        Victim::Postmaster | Victim::Server => cluster.start(),
        Victim::Archiver => {
            let is_back = "database system is ready to accept connections";
            wait_until("the postmaster has restarted the cluster", || cluster.log_since(mark).contains(is_back));
            if by_itself {
                cluster.wait_for_another_archiver(archiver);
            } else {
                cluster.stop(Stop::Immediate);
                cluster.start();
            }
        }
    }
    moment
}

/// `ARCHIVER_TEST_KILLS=50` for the whole.
#[test]
fn kills_while_a_file_is_staged_or_has_no_line_lose_no_segment_and_record_none_twice() {
    let kills = figure("ARCHIVER_TEST_KILLS", 10);
    let began = Instant::now();
    let cluster = Cluster::new(1);
    let gates = Gates::of(&cluster);
    cluster.start();
    let mut copies = Copies::of(&cluster);
    cluster.write_segments(1);
    cluster.drain();

    let mut moments = Vec::new();
    for turn in 0..kills + IMMEDIATE_STOPS {
        let victim = match turn % 2 {
            _ if turn >= kills => Victim::Server,
            0 => Victim::Postmaster,
            _ => Victim::Archiver,
        };
        let gate = Gate::ALL[turn as usize % Gate::ALL.len()];
        gates.close(gate);
        cluster.write_segments(SEGMENTS_BEFORE_A_KILL);
        copies.take();
        gates.wait_for(gate);
        let moment = strike(&cluster, &gates, victim, gate, turn == 1);
        if victim != Victim::Server {
            moments.push(moment);
        }
        println!("kill {turn}: {victim:?} at {gate:?}: {moment:?}");
        let left = staged(&cluster);
        cluster.write_segments(1);
        cluster.drain();
        let still: Vec<_> = left.iter().filter(|path| path.exists()).collect();
        assert_eq!(still, [] as [&PathBuf; 0], "staged before kill {turn}, and not swept after the next start");
        copies.take();
    }
    cluster.restart();
    cluster.write_segments(1);
    cluster.drain();
    copies.take();

    let count = |wanted: Moment| moments.iter().filter(|moment| **moment == wanted).count() as u32;
    let (staged_kills, unrecorded) = (count(Moment::Staged), count(Moment::BetweenStoreAndLine));
    let (unanswered, missed) = (count(Moment::BetweenLineAndAnswer), count(Moment::Missed));
    println!(
        "{kills} kills in {:.0} s: {staged_kills} staged, {unrecorded} between store and line, \
         {unanswered} with a line that was not durable, {missed} missed",
        began.elapsed().as_secs_f64()
    );
    assert!(kills - missed >= kills * 4 / 5, "{moments:?}");
    assert!(copies.names.len() as u32 >= kills * (SEGMENTS_BEFORE_A_KILL + 1));
    copies.assert_archived();
    cluster.assert_one_line_each();
    assert_eq!(staged(&cluster), [] as [PathBuf; 0]);
    let log = cluster.log();
    assert!(!log.contains("another file named"), "{log}");
    let refusals = log.lines().filter(|line| line.contains("could not archive WAL file"));
    // What an archiver says whose postmaster was killed under it is no refusal.
    assert_eq!(refusals.filter(|line| !line.contains("the postmaster died")).collect::<Vec<_>>(), [] as [&str; 0]);
}
