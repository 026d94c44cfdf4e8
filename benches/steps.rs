//! The steps that archiving one segment is made of, each by itself: the codecs, the hash, and a file made durable.

use archiver_core::codec::{Compression, Encoder, decode};
use archiver_core::mode::Mode;
use archiver_core::pulse::Pulse;
use archiver_core::store::{Attributes, Body, LocalStore, Store};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

const SEGMENT_BYTES: usize = 16 << 20;

/// As compressible as WAL: records of which a third is noise, of the same shape over and over.
fn segment() -> Vec<u8> {
    let mut state = 1u64;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    };
    let mut segment = Vec::with_capacity(SEGMENT_BYTES);
    while segment.len() < SEGMENT_BYTES {
        segment.extend_from_slice(&noise()[..7]);
        segment.extend_from_slice(b"a record of one shape");
        segment.extend_from_slice(&noise()[..4]);
    }
    segment.truncate(SEGMENT_BYTES);
    segment
}

fn codecs(criterion: &mut Criterion) {
    let plain = segment();
    for compression in Compression::ALL {
        // Seconds a segment: nothing that one would wait for here.
        if matches!(compression, Compression::None | Compression::Bzip2 | Compression::Xz) {
            continue;
        }
        let mut group = criterion.benchmark_group(compression.name());
        group.throughput(Throughput::Bytes(SEGMENT_BYTES as u64)).sample_size(10);
        let level = compression.level("low").expect("every format has a low level");
        let mut encoder = Encoder::new(compression, level).expect("an encoder");
        let mut encoded = Vec::new();
        group.bench_function("encode", |bencher| {
            bencher.iter(|| encoder.encode(black_box(&plain), &mut encoded).expect("encode"));
        });
        group.bench_function("decode", |bencher| {
            bencher.iter(|| {
                let mut decoder = decode(&encoded[..], SEGMENT_BYTES as u64).expect("decode");
                io::copy(&mut decoder.plain, &mut io::sink()).expect("decode")
            });
        });
    }
}

fn hash(criterion: &mut Criterion) {
    let plain = segment();
    let mut group = criterion.benchmark_group("blake3");
    group.throughput(Throughput::Bytes(SEGMENT_BYTES as u64)).sample_size(20);
    group.bench_function("hash", |bencher| bencher.iter(|| blake3::hash(black_box(&plain))));
}

fn local_store(criterion: &mut Criterion) {
    let plain = segment();
    let directory = tempfile::tempdir().expect("temporary directory");
    let store = LocalStore::open(directory.path(), ".staging", Mode::PRIVATE, Arc::new(Pulse::new())).expect("a store");
    let attributes = Attributes { modified: SystemTime::now(), content: None };
    let mut group = criterion.benchmark_group("local store");
    for (name, bytes) in [("put 16 MiB", &plain[..]), ("put 4 MiB", &plain[..4 << 20]), ("put 1 kB", &plain[..1000])] {
        group.throughput(Throughput::Bytes(bytes.len() as u64)).sample_size(10);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                store.put_new("wals/segment", Body::Bytes(bytes), &attributes).expect("put");
                store.delete("wals/segment").expect("delete")
            });
        });
    }
}

criterion_group!(steps, codecs, hash, local_store);
criterion_main!(steps);
