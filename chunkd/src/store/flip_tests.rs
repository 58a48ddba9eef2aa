//! A bit that flips in a chunk file on a real disk is never returned as data, and a sealed chunk's is found by a scrub.

use super::format::FILE_HEADER;
use super::tests::{entries, payload, record};
use super::*;
use dfs_proto::checksum::units_match;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::path::Path;

/// A chunk as it was written.
struct Written {
    id: ChunkId,
    lengths: Vec<usize>,
    sealed: bool,
    file: Vec<u8>,
}

impl Written {
    fn bytes(&self) -> Vec<u8> {
        entries(&self.lengths).iter().flat_map(|entry| payload(entry.offset, entry.length as usize)).collect()
    }
}

async fn open(dir: &Path) -> Store {
    let env = Env::real();
    let dirs = vec![DataDir::new(dir.to_owned(), None)];
    Store::open(env.clone(), Dirs::new(env, dirs, None, 0), "cluster").await
}

fn path(dir: &Path, id: ChunkId) -> std::path::PathBuf {
    DataDir::new(dir.to_owned(), None).chunk_path(id)
}

/// Chunks of many shapes: sealed or open, of large and small records, fenced, cut by a seal.
async fn written(dir: &Path) -> Vec<Written> {
    durable::make_chunk_dirs(&*Env::real().disk, dir).expect("made");
    let store = open(dir).await;
    let shapes: [(&[usize], bool, bool); 6] = [
        (&[40_000, 1, 16_384, 3, 100_000, 7, 7, 7, 16_385], true, false),
        (&[5; 60], true, false),
        (&[70_000], true, true),
        (&[40_000, 1, 16_384, 3], false, false),
        (&[300; 20], false, false),
        (&[20_000, 9], false, true),
    ];
    let mut all = Vec::new();
    for (number, (lengths, sealed, fenced)) in (1..).zip(shapes) {
        let id = ChunkId(number);
        for entry in entries(lengths) {
            let bytes = payload(entry.offset, entry.length as usize);
            store.append(id, record(1, entry.offset, bytes), true).await.expect("appended");
        }
        if fenced {
            store.order(id, ChunkOrder::Fence(Epoch(2))).await.expect("fenced");
        }
        let length = lengths.iter().sum::<usize>() as u64;
        if sealed {
            store.order(id, ChunkOrder::Seal { epoch: Epoch(3), length }).await.expect("sealed");
        }
        let file = std::fs::read(path(dir, id)).expect("read");
        all.push(Written { id, lengths: lengths.to_vec(), sealed, file });
    }
    all
}

/// Every byte that is told of an offset is the one that was written there; answers how many are told.
async fn told(store: &Store, chunk: &Written, length: usize) -> usize {
    let (whole, mut told) = (chunk.bytes(), 0);
    for entry in entries(&chunk.lengths).iter().filter(|entry| entry.end() <= length as u64) {
        // A client looks at the checksums, too; a daemon says nothing that does not fit them.
        let Ok(piece) = store.read(chunk.id, entry.offset, entry.length as usize).await else { continue };
        let mut rest = piece.data.clone();
        for unit in &piece.units {
            let bytes = rest.split_to(unit.length as usize);
            assert!(units_match(&bytes, &[unit.checksum]), "chunk {}: sent unverified", chunk.id);
        }
        let start = usize::try_from(piece.start).expect("small");
        assert!(piece.data[..] == whole[start..start + piece.data.len()], "chunk {}: wrong bytes", chunk.id);
        told += entry.length as usize;
    }
    told
}

#[tokio::test]
async fn a_thousand_flipped_bits_are_never_returned_as_data() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let all = written(dir.path()).await;
    for chunk in &all {
        std::fs::remove_file(path(dir.path(), chunk.id)).expect("removed");
    }
    let mut rng = SmallRng::seed_from_u64(7);
    let mut random = |below: usize| usize::try_from(rng.next_u64() % below as u64).expect("small");
    let (mut damaged, mut healed, mut shorter) = (0, 0, 0);
    for case in 0..1000 {
        let chunk = &all[case % all.len()];
        let (at, bit) = match random(4) {
            // Headers and what stands at the end matter most.
            0 => (random(FILE_HEADER + 80), random(8)),
            1 => (chunk.file.len() - 1 - random(150), random(8)),
            _ => (random(chunk.file.len()), random(8)),
        };
        let place = path(dir.path(), chunk.id);
        let mut bytes = chunk.file.clone();
        bytes[at] ^= 1 << bit;
        std::fs::write(&place, &bytes).expect("written");
        let store = open(dir.path()).await;
        let (whole, shown) = (chunk.bytes().len(), format!("case {case}, chunk {}, byte {at}", chunk.id));
        match store.found(chunk.id) {
            None => damaged += 1,
            Some(found) => {
                let length = usize::try_from(found.length).expect("small");
                assert!(length <= whole, "{shown}: longer than it ever was");
                let told = told(&store, chunk, length).await;
                let is_whole = length == whole && told == whole && !found.damaged;
                if chunk.sealed {
                    // Of a file that nobody has read yet a scrub tells.
                    let scrubbed = store.verify(chunk.id).await.is_ok() && found.sealed;
                    if scrubbed {
                        let now = std::fs::read(&place).expect("read");
                        // A header that was made anew does not know how much the chunk might have held before it was sealed.
                        let same = now[FILE_HEADER..] == chunk.file[FILE_HEADER..];
                        assert!(is_whole && same, "{shown}: a scrub found nothing");
                        healed += 1;
                    } else {
                        damaged += 1;
                    }
                } else if is_whole {
                    // Zeroes written ahead, or the epoch of a fence: no byte of data is behind it.
                    healed += 1;
                } else if length < whole && !found.damaged {
                    // The last record seems to be one that was never synced. The master knows how long the chunk must be.
                    shorter += 1;
                } else {
                    damaged += 1;
                }
            }
        }
        drop(store);
        // A damaged header may have made it nobody's: left alone, or removed.
        let _ = std::fs::remove_file(&place);
    }
    println!("{damaged} damaged, {healed} healed or without a meaning, {shorter} shorter");
    // Most of what an open chunk has on the disk are zeroes written ahead.
    assert!(damaged > 500, "{damaged} damaged, {healed} healed, {shorter} shorter");
}
