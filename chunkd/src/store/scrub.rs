//! Finds damage before somebody reads it: every sealed chunk is read from the disk and verified, slowly and for ever.
//!
//! What is found is noted as damage that a read finds is: the next report names it, and the master has it made anew.

use super::Store;
use super::file::{Chunk, Phase};
use super::orders::Settled;
use super::recovery;
use dfs_env::disk::OpenMode;
use dfs_proto::error::ErrorCode;
use dfs_proto::{ChunkId, FsResult};
use std::time::Duration;

/// The pause between two rounds, and after a chunk at least.
const REST: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);

impl Chunk {
    /// Reads a sealed chunk from the disk, past what the machine has in memory, and verifies every byte of it: headers,
    /// payloads, footer. A chunk that is not sealed is left alone. Blocks.
    ///
    /// # Errors
    /// ERROR_CORRUPT with the first damage; what the disk says.
    pub fn verify(&self) -> FsResult<Settled> {
        let state = self.snapshot();
        let sealed = state.phase == Phase::Sealed;
        let settled = Settled { epoch: state.epoch, length: state.length, digest: state.digest, sealed };
        let Some((_, path)) = state.place.as_ref().filter(|_| state.phase == Phase::Sealed) else {
            return Ok(settled);
        };
        let io = |error| self.unreadable(0, &error);
        let file = self.shared.env.disk.open(path, OpenMode::Read).map_err(io)?;
        file.forget_cached(0..state.file_bytes).map_err(io)?;
        match recovery::verify(&*file, self.id).map_err(io)? {
            Ok(found) if found == (state.length, state.digest) => Ok(settled),
            Ok(_) => Err(self.corrupt(state.length, "it is not the file that was sealed")),
            Err(cause) => Err(self.error(ErrorCode::ErrorCorrupt, cause)),
        }
    }
}

impl Store {
    /// Verifies one chunk; see [`Chunk::verify`].
    ///
    /// # Errors
    /// See [`Chunk::verify`].
    pub async fn verify(&self, id: ChunkId) -> FsResult<Settled> {
        let chunk = self.existing(id)?;
        self.0.env.blocking(move || Ok(chunk.noting(|| chunk.verify()))).await?
    }

    /// Verifies all chunks, one after the other, so many bytes a second at most; 0: none.
    pub async fn scrub(&self, bytes_per_second: u64) {
        if bytes_per_second == 0 {
            return;
        }
        // A daemon that is restarted often must not verify the same chunks every time.
        let mut after = self.0.env.random();
        loop {
            let found = self.report();
            let sealed: Vec<u64> = found.iter().filter(|one| one.sealed).map(|one| one.chunk).collect();
            if sealed.is_empty() {
                tokio::time::sleep(REST).await;
                continue;
            }
            let first = sealed.partition_point(|chunk| *chunk <= after % (sealed[sealed.len() - 1] + 1));
            for chunk in sealed[first..].iter().chain(&sealed[..first]) {
                let bytes = match self.verify(ChunkId(*chunk)).await {
                    Ok(settled) => settled.length,
                    // Deleted since the round began.
                    Err(error) if error.code == ErrorCode::ErrorNoChunk => continue,
                    Err(error) => {
                        tracing::error!(%error, "scrub");
                        0
                    }
                };
                tokio::time::sleep(PAUSE + Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64))
                    .await;
            }
            tracing::info!(chunks = sealed.len(), "every sealed chunk has been verified");
            after = 0;
            tokio::time::sleep(REST).await;
        }
    }
}
