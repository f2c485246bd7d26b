//! Sets and maps, and what is in them.

use super::expression::{Expression, Verdict};
use crate::Message;
use crate::attribute::{attributes, be32, be64, find, text};

pub(super) const NAME: u16 = 2;
pub(super) const ELEMENTS_SET: u16 = 2;
pub(super) const ELEMENTS: u16 = 3;

const FLAGS: u16 = 3;
const KEY_TYPE: u16 = 4;
const KEY_LENGTH: u16 = 5;
const DATA_TYPE: u16 = 6;
const DATA_LENGTH: u16 = 7;
const DESCRIPTION: u16 = 9;
const DESCRIPTION_SIZE: u16 = 1;
const DESCRIPTION_CONCAT: u16 = 2;
const FIELD_LENGTH: u16 = 1;
const ID: u16 = 10;
const USERDATA: u16 = 13;
const TEMPLATE: u16 = 17;
const LIST_ELEMENT: u16 = 1;

const INTERVAL: u32 = 4;
const MAP: u32 = 8;
const TIMEOUT: u32 = 0x10;
const EVALUATED: u32 = 0x20;
const CONCAT: u32 = 0x80;
const DATA_VERDICT: u32 = 0xffff_ff00;

const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENT_TIMEOUT: u16 = 4;
const ELEMENT_EXPIRATION: u16 = 5;
const ELEMENT_EXPRESSION: u16 = 7;
const ELEMENT_KEY_END: u16 = 10;
const ELEMENT_EXPRESSIONS: u16 = 11;
const INTERVAL_END: u32 = 1;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// An attribute's length is a `u16`, and the kernel and others leave some room below it.
const LIST_MAX: usize = 60 * 1024;

/// Types of values as `nft` numbers them (`enum datatypes` of its `datatype.h`), so that it prints them well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "nft's names")]
pub enum Type {
    Ipv4 = 7,
    Ipv6 = 8,
    Ether = 9,
    Service = 13,
    Mark = 19,
    Icmpv6 = 29,
    Interface = 41,
}

impl Type {
    /// Bytes of a value.
    fn length(self) -> u32 {
        match self {
            Self::Icmpv6 => 1,
            Self::Service => 2,
            Self::Ipv4 | Self::Mark => 4,
            Self::Ether => 6,
            Self::Ipv6 | Self::Interface => 16,
        }
    }
}

/// What a map has for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Value {
    Of(Type),
    Verdict,
}

/// A set or map to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Its name in its table.
    pub name: String,
    /// The fields of a key.
    pub key: Vec<Type>,
    /// For maps.
    pub value: Option<Value>,
    /// Whether keys are ranges.
    pub interval: bool,
    /// Whether elements may go by themselves after a time.
    pub timeout: bool,
    /// Whether rules add elements, and how many there may be.
    pub dynamic: Option<u32>,
    /// Whether each element counts what it met.
    pub counter: bool,
}

impl Set {
    pub(super) fn write(&self, message: &mut Message, id: u32) {
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let concat = self.key.len() > 1;
        let flags = flag(self.interval, INTERVAL)
            | flag(self.value.is_some(), MAP)
            | flag(self.timeout, TIMEOUT)
            | flag(self.dynamic.is_some(), EVALUATED)
            | flag(concat, CONCAT);
        let types = self.key.iter().fold(0, |all, one| all << 6 | *one as u32);
        let padded = |field: &Type| field.length().next_multiple_of(4);
        let length = match self.key[..] {
            [one] => one.length(),
            _ => self.key.iter().map(padded).sum(),
        };
        message.text(NAME, &self.name).be32(FLAGS, flags);
        message.be32(KEY_TYPE, types).be32(KEY_LENGTH, length);
        match self.value {
            Some(Value::Of(kind)) => {
                message.be32(DATA_TYPE, kind as u32);
                message.be32(DATA_LENGTH, kind.length());
            }
            Some(Value::Verdict) => {
                message.be32(DATA_TYPE, DATA_VERDICT);
            }
            None => {}
        }
        if concat || self.dynamic.is_some() {
            message.nest(DESCRIPTION, |description| {
                if let Some(size) = self.dynamic {
                    description.be32(DESCRIPTION_SIZE, size);
                }
                if concat {
                    description.nest(DESCRIPTION_CONCAT, |fields| {
                        for field in &self.key {
                            fields.nest(LIST_ELEMENT, |inner| {
                                inner.be32(FIELD_LENGTH, field.length());
                            });
                        }
                    });
                }
            });
        }
        message.be32(ID, id);
        // Types 0 and 1 are the byte orders of keys and of values, and 1 the host's (`enum nftnl_udata_set_types` of
        // libnftnl): `nft` prints such numbers the wrong way round otherwise.
        let mut userdata = Vec::new();
        for (kind, host) in [
            (0u8, self.key == [Type::Interface]),
            (1, self.value == Some(Value::Of(Type::Mark))),
        ] {
            if host {
                userdata.extend([kind, 4]);
                userdata.extend(1u32.to_ne_bytes());
            }
        }
        if !userdata.is_empty() {
            message.put(USERDATA, &userdata);
        }
        if self.counter {
            message.nest(TEMPLATE, |inner| Expression::Counter.write(inner));
        }
    }
}

