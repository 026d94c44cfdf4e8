//! limit_loop MODE WAL_DIRECTORY SCRATCH_DIRECTORY [WORKERS]: what the machine itself can do with those segments, with
//! nothing of PostgreSQL's or ours in the way. Prints one line of JSON.
//!
//! MODE is `read`; `zstd-memory` (read and compress, store nothing); or `write`, `zstd`, `lz4`, which store each file as
//! durably as an archiver has to: written under another name, synced, renamed, its directory synced. WORKERS, 2 unless
//! told, do so at the same time; each has one compression context and buffers that it keeps.

use lz4_flex::frame::{BlockSize, FrameEncoder, FrameInfo};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;
use zstd::zstd_safe::CParameter;

/// After so many bytes the kernel is asked to start writing them back: less is left to the fsync in the end.
const WRITEBACK_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Read,
    Write,
    ZstdMemory,
    Zstd,
    Lz4,
}

impl Mode {
    fn from_name(name: &str) -> Option<Self> {
        let all = [
            ("read", Mode::Read),
            ("write", Mode::Write),
            ("zstd-memory", Mode::ZstdMemory),
            ("zstd", Mode::Zstd),
            ("lz4", Mode::Lz4),
        ];
        all.into_iter().find(|(known, _)| *known == name).map(|(_, mode)| mode)
    }
}

/// What a thread keeps from file to file.
struct Worker {
    mode: Mode,
    zstd: zstd::bulk::Compressor<'static>,
    plain: Vec<u8>,
    encoded: Vec<u8>,
}

impl Worker {
    fn new(mode: Mode) -> io::Result<Self> {
        let mut zstd = zstd::bulk::Compressor::new(1)?;
        zstd.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Worker { mode, zstd, plain: Vec::new(), encoded: Vec::new() })
    }

    /// Does one file; answers the bytes stored.
    fn run(&mut self, source: &Path, scratch: &Path) -> io::Result<usize> {
        self.plain.clear();
        File::open(source)?.read_to_end(&mut self.plain)?;
        let stored = match self.mode {
            Mode::Read => return Ok(0),
            Mode::Write => &self.plain,
            Mode::ZstdMemory | Mode::Zstd => {
                self.encoded.clear();
                self.encoded.reserve(zstd::zstd_safe::compress_bound(self.plain.len()));
                self.zstd.compress_to_buffer(&self.plain, &mut self.encoded)?;
                &self.encoded
            }
            Mode::Lz4 => {
                self.encoded.clear();
                let info = FrameInfo::new().block_size(BlockSize::Max1MB).content_checksum(true);
                let mut encoder = FrameEncoder::with_frame_info(info, &mut self.encoded);
                encoder.write_all(&self.plain)?;
                encoder.finish().map_err(io::Error::from)?;
                &self.encoded
            }
        };
        if self.mode != Mode::ZstdMemory {
            store(stored, source, scratch)?;
        }
        Ok(stored.len())
    }
}

fn store(bytes: &[u8], source: &Path, scratch: &Path) -> io::Result<()> {
    let target = scratch.join(source.file_name().unwrap_or_default());
    let staged = target.with_extension("tmp");
    let mut file = File::create(&staged)?;
    let mut offset = 0;
    for piece in bytes.chunks(WRITEBACK_BYTES) {
        file.write_all(piece)?;
        // SAFETY: the descriptor is open, and the call touches no memory of ours.
        unsafe { libc::sync_file_range(file.as_raw_fd(), offset, piece.len() as i64, libc::SYNC_FILE_RANGE_WRITE) };
        offset += piece.len() as i64;
    }
    file.sync_all()?;
    fs::rename(&staged, &target)?;
    File::open(scratch)?.sync_all()
}

/// The seconds that each file took and the bytes stored, by one of the workers.
fn work(mode: Mode, files: &[PathBuf], next: &AtomicUsize, scratch: &Path) -> io::Result<(Vec<f64>, usize)> {
    let mut worker = Worker::new(mode)?;
    let (mut seconds, mut stored) = (Vec::new(), 0);
    while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
        let began = Instant::now();
        stored += worker.run(file, scratch)?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    Ok((seconds, stored))
}

fn measure(mode: Mode, wal: &Path, scratch: &Path, workers: usize) -> io::Result<serde_json::Value> {
    let mut files = fs::read_dir(wal)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    files.sort();
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    let done = thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(|| work(mode, &files, &next, scratch))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<io::Result<Vec<_>>>()
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let stored: usize = done.iter().map(|(_, stored)| stored).sum();
    let each: Vec<f64> = done.into_iter().flat_map(|(seconds, _)| seconds).collect();
    Ok(serde_json::json!({ "seconds": seconds, "files": each.len(), "stored_bytes": stored, "seconds_each": each }))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (mode, wal, scratch, workers) = match &arguments[..] {
        [mode, wal, scratch] => (mode, wal, scratch, Some(2)),
        [mode, wal, scratch, workers] => (mode, wal, scratch, workers.parse().ok()),
        _ => return usage(),
    };
    let (Some(mode), Some(workers)) = (Mode::from_name(mode), workers) else { return usage() };
    match measure(mode, wal.as_ref(), scratch.as_ref(), workers) {
        Ok(result) => println!("{result}"),
        Err(error) => {
            eprintln!("limit_loop: {error}");
            std::process::exit(1);
        }
    }
}

fn usage() {
    eprintln!("usage: limit_loop read|write|zstd-memory|zstd|lz4 WAL_DIRECTORY SCRATCH_DIRECTORY [WORKERS]");
    std::process::exit(2);
}
