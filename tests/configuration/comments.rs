//! The doc comments at the fields of the configuration's types, read from their source: they are its documentation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A type of the source: its fields, or its variants, which in YAML are fields as well.
#[derive(Debug, Default)]
struct Type {
    fields: BTreeMap<String, Field>,
}

#[derive(Debug)]
struct Field {
    comment: String,
    /// Name of the type of what it holds, or of each of what it holds.
    of: String,
}

/// All types whose fields may be settings, by name.
pub(super) struct Comments {
    /// Those of `src/config`, which go first.
    own: BTreeMap<String, Type>,
    /// Those of the modules; two of one name are none.
    others: BTreeMap<String, Option<Type>>,
    /// Other names that `src/config` gives to types of the modules.
    aliases: BTreeMap<String, String>,
}

impl Comments {
    /// Reads the source below `src`.
    pub(super) fn read(src: &Path) -> Self {
        let mut comments = Self { own: BTreeMap::new(), others: BTreeMap::new(), aliases: BTreeMap::new() };
        comments.read_dir(src, &src.join("config"));
        comments
    }

    fn read_dir(&mut self, dir: &Path, config: &Path) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                self.read_dir(&path, config);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let source = fs::read_to_string(&path).unwrap();
            if path.starts_with(config) {
                self.aliases.extend(aliases(&source));
            }
            for (name, found) in types(&source) {
                if path.starts_with(config) {
                    assert!(self.own.insert(name.clone(), found).is_none(), "src/config has two types {name}");
                } else {
                    let of_name = self.others.entry(name);
                    of_name.and_modify(|other| *other = None).or_insert(Some(found));
                }
            }
        }
    }

    /// What is said at the field that `path` leads to from `Config`.
    pub(super) fn of(&self, path: &str) -> String {
        let mut of = "Config".to_owned();
        let mut comment = String::new();
        for name in path.split('.').filter(|name| !name.is_empty()) {
            let other = self.aliases.get(&of).unwrap_or(&of);
            let found = self.own.get(&of).or_else(|| self.others.get(other)?.as_ref());
            let found = found.unwrap_or_else(|| panic!("{path}: there is no one type {of}"));
            let name = name.trim_end_matches("[]");
            let field = found.fields.get(name).unwrap_or_else(|| panic!("{path}: {of} has no {name}: {found:?}"));
            comment.clone_from(&field.comment);
            of.clone_from(&field.of);
        }
        assert!(!comment.is_empty(), "{path} has no doc comment");
        plain(&comment)
    }
}

/// A comment without what only rustdoc understands.
fn plain(comment: &str) -> String {
    comment.replace("[`", "`").replace("`]", "`").replace("`Self::", "`")
}

/// The names after `as` in a file's imports, with those before.
fn aliases(source: &str) -> Vec<(String, String)> {
    let imports = source.lines().filter(|line| line.starts_with("use "));
    let words: Vec<&str> = imports.flat_map(|line| line.split([' ', ',', '{', '}', ';'])).collect();
    let alias = |words: &[&str]| (words[2].to_owned(), words[0].rsplit("::").next().unwrap().to_owned());
    words.windows(3).filter(|words| words[1] == "as" && words[2] != "_").map(alias).collect()
}

/// The types in a file, as rustfmt writes them.
fn types(source: &str) -> Vec<(String, Type)> {
    let mut types = Vec::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let named = |keyword| line.strip_prefix(keyword)?.strip_suffix(" {");
        if let Some(name) = ["pub struct ", "pub enum "].into_iter().find_map(named) {
            types.push((name.to_owned(), Type { fields: fields(&mut lines) }));
        }
    }
    types
}

/// The fields or variants up to the end of the type.
fn fields<'a>(lines: &mut impl Iterator<Item = &'a str>) -> BTreeMap<String, Field> {
    let mut fields = BTreeMap::new();
    let mut comment = String::new();
    for line in lines.take_while(|line| *line != "}") {
        let line = line.trim();
        if let Some(text) = line.strip_prefix("///") {
            add_line(&mut comment, text);
            continue;
        }
        let line = line.strip_suffix(',').unwrap_or(line);
        let field = line.strip_prefix("pub ").and_then(|field| field.split_once(": "));
        let field = field.map(|(name, of)| (name.to_owned(), of));
        let variant = line.strip_suffix(')').and_then(|variant| variant.split_once('('));
        // As serde names variants of one word.
        let variant = variant.map(|(name, of)| (name.to_lowercase(), of));
        if let Some((name, of)) = field.or(variant) {
            fields.insert(name, Field { comment: std::mem::take(&mut comment), of: inner(of).to_owned() });
        }
    }
    fields
}

fn add_line(comment: &mut String, text: &str) {
    if !comment.is_empty() {
        comment.push(' ');
    }
    comment.push_str(text.trim());
}

/// `Option<Vec<a::B>>` holds a `B`.
fn inner(of: &str) -> &str {
    let innermost = of.rsplit('<').next().unwrap().trim_end_matches('>');
    innermost.rsplit("::").next().unwrap()
}
