//! What a simulated client does, and what it must see: random operations in a directory of its own, each checked
//! against a plain model of that directory.
//!
//! The operations are chosen so that one applied twice or not at all shows at once: exclusive creates of fresh names,
//! unlinks and renames of names that exist, appends whose bytes are all different. That is I6 as programs see it; the
//! checker in `checkers/i6.rs` counts what the masters applied.

use dfs_client::{Client, OpenFlags, Privileges};
use dfs_proto::InodeNo;
use dfs_proto::v1::{Attr, Create, Cred, Kind, SetAttr};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;

const FILES_MAX: usize = 12;
const WRITE_MAX: usize = 40 << 10;
/// Long enough that the client sends records before anybody asks for a sync: what a crash can lose.
const STREAM: usize = 5 << 18;

/// A directory as it must be: name to (inode, content).
pub type Model = BTreeMap<String, (InodeNo, Vec<u8>)>;

/// One client's directory, its model, and the randomness that drives it.
pub struct Workload {
    client: Client,
    cred: Cred,
    dir: InodeNo,
    model: Model,
    random: SmallRng,
    names: u64,
    /// Changes of the directory's names that were acknowledged.
    changes: u64,
    /// Operations that were acknowledged.
    pub done: u64,
}

/// What went wrong, in words.
pub type Violation = String;

fn during<T>(what: &str, result: dfs_proto::FsResult<T>) -> Result<T, Violation> {
    result.map_err(|error| format!("{what} failed: {error}"))
}

fn ino(attr: &Attr) -> InodeNo {
    InodeNo(attr.ino)
}

impl Workload {
    /// Makes the directory `name` below the root.
    pub async fn new(client: Client, name: &str, seed: u64) -> Result<Self, Violation> {
        let cred = Cred::default();
        let create = Create {
            parent: InodeNo::ROOT.get(),
            name: name.as_bytes().to_vec().into(),
            kind: Kind::Dir.into(),
            mode: 0o755,
            exclusive: true,
            ..Create::default()
        };
        let dir = during("mkdir", client.create(&cred, create).await)?;
        let dir = ino(&dir.attr);
        let random = SmallRng::seed_from_u64(seed);
        Ok(Self { client, cred, dir, model: Model::new(), random, names: 0, changes: 0, done: 0 })
    }

    /// One random operation. An error is a violation: enough of the cluster always comes back in time.
    pub async fn step(&mut self) -> Result<(), Violation> {
        let known = self.pick();
        match (self.random.random_range(0..10), known) {
            (0..=2, _) | (_, None) => self.create().await?,
            (3, Some(name)) => self.append(&name).await?,
            (4, Some(name)) => self.overwrite(&name).await?,
            (5, Some(name)) => self.truncate(&name).await?,
            (6, Some(name)) => self.rename(&name).await?,
            (7, Some(name)) => self.unlink(&name).await?,
            (_, Some(name)) => self.verify(&name).await?,
        }
        self.done += 1;
        Ok(())
    }

    /// The directory, and how many changes of its names were acknowledged.
    pub fn name_changes(&self) -> (InodeNo, u64) {
        (self.dir, self.changes)
    }

    /// What the directory must hold; consumes the workload.
    pub fn into_model(self) -> Model {
        self.model
    }

    fn pick(&mut self) -> Option<String> {
        let index = self.random.random_range(0..self.model.len().max(1));
        self.model.keys().nth(index).cloned()
    }

    fn fresh(&mut self) -> String {
        self.names += 1;
        format!("f{}", self.names)
    }

