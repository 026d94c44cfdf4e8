//! Harm done to an archive, as disks and people do it.

use archiver_core::codec::Compression;
use archiver_core::crypt::Encryption;
use archiver_core::gaps::{self, Findings};
use archiver_core::listing::Range;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::store::{Attributes, Body, Put};
use archiver_core::verify::{Request, State, Verified, verify};
use archiver_core::wal::{SegmentSize, WalName};
use std::collections::BTreeSet;
use std::io::Read;
use std::ops::ControlFlow;

use crate::PAGE_BYTES;

/// Gives a stored file other bytes; what was noted of it stays.
pub fn change(place: &Place, name: &WalName, change: impl FnOnce(&mut Vec<u8>)) {
    let (stored, mut object) = place.open_wal(name).expect("open").expect("it is stored");
    let mut bytes = Vec::new();
    object.body.read_to_end(&mut bytes).expect("read");
    let before = bytes.clone();
    change(&mut bytes);
    assert!(bytes != before, "{name} is as it was");
    remove(place, name);
    let attributes = Attributes { modified: object.meta.modified, content: object.meta.content };
    let put = place.store.put_new(&stored.key, Body::Bytes(&bytes), &attributes).expect("put");
    assert!(matches!(put, Put::Created { .. }));
}

/// Takes a stored file away.
pub fn remove(place: &Place, name: &WalName) {
    let stored = place.find(name).expect("look").expect("it is stored");
    assert!(place.store.delete(&stored.key).expect("delete"));
}

/// Flips one bit, of the data on a page where pages are stored as they are.
pub fn flip_bit(bytes: &mut [u8], random: u64) {
    const LONG_HEADER_BYTES: usize = 40;
    // What stands before the content of an encrypted file says for whom it is: without that nobody can look at it.
    const SESSION_KEYS_BYTES: usize = 1024;
    let at = match Compression::detect(bytes) {
        None if Encryption::detect(bytes) != Encryption::None => {
            SESSION_KEYS_BYTES + random as usize % (bytes.len() - SESSION_KEYS_BYTES)
        }
        None => {
            let (page, offset) = (random as usize % (bytes.len() / PAGE_BYTES), (random >> 20) as usize);
            page * PAGE_BYTES + LONG_HEADER_BYTES + offset % (PAGE_BYTES - LONG_HEADER_BYTES)
        }
        Some(_) => LONG_HEADER_BYTES + random as usize % (bytes.len() - 2 * LONG_HEADER_BYTES),
    };
    bytes[at] ^= 1 << (random % 8);
}

/// What was done to six of many segments.
#[derive(Debug, Default)]
pub struct Harm {
    /// These are not there any more.
    pub removed: BTreeSet<WalName>,
    /// These have other bytes, or fewer.
    pub damaged: BTreeSet<WalName>,
}

impl Harm {
    /// Removes three of `names`, flips a bit in two and truncates one. Neither first nor last is among them.
    pub fn to_six_of(place: &Place, names: &[WalName], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut harm = Harm::default();
        let mut left: Vec<WalName> = names[1..names.len() - 1].to_vec();
        let mut pick = |random: &mut Random| left.swap_remove(random.next() as usize % left.len());
        for _ in 0..3 {
            let name = pick(&mut random);
            remove(place, &name);
            harm.removed.insert(name);
        }
        for is_truncated in [false, false, true] {
            let name = pick(&mut random);
            let number = random.next();
            change(place, &name, |bytes| match is_truncated {
                false => flip_bit(bytes, number),
                true => bytes.truncate(1 + number as usize % (bytes.len() - 1)),
            });
            harm.damaged.insert(name);
        }
        harm
    }
}

/// Numbers that look random, the same ones for the same seed.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }
}

/// A seed that differs from run to run; say it where a test fails.
pub fn new_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64)
}

/// What `gaps` finds.
pub fn findings(place: &Place) -> Findings {
    gaps::find(place, None, None, &Pulse::new()).expect("gaps")
}

/// Every segment in those gaps.
pub fn segments_in(findings: &Findings, size: SegmentSize) -> BTreeSet<WalName> {
    let mut names = BTreeSet::new();
    for gap in &findings.gaps {
        let (mut segment, last) = (gap.first.segment().expect("a segment"), gap.last.segment().expect("a segment"));
        let before = names.len() as u64;
        while names.insert(WalName::Segment(segment)) && segment != last {
            segment = segment.next(size).expect("another segment");
        }
        assert_eq!(names.len() as u64 - before, gap.segments, "{gap:?}");
    }
    names
}

/// All verdicts on a range.
pub fn verdicts(place: &Place, range: Range) -> Vec<Verified> {
    let mut verdicts = Vec::new();
    let request = Request { range, system_identifier: None };
    let verified = verify(place, &request, &Pulse::new(), &mut |verified| {
        verdicts.push(verified);
        ControlFlow::Continue(())
    });
    verified.expect("verify");
    verdicts
}

/// The files that were judged so.
pub fn judged(verdicts: &[Verified], state: State) -> BTreeSet<WalName> {
    verdicts.iter().filter(|verified| verified.state == state).map(|verified| verified.name).collect()
}
