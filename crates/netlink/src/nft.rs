//! nf_tables: batches of changes, and what is there. `linux/netfilter/nf_tables.h`, `linux/netfilter/nfnetlink.h`.
//! Numbers in attributes are big-endian.

use rustix::io::Errno;

use crate::attribute::{attributes, be32, find, text};
use crate::message::{APPEND, CREATE, Message};
use crate::{Error, Protocol, Reply, Result, Socket};

mod event;
mod expression;
mod set;

pub use event::Events;
pub use expression::{
    Address, Base, Compare, Conntrack, Expression, Meta, REGISTER, Register, Reject, Verdict,
    register32,
};
use set::elements_message;
pub use set::{Data, Element, Found, Set, Type, Value, concatenated};

const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const BATCH_GENERATION: u16 = 1;

const NEW_TABLE: u16 = SUBSYSTEM;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const GET_CHAIN: u16 = SUBSYSTEM | 4;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const GET_RULE: u16 = SUBSYSTEM | 7;
const DELETE_RULE: u16 = SUBSYSTEM | 8;
const NEW_SET: u16 = SUBSYSTEM | 9;
const GET_SET: u16 = SUBSYSTEM | 10;
const NEW_ELEMENTS: u16 = SUBSYSTEM | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM | 13;
const DELETE_ELEMENTS: u16 = SUBSYSTEM | 14;
const NEW_GENERATION: u16 = SUBSYSTEM | 15;
const GET_GENERATION: u16 = SUBSYSTEM | 16;

/// The first attribute of every object names its table; the second, or third, the object.
const TABLE: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_USERDATA: u16 = 6;
const TABLE_OWNER: u16 = 7;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const GENERATION_ID: u16 = 1;

/// Only the socket that made the table may change it; with [`PERSIST`], it stays when that socket is closed and
/// whoever comes next may take it over. `flush ruleset` leaves it alone. Kernel 5.12.
pub const OWNER: u32 = 2;
/// See [`OWNER`]. Kernel 6.9.
pub const PERSIST: u32 = 4;

/// Comments are type, length and text with NUL (`NFTNL_UDATA_TABLE_COMMENT` of libnftnl), at most 128 bytes.
const COMMENT: u8 = 0;
const COMMENT_MAX: usize = 127;

/// Of which packets a table has rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    Arp = 3,
    Bridge = 7,
}

/// A table's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// Two tables of different families may have one name.
    pub family: Family,
    /// At most 255 bytes.
    pub name: String,
}

/// Where in a packet's way a chain stands; `inet` and `bridge` number them alike, `arp` has input and output as 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: &'static str,
    /// `NF_INET_PRE_ROUTING` is 0.
    pub number: u32,
    /// Lower ones come first.
    pub priority: i32,
}

/// What a table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFound {
    /// [`OWNER`], [`PERSIST`].
    pub flags: u32,
    /// The port of the socket that owns it, if one does.
    pub owner: Option<u32>,
    /// The comment that whoever made it left, or nothing.
    pub comment: String,
}

/// A rule in its chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuleFound {
    /// The chain's name.
    pub chain: String,
    /// Its expressions as the kernel writes them.
    pub expressions: Vec<u8>,
}

/// Changes that are all made, or none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    messages: Vec<Message>,
}

impl Batch {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Makes a table, keeps one that is there, or takes it over when nobody owns it any more.
    pub fn table(&mut self, table: &Table, flags: u32, comment: &str) {
        let mut message = table.message("make a table", NEW_TABLE, CREATE);
        message.be32(TABLE_FLAGS, flags);
        let text = &comment.as_bytes()[..comment.len().min(COMMENT_MAX)];
        if !text.is_empty() {
            let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
            message.put(TABLE_USERDATA, &[&[COMMENT, length], text, &[0]].concat());
        }
        self.messages.push(message);
    }

    /// Removes a table with all that is in it.
    pub fn delete_table(&mut self, table: &Table) {
        self.messages
            .push(table.message("remove a table", DELETE_TABLE, 0));
    }

    /// Makes a chain. One with a hook lets pass what no rule decides about.
    pub fn chain(&mut self, table: &Table, name: &str, hook: Option<Hook>) {
        let mut message = table.message("make a chain", NEW_CHAIN, CREATE);
        message.text(CHAIN_NAME, name);
        if let Some(hook) = hook {
            message.nest(CHAIN_HOOK, |inner| {
                inner.be32(HOOK_NUMBER, hook.number);
                inner.put(HOOK_PRIORITY, &hook.priority.to_be_bytes());
            });
            let accept = 1;
            message.be32(CHAIN_POLICY, accept);
            message.text(CHAIN_TYPE, hook.kind);
        }
        self.messages.push(message);
    }

    /// Appends a rule. Chains and sets that it names must be there, or come before it.
    pub fn rule(&mut self, table: &Table, chain: &str, expressions: &[Expression]) {
        let mut message = table.message("make a rule", NEW_RULE, CREATE | APPEND);
        message.text(RULE_CHAIN, chain);
        message.nest(RULE_EXPRESSIONS, |list| {
            for expression in expressions {
                list.nest(LIST_ELEMENT, |inner| expression.write(inner));
            }
        });
        self.messages.push(message);
    }

