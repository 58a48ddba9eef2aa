//! Identifiers and byte units as types of their own, so that one is never mistaken for another.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The bare number, for the wire, the disk and arithmetic.
            #[must_use]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number!(/// An inode's number, unique for the life of a cluster. The root directory is 1.
    InodeNo(u64));
number!(/// A chunk's number, unique for the life of a cluster.
    ChunkId(u64));
number!(/// A chunk daemon's number: random, made at its first start, kept in its data directories.
    NodeId(u64));
number!(/// A client session's number, unique for the life of a cluster.
    SessionId(u64));
number!(/// How often the right to append to a chunk was withdrawn. A new chunk has epoch 1.
    Epoch(u32));
number!(/// A position, in bytes.
    ByteOffset(u64));
number!(/// A length, in bytes.
    ByteLen(u64));

impl InodeNo {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

impl Epoch {
    /// The epoch of a chunk that was never fenced.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl std::ops::Add<ByteLen> for ByteOffset {
    type Output = Self;
    fn add(self, len: ByteLen) -> Self {
        Self(self.0 + len.0)
    }
}

impl std::ops::Sub for ByteOffset {
    type Output = ByteLen;
    fn sub(self, earlier: Self) -> ByteLen {
        ByteLen(self.0 - earlier.0)
    }
}
