//! The namespace against a plain model: a map from paths to what is there.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What the model keeps of an inode: everything that does not depend on time.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    File,
    Dir(BTreeMap<String, usize>),
}

/// Inodes by number in order of their making; number 0 is the root.
#[derive(Debug, Clone)]
struct Model {
    nodes: Vec<Node>,
    inos: Vec<u64>,
}

#[derive(Debug, Clone)]
enum Step {
    Make(usize, u8, bool),
    Unlink(usize, u8, bool),
    Rename(usize, u8, usize, u8, u8),
    Link(usize, usize, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let (node, name) = (|| any::<prop::sample::Index>().prop_map(|index| index.index(1 << 20)), || 0_u8..4);
    prop_oneof![
        4 => (node(), name(), any::<bool>()).prop_map(|(at, name, dir)| Step::Make(at, name, dir)),
        2 => (node(), name(), any::<bool>()).prop_map(|(at, name, dir)| Step::Unlink(at, name, dir)),
        5 => (node(), name(), node(), name(), 0_u8..3).prop_map(|(a, n, b, m, how)| Step::Rename(a, n, b, m, how)),
        2 => (node(), node(), name()).prop_map(|(what, at, name)| Step::Link(what, at, name)),
    ]
}

fn text(name: u8) -> String {
    char::from(b'a' + name).to_string()
}

impl Model {
    fn dir(&self, at: usize) -> Result<&BTreeMap<String, usize>, ErrorCode> {
        match &self.nodes[at] {
            Node::Dir(entries) => Ok(entries),
            Node::File => Err(ErrorCode::ErrorNotDir),
        }
    }

    fn dir_mut(&mut self, at: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[at] {
            Node::Dir(entries) => entries,
            Node::File => panic!("{at} is a file"),
        }
    }

    fn is_dir(&self, at: usize) -> bool {
        matches!(self.nodes[at], Node::Dir(_))
    }

    fn names(&self, at: usize) -> usize {
        let count = |node: &Node| match node {
            Node::Dir(entries) => entries.values().filter(|there| **there == at).count(),
            Node::File => 0,
        };
        self.nodes.iter().map(count).sum::<usize>() + usize::from(at == 0)
    }

    fn holds(&self, above: usize, below: usize) -> bool {
        above == below
            || match &self.nodes[above] {
                Node::Dir(entries) => entries.values().any(|child| self.holds(*child, below)),
                Node::File => false,
            }
    }

    fn make(&mut self, at: usize, name: &str, dir: bool) -> Result<(), ErrorCode> {
        if self.dir(at)?.contains_key(name) {
            return Err(ErrorCode::ErrorExists);
        }
        if self.names(at) == 0 {
            return Err(ErrorCode::ErrorNotFound);
        }
        let new = self.nodes.len();
        self.nodes.push(if dir { Node::Dir(BTreeMap::new()) } else { Node::File });
        self.dir_mut(at).insert(name.to_owned(), new);
        Ok(())
    }

    fn unlink(&mut self, at: usize, name: &str, dir: bool) -> Result<(), ErrorCode> {
        let victim = *self.dir(at)?.get(name).ok_or(ErrorCode::ErrorNotFound)?;
        match (dir, &self.nodes[victim]) {
            (true, Node::File) => return Err(ErrorCode::ErrorNotDir),
            (false, Node::Dir(_)) => return Err(ErrorCode::ErrorIsDir),
            (true, Node::Dir(entries)) if !entries.is_empty() => return Err(ErrorCode::ErrorNotEmpty),
            _ => {}
        }
        self.dir_mut(at).remove(name);
        Ok(())
    }

    fn link(&mut self, what: usize, at: usize, name: &str) -> Result<(), ErrorCode> {
        if self.dir(at)?.contains_key(name) {
            return Err(ErrorCode::ErrorExists);
        }
        if self.names(at) == 0 {
            return Err(ErrorCode::ErrorNotFound);
        }
        if self.is_dir(what) {
            return Err(ErrorCode::ErrorNotPermitted);
        }
        if self.names(what) == 0 {
            return Err(ErrorCode::ErrorNotFound);
        }
        self.dir_mut(at).insert(name.to_owned(), what);
        Ok(())
    }

