//! Patterns of paths: which match, and below which directories something still can. It sees paths, not files.
//!
//! A pattern and a path are names between slashes. `*`, `?` and `[…]` stand for parts of one name, `**` for any number of
//! directories. As in a shell, a name that begins with a dot is matched by a dot alone. The cost of a match is bounded by
//! name times pattern, whatever either says.

use tonic::Status;

/// Most names in a pattern: a set of them is one integer.
const NAMES: usize = 60;
/// What a byte that is part of no character is taken for: nothing that a pattern has.
const FOREIGN: u32 = 0x0011_0000;

/// A pattern of paths.
#[derive(Debug, Clone)]
pub struct Pattern {
    names: Vec<Name>,
}

/// How much of a pattern a directory's path has used up: the places at which its next name may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places(u64);

#[derive(Debug, Clone)]
enum Name {
    /// `**`
    Directories,
    One(Vec<Token>),
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Character(u32),
    /// `?`
    Any,
    /// `*`
    Some,
    /// `[…]`
    Class {
        not: bool,
        ranges: Vec<(u32, u32)>,
    },
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// One that no path below a directory can match, or that is too long.
    pub fn parse(text: &str) -> Result<Self, Status> {
        let refuse = |why: &str| Status::invalid_argument(format!("the pattern {why}"));
        if text.len() >= 4096 {
            return Err(refuse("has more than 4095 bytes"));
        }
        let mut names = Vec::new();
        for name in text.split('/') {
            match name {
                "" if names.is_empty() => {
                    return Err(refuse("must be relative to the directory"));
                }
                "" => return Err(refuse("has an empty name")),
                "." | ".." => return Err(refuse("has `.` or `..` as a name")),
                "**" if matches!(names.last(), Some(Name::Directories)) => {}
                "**" => names.push(Name::Directories),
                name => names.push(Name::One(tokens(name).map_err(refuse)?)),
            }
        }
        if let Some(Name::Directories) = names.last() {
            // All that is in those directories.
            names.push(Name::One(vec![Token::Some]));
        }
        match names.len() > NAMES {
            true => Err(refuse("has more than 60 names")),
            false => Ok(Self { names }),
        }
    }

    /// Where the first name of a path may stand.
    pub fn start(&self) -> Places {
        self.with_skips(1)
    }

    /// Where the name after `name` may stand.
    pub fn step(&self, places: Places, name: &[u8]) -> Places {
        let characters = characters(name);
        let hidden = name.first() == Some(&b'.');
        let mut next = 0;
        for (place, pattern) in self.names.iter().enumerate() {
            if places.0 & (1 << place) == 0 {
                continue;
            }
            match pattern {
                Name::Directories if !hidden => next |= 1 << place,
                Name::One(tokens) if matches(tokens, &characters) => next |= 1 << (place + 1),
                _ => {}
            }
        }
        self.with_skips(next)
    }

    /// Whether a path that has come so far matches.
    pub fn accepts(&self, places: Places) -> bool {
        places.0 & (1 << self.names.len()) != 0
    }

    /// Whether a path that goes on from here can match.
    pub fn goes_on(&self, places: Places) -> bool {
        places.0 & ((1 << self.names.len()) - 1) != 0
    }

    /// `**` may also stand for no directory at all.
    fn with_skips(&self, mut places: u64) -> Places {
        for (place, name) in self.names.iter().enumerate() {
            if matches!(name, Name::Directories) && places & (1 << place) != 0 {
                places |= 1 << (place + 1);
            }
        }
        Places(places)
    }
}

fn tokens(name: &str) -> Result<Vec<Token>, &'static str> {
    let mut tokens = Vec::new();
    let mut rest = name.chars();
    while let Some(character) = rest.next() {
        tokens.push(match character {
            '*' if tokens.last() == Some(&Token::Some) => continue,
            '*' => Token::Some,
            '?' => Token::Any,
            '[' => class(&mut rest)?,
            '\\' => Token::Character(rest.next().ok_or("ends with a backslash")?.into()),
            plain => Token::Character(plain.into()),
        });
    }
    Ok(tokens)
}

/// What stands between `[` and `]`.
fn class(rest: &mut std::str::Chars<'_>) -> Result<Token, &'static str> {
    const OPEN: &str = "has a `[` without its `]`";
    let not = rest.as_str().starts_with(['!', '^']);
    if not {
        rest.next();
    }
    let mut ranges = Vec::new();
    loop {
        let mut next = || match rest.next() {
            Some('\\') => rest.next().ok_or(OPEN),
            Some(character) => Ok(character),
            None => Err(OPEN),
        };
        let first = next()?;
        if first == ']' && !ranges.is_empty() {
            return Ok(Token::Class { not, ranges });
        }
        let mut last = first;
        let after = rest.as_str().strip_prefix('-');
        if after.is_some_and(|after| !after.starts_with(']')) {
            rest.next();
            last = match rest.next() {
                Some('\\') => rest.next().ok_or(OPEN)?,
                Some(character) => character,
                None => return Err(OPEN),
            };
        }
        ranges.push((u32::from(first), u32::from(last)));
    }
}

/// The characters of a name; a byte that is part of none is one of its own.
fn characters(name: &[u8]) -> Vec<u32> {
    let mut characters = Vec::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        characters.extend(chunk.valid().chars().map(u32::from));
        characters.extend(
            chunk
                .invalid()
                .iter()
                .map(|byte| FOREIGN + u32::from(*byte)),
        );
    }
    characters
}