    /// Removes the rules of all chains of a table.
    pub fn delete_rules(&mut self, table: &Table) {
        self.messages
            .push(table.message("remove rules", DELETE_RULE, 0));
    }

    /// Makes a set or map.
    pub fn set(&mut self, table: &Table, set: &Set) {
        let id = u32::try_from(self.messages.len()).unwrap_or(u32::MAX);
        let mut message = table.message("make a set", NEW_SET, CREATE);
        set.write(&mut message, id);
        self.messages.push(message);
    }

    /// Adds elements; those that are there stay as they are.
    pub fn add<'a>(
        &mut self,
        table: &Table,
        set: &str,
        elements: impl IntoIterator<Item = &'a Element>,
    ) {
        let start = || table.message("add to a set", NEW_ELEMENTS, CREATE);
        elements_message(&mut self.messages, start, set, elements, true);
    }

    /// Removes elements, which must be there.
    pub fn delete<'a>(
        &mut self,
        table: &Table,
        set: &str,
        elements: impl IntoIterator<Item = &'a Element>,
    ) {
        let start = || table.message("remove from a set", DELETE_ELEMENTS, 0);
        elements_message(&mut self.messages, start, set, elements, false);
    }

    /// The bytes of all changes, to tell one batch from another.
    ///
    /// # Errors
    /// Something in it is too long.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for message in &self.messages {
            message.write(0, 0, &mut bytes)?;
        }
        Ok(bytes)
    }
}

/// A socket for nf_tables.
#[derive(Debug)]
pub struct Nft(Socket);

impl Nft {
    /// Opens a socket. It becomes the owner of tables that it makes as [`OWNER`].
    ///
    /// # Errors
    /// As [`Socket::open`].
    pub fn open() -> Result<Self> {
        Ok(Self(Socket::open(Protocol::Netfilter)?))
    }

    /// The number by which events name this socket.
    ///
    /// # Errors
    /// As [`Socket::port`].
    pub fn port(&self) -> Result<u32> {
        self.0.port()
    }

    /// Makes all changes, or none; with a generation, only if nobody has changed anything since.
    ///
    /// # Errors
    /// The first refusal; `ERESTART` when the generation is another one by now.
    pub fn commit(&mut self, batch: &Batch, generation: Option<u32>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        // Family 0, and the subsystem where the resource id stands.
        let header = [0, 0, 0, 10];
        let mut begin = Message::new("change nf_tables", BATCH_BEGIN, 0, &header);
        if let Some(generation) = generation {
            begin.be32(BATCH_GENERATION, generation);
        }
        let mut messages = vec![begin];
        messages.extend(batch.messages.iter().cloned());
        messages.push(Message::new("change nf_tables", BATCH_END, 0, &header));
        self.0.batch(&messages)
    }

