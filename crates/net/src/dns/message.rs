//! DNS messages (RFC 1035, RFC 6891): questions read, answers of others taken apart, our own written. The only file
//! that knows the library which reads and writes them.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::domain::Domain;

/// The largest answer over UDP: it fits into every packet that IPv6 promises (RFC 9715).
pub(super) const UDP_MAX: usize = 1232;
/// What one asks for who says nothing (RFC 1035 §4.2.1).
const UDP_LEAST: u16 = 512;
/// The largest message over TCP.
pub(super) const TCP_MAX: usize = 65_535;
/// Names that lead to another one until the last.
const CHAIN_MAX: usize = 16;
/// Records of an answer; what is beyond is left out.
const RECORDS_MAX: usize = 64;
/// Seconds for which an answer is good at most.
const TTL_MAX: u32 = 3600;
const HEADER: usize = 12;

/// What came from a machine.
#[derive(Debug)]
pub(super) enum Asked {
    Question(Question),
    /// It cannot be answered but by this.
    Refused(Vec<u8>),
    /// No question at all.
    Nothing,
}

/// One question about one name.
#[derive(Debug, Clone)]
pub(super) struct Question {
    id: u16,
    query: Query,
    wants_recursion: bool,
    /// Bytes of an answer over UDP that the asker takes, if it speaks EDNS.
    takes: Option<u16>,
    pub(super) name: Domain,
}

/// What a question is about, as far as that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About {
    Ipv4,
    Ipv6,
    Pointer,
    /// Where and how a service is reached, with addresses as hints (RFC 9460).
    Service,
    Other,
}

/// Why a question gets no records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    NoError,
    Malformed,
    Failed,
    NoName,
    NotImplemented,
    Refused,
}

/// What came from another resolver.
#[derive(Debug)]
pub(super) enum Heard {
    /// It does not answer the question.
    NotOurs,
    /// It did not fit.
    Truncated,
    /// It could not, or would not, answer.
    Failed,
    Answer(Box<Answer>),
}

/// What of an answer belongs to the question: the names that lead to the last one, and that one's records.
#[derive(Debug)]
pub(super) struct Answer {
    code: ResponseCode,
    chain: Vec<Record>,
    records: Vec<Record>,
    /// For how long there is nothing.
    authority: Option<Record>,
}

impl From<Code> for ResponseCode {
    fn from(code: Code) -> Self {
        match code {
            Code::NoError => Self::NoError,
            Code::Malformed => Self::FormErr,
            Code::Failed => Self::ServFail,
            Code::NoName => Self::NXDomain,
            Code::NotImplemented => Self::NotImp,
            Code::Refused => Self::Refused,
        }
    }
}

/// Reads a question.
pub(super) fn read(bytes: &[u8]) -> Asked {
    let (Some([high, low, flags]), true) = (bytes.first_chunk(), bytes.len() >= HEADER) else {
        return Asked::Nothing;
    };
    let is_answer = flags & 0x80 != 0;
    if is_answer {
        return Asked::Nothing;
    }
    let id = u16::from_be_bytes([*high, *low]);
    let bare = |op: OpCode, code: Code| {
        let message = Message::error_msg(id, op, code.into());
        message.to_vec().map_or(Asked::Nothing, Asked::Refused)
    };
    let Ok(message) = Message::from_vec(bytes) else {
        return bare(OpCode::Query, Code::Malformed);
    };
    let op = message.metadata.op_code;
    if op != OpCode::Query {
        return bare(op, Code::NotImplemented);
    }
    let [query] = &message.queries[..] else {
        return bare(op, Code::Malformed);
    };
    let Some(name) = domain(query.name()) else {
        return bare(op, Code::Refused);
    };
    let question = Question {
        id,
        query: query.clone(),
        wants_recursion: message.metadata.recursion_desired,
        takes: message.edns.as_ref().map(Edns::max_payload),
        name,
    };
    let version = message.edns.as_ref().map_or(0, Edns::version);
    if version != 0 {
        return Asked::Refused(question.reply(ResponseCode::BADVERS).bytes(UDP_MAX));
    }
    // Transfers and `ANY` (RFC 8482) are no questions for a resolver.
    let about_many = (249..=255).contains(&u16::from(query.query_type()));
    if query.query_class() != DNSClass::IN || about_many {
        return Asked::Refused(question.empty(Code::NotImplemented).bytes(UDP_MAX));
    }
    Asked::Question(question)
}

/// A name, if it is one that policies can speak of. Others have no addresses either.
fn domain(name: &Name) -> Option<Domain> {
    let mut text = String::new();
    for label in name.iter() {
        let label = std::str::from_utf8(label).ok()?;
        // Two labels must not look like one.
        if label.contains('.') {
            return None;
        }
        text.push_str(label);
        text.push('.');
    }
    text.parse().ok()
}

/// Whether a name of a record is that one. A name on the wire always is a whole one.
fn same(one: &Name, other: &Name) -> bool {
    one.eq_ignore_root(other)
}

impl Question {
    pub(super) fn about(&self) -> About {
        match self.query.query_type() {
            RecordType::A => About::Ipv4,
            RecordType::AAAA => About::Ipv6,
            RecordType::PTR => About::Pointer,
            RecordType::SVCB | RecordType::HTTPS => About::Service,
            _ => About::Other,
        }
    }

    /// How much of an answer the asker takes over UDP.
    pub(super) fn udp_limit(&self) -> usize {
        usize::from(self.takes.unwrap_or(UDP_LEAST).max(UDP_LEAST)).min(UDP_MAX)
    }

    /// An answer without records.
    pub(super) fn empty(&self, code: Code) -> Reply {
        self.reply(code.into())
    }

