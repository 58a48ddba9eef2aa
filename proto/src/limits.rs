//! Every limit of the system in one file. Sizes in bytes, times in milliseconds unless the name says otherwise.

/// The longest file name.
pub const NAME_MAX: usize = 255;
/// The longest path and the longest symlink text.
pub const PATH_MAX: usize = 4096;
/// The longest extended attribute name.
pub const XATTR_NAME_MAX: usize = 255;
/// The longest extended attribute value.
pub const XATTR_VALUE_MAX: usize = 64 << 10;
/// The longest list of extended attribute names, zero bytes included.
pub const XATTR_LIST_MAX: usize = 64 << 10;
/// The most hard links an inode may have.
pub const LINK_MAX: u32 = 65_000;
/// The largest file size: what off_t holds.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;
/// The most supplementary groups a credential carries (Linux: NGROUPS_MAX).
pub const GROUPS_MAX: usize = 65_536;

/// The most masters.
pub const MASTERS_MAX: usize = 7;
/// The most addresses of masters that a client or a chunk daemon keeps: its own settings, and what masters told it.
pub const MASTER_ADDRESSES_MAX: usize = 32;
/// A master that was added votes once it lacks no more than so many entries.
pub const LEARNER_LAG_ENTRIES: u64 = 1000;
/// What a master keeps free on the disk of its data directory (setting).
pub const MASTER_RESERVE: u64 = 64 << 20;
/// How long the leader waits for another master to say that it lives, and for a change of the group to be agreed on.
pub const MASTER_PROBE_MS: u64 = 1_000;
pub const MASTER_CHANGE_MS: u64 = 10_000;
/// How long a leader that hands over waits for the next one: to catch up, and to lead.
pub const HAND_OVER_MS: u64 = 3_000;
/// How many times a leader that is to be removed hands over before it says that it cannot.
pub const HAND_OVERS_MAX: u32 = 3;

/// How long a chunk grows unless the cluster or a directory says otherwise.
pub const CHUNK_SIZE_DEFAULT: u64 = 64 << 20;
/// The smallest and largest chunk size that may be configured.
pub const CHUNK_SIZE_MIN: u64 = 8;
pub const CHUNK_SIZE_MAX: u64 = 4 << 30;
/// The most replicas a chunk may have.
pub const REPLICAS_MAX: u32 = 9;
/// The unit of checksums within a record, counted from the record's beginning.
pub const CHECKSUM_UNIT: usize = 16 << 10;
/// The longest payload of one record, and of one read.
pub const RECORD_MAX: usize = 1 << 20;
/// The longest range one ReadRequest may name.
pub const READ_MAX: usize = 1 << 20;

/// The HTTP/2 frame that bulk messages fit into: a record and its header (the default 16 KiB doubles the CPU cost).
pub const FRAME_SIZE: u32 = (1 << 20) + (64 << 10);
/// The longest gRPC message either side accepts.
pub const MESSAGE_MAX: usize = 8 << 20;
/// HTTP/2 windows: one stream's and one connection's.
pub const STREAM_WINDOW: u32 = 16 << 20;
pub const CONNECTION_WINDOW: u32 = 64 << 20;

