//! What rules are made of. One packet's rule runs its expressions in order until one does not match.

use crate::Message;
use crate::attribute::{be32, be64, find, text};

const NAME: u16 = 1;
const DATA: u16 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// `NF_NAT_RANGE_PROTO_SPECIFIED`
const PORT_GIVEN: u32 = 2;
const FIB_DESTINATION: u32 = 2;
const FIB_ADDRESS_TYPE: u32 = 3;
const OVER: u32 = 1;
const SECOND: u64 = 1;
const CT_STATUS_CONFIRMED: u32 = 8;
const CT_STATUS_DNAT: u32 = 32;
const LIMIT_RATE: u16 = 1;
const LIMIT_UNIT: u16 = 2;
const LIMIT_BURST: u16 = 3;
const LIMIT_TYPE: u16 = 4;
const LIMIT_FLAGS: u16 = 5;
const PACKETS: u32 = 0;
const BYTES: u32 = 1;
const CONNECTIONS_COUNT: u16 = 1;
const CONNECTIONS_FLAGS: u16 = 2;
const RT_SEGMENT: u32 = 3;
const TCP_OPTION: u32 = 1;
const TCP_OPTION_SEGMENT: u8 = 2;

/// Where a value stands while a rule is evaluated.
pub type Register = u32;
/// The first register; values that are matched together stand behind each other, in steps of four bytes.
pub const REGISTER: Register = 1;

/// The register `bytes` after the first one (`NFT_REG32_00` is 8; the first has the same place).
pub const fn register32(bytes: u32) -> Register {
    match bytes {
        0 => REGISTER,
        _ => 8 + bytes / 4,
    }
}

/// Facts about a packet that are not in it (`enum nft_meta_keys`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Meta {
    InputName = 6,
    OutputName = 7,
    /// `ARPHRD_…`, two bytes of the host's order.
    InputType = 8,
    /// `NFPROTO_…`, one byte.
    NfProtocol = 15,
    /// `IPPROTO_…`, one byte.
    L4Protocol = 16,
}

/// From where a payload's offset counts (`enum nft_payload_bases`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Base {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// How a value is compared (`enum nft_cmp_ops`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Compare {
    Equal = 0,
    NotEqual = 1,
}

/// Facts about a packet's connection (`enum nft_ct_keys`), four bytes of the host's order, or one for the direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Conntrack {
    State = 0,
    /// 0 for the direction of who began it.
    Direction = 1,
    Status = 2,
    Mark = 3,
}

impl Conntrack {
    /// The packet fits no connection.
    pub const INVALID: u32 = 1;
    /// There were packets in both directions.
    pub const ESTABLISHED: u32 = 2;
    /// It belongs to another connection, as an error message does.
    pub const RELATED: u32 = 4;
    /// It begins a connection.
    pub const NEW: u32 = 8;
    /// Bit of the status: a packet of it has passed the host.
    pub const CONFIRMED: u32 = CT_STATUS_CONFIRMED;
    /// Bit of the status: the destination has been translated.
    pub const DESTINATION_TRANSLATED: u32 = CT_STATUS_DNAT;
}

/// What an address is to the host (`RTN_…`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Address {
    Local = 2,
    Broadcast = 3,
    Anycast = 4,
    Multicast = 5,
}

/// How the sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reject {
    /// By a TCP reset.
    Reset,
    /// By ICMP of its family: administratively prohibited.
    Prohibited,
}

/// What becomes of the packet, or where its way goes on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Verdict {
    Accept,
    Drop,
    Jump(String),
    Goto(String),
}