    fn bytes(&mut self) -> Vec<u8> {
        // Mostly small files, now and then one of several checksum units, sometimes a long one.
        let length = match self.random.random_range(0..40) {
            0..4 => STREAM,
            4..12 => self.random.random_range(1..=WRITE_MAX),
            _ => self.random.random_range(1..=512),
        };
        let mut bytes = vec![0; length];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    async fn create(&mut self) -> Result<(), Violation> {
        if self.model.len() >= FILES_MAX {
            let name = self.model.keys().next().cloned().unwrap_or_default();
            return self.unlink(&name).await;
        }
        let (name, bytes) = (self.fresh(), self.bytes());
        let create = Create {
            parent: self.dir.get(),
            name: name.as_bytes().to_vec().into(),
            kind: Kind::File.into(),
            mode: 0o644,
            exclusive: true,
            open: true,
            ..Create::default()
        };
        let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let (entry, file) = during("create", self.client.create_open(&self.cred, create, flags).await)?;
        during("write", self.client.write(&file, 0, &bytes, &Privileges::Keep).await)?;
        if bytes.len() >= STREAM {
            // Records are sent and nobody asks for a sync yet: a crash now has something to lose.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
        if self.random.random_range(0..3) == 0 {
            during("fsync", self.client.fsync(file.ino).await)?;
        }
        during("flush", self.client.flush(&file).await)?;
        during("release", self.client.release(file).await)?;
        self.model.insert(name, (ino(&entry.attr), bytes));
        self.changes += 1;
        Ok(())
    }

    async fn write_at(&mut self, name: &str, offset: usize, bytes: &[u8]) -> Result<(), Violation> {
        let file_ino = self.model[name].0;
        let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let file = during("open", self.client.open(&self.cred, file_ino, flags).await)?;
        during("write", self.client.write(&file, offset as u64, bytes, &Privileges::Keep).await)?;
        during("flush", self.client.flush(&file).await)?;
        during("release", self.client.release(file).await)?;
        let content = &mut self.model.get_mut(name).expect("picked from the model").1;
        if content.len() < offset + bytes.len() {
            content.resize(offset + bytes.len(), 0);
        }
        content[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    async fn append(&mut self, name: &str) -> Result<(), Violation> {
        let (end, bytes) = (self.model[name].1.len(), self.bytes());
        self.write_at(name, end, &bytes).await
    }

    async fn overwrite(&mut self, name: &str) -> Result<(), Violation> {
        // Past the end too: that leaves a hole of zeroes.
        let offset = self.random.random_range(0..=self.model[name].1.len() + 100);
        let bytes = self.bytes();
        self.write_at(name, offset, &bytes).await
    }

    async fn truncate(&mut self, name: &str) -> Result<(), Violation> {
        let (file, length) = (self.model[name].0, self.model[name].1.len());
        let size = self.random.random_range(0..=length + 50);
        let change = SetAttr { ino: file.get(), size: Some(size as u64), ..SetAttr::default() };
        during("truncate", self.client.setattr(&self.cred, change).await)?;
        self.model.get_mut(name).expect("picked from the model").1.resize(size, 0);
        Ok(())
    }

    async fn rename(&mut self, name: &str) -> Result<(), Violation> {
        // Half of the time over another file.
        let target = match self.pick() {
            Some(other) if other != name && self.random.random_range(0..2) == 0 => other,
            _ => self.fresh(),
        };
        let (dir, old, new) = (self.dir, name.as_bytes(), target.as_bytes());
        during("rename", self.client.rename(&self.cred, dir, old, dir, new, false, false).await)?;
        let moved = self.model.remove(name).expect("picked from the model");
        self.model.insert(target, moved);
        self.changes += 1;
        Ok(())
    }

    async fn unlink(&mut self, name: &str) -> Result<(), Violation> {
        during("unlink", self.client.unlink(&self.cred, self.dir, name.as_bytes()).await)?;
        self.model.remove(name);
        self.changes += 1;
        Ok(())
    }

    async fn verify(&mut self, name: &str) -> Result<(), Violation> {
        verify_file(&self.client, &self.cred, self.dir, name, &self.model[name]).await
    }
}

async fn verify_file(
    client: &Client,
    cred: &Cred,
    dir: InodeNo,
    name: &str,
    (number, content): &(InodeNo, Vec<u8>),
) -> Result<(), Violation> {
    let attr = during("lookup", client.lookup(cred, dir, name.as_bytes()).await)?;
    if ino(&attr) != *number || attr.size != content.len() as u64 || attr.nlink != 1 {
        return Err(format!(
            "{name}: stat shows {attr:?}, expected inode {number}, {} bytes, 1 link",
            content.len()
        ));
    }
    let seen = read_inode(client, cred, *number).await?;
    match seen.iter().zip(content).position(|(a, b)| a != b) {
        None if seen.len() == content.len() => Ok(()),
        None => Err(format!("{name}: {} bytes read, {} expected", seen.len(), content.len())),
        Some(at) => Err(format!("{name}: byte {at} of {} differs", content.len())),
    }
}

/// All bytes of a file of a directory.
pub async fn read_whole(
    client: &Client,
    cred: &Cred,
    dir: InodeNo,
    name: &str,
) -> Result<Vec<u8>, Violation> {
    let attr = during("lookup", client.lookup(cred, dir, name.as_bytes()).await)?;
    read_inode(client, cred, ino(&attr)).await
}

async fn read_inode(client: &Client, cred: &Cred, file: InodeNo) -> Result<Vec<u8>, Violation> {
    let flags = OpenFlags { read: true, ..OpenFlags::default() };
    let file = during("open", client.open(cred, file, flags).await)?;
    let mut seen = Vec::new();
    loop {
        let part = during("read", client.read(&file, seen.len() as u64, 64 << 10).await)?;
        if part.is_empty() {
            break;
        }
        seen.extend_from_slice(&part);
    }
    during("release", client.release(file).await)?;
    Ok(seen)
}

/// The names in a directory, sorted.
pub async fn list(client: &Client, dir: InodeNo) -> Result<Vec<String>, Violation> {
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        let page = during("readdir", client.read_dir(&Cred::default(), dir, cookie, 5, true).await)?;
        names.extend(page.entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()));
        match page.entries.last() {
            Some(last) if !page.end => cookie = last.cookie,
            _ => break,
        }
    }
    names.sort();
    Ok(names)
}

/// Checks that `client` sees exactly what the model of directory `name` says: every name once, every byte.
pub async fn verify_dir(client: &Client, name: &str, model: &Model) -> Result<(), Violation> {
    let cred = Cred::default();
    let dir = during("lookup", client.lookup(&cred, InodeNo::ROOT, name.as_bytes()).await)?;
    let names = list(client, ino(&dir)).await?;
    if !names.iter().eq(model.keys()) {
        return Err(format!("{name} lists {names:?}, expected {:?}", model.keys().collect::<Vec<_>>()));
    }
    for (file, expected) in model {
        verify_file(client, &cred, ino(&dir), file, expected).await?;
    }
    Ok(())
}