/// The most requests packed into one frame of a session, and the most bytes they may take together.
pub const FRAME_REQUESTS_MAX: usize = 1024;
pub const FRAME_BYTES_MAX: usize = 2 << 20;
/// The most requests a session may have unanswered on behalf of programs; the client holds back beyond.
pub const SESSION_WINDOW: usize = 4096;
/// The most that may be unanswered besides, so that bytes others wait for can be committed whatever programs wait for. With
/// closes and cancels, for which nobody waits, a session never has twice its window; the master refuses that.
pub const SESSION_RESERVE: usize = 512;
/// The most answers the master keeps for one session to answer a repeated mutation.
pub const DEDUP_WINDOW: usize = 2 * SESSION_WINDOW;
/// The most sessions that may end before a change is answered; then it fails.
pub const EARLIER_SESSIONS_MAX: usize = 8;
/// The answers of a session that ended without a goodbye are kept for so long, in seconds, and those of so many sessions.
pub const ENDED_SESSION_KEPT_S: i64 = 86_400;
pub const ENDED_SESSIONS_MAX: usize = 4_096;
/// The most commands and bytes in one Raft entry.
pub const BATCH_COMMANDS_MAX: usize = 4096;
pub const BATCH_BYTES_MAX: usize = 4 << 20;
/// The most entries in one directory page.
pub const DIR_PAGE_MAX: u32 = 1024;
/// The most slices in one layout answer and in one commit.
pub const LAYOUT_SLICES_MAX: u32 = 4096;
pub const COMMIT_SLICES_MAX: usize = 4096;
/// The most chunks one allocation may ask for.
pub const ALLOC_CHUNKS_MAX: u32 = 256;
/// The most chunks one GetChunks may name.
pub const GET_CHUNKS_MAX: usize = 1024;

/// The most slices and attributes that one command frees of orphans, and the most items of lists in commands that have
/// no limit of their own.
pub const REAP_ROWS_MAX: usize = 4096;

/// The most faults that one command mends: each may have a chunk's extents counted.
pub const MEND_FAULTS_MAX: usize = 64;

/// How old a proof of an order may be at most, and how far ahead, and how many that were used a leader remembers.
pub const PROOF_MS: u64 = 300_000;
pub const PROOFS_MAX: usize = 4096;

/// How long a session outlives its last keep-alive.
pub const SESSION_TTL_MS: u64 = 20_000;
/// How long a session may take to give a lease back without committing anything of the inode meanwhile; then it is cut off.
pub const RECALL_MS: u64 = 10_000;
/// How long before a session may be given up its client stops to believe that it has it.
pub const LEASE_MARGIN_MS: u64 = 2_000;
/// The most leases of one client; it gives back those it used least.
pub const LEASES_PER_CLIENT: usize = 262_144;
/// How often a client says that it lives.
pub const KEEP_ALIVE_MS: u64 = 2_000;
/// How long an append may make no progress before the chunk is given up.
pub const APPEND_PROGRESS_MS: u64 = 2_000;
/// How often a chunk daemon reports; after how many milliseconds of silence it is suspect and dead.
pub const HEARTBEAT_MS: u64 = 1_000;
pub const NODE_SUSPECT_MS: u64 = 3_000;
pub const NODE_DEAD_MS: u64 = 10_000;
/// How long sealing waits for daemons that do not answer before it goes on without them.
pub const SEAL_WAIT_MS: u64 = 2_000;
/// How long one attempt to connect may take.
pub const CONNECT_MS: u64 = 2_000;
/// How long a client operation may wait for the cluster before it fails (setting; 0 waits for ever).
pub const OPERATION_MS: u64 = 60_000;
/// How much longer a request of the kernel may take whose parts have each stayed within that.
pub const OPERATION_SLACK_MS: u64 = 2_000;
/// How long uncommitted bytes stay in a client at most before they are synced and committed.
pub const WRITE_BEHIND_MS: u64 = 1_000;
/// How long an access token is good.
pub const TOKEN_TTL_MS: u64 = 3_600_000;

/// A daemon that takes so many bytes more will not be full before whoever writes there hears of it.
pub const ROOMY_BYTES: u64 = 1 << 30;

/// The client's memory for bytes that are not committed yet, and for bytes read.
pub const WRITE_MEMORY: u64 = 256 << 20;
pub const READ_CACHE: u64 = 256 << 20;
/// The most entries of the client's attribute and slice caches.
pub const ATTR_CACHE_ENTRIES: usize = 200_000;