/// One step of a rule, or what an element of a set does when it is found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Expression {
    /// Loads a fact.
    Meta(Meta, Register),
    /// Loads bytes of the packet: base, offset, length.
    Payload(Base, u32, u32, Register),
    /// Goes on if the register compares so; fewer bytes than loaded compare a prefix.
    Cmp(Register, Compare, Vec<u8>),
    /// Keeps the bits of a mask of as many bytes.
    And(Register, Vec<u8>),
    /// Goes on if the register's value is in the set, after the element's own expressions.
    Lookup(String, Register),
    /// Goes on with what the map has for the register's value.
    Map(String, Register, Register),
    /// Does what a map of verdicts has for the register's value.
    VerdictMap(String, Register),
    /// Decides.
    Verdict(Verdict),
    /// Loads a fact about the connection.
    Conntrack(Conntrack, Register),
    /// Marks the connection.
    SetMark(Register),
    /// Goes on below a rate: packets a second, and how many at once.
    Limit(u64, u32),
    /// For elements: goes on above a rate: bytes a second, and how many at once.
    BytesOver(u64, u32),
    /// For elements: goes on while the element's connections are more than so many.
    ConnectionsOver(u32),
    /// Counts packets and bytes.
    Counter,
    /// Puts the register's value into a set for so many milliseconds, or anew.
    Update(String, Register, u64),
    /// Drops the packet and tells its sender.
    Reject(Reject),
    /// Sends the packet out under the host's address.
    Masquerade,
    /// Sends the packet to the host itself, to the port in the register.
    Redirect(Register),
    /// Loads what the destination is to the host: an [`Address`], four bytes of the host's order.
    DestinationType(Register),
    /// Loads the largest TCP segment that the route can carry, two bytes of the host's order.
    RouteSegment(Register),
    /// Turns two bytes into network order.
    NetworkOrder(Register),
    /// Lowers the largest segment that a TCP packet announces to the register's value.
    ClampSegment(Register),
}

impl Expression {
    /// Writes it as an element of a list.
    pub(crate) fn write(&self, to: &mut Message) {
        let mut expression = |name: &str, data: &dyn Fn(&mut Message)| {
            to.text(NAME, name).nest(DATA, |inner| data(inner));
        };
        match self {
            Self::Meta(key, register) => expression("meta", &|data| {
                data.be32(1, *register).be32(2, *key as u32);
            }),
            Self::Payload(base, offset, length, register) => expression("payload", &|data| {
                data.be32(1, *register).be32(2, *base as u32);
                data.be32(3, *offset).be32(4, *length);
            }),
            Self::Cmp(register, compare, value) => expression("cmp", &|data| {
                data.be32(1, *register).be32(2, *compare as u32);
                data.nest(3, |inner| {
                    inner.put(VALUE, value);
                });
            }),
            Self::And(register, mask) => expression("bitwise", &|data| {
                let length = u32::try_from(mask.len()).unwrap_or(u32::MAX);
                data.be32(1, *register).be32(2, *register).be32(3, length);
                data.nest(4, |inner| {
                    inner.put(VALUE, mask);
                });
                data.nest(5, |inner| {
                    inner.put(VALUE, &vec![0; mask.len()]);
                });
            }),
            Self::Lookup(set, register) => expression("lookup", &|data| {
                data.text(1, set).be32(2, *register);
            }),
            Self::Map(map, key, value) => expression("lookup", &|data| {
                data.text(1, map).be32(2, *key).be32(3, *value);
            }),
            Self::VerdictMap(map, key) => expression("lookup", &|data| {
                data.text(1, map).be32(2, *key).be32(3, 0);
            }),
            Self::Verdict(verdict) => expression("immediate", &|data| {
                data.be32(1, 0);
                data.nest(2, |inner| verdict.write(inner));
            }),
            Self::Conntrack(key, register) => expression("ct", &|data| {
                data.be32(1, *register).be32(2, *key as u32);
            }),
            Self::SetMark(register) => expression("ct", &|data| {
                data.be32(2, Conntrack::Mark as u32).be32(4, *register);
            }),
            Self::Limit(rate, burst) => expression("limit", &|data| {
                data.be64(LIMIT_RATE, *rate).be64(LIMIT_UNIT, SECOND);
                data.be32(LIMIT_BURST, *burst);
                data.be32(LIMIT_TYPE, PACKETS).be32(LIMIT_FLAGS, 0);
            }),
            Self::BytesOver(rate, burst) => expression("limit", &|data| {
                data.be64(LIMIT_RATE, *rate).be64(LIMIT_UNIT, SECOND);
                data.be32(LIMIT_BURST, *burst);
                data.be32(LIMIT_TYPE, BYTES).be32(LIMIT_FLAGS, OVER);
            }),
            Self::ConnectionsOver(count) => expression("connlimit", &|data| {
                data.be32(CONNECTIONS_COUNT, *count);
                data.be32(CONNECTIONS_FLAGS, OVER);
            }),
            Self::Counter => expression("counter", &|data| {
                data.be64(1, 0).be64(2, 0);
            }),
            Self::Update(set, register, milliseconds) => expression("dynset", &|data| {
                let update = 1;
                data.text(1, set).be32(3, update).be32(4, *register);
                data.be64(6, *milliseconds);
            }),
            Self::Reject(Reject::Reset) => expression("reject", &|data| {
                data.be32(1, 1).put(2, &[0]);
            }),
            Self::Reject(Reject::Prohibited) => expression("reject", &|data| {
                data.be32(1, 2).put(2, &[3]);
            }),
            Self::Masquerade => expression("masq", &|_| {}),
            Self::Redirect(register) => expression("redir", &|data| {
                data.be32(1, *register).be32(2, *register);
                data.be32(3, PORT_GIVEN);
            }),
            Self::DestinationType(register) => expression("fib", &|data| {
                data.be32(1, *register).be32(2, FIB_ADDRESS_TYPE);
                data.be32(3, FIB_DESTINATION);
            }),
            Self::RouteSegment(register) => expression("rt", &|data| {
                data.be32(1, *register).be32(2, RT_SEGMENT);
            }),
            Self::NetworkOrder(register) => expression("byteorder", &|data| {
                let to_network = 1;
                data.be32(1, *register).be32(2, *register);
                data.be32(3, to_network).be32(4, 2).be32(5, 2);
            }),
            Self::ClampSegment(register) => expression("exthdr", &|data| {
                // Two bytes at the third of the option; the kernel only ever lowers this one.
                data.put(2, &[TCP_OPTION_SEGMENT]).be32(3, 2).be32(4, 2);
                data.be32(6, TCP_OPTION).be32(7, *register);
            }),
        }
    }
}

