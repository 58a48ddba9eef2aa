//! Completes the state machine's answers with what is not replicated: addresses, access tokens and space.

use super::term::Term;
use crate::placement::Health;
use bytes::Bytes;
use dfs_proto::limits::TOKEN_TTL_MS;
use dfs_proto::token::Rights;
use dfs_proto::v1::{self, ChunkAccess, FsStats, answer::Body};
use dfs_proto::{ChunkId, SessionId};

/// What `statfs` shows while no daemon has reported yet: some programs divide by it.
const LEAST_TOTAL: u64 = 1 << 20;

/// Whose append rights an answer gives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Appends {
    /// Every chunk in it was allocated to the session just now.
    All,
    /// None: it is about reading.
    None,
}

impl Term {
    /// Fills in what the state machine left open.
    pub fn complete(&self, session: SessionId, answer: &mut v1::Answer, appends: Appends) {
        match &mut answer.body {
            Some(Body::Chunks(chunks)) => self.complete_all(session, &mut chunks.chunks, appends),
            Some(Body::Layout(layout)) => self.complete_all(session, &mut layout.chunks, Appends::None),
            Some(Body::Opened(v1::Opened { layout: Some(layout), .. })) => {
                self.complete_all(session, &mut layout.chunks, Appends::None);
            }
            Some(Body::StatFs(stats)) => self.complete_stats(stats),
            _ => {}
        }
    }

    fn complete_all(&self, session: SessionId, chunks: &mut [ChunkAccess], appends: Appends) {
        let expiry = self.shared.env.clock.system_ms().saturating_add(TOKEN_TTL_MS);
        for access in chunks {
            let append = match appends {
                Appends::All => true,
                Appends::None => false,
            };
            let rights = if append { Rights::READ.and(Rights::APPEND) } else { Rights::READ };
            let token = self.shared.key.issue(session, ChunkId(access.chunk), rights, expiry);
            access.token = Bytes::from(token);
            let mut healths: Vec<(Health, v1::Replica)> = std::mem::take(&mut access.replicas)
                .into_iter()
                .map(|mut replica| (self.nodes.locate(&mut replica), replica))
                .collect();
            if !append {
                // Readers try them in this order. For appends it stays as placed: the first one forwards.
                healths.sort_by_key(|(health, _)| *health);
            }
            access.replicas = healths.into_iter().map(|(_, replica)| replica).collect();
        }
    }

    fn complete_stats(&self, stats: &mut FsStats) {
        let space = self.nodes.space();
        let replicas = u64::from(self.replicas.max(1));
        let total = space.total / replicas;
        let free = (space.free / replicas).min(total);
        stats.total_bytes = total.max(stats.live_bytes).max(LEAST_TOTAL);
        stats.free_bytes = free.min(stats.total_bytes);
        stats.used_bytes = stats.total_bytes - stats.free_bytes;
    }
}