/// A chunk daemon: the most requests one append stream and one read stream may have unanswered.
pub const APPEND_STREAM_REQUESTS: usize = 256;
pub const READ_STREAM_REQUESTS: usize = 64;
/// The most payload bytes it holds for appends of clients, as much again for appends that other daemons forward (these
/// wait for nobody, so two full daemons never wait for each other), and for answers to reads.
pub const APPEND_MEMORY: usize = 256 << 20;
pub const READ_MEMORY: usize = 256 << 20;
/// The most records and bytes it writes at once, and up to how many bytes it writes without leaving the runtime.
pub const WRITE_BATCH_RECORDS: usize = 64;
pub const WRITE_BATCH_BYTES: usize = 4 << 20;
pub const WRITE_INLINE_BYTES: usize = 64 << 10;
/// How many fdatasyncs it runs at once, and how many unsynced bytes of a chunk start one before anybody asks.
pub const SYNCS_AT_ONCE: usize = 16;
pub const UNSYNCED_BYTES: u64 = 8 << 20;
/// Sealed chunk files kept open, and entries of their indexes kept in memory (24 bytes each).
pub const OPEN_FILES: usize = 1024;
pub const INDEX_ENTRIES: usize = 1 << 20;
/// The most records one forwarding stream may have unanswered; after how long without any answer it is given up
/// (a little before the client gives up, so that the answer can name the culprit); how long one stays open unused.
pub const FORWARD_REQUESTS: usize = 1024;
pub const FORWARD_PROGRESS_MS: u64 = APPEND_PROGRESS_MS * 9 / 10;
pub const FORWARD_IDLE_MS: u64 = 60_000;
/// About how many payload bytes and at most how many records one message of a copy carries, how long its source may say nothing, and for how long the
/// token is good that a daemon shows another.
pub const FETCH_BYTES: u64 = 1 << 20;
pub const FETCH_RECORDS: usize = 4096;
pub const FETCH_PROGRESS_MS: u64 = 10_000;
pub const FETCH_TOKEN_MS: u64 = 600_000;
/// How many copies a daemon makes at once; how long one may take at least, and besides for each so many bytes a second.
pub const COPIES_PER_NODE: usize = 2;
pub const COPY_WAIT_MS: u64 = 60_000;
pub const SLOWEST_COPY: u64 = 1 << 20;
/// Bytes that each daemon copies in a second at most to make up for lost replicas (setting; 0: no limit).
pub const REPAIR_BANDWIDTH: u64 = 200 << 20;
/// How long whoever takes or makes a backup may stand still.
pub const BACKUP_PROGRESS_MS: u64 = 30_000;
/// Bytes of chunks that are compacted which each daemon copies in a second at most (setting; 0: no limit).
pub const COMPACTION_BANDWIDTH: u64 = 64 << 20;
/// For how long nothing of a half-dead chunk may have been removed before it is compacted (setting), and after how many times
/// as long it is compacted all the same.
pub const COMPACT_AFTER_MS: u64 = 10_000;
pub const COMPACT_PATIENCE: u32 = 6;
/// Compactions at once; the most chunks and pieces of them that one makes a chunk of; extents moved with one command.
pub const COMPACTIONS_AT_ONCE: usize = 4;
/// How many times the rest of a chunk that cannot be compacted is doubled at most.
pub const COMPACT_RESTS_DOUBLED: u32 = 6;
/// What gathering a piece may take besides its bytes: a round trip to another daemon, and its place on a disk.
pub const GATHER_PIECE_MS: u64 = 5;
pub const GATHER_SOURCES_MAX: usize = 64;
pub const GATHER_PIECES_MAX: usize = 65_536;
pub const MOVES_PER_COMMAND: usize = 512;
/// Files whose replicas were set that are looked at together; of how many chunks it is remembered meanwhile who wants what they are
/// to have; and chunks that are told with one command how many replicas they are to have.
pub const REVIEW_FILES: usize = 1024;
pub const REVIEW_CHUNKS: usize = 65_536;
pub const WISHES_PER_COMMAND: usize = 512;
/// The most chunks in one report and orders carried out at once.
pub const REPORT_CHUNKS: usize = 4096;
pub const ORDERS_AT_ONCE: usize = 64;