    /// An answer with those of some addresses that were asked for.
    pub(super) fn with_addresses(&self, addresses: &[IpAddr], ttl: u32) -> Reply {
        let mut reply = self.empty(Code::NoError);
        let of_kind = addresses.iter().filter(|address| match self.about() {
            About::Ipv4 => address.is_ipv4(),
            About::Ipv6 => address.is_ipv6(),
            _ => false,
        });
        let record = |address: &IpAddr| {
            let data = match *address {
                IpAddr::V4(address) => RData::A(address.into()),
                IpAddr::V6(address) => RData::AAAA(address.into()),
            };
            Record::from_rdata(self.query.name().clone(), ttl, data)
        };
        reply.0.answers = of_kind.take(RECORDS_MAX).map(record).collect();
        reply
    }

    /// An answer with the name of an address.
    pub(super) fn with_pointer(&self, name: &Domain, ttl: u32) -> Reply {
        let mut reply = self.empty(Code::NoError);
        if let Ok(mut to) = Name::from_ascii(name.as_str()) {
            to.set_fqdn(true);
            let data = RData::PTR(PTR(to));
            let record = Record::from_rdata(self.query.name().clone(), ttl, data);
            reply.0.answers.push(record);
        }
        reply
    }

    /// The same question for another resolver.
    pub(super) fn forwarded(&self, id: u16) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let query = Query::query(self.query.name().clone(), self.query.query_type());
        message.add_query(query);
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_MAX as u16);
        message.set_edns(edns);
        message.to_vec().unwrap_or_default()
    }

    /// Reads what another resolver says to [`Self::forwarded`] of that id.
    pub(super) fn hear(&self, id: u16, bytes: &[u8]) -> Heard {
        let Ok(message) = Message::from_vec(bytes) else {
            return Heard::NotOurs;
        };
        let metadata = &message.metadata;
        let ours = metadata.message_type == MessageType::Response
            && metadata.id == id
            && metadata.op_code == OpCode::Query
            && matches!(&message.queries[..], [query]
                if same(query.name(), self.query.name())
                    && query.query_type() == self.query.query_type()
                    && query.query_class() == DNSClass::IN);
        if !ours {
            return Heard::NotOurs;
        }
        if metadata.truncation {
            return Heard::Truncated;
        }
        let code = metadata.response_code;
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Heard::Failed;
        }
        self.follow(message)
            .map_or(Heard::Failed, |answer| Heard::Answer(Box::new(answer)))
    }

    /// What belongs to the question, or none when names lead nowhere.
    fn follow(&self, message: Message) -> Option<Answer> {
        let wanted = self.query.query_type();
        let answers = message.answers.into_iter();
        let answers: Vec<_> = answers
            .filter(|record| record.dns_class == DNSClass::IN)
            .collect();
        let mut name = self.query.name().clone();
        let mut chain: Vec<Record> = Vec::new();
        if wanted != RecordType::CNAME {
            let next = |name: &Name| {
                answers.iter().find_map(|record| match &record.data {
                    RData::CNAME(to) if same(&record.name, name) => Some((record, &to.0)),
                    _ => None,
                })
            };
            while let Some((record, to)) = next(&name) {
                if chain.len() == CHAIN_MAX {
                    return None;
                }
                name = to.clone();
                chain.push(record.clone());
            }
        }
        let of_name = answers
            .into_iter()
            .filter(|record| record.record_type() == wanted && same(&record.name, &name));
        let records: Vec<_> = of_name.take(RECORDS_MAX).collect();
        let mut authorities = message.authorities.into_iter();
        let soa = authorities.find(|record| record.record_type() == RecordType::SOA);
        Some(Answer {
            code: message.metadata.response_code,
            chain,
            authority: soa.filter(|_| records.is_empty()),
            records,
        })
    }

    fn reply(&self, code: ResponseCode) -> Reply {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.wants_recursion;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.query.clone());
        if self.takes.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_MAX as u16);
            message.set_edns(edns);
        }
        Reply(message)
    }
}

impl Answer {
    /// The addresses in it.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.records.iter().filter_map(address).collect()
    }

    /// Keeps only those addresses.
    pub(super) fn retain_addresses(&mut self, keep: impl Fn(IpAddr) -> bool) {
        self.records
            .retain(|record| address(record).is_none_or(&keep));
    }

    /// Seconds for which all of it is good.
    pub(super) fn ttl(&self) -> u32 {
        let all = [&self.chain, &self.records].into_iter().flatten();
        all.map(|record| record.ttl).min().unwrap_or(0).min(TTL_MAX)
    }

    /// The answer to the machine. No part is good for longer than the whole: who asks for the last name of a chain
    /// only would not be heard of the first one again.
    pub(super) fn reply(self, question: &Question) -> Reply {
        let ttl = self.ttl();
        let mut reply = question.reply(self.code);
        let answers = self.chain.into_iter().chain(self.records);
        reply.0.answers = answers.collect();
        for record in &mut reply.0.answers {
            record.ttl = ttl;
        }
        reply.0.authorities = self.authority.into_iter().collect();
        for record in &mut reply.0.authorities {
            record.ttl = record.ttl.min(TTL_MAX);
        }
        reply
    }
}

fn address(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    }
}

/// A message for a machine.
#[derive(Debug, Clone)]
pub(super) struct Reply(Message);

impl Reply {
    /// Its bytes; where they are more than `limit`, those of a message that says so.
    pub(super) fn bytes(mut self, limit: usize) -> Vec<u8> {
        match self.0.to_vec() {
            Ok(bytes) if bytes.len() <= limit => bytes,
            _ => {
                self.0.answers.clear();
                self.0.authorities.clear();
                self.0.metadata.truncation = true;
                self.0.to_vec().unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests;