/// Whether a whole name matches. Of several `*` only the last one ever has to be tried again.
fn matches(tokens: &[Token], name: &[u32]) -> bool {
    let dot = u32::from('.');
    if name.first() == Some(&dot) && tokens.first() != Some(&Token::Character(dot)) {
        return false;
    }
    let (mut token, mut at) = (0, 0);
    let mut again = None;
    while at < name.len() {
        match tokens.get(token) {
            Some(Token::Some) => {
                again = Some((token, at));
                token += 1;
            }
            Some(one) if is(one, name[at]) => {
                token += 1;
                at += 1;
            }
            _ => {
                let Some((star, from)) = again else {
                    return false;
                };
                again = Some((star, from + 1));
                (token, at) = (star + 1, from + 1);
            }
        }
    }
    tokens[token..].iter().all(|token| *token == Token::Some)
}

fn is(token: &Token, character: u32) -> bool {
    match token {
        Token::Character(wanted) => *wanted == character,
        Token::Any => true,
        Token::Some => false,
        Token::Class { not, ranges } => {
            let inside = |(first, last): &(u32, u32)| (*first..=*last).contains(&character);
            ranges.iter().any(inside) != *not
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matched(pattern: &str, path: &str) -> bool {
        let pattern = Pattern::parse(pattern).unwrap();
        let mut places = pattern.start();
        for name in path.split('/') {
            places = pattern.step(places, name.as_bytes());
        }
        pattern.accepts(places)
    }

    #[test]
    fn patterns_match_what_a_shell_would() {
        for (pattern, path) in [
            ("a", "a"),
            ("*.rs", "lib.rs"),
            ("?.c", "é.c"),
            ("[a-c]x[!0-9]", "bxy"),
            ("[]]", "]"),
            ("[a-]", "-"),
            ("\\*", "*"),
            ("src/*/mod.rs", "src/a/mod.rs"),
            ("**/*.rs", "lib.rs"),
            ("**/*.rs", "a/b/lib.rs"),
            ("a/**/z", "a/z"),
            ("a/**/z", "a/b/c/z"),
            ("a/**", "a/b/c"),
            ("**", "a/b"),
            ("**/**/x", "x"),
            (".*", ".bashrc"),
            ("*a*b*c", "xaxxbxabc"),
        ] {
            assert!(matched(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("a", "b"),
            ("*.rs", "a/lib.rs"),
            ("*", ".hidden"),
            ("?hidden", ".hidden"),
            ("[.]hidden", ".hidden"),
            ("**/x", ".git/x"),
            ("\\*", "a"),
            ("[!a]", "a"),
            ("a/**", "a"),
            ("a/**/z", "az"),
            ("a?", "a"),
            ("*a*b*c", "xaxxbxab"),
        ] {
            assert!(!matched(pattern, path), "{pattern} {path}");
        }
    }

    #[test]
    fn a_byte_that_is_no_character_is_one() {
        let pattern = Pattern::parse("a?b").unwrap();
        assert!(pattern.accepts(pattern.step(pattern.start(), b"a\xffb")));
        assert!(!pattern.accepts(pattern.step(pattern.start(), b"a\xff\xfeb")));
    }

    #[test]
    fn patterns_that_nothing_could_match_are_refused() {
        let long = "x".repeat(5000);
        let many = vec!["a"; 61].join("/");
        for bad in [
            "", "/a", "a//b", "a/", "./a", "a/../b", "[a", "[", "a\\", "[a\\", &long, &many,
        ] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_directories_that_can_lead_to_a_match_go_on() {
        let pattern = Pattern::parse("src/*/x").unwrap();
        let src = pattern.step(pattern.start(), b"src");
        assert!(pattern.goes_on(src));
        assert!(!pattern.goes_on(pattern.step(pattern.start(), b"target")));
        assert!(!pattern.goes_on(pattern.step(pattern.step(src, b"a"), b"x")));
    }

    #[test]
    fn a_pattern_made_to_be_slow_is_not() {
        // Tried again for each star, this would not end.
        let pattern = format!("{}b", "*a".repeat(1000));
        assert!(!matched(&pattern, &"a".repeat(255)));
    }

    /// The same by trying everything.
    fn slowly(pattern: &[char], name: &[char]) -> bool {
        match (pattern.first(), name.first()) {
            (None, None) => true,
            (Some('*'), _) => {
                slowly(&pattern[1..], name) || (!name.is_empty() && slowly(pattern, &name[1..]))
            }
            (Some('?'), Some(_)) => slowly(&pattern[1..], &name[1..]),
            (Some(a), Some(b)) => a == b && slowly(&pattern[1..], &name[1..]),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn stars_match_as_if_everything_were_tried(pattern in "[ab*?]{1,8}", name in "[ab]{1,10}") {
            prop_assume!(pattern != "**");
            let (p, n): (Vec<_>, Vec<_>) = (pattern.chars().collect(), name.chars().collect());
            prop_assert_eq!(matched(&pattern, &name), slowly(&p, &n));
        }
    }
}
