//! Who made a temporary file, written into its name, so that a later process can tell whether its maker is dead.

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// Another host's leftovers are judged by age alone: its processes cannot be seen from here.
const FOREIGN_LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// The maker of a temporary file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    host: String,
    pid: u32,
    /// Clock ticks between boot and the process's start (proc(5), field 22 of `stat`): a reused PID differs in it.
    start_ticks: u64,
}

impl Owner {
    /// This process.
    pub fn current() -> Self {
        let pid = std::process::id();
        Owner { host: this_host(), pid, start_ticks: stat(pid).map_or(0, |stat| stat.start_ticks) }
    }

    /// The process of that PID on this host; nothing where none lives.
    pub fn of_process(pid: u32) -> Option<Self> {
        let stat = stat(pid).filter(|stat| !stat.is_dead)?;
        Some(Owner { host: this_host(), pid, start_ticks: stat.start_ticks })
    }

    /// A file name that no other call in any process makes: `<host>.<pid>.<start>.<number>`.
    pub fn unique_name(&self) -> String {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        format!("{}.{}.{}.{number}", self.host, self.pid, self.start_ticks)
    }

    /// The maker of the file of that name, if [`Owner::unique_name`] made it.
    pub fn of_name(name: &str) -> Option<Self> {
        let mut fields = name.rsplitn(4, '.');
        let _number: u64 = fields.next()?.parse().ok()?;
        let start_ticks = fields.next()?.parse().ok()?;
        let pid = fields.next()?.parse().ok()?;
        Some(Owner { host: fields.next()?.to_string(), pid, start_ticks })
    }

    /// Whether a file of this owner, last changed at `changed`, is a leftover that nobody will finish:
    /// its maker is dead, or on another host and a day old. A maker that cannot be looked at counts as alive.
    pub fn has_left(&self, changed: SystemTime) -> bool {
        if self.host != this_host() {
            return changed.elapsed().is_ok_and(|age| age > FOREIGN_LEFTOVER_AGE);
        }
        match stat(self.pid) {
            Some(stat) => stat.start_ticks != self.start_ticks || stat.is_dead,
            None => kill(Pid::from_raw(self.pid.cast_signed()), None) == Err(Errno::ESRCH),
        }
    }
}

fn this_host() -> String {
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    // A dot parts the fields of a name.
    host.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect()
}

struct Stat {
    start_ticks: u64,
    /// Its parent has not taken notice yet. After the death of a server that is init, which may take its time.
    is_dead: bool,
}

fn stat(pid: u32) -> Option<Stat> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything, so count from the last parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let is_dead = matches!(fields.next()?, "Z" | "X");
    Some(Stat { start_ticks: fields.nth(18)?.parse().ok()?, is_dead })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_maker() {
        let me = Owner::current();
        let name = me.unique_name();
        assert_eq!(Owner::of_name(&name), Some(me.clone()));
        assert_ne!(name, me.unique_name());
        assert!(!me.has_left(SystemTime::now()));
    }

    #[test]
    fn a_dead_maker_on_this_host_has_left_at_once() {
        let me = Owner::current();
        assert!(Owner { pid: i32::MAX as u32, ..me.clone() }.has_left(SystemTime::now()));
        assert!(Owner { start_ticks: me.start_ticks + 1, ..me }.has_left(SystemTime::now()), "a reused PID");
    }

    #[test]
    fn a_dead_maker_whose_parent_has_not_taken_notice_has_left() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start_ticks = stat(child.id()).unwrap().start_ticks;
        let maker = Owner { pid: child.id(), start_ticks, ..Owner::current() };
        assert!(!maker.has_left(SystemTime::now()));
        assert_eq!(Owner::of_process(child.id()), Some(maker.clone()));
        child.kill().unwrap();
        while !stat(child.id()).unwrap().is_dead {
            std::thread::yield_now();
        }
        assert!(maker.has_left(SystemTime::now()));
        assert_eq!(Owner::of_process(child.id()), None);
        child.wait().unwrap();
    }

    #[test]
    fn a_maker_on_another_host_has_left_after_a_day() {
        let other = Owner { host: "elsewhere".into(), ..Owner::current() };
        assert!(!other.has_left(SystemTime::now()));
        assert!(other.has_left(SystemTime::now() - FOREIGN_LEFTOVER_AGE - Duration::from_secs(1)));
    }

    #[test]
    fn foreign_names_have_no_maker() {
        for name in ["", "x", "000000010000000200000042", "host.1.2", "host.pid.2.3"] {
            assert_eq!(Owner::of_name(name), None, "{name}");
        }
    }
}