    fn rename(
        &mut self,
        from: usize,
        name: &str,
        to: usize,
        new_name: &str,
        how: u8,
    ) -> Result<(), ErrorCode> {
        let (no_replace, exchange) = (how == 1, how == 2);
        self.dir(from)?;
        self.dir(to)?;
        let moved = *self.dir(from)?.get(name).ok_or(ErrorCode::ErrorNotFound)?;
        let target = self.dir(to)?.get(new_name).copied();
        match target {
            Some(_) if no_replace => return Err(ErrorCode::ErrorExists),
            None if exchange => return Err(ErrorCode::ErrorNotFound),
            _ => {}
        }
        if from != to && self.holds(moved, to) {
            return Err(ErrorCode::ErrorInvalid);
        }
        if let Some(target) = target {
            if from != to && self.holds(target, from) {
                return Err(if exchange { ErrorCode::ErrorInvalid } else { ErrorCode::ErrorNotEmpty });
            }
            if moved == target {
                return Ok(());
            }
            match (self.is_dir(moved), &self.nodes[target]) {
                _ if exchange => {}
                (true, Node::File) => return Err(ErrorCode::ErrorNotDir),
                (false, Node::Dir(_)) => return Err(ErrorCode::ErrorIsDir),
                (true, Node::Dir(entries)) if !entries.is_empty() => return Err(ErrorCode::ErrorNotEmpty),
                _ => {}
            }
        } else if self.names(to) == 0 {
            return Err(ErrorCode::ErrorNotFound);
        }
        self.dir_mut(from).remove(name);
        self.dir_mut(to).insert(new_name.to_owned(), moved);
        if let Some(target) = target.filter(|_| exchange) {
            self.dir_mut(from).insert(name.to_owned(), target);
        }
        Ok(())
    }
}

/// Runs a step on both; they must agree on the errno.
fn run(w: &World, model: &mut Model, step: &Step) {
    let count = model.nodes.len();
    let (expected, done) = match *step {
        Step::Make(at, name, dir) => {
            let (at, name) = (at % count, text(name));
            let kind = if dir { Kind::Dir } else { Kind::File };
            let made = w.make(&root(), model.inos[at], &name, kind, 0o755);
            let expected = model.make(at, &name, dir);
            if let Ok(attr) = &made {
                model.inos.push(attr.ino);
            }
            (expected, made.map(|_| ()))
        }
        Step::Unlink(at, name, dir) => {
            let (at, name) = (at % count, text(name));
            (model.unlink(at, &name, dir), w.unlink(&root(), model.inos[at], &name, dir).map(|_| ()))
        }
        Step::Link(what, at, name) => {
            let (what, at, name) = (what % count, at % count, text(name));
            let done = w.link(&root(), model.inos[what], model.inos[at], &name);
            (model.link(what, at, &name), done.map(|_| ()))
        }
        Step::Rename(from, name, to, new_name, how) => {
            let (from, to, name, new_name) = (from % count, to % count, text(name), text(new_name));
            let flags = ["", "noreplace", "exchange"][usize::from(how)];
            let done = w.rename(&root(), (model.inos[from], &name), (model.inos[to], &new_name), flags);
            (model.rename(from, &name, to, &new_name, how), done.map(|_| ()))
        }
    };
    assert_eq!(done.map_err(|error| error.code), expected, "{step:?}");
}

/// The state shows what the model holds, directory by directory.
fn compare(w: &World, model: &Model) {
    w.check();
    for (at, node) in model.nodes.iter().enumerate() {
        let Node::Dir(entries) = node else { continue };
        let page = w.page(model.inos[at], 0, 1000);
        let shown: BTreeMap<String, u64> = page
            .entries
            .iter()
            .map(|entry| (String::from_utf8(entry.name.to_vec()).unwrap(), entry.ino))
            .collect();
        let expected: BTreeMap<String, u64> =
            entries.iter().map(|(name, node)| (name.clone(), model.inos[*node])).collect();
        assert_eq!(shown, expected);
    }
    let named = (0..model.nodes.len()).filter(|at| model.names(*at) > 0).count();
    let orphaned = orphans(&w.kv, InodeNo(0), usize::MAX).unwrap().len();
    assert_eq!(named + orphaned, model.nodes.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn the_namespace_is_the_plain_one(steps in prop::collection::vec(step(), 1..60)) {
        let w = World::new();
        let mut model = Model { nodes: vec![Node::Dir(BTreeMap::new())], inos: vec![ROOT] };
        for step in &steps {
            run(&w, &mut model, step);
            compare(&w, &model);
        }
        let live: Vec<usize> = (0..model.nodes.len()).filter(|at| model.names(*at) > 0).collect();
        w.reap_all();
        w.check();
        prop_assert_eq!(cluster_row(&w.kv).unwrap().unwrap().files, live.len() as u64);
        for at in live {
            prop_assert!(w.attr(model.inos[at]).is_ok());
        }
    }

    /// One batch of many commands and many batches of one command leave the same bytes behind.
    #[test]
    fn batches_may_be_cut_anywhere(steps in prop::collection::vec(step(), 1..40), cut in 1_usize..10) {
        let (w, packed) = (World::new(), World::new());
        let mut model = Model { nodes: vec![Node::Dir(BTreeMap::new())], inos: vec![ROOT] };
        w.log.borrow_mut().clear();
        for step in &steps {
            run(&w, &mut model, step);
        }
        for commands in w.log.borrow().chunks(cut) {
            let batch = v1::Batch { version: BATCH_VERSION, commands: commands.to_vec() };
            let (writes, _) = apply(&packed.kv, &batch).unwrap();
            packed.kv.apply(&writes).unwrap();
        }
        prop_assert_eq!(dump(&w.kv), dump(&packed.kv));
    }
}

fn dump(kv: &MemKv) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    kv.scan(&[], &[u8::MAX], &mut |key, value| {
        rows.push((key.to_vec(), value.to_vec()));
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    rows
}