/// What a map's element has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Data {
    Value(Vec<u8>),
    Verdict(Verdict),
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// The key, or where its range begins: fields in network order, each padded to four bytes if there are several.
    pub key: Vec<u8>,
    /// The last key of the range, where keys have several fields.
    pub last: Option<Vec<u8>>,
    /// Whether a range of keys of one field ends before this key.
    pub end: bool,
    /// For maps.
    pub data: Option<Data>,
    /// What is evaluated when it is found.
    pub expressions: Vec<Expression>,
    /// Milliseconds for which it stays.
    pub timeout: Option<u64>,
}

impl Element {
    /// An element with nothing but a key.
    pub fn new(key: impl Into<Vec<u8>>) -> Self {
        Self {
            key: key.into(),
            last: None,
            end: false,
            data: None,
            expressions: Vec::new(),
            timeout: None,
        }
    }

    /// The two elements of a range from `first` to before `end`; without one, to the last key that there is.
    pub fn range(first: impl Into<Vec<u8>>, end: Option<Vec<u8>>) -> Vec<Self> {
        let mut both = vec![Self::new(first)];
        both.extend(end.map(|end| Self {
            end: true,
            ..Self::new(end)
        }));
        both
    }

    /// With what a map has for it.
    pub fn with(self, data: Data) -> Self {
        Self {
            data: Some(data),
            ..self
        }
    }

    /// With an expression of its own.
    pub fn evaluating(mut self, expression: Expression) -> Self {
        self.expressions.push(expression);
        self
    }

    fn write(&self, to: &mut Message, whole: bool) {
        to.nest(ELEMENT_KEY, |inner| {
            inner.put(VALUE, &self.key);
        });
        if let Some(last) = &self.last {
            to.nest(ELEMENT_KEY_END, |inner| {
                inner.put(VALUE, last);
            });
        }
        if self.end {
            to.be32(ELEMENT_FLAGS, INTERVAL_END);
        }
        if !whole {
            return;
        }
        match &self.data {
            Some(Data::Value(value)) => {
                to.nest(ELEMENT_DATA, |inner| {
                    inner.put(VALUE, value);
                });
            }
            Some(Data::Verdict(verdict)) => {
                to.nest(ELEMENT_DATA, |inner| verdict.write(inner));
            }
            None => {}
        }
        if let Some(timeout) = self.timeout {
            to.be64(ELEMENT_TIMEOUT, timeout);
        }
        if !self.expressions.is_empty() {
            to.nest(ELEMENT_EXPRESSIONS, |list| {
                for expression in &self.expressions {
                    list.nest(LIST_ELEMENT, |inner| expression.write(inner));
                }
            });
        }
    }
}

/// Fields of a key, each padded to four bytes.
pub fn concatenated(fields: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::new();
    for field in fields {
        key.extend(*field);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    key
}

/// An element that is there, and what it counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Without timeout, and of its expressions with the limits only.
    pub element: Element,
    /// Packets and bytes, if it counts.
    pub counted: Option<(u64, u64)>,
    /// How many expressions it has.
    pub expressions: usize,
    /// Milliseconds for which it will stay, if it goes by itself.
    pub expires: Option<u64>,
}

impl Found {
    pub(super) fn read(element: &[u8]) -> Option<Self> {
        let key = |kind: u16| Some(find(find(element, kind)?, VALUE)?.to_vec());
        let mut read = Element::new(key(ELEMENT_KEY)?);
        read.last = key(ELEMENT_KEY_END);
        let flags = find(element, ELEMENT_FLAGS).and_then(be32).unwrap_or(0);
        read.end = flags & INTERVAL_END != 0;
        read.data = find(element, ELEMENT_DATA).and_then(|data| {
            let value = find(data, VALUE).map(|value| Data::Value(value.to_vec()));
            let verdict = || Verdict::read(find(data, VERDICT)?);
            value.or_else(|| Some(Data::Verdict(verdict()?)))
        });
        let list = find(element, ELEMENT_EXPRESSIONS).unwrap_or_default();
        let single = find(element, ELEMENT_EXPRESSION);
        let all = attributes(list).map(|(_, value)| value).chain(single);
        let all: Vec<&[u8]> = all.collect();
        read.expressions = all
            .iter()
            .filter_map(|limit| Expression::read(limit))
            .collect();
        Some(Self {
            element: read,
            counted: all.iter().find_map(|expression| counted(expression)),
            expressions: all.len(),
            expires: find(element, ELEMENT_EXPIRATION).and_then(be64),
        })
    }
}

fn counted(expression: &[u8]) -> Option<(u64, u64)> {
    if text(find(expression, EXPRESSION_NAME)?) != "counter" {
        return None;
    }
    let data = find(expression, EXPRESSION_DATA)?;
    let number = |kind| be64(find(data, kind)?);
    Some((number(COUNTER_PACKETS)?, number(COUNTER_BYTES)?))
}

/// Messages about elements, each of which an attribute can hold.
pub(super) fn elements_message<'a>(
    messages: &mut Vec<Message>,
    start: impl Fn() -> Message,
    set: &str,
    elements: impl IntoIterator<Item = &'a Element>,
    whole: bool,
) {
    let mut list = start().empty();
    let mut flush = |list: &mut Message| {
        if !list.body().is_empty() {
            let mut message = start();
            message.text(ELEMENTS_SET, set);
            message.nest(ELEMENTS, |inner| inner.append(list));
            messages.push(message);
            *list = list.empty();
        }
    };
    for element in elements {
        list.nest(LIST_ELEMENT, |inner| element.write(inner, whole));
        if list.body().len() > LIST_MAX {
            flush(&mut list);
        }
    }
    flush(&mut list);
}
