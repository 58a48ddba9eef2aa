//! A backup: the state as of one log entry, as the bytes of a snapshot file, while entries go on being applied.

use super::snapshot::{Draft, SnapshotData, SnapshotWriter};
use super::store::{Shared, StateExport};
use super::{Piece, codec};
use bytes::Bytes;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A backup that is being taken, piece by piece.
pub struct Backup {
    export: StateExport,
    /// None after the end.
    writer: Option<SnapshotWriter>,
}

impl Backup {
    /// Begins a backup of the state as it is now.
    ///
    /// # Errors
    /// When the state store cannot be read.
    pub fn begin(shared: &Arc<Shared>) -> io::Result<Self> {
        let (export, header) = shared.export_with_header()?;
        let writer = SnapshotWriter::new(Draft::Memory(Vec::new()), &header)?;
        Ok(Self { export, writer: Some(writer) })
    }

    /// The next bytes, perhaps none; None after the last. Blocks.
    ///
    /// # Errors
    /// When the state store cannot be read, or another leader's state took its place.
    pub fn piece(&mut self) -> io::Result<Option<Bytes>> {
        let Some(mut writer) = self.writer.take() else { return Ok(None) };
        let bytes = match self.export.next()? {
            Piece::Rows(rows) => {
                writer.block(&rows)?;
                let bytes = writer.take();
                self.writer = Some(writer);
                bytes
            }
            Piece::End => writer.finish()?.take(),
            Piece::Cancelled => return Err(io::Error::other("another leader's state came")),
        };
        Ok(Some(bytes.into()))
    }
}

/// Reads a backup file from end to end: of which cluster it is, and as of which log entry.
///
/// # Errors
/// When it cannot be read, or is damaged, cut off or of another format: one line, without the file's name.
pub fn check(path: &Path) -> io::Result<(String, u64)> {
    let row = SnapshotData::file(path)?.verify().map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => codec::invalid("it is cut off, or no backup at all"),
        _ => error,
    })?;
    let index = row.last().map_or(0, |last| last.index);
    Ok((row.cluster, index))
}