impl Expression {
    /// What the kernel shows of an element's limit; none for other expressions.
    pub(crate) fn read(expression: &[u8]) -> Option<Self> {
        let (name, data) = (find(expression, NAME)?, find(expression, DATA)?);
        let long = |kind| find(data, kind).and_then(be64);
        let short = |kind| find(data, kind).and_then(be32);
        match &text(name)[..] {
            "limit" => {
                let plain = long(LIMIT_UNIT)? == SECOND
                    && short(LIMIT_TYPE)? == BYTES
                    && short(LIMIT_FLAGS)? == OVER;
                plain.then_some(Self::BytesOver(long(LIMIT_RATE)?, short(LIMIT_BURST)?))
            }
            "connlimit" => {
                let over = short(CONNECTIONS_FLAGS)? == OVER;
                over.then_some(Self::ConnectionsOver(short(CONNECTIONS_COUNT)?))
            }
            _ => None,
        }
    }
}

impl Verdict {
    pub(crate) fn write(&self, to: &mut Message) {
        // NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO
        let (code, chain) = match self {
            Self::Drop => (0i32, None),
            Self::Accept => (1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
        };
        to.nest(VERDICT, |inner| {
            inner.put(VERDICT_CODE, &code.to_be_bytes());
            if let Some(chain) = chain {
                inner.text(VERDICT_CHAIN, chain);
            }
        });
    }

    pub(crate) fn read(value: &[u8]) -> Option<Self> {
        let code = i32::from_be_bytes(find(value, VERDICT_CODE)?.try_into().ok()?);
        let chain = || Some(text(find(value, VERDICT_CHAIN)?));
        match code {
            0 => Some(Self::Drop),
            1 => Some(Self::Accept),
            -3 => Some(Self::Jump(chain()?)),
            -4 => Some(Self::Goto(chain()?)),
            _ => None,
        }
    }
}
