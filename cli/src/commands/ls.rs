//! `dfs ls`

use super::{Context, Each};
use crate::Result;
use crate::format;
use crate::output::table;
use crate::remote::{Last, Remote, join};
use dfs_client::InodeNo;
use dfs_client::v1::{Attr, Kind};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStringExt;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(value_name = "PATH", default_value = "/")]
    paths: Vec<OsString>,
    /// Modes, owners, sizes and times
    #[arg(short)]
    long: bool,
    /// Directories below, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Names that begin with a dot, too
    #[arg(short, long)]
    all: bool,
    /// Directories themselves, not what is in them
    #[arg(short, long)]
    directory: bool,
    /// Exact sizes
    #[arg(short, long)]
    bytes: bool,
}

/// One line of a listing.
struct Row {
    path: Vec<u8>,
    name: Vec<u8>,
    attr: Attr,
    target: Option<Vec<u8>>,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let listing = Listing { context, remote, args: &args, people: People::load() };
            let paths: Vec<Vec<u8>> = args.paths.iter().map(|path| path.clone().into_vec()).collect();
            let headed = args.recursive || paths.len() > 1;
            let (mut each, mut values, mut first) = (Each::new(), Vec::new(), true);
            for path in paths {
                let result = listing.path(path, headed, &mut first, &mut values).await;
                each.note(result)?;
            }
            if context.output.json {
                context.output.value(&Value::Array(values))?;
            }
            each.end()
        })
        .await
}

struct Listing<'a> {
    context: &'a Context,
    remote: &'a Remote,
    args: &'a Args,
    people: People,
}

impl Listing<'_> {
    async fn path(&self, path: Vec<u8>, headed: bool, first: &mut bool, values: &mut Vec<Value>) -> Result {
        // As in ls: -l and -d show a symlink itself.
        let last = if self.args.long || self.args.directory { Last::Keep } else { Last::Follow };
        let (_, attr) = self.remote.existing(&path, last).await?;
        if attr.kind() != Kind::Dir || self.args.directory {
            let row = self.row(path.clone(), path, attr).await?;
            return self.show(None, &[row], first, values);
        }
        let mut todo = vec![(path, InodeNo(attr.ino))];
        let mut each = Each::new();
        while let Some((path, ino)) = todo.pop() {
            let Some(rows) = each.note(self.directory(&path, ino).await)? else { continue };
            if self.args.recursive {
                // Last in, first out: the last name goes in first.
                let below = rows.iter().rev().filter(|row| row.attr.kind() == Kind::Dir);
                todo.extend(below.map(|row| (row.path.clone(), InodeNo(row.attr.ino))));
            }
            self.show(headed.then_some(&path[..]), &rows, first, values)?;
        }
        each.end()
    }

    async fn directory(&self, path: &[u8], ino: InodeNo) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for entry in self.remote.list(ino, path).await? {
            let hidden = entry.name.starts_with(b".") && !self.args.all;
            if let Some(attr) = entry.attr.filter(|_| !hidden) {
                rows.push(self.row(join(path, &entry.name), entry.name.to_vec(), attr).await?);
            }
        }
        Ok(rows)
    }

    async fn row(&self, path: Vec<u8>, name: Vec<u8>, attr: Attr) -> Result<Row> {
        let wanted = attr.kind() == Kind::Symlink && (self.args.long || self.context.output.json);
        let target = if wanted {
            // A symlink that vanishes while it is listed is listed without its target.
            self.remote.client.readlink(InodeNo(attr.ino)).await.ok().map(|target| target.to_vec())
        } else {
            None
        };
        Ok(Row { path, name, attr, target })
    }

    fn show(
        &self,
        heading: Option<&[u8]>,
        rows: &[Row],
        first: &mut bool,
        values: &mut Vec<Value>,
    ) -> Result {
        if self.context.output.json {
            values.extend(
                rows.iter().map(|row| format::attr_json(&row.path, &row.attr, row.target.as_deref())),
            );
            return Ok(());
        }
        let mut text = String::new();
        if let Some(heading) = heading {
            if !*first {
                text.push('\n');
            }
            text.push_str(&format!("{}:\n", format::name(heading)));
        }
        *first = false;
        if self.args.long {
            let cells: Vec<Vec<String>> = rows.iter().map(|row| self.long(row)).collect();
            text.push_str(&table(&["", ">", "", "", ">", "", ""], &cells));
        } else {
            let names: Vec<String> = rows.iter().map(|row| format::name(&row.name)).collect();
            text.push_str(&columns(&names, terminal_width()));
        }
        self.context.output.text(&text)
    }

    fn long(&self, row: &Row) -> Vec<String> {
        let attr = &row.attr;
        let size = match attr.kind() {
            Kind::Char | Kind::Block => {
                format!("{},{}", libc::major(attr.rdev.into()), libc::minor(attr.rdev.into()))
            }
            _ if self.args.bytes => attr.size.to_string(),
            _ => format::size(attr.size),
        };
        let mut name = format::name(&row.name);
        if let Some(target) = &row.target {
            name.push_str(&format!(" -> {}", format::name(target)));
        }
        vec![
            format::mode(attr),
            attr.nlink.to_string(),
            self.people.user(attr.uid),
            self.people.group(attr.gid),
            size,
            format::local_time(attr.mtime),
            name,
        ]
    }
}

/// The names of users and groups on this machine.
struct People {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl People {
    fn load() -> Self {
        Self { users: Self::table("/etc/passwd"), groups: Self::table("/etc/group") }
    }

    /// passwd(5) and group(5) both have the name first and the number third. Without them numbers are shown.
    fn table(path: &str) -> HashMap<u32, String> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                Some((fields.nth(1)?.parse().ok()?, name.to_owned()))
            })
            .collect()
    }

    fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

/// The width of the terminal; 0 when standard output is none.
fn terminal_width() -> usize {
    if !std::io::stdout().is_terminal() {
        return 0;
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize to the pointer, which is valid for the call.
    let result = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if result == 0 && size.ws_col > 0 { usize::from(size.ws_col) } else { 80 }
}

/// Names in columns that fit the width, downwards as in ls; width 0: one a line.
fn columns(names: &[String], width: usize) -> String {
    let widest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) + 2;
    let across = (width / widest).max(1);
    let down = names.len().div_ceil(across);
    let mut text = String::new();
    for row in 0..down {
        let mut line = String::new();
        for name in names.iter().skip(row).step_by(down) {
            line.push_str(name);
            line.push_str(&" ".repeat(widest - name.chars().count()));
        }
        text.push_str(line.trim_end_matches("  "));
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    text
}

/// What a directory's entries look like in JSON, nested. Shared with `tree`.
pub fn nested(path: &[u8], attr: &Attr, children: &[Value]) -> Value {
    let mut value = format::attr_json(path, attr, None);
    if attr.kind() == Kind::Dir {
        value["entries"] = json!(children);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_in_columns_as_in_ls() {
        let names: Vec<String> = ["a", "bb", "ccc", "d", "e"].map(String::from).into();
        assert_eq!(columns(&names, 10), "a    d\nbb   e\nccc\n");
        assert_eq!(columns(&names, 0), "a\nbb\nccc\nd\ne\n");
        assert_eq!(columns(&[], 80), "");
    }
}
