//! House rules that no other program checks: sizes, first lines, names, paths of somebody's machine.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;

/// Longest file, and longest file of tests, in lines.
const MAX_LINES: usize = 700;
const MAX_TEST_LINES: usize = 1000;
/// Words that say nothing about a type.
const BANNED_NAMES: [&str; 4] = ["Manager", "Helper", "Util", "Common"];
/// Files that collect what has no place.
const BANNED_FILES: [&str; 6] = [
    "util.rs",
    "utils.rs",
    "common.rs",
    "helper.rs",
    "helpers.rs",
    "misc.rs",
];
/// Where our own sources are.
const PLACES: [&str; 4] = ["crates", "xtask", "tests", "docs"];
/// The page whose every row names the tests that hold it.
const PROMISES: &str = "docs/what-survives.md";
/// Shortest text after a mark that something is missing.
const MIN_MARK: usize = 20;

/// All our files below [`PLACES`] and at the top, relative to the repository.
pub fn sources() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for place in PLACES {
        walk(Path::new(place), &mut files)?;
    }
    for entry in fs::read_dir(crate::root())? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.file_name().into());
        }
    }
    files.sort();
    Ok(files)
}

fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result {
    for entry in fs::read_dir(crate::root().join(dir))? {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        match entry.file_type()? {
            kind if kind.is_dir() => walk(&path, files)?,
            kind if kind.is_file() => files.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// Every rule that is broken, one line each.
pub fn check() -> Result<Vec<String>> {
    let mut broken = Vec::new();
    let (mut named, mut tests) = (Vec::new(), HashSet::new());
    for path in sources()? {
        let bytes = fs::read(crate::root().join(&path))?;
        // Test data may be anything.
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        for problem in problems(&path, &text) {
            broken.push(format!("{}{problem}", path.display()));
        }
        if path == Path::new(PROMISES) {
            named = tests_named(&text);
        } else if path.extension().is_some_and(|is| is == "rs") {
            tests.extend(functions(&text));
        }
    }
    let missing = named.iter().filter(|name| !tests.contains(*name));
    broken.extend(missing.map(|name| format!("{PROMISES}: there is no test {name}")));
    Ok(broken)
}

/// The tests that a page of promises names, as code.
fn tests_named(text: &str) -> Vec<String> {
    let code = text.split('`').skip(1).step_by(2);
    let is_name = |word: &&str| {
        word.contains('_') && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    code.filter(is_name).map(str::to_owned).collect()
}

/// The functions that a source defines.
fn functions(text: &str) -> impl Iterator<Item = String> {
    let after = text.split("fn ").skip(1);
    after.filter_map(|rest| rest.split_once('(').map(|(name, _)| name.to_owned()))
}

fn problems(path: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    for (number, line) in text.lines().enumerate() {
        let mut add = |problem: &str| found.push(format!(":{}: {problem}", number + 1));
        if names_a_machine(line) {
            add("a path of one machine");
        }
        if name.ends_with(".rs") {
            if unexplained(line) {
                add("a mark for missing work that does not say what is missing");
            }
            if let Some(word) = banned_type(line) {
                add(&format!("a type called {word}: say what it does"));
            }
        }
    }
    if name.ends_with(".rs") {
        let is_test = path.components().any(|part| part.as_os_str() == "tests")
            || name == "tests.rs"
            || name.ends_with("_tests.rs");
        let max = if is_test { MAX_TEST_LINES } else { MAX_LINES };
        let lines = text.lines().count();
        if lines > max {
            found.push(format!(": {lines} lines, and may have {max}"));
        }
        if !text.starts_with("//!") {
            found.push(": does not begin with `//!`, which says what it owns".to_owned());
        }
        if BANNED_FILES.contains(&name.as_ref()) {
            found.push(": a name for what has no place".to_owned());
        }
    }
    if name == "Cargo.toml"
        && ["registry =", "registry-index", "git ="]
            .iter()
            .any(|key| text.contains(key))
    {
        found.push(": a dependency from elsewhere than crates.io".to_owned());
    }
    found
}

/// Whether a line has a home or work directory, as error messages and scripts of one developer do.
fn names_a_machine(line: &str) -> bool {
    // Put together, so that this file passes its own check.
    let homes = [["/wor", "k/"], ["/ro", "ot/."]].map(|parts| parts.concat());
    homes.iter().any(|home| {
        line.match_indices(home.as_str()).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            let starts = before.is_none_or(|c| !c.is_alphanumeric() && !"._-}/".contains(c));
            let rest = line[at + home.len()..].chars().next();
            starts && rest.is_some_and(char::is_alphanumeric)
        })
    })
}

/// Whether a line says that something is to do, and not what.
fn unexplained(line: &str) -> bool {
    ["TO", "FIX", "XX"]
        .iter()
        .zip(["DO", "ME", "X"])
        .any(|(a, b)| {
            let mark = [*a, b].concat();
            line.split_once(&mark).is_some_and(|(before, after)| {
                before.contains("//") && after.trim_matches([':', ' ']).len() < MIN_MARK
            })
        })
}

/// The banned word in the name of a type that is defined on this line.
fn banned_type(line: &str) -> Option<&'static str> {
    let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.find(|word| matches!(*word, "struct" | "enum" | "trait" | "type" | "union"))?;
    let name = words.next()?;
    // Neither in comments nor in texts.
    let defined = name.starts_with(char::is_uppercase)
        && !line.trim_start().starts_with("//")
        && !line.contains('"');
    BANNED_NAMES
        .into_iter()
        .find(|banned| defined && name.contains(banned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(name: &str, text: &str) -> usize {
        problems(Path::new(name), text).len()
    }

    #[test]
    fn a_file_says_what_it_owns_and_stays_short() {
        assert_eq!(problems_of("crates/x/src/lib.rs", "//! All.\n"), 0);
        assert_eq!(problems_of("crates/x/src/lib.rs", "fn main() {}\n"), 1);
        assert_eq!(problems_of("crates/x/src/utils.rs", "//! All.\n"), 1);
        let long = format!("//! All.\n{}", "\n".repeat(MAX_LINES));
        assert_eq!(problems_of("crates/x/src/lib.rs", &long), 1);
        assert_eq!(problems_of("crates/x/tests/it/main.rs", &long), 0);
    }

    #[test]
    fn types_say_what_they_do() {
        assert_eq!(banned_type("pub struct VmManager;"), Some("Manager"));
        assert_eq!(banned_type("pub(crate) enum Helper {"), Some("Helper"));
        assert_eq!(banned_type("struct Utilization(f64);"), Some("Util"));
        assert_eq!(banned_type("/// Another struct Helper"), None);
        assert_eq!(banned_type("pub struct Machine;"), None);
    }

    #[test]
    fn marks_explain_themselves() {
        let mark = ["TO", "DO"].concat();
        assert!(unexplained(&format!("// {mark}")));
        assert!(unexplained(&format!("x(); // {mark}: later")));
        assert!(!unexplained(&format!(
            "// {mark}: the size of a btrfs pool is not counted here"
        )));
        assert!(!unexplained("let todo = 1;"));
    }

    #[test]
    fn promises_name_tests_that_exist() {
        let page = "| `a_thing_survives`, `--restart` | and `b_c` |";
        assert_eq!(tests_named(page), ["a_thing_survives", "b_c"]);
        let source = "async fn a_thing_survives() {}\nfn b_c(x: u8) {}";
        assert_eq!(functions(source).collect::<Vec<_>>(), tests_named(page));
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let place = ["/wor", "k/"].concat();
        assert!(names_a_machine(&format!("open(\"{place}x\")")));
        assert!(!names_a_machine(&format!("rootfs{place}x")));
        assert!(!names_a_machine("/works/x /workspace/x"));
    }
}