    /// A number that grows with each change that anybody makes in this network namespace.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn generation(&mut self) -> Result<u32> {
        let what = "ask for nf_tables' generation";
        let reply = self
            .0
            .get(&Message::new(what, GET_GENERATION, 0, &[0; 4]))?;
        let body = reply.as_ref().and_then(|reply| reply.body.get(4..));
        let number = body.and_then(|rest| be32(find(rest, GENERATION_ID)?));
        number.ok_or(Error::Malformed(what))
    }

    /// A table, if it is there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn table(&mut self, table: &Table) -> Result<Option<TableFound>> {
        let reply = self.0.get(&table.message("find a table", GET_TABLE, 0))?;
        Ok(reply.map(|reply| TableFound::read(reply.body.get(4..).unwrap_or_default())))
    }

    /// Names of a family's tables.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn tables(&mut self, family: Family) -> Result<Vec<String>> {
        let header = [family as u8, 0, 0, 0];
        let message = Message::new("list tables", GET_TABLE, 0, &header);
        self.names(&message, &header, None, TABLE)
    }

    /// Names of a table's chains; none when there is no such table.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn chains(&mut self, table: &Table) -> Result<Vec<String>> {
        // The kernel lists the chains of all tables of a family.
        let header = [table.family as u8, 0, 0, 0];
        let message = Message::new("list chains", GET_CHAIN, 0, &header);
        self.names(&message, &header, Some(&table.name), CHAIN_NAME)
    }

    /// Names of a table's sets and maps; none when there is no such table.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn sets(&mut self, table: &Table) -> Result<Vec<String>> {
        let message = table.message("list sets", GET_SET, 0);
        let header = [table.family as u8, 0, 0, 0];
        self.names(&message, &header, Some(&table.name), set::NAME)
    }

    /// A table's rules, chain by chain in their order; none when there is no such table.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn rules(&mut self, table: &Table) -> Result<Vec<RuleFound>> {
        let replies = self.dump(&table.message("list rules", GET_RULE, 0))?;
        let read = |reply: &Reply| {
            let rest = reply.body.get(4..)?;
            (text(find(rest, TABLE)?) == table.name).then_some(())?;
            Some(RuleFound {
                chain: text(find(rest, RULE_CHAIN)?),
                expressions: find(rest, RULE_EXPRESSIONS)?.to_vec(),
            })
        };
        Ok(replies.iter().filter_map(read).collect())
    }

    /// A set's elements; none when there is no such set.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn elements(&mut self, table: &Table, set: &str) -> Result<Vec<Found>> {
        let mut message = table.message("list a set", GET_ELEMENTS, 0);
        message.text(set::ELEMENTS_SET, set);
        let mut found = Vec::new();
        for reply in self.dump(&message)? {
            let list = reply
                .body
                .get(4..)
                .and_then(|rest| find(rest, set::ELEMENTS));
            found.extend(attributes(list.unwrap_or_default()).filter_map(|(_, e)| Found::read(e)));
        }
        Ok(found)
    }

    /// One element of a set, if it is there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn element(
        &mut self,
        table: &Table,
        set: &str,
        element: &Element,
    ) -> Result<Option<Found>> {
        let mut messages = Vec::new();
        let start = || table.message("find an element", GET_ELEMENTS, 0);
        elements_message(&mut messages, start, set, [element], false);
        let Some(message) = messages.first() else {
            return Ok(None);
        };
        let reply = self.0.get(message)?;
        let list = reply.as_ref().and_then(|reply| reply.body.get(4..));
        let list = list.and_then(|rest| find(rest, set::ELEMENTS));
        let first = attributes(list.unwrap_or_default()).next();
        Ok(first.and_then(|(_, element)| Found::read(element)))
    }

    fn names(
        &mut self,
        message: &Message,
        header: &[u8; 4],
        table: Option<&str>,
        name: u16,
    ) -> Result<Vec<String>> {
        let replies = self.dump(message)?;
        let read = |reply: &Reply| {
            let rest = reply.body.get(4..)?;
            let of = text(find(rest, TABLE)?);
            let wanted = reply.body[0] == header[0] && table.is_none_or(|table| table == of);
            wanted.then_some(text(find(rest, name)?))
        };
        Ok(replies.iter().filter_map(read).collect())
    }

    fn dump(&mut self, message: &Message) -> Result<Vec<Reply>> {
        match self.0.dump(message) {
            Err(error) if error.errno() == Some(Errno::NOENT) => Ok(Vec::new()),
            other => other,
        }
    }
}

impl Table {
    fn message(&self, what: &'static str, kind: u16, flags: u16) -> Message {
        let mut message = Message::new(what, kind, flags, &[self.family as u8, 0, 0, 0]);
        message.text(TABLE, &self.name);
        message
    }
}

impl TableFound {
    fn read(rest: &[u8]) -> Self {
        let userdata = find(rest, TABLE_USERDATA).unwrap_or_default();
        let comment = match userdata {
            [COMMENT, length, rest @ ..] => rest.get(..usize::from(*length)),
            _ => None,
        };
        Self {
            flags: find(rest, TABLE_FLAGS).and_then(be32).unwrap_or(0),
            owner: find(rest, TABLE_OWNER).and_then(be32),
            comment: text(comment.unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::messages;

    /// `iifname "hab12-*" goto from_tap`, as the kernel's headers have it.
    #[test]
    fn a_rule_has_these_bytes() {
        let table = Table {
            family: Family::Inet,
            name: "hutch_ab12".into(),
        };
        let mut batch = Batch::default();
        let name = Expression::Meta(Meta::InputName, REGISTER);
        let prefix = Expression::Cmp(REGISTER, Compare::Equal, b"hab12-".to_vec());
        let goto = Expression::Verdict(Verdict::Goto("from_tap".into()));
        batch.rule(&table, "spoof", &[name, prefix, goto]);
        let bytes = batch.bytes().unwrap();
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        assert_eq!(hex(&bytes[4..8]), "060a000c");
        let expected = [
            "01000000",
            "0f00010068757463685f616231320000",
            "0a00020073706f6f66000000",
            "98000480",
            "24000180090001006d65746100000000",
            "1400028008000100000000010800020000000006",
            "3000018008000100636d7000",
            "2400028008000100000000010800020000000000",
            "100003800a00010068616231322d0000",
            "400001800e000100696d6d6564696174650000002c000280",
            "0800010000000000200002801c000280",
            "08000100fffffffc0d00020066726f6d5f74617000000000",
        ];
        assert_eq!(hex(&bytes[16..]), expected.concat());
    }

    #[test]
    fn many_elements_take_several_messages() {
        let table = Table {
            family: Family::Inet,
            name: "t".into(),
        };
        let elements: Vec<_> = (0..10_000u32)
            .map(|number| Element::new(number.to_be_bytes()))
            .collect();
        let mut batch = Batch::default();
        batch.add(&table, "s", &elements);
        let bytes = batch.bytes().unwrap();
        let all: Vec<_> = messages(&bytes).collect();
        assert!(all.len() > 1);
        let read: Vec<_> = all
            .iter()
            .flat_map(|message| attributes(find(&message.body[4..], set::ELEMENTS).unwrap()))
            .filter_map(|(_, element)| Found::read(element))
            .map(|found| found.element)
            .collect();
        assert_eq!(read, elements);
    }
}
