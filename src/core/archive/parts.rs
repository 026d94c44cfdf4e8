//! Parts of a segment that is being received: put where `restore --partial` finds them, and removed once there is better.

use super::source::{self, WalFile};
use super::{Archive, max_buffer_bytes};
use crate::crypt::Encryption;
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash};
use crate::layout::Format;
use crate::part::Part;
use crate::place::Place;
use crate::pulse::Beating;
use crate::store::Put;
use crate::wal::{SegmentName, WalName};
use std::io;
use std::path::Path;

impl Archive {
    /// Puts the first bytes of a segment that is received into `file`, once, as every WAL file is put: encoded by the same
    /// settings, durable when this returns, and never over anything. They must not change any more; what follows them may.
    ///
    /// The same part again is success, another one of its name is refused.
    pub fn put_part(&self, part: &Part, file: &Path) -> Result<()> {
        let place = self.place()?;
        self.confirm_identity(place)?;
        let mut desk = self.desks.take(&self.pulse)?;
        let file = WalFile { name: WalName::Partial(part.segment), path: file.to_path_buf() };
        let opened = source::open_part(&file, &self.cluster, part.bytes)?;
        let format = Format { compression: self.config.compression, encryption: self.encryption() };
        let key = place.layout.part_key(part, format);
        let source = opened.read(max_buffer_bytes(&self.config), &mut desk.plain, &self.pulse)?;
        // Nothing is noted of it beside the object itself: it is there for a while only.
        let put = self.put(place, &key, &file, &source, self.config.level, desk, &|_, _| Ok(()))?;
        if put == Put::AlreadyExists {
            self.compare_part(place, &key, &source.content)?;
        }
        // As with a whole file: nothing may be taken for stored that lies in the mount point of what was unmounted.
        self.confirm_identity(place)
    }

    /// The parts that are kept of that segment, or of any: in order.
    pub fn parts(&self, of: Option<SegmentName>) -> Result<Vec<Part>> {
        self.place()?.parts(of)
    }

    /// Removes the part, in whatever format it was put.
    pub fn remove_part(&self, part: &Part) -> Result<()> {
        let place = self.place()?;
        for key in place.part_keys(part)? {
            place.store.delete(&key)?;
        }
        Ok(())
    }

    /// Whether what is archived of the part's segment, whole or what a timeline ended with, goes as far as the part does;
    /// nothing where neither is archived.
    pub fn covers(&self, part: &Part) -> Result<Option<bool>> {
        if self.holds(&WalName::Segment(part.segment))? {
            return Ok(Some(true));
        }
        let place = self.place()?;
        place.partial_holds(part, || place.hash_of_part(part))
    }

    /// Fails where another part stands there. What is encrypted, and neither noted nor to be read here, is taken for the same.
    fn compare_part(&self, place: &Place, key: &str, offered: &Content) -> Result<()> {
        let Some(object) = place.store.get(key)? else { return Ok(()) };
        let location = place.store.location(key);
        let noted = object.meta.content.and_then(|noted| noted.is_of(offered, place.hash_key.as_ref()));
        let is_same = match noted {
            Some(is_same) => is_same,
            None if self.encryption() != Encryption::None && !place.secret_keys.are_named() => true,
            None => {
                let unfit = |error: &io::Error| {
                    Error::of_stored_copy(&location, error, "Remove it: it is put again by itself.")
                };
                let mut plain = place
                    .decode(Beating::new(object.body, &self.pulse), offered.size)
                    .map_err(|error| unfit(&error))?
                    .plain;
                let mut hasher = blake3::Hasher::new();
                let size = io::copy(&mut plain, &mut hasher).map_err(|error| unfit(&error))?;
                (size, Hash(hasher.finalize())) == (offered.size, offered.hash)
            }
        };
        if is_same {
            return Ok(());
        }
        Err(Error::new(Kind::Conflict, location.clone(), format!("another part of the segment lies at \"{location}\""))
            .detail("Nothing was overwritten.")
            .hint(
                "Has the server gone back in time (a restored copy, a snapshot)? Give it another archiver.server_name.",
            ))
    }
}
