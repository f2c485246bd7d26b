//! Messages as tests make them, good and hostile.

use hickory_proto::rr::rdata::{CNAME, SOA};
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap();
    name.set_fqdn(true);
    name
}

fn query(text: &str, about: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(text), about));
    message
}

fn question(text: &str, about: RecordType) -> Question {
    match read(&query(text, about).to_vec().unwrap()) {
        Asked::Question(question) => question,
        other => panic!("{other:?}"),
    }
}

/// What an honest server says, with these records.
fn answer(question: &Question, id: u16, records: Vec<Record>) -> Message {
    let mut message = Message::response(id, OpCode::Query);
    message.add_query(question.query.clone());
    message.answers = records;
    message
}

fn a(owner: &str, ttl: u32, address: [u8; 4]) -> Record {
    let data = RData::A(std::net::Ipv4Addr::from(address).into());
    Record::from_rdata(name(owner), ttl, data)
}

fn alias(owner: &str, ttl: u32, to: &str) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(to))))
}

fn heard(question: &Question, records: Vec<Record>) -> Option<Answer> {
    let bytes = answer(question, 5, records).to_vec().unwrap();
    match question.hear(5, &bytes) {
        Heard::Answer(answer) => Some(*answer),
        Heard::Failed => None,
        other => panic!("{other:?}"),
    }
}

fn code(asked: Asked) -> ResponseCode {
    match asked {
        Asked::Refused(bytes) => {
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!(message.metadata.id, 77);
            assert_eq!(message.metadata.message_type, MessageType::Response);
            message.metadata.response_code
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_question_says_who_what_and_how_much() {
    let plain = question("WWW.Example.com", RecordType::AAAA);
    assert_eq!(plain.name.as_str(), "www.example.com");
    assert_eq!((plain.about(), plain.udp_limit()), (About::Ipv6, 512));
    for (says, takes) in [(0, 512), (600, 600), (1232, 1232), (65535, 1232)] {
        let mut message = query("example.com", RecordType::A);
        let mut edns = Edns::new();
        edns.set_max_payload(says);
        message.set_edns(edns);
        let Asked::Question(question) = read(&message.to_vec().unwrap()) else {
            panic!("no question");
        };
        assert_eq!(question.udp_limit(), takes);
        let reply = Message::from_vec(&question.empty(Code::NoName).bytes(512)).unwrap();
        assert_eq!(reply.edns.unwrap().max_payload(), 1232);
    }
}

#[test]
fn what_is_no_question_about_a_name_is_refused_or_ignored() {
    assert!(matches!(read(&[]), Asked::Nothing));
    assert!(matches!(read(&[0; 11]), Asked::Nothing));
    // An answer to an answer would never end.
    let answer = Message::response(77, OpCode::Query).to_vec().unwrap();
    assert!(matches!(read(&answer), Asked::Nothing));
    let refused = |message: &Message| code(read(&message.to_vec().unwrap()));
    let mut notify = query("example.com", RecordType::A);
    notify.metadata.op_code = OpCode::Notify;
    assert_eq!(refused(&notify), ResponseCode::NotImp);
    let mut two = query("example.com", RecordType::A);
    two.add_query(Query::query(name("example.org"), RecordType::A));
    assert_eq!(refused(&two), ResponseCode::FormErr);
    two.queries.clear();
    assert_eq!(refused(&two), ResponseCode::FormErr);
    let mut chaos = query("version.bind", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(refused(&chaos), ResponseCode::NotImp);
    for about in [RecordType::ANY, RecordType::AXFR, RecordType::IXFR] {
        let message = query("example.com", about);
        assert_eq!(refused(&message), ResponseCode::NotImp);
    }
    let mut edns = query("example.com", RecordType::A);
    edns.set_edns(Edns::new());
    edns.edns.as_mut().unwrap().set_version(1);
    // 16 is BADVERS here, and BADSIG elsewhere.
    assert_eq!(u16::from(refused(&edns)), 16);
    let mut long = query("example.com", RecordType::A).to_vec().unwrap();
    long.truncate(20);
    assert_eq!(code(read(&long)), ResponseCode::FormErr);
    // Labels that have what a policy cannot say: `a.b` as one label is not the name `a.b`.
    for label in [&b"a.b"[..], b"a b", b"\xff", b"*"] {
        let odd = Name::from_labels([label, b"com"]).unwrap();
        let mut message = query("example.com", RecordType::A);
        message.queries[0].set_name(odd);
        assert_eq!(refused(&message), ResponseCode::Refused);
    }
    assert_eq!(refused(&query(".", RecordType::NS)), ResponseCode::Refused);
}

#[test]
fn only_the_answer_to_the_question_is_heard() {
    let asked = question("example.com", RecordType::A);
    let record = || vec![a("example.com", 60, [203, 0, 113, 10])];
    let hear = |message: &Message| asked.hear(5, &message.to_vec().unwrap());
    let honest = answer(&asked, 5, record());
    assert!(matches!(hear(&honest), Heard::Answer(_)));
    let mut shouted = honest.clone();
    shouted.queries[0].set_name(name("EXAMPLE.com"));
    assert!(matches!(hear(&shouted), Heard::Answer(_)));
    let lies: [&dyn Fn(&mut Message); 6] = [
        &|message| message.metadata.id = 6,
        &|message| message.metadata.message_type = MessageType::Query,
        &|message| message.metadata.op_code = OpCode::Status,
        &|message| message.queries.clear(),
        &|message| message.queries[0].name = name("example.org"),
        &|message| message.queries[0].query_type = RecordType::AAAA,
    ];
    for (number, lie) in lies.iter().enumerate() {
        let mut message = honest.clone();
        lie(&mut message);
        assert!(matches!(hear(&message), Heard::NotOurs), "{number}");
    }
    let mut cut = honest.clone();
    cut.metadata.truncation = true;
    assert!(matches!(hear(&cut), Heard::Truncated));
    let mut failed = honest.clone();
    failed.metadata.response_code = ResponseCode::ServFail;
    assert!(matches!(hear(&failed), Heard::Failed));
}

#[test]
fn aliases_are_followed_and_strangers_left_out() {
    let asked = question("www.example.com", RecordType::A);
    let records = vec![
        a("host.example.net", 300, [203, 0, 113, 10]),
        a("evil.example.org", 300, [203, 0, 113, 66]),
        alias("mid.example.com", 40, "HOST.example.net"),
        alias("WWW.example.com", 100, "mid.example.com"),
        a("www.example.com", 300, [203, 0, 113, 67]),
        a("host.example.net", 200, [203, 0, 113, 11]),
    ];
    let answer = heard(&asked, records).unwrap();
    let addresses: Vec<IpAddr> = vec![[203, 0, 113, 10].into(), [203, 0, 113, 11].into()];
    assert_eq!(answer.addresses(), addresses);
    assert_eq!(answer.ttl(), 40);
    let reply = Message::from_vec(&answer.reply(&asked).bytes(512)).unwrap();
    assert_eq!((reply.metadata.id, reply.answers.len()), (77, 4));
    assert!(reply.answers.iter().all(|record| record.ttl == 40));
    assert!(reply.metadata.recursion_available && reply.metadata.recursion_desired);
    // Who asks for the alias itself gets it.
    let asked = question("www.example.com", RecordType::CNAME);
    let records = vec![alias("www.example.com", 100, "mid.example.com")];
    assert_eq!(heard(&asked, records).unwrap().records.len(), 1);
}

#[test]
fn aliases_that_lead_too_far_are_no_answer() {
    let asked = question("n0.example.com", RecordType::A);
    let chain = |length: usize| {
        let step = |n: usize| {
            let next = format!("n{}.example.com", n + 1);
            alias(&format!("n{n}.example.com"), 60, &next)
        };
        let mut records: Vec<_> = (0..length).map(step).collect();
        records.push(a(&format!("n{length}.example.com"), 60, [203, 0, 113, 10]));
        heard(&asked, records)
    };
    assert_eq!(chain(16).unwrap().addresses().len(), 1);
    assert!(chain(17).is_none());
    let circle = vec![
        alias("n0.example.com", 60, "n1.example.com"),
        alias("n1.example.com", 60, "n0.example.com"),
    ];
    assert!(heard(&asked, circle).is_none());
}

#[test]
fn nothing_is_good_for_longer_than_an_hour() {
    let asked = question("example.com", RecordType::A);
    for (ttl, good) in [(0, 0), (1, 1), (86_400, 3600), (u32::MAX, 3600)] {
        let answer = heard(&asked, vec![a("example.com", ttl, [203, 0, 113, 10])]).unwrap();
        assert_eq!(answer.ttl(), good);
    }
    let mut none = answer(&asked, 5, Vec::new());
    none.metadata.response_code = ResponseCode::NXDomain;
    let soa = SOA::new(
        name("ns.example.com"),
        name("root.example.com"),
        1,
        2,
        3,
        4,
        5,
    );
    none.add_authority(Record::from_rdata(name("com"), 86_400, RData::SOA(soa)));
    none.add_authority(a("ns.example.com", 60, [203, 0, 113, 53]));
    let Heard::Answer(none) = asked.hear(5, &none.to_vec().unwrap()) else {
        panic!("no answer");
    };
    let reply = Message::from_vec(&none.reply(&asked).bytes(512)).unwrap();
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    let ttls: Vec<_> = reply.authorities.iter().map(|record| record.ttl).collect();
    assert_eq!(ttls, [3600]);
}

#[test]
fn what_does_not_fit_says_so() {
    let asked = question("example.com", RecordType::A);
    let records = (0..200).map(|last| a("example.com", 60, [203, 0, 113, last]));
    let answer = heard(&asked, records.collect()).unwrap();
    assert_eq!(answer.addresses().len(), RECORDS_MAX);
    let reply = answer.reply(&asked);
    let short = Message::from_vec(&reply.clone().bytes(512)).unwrap();
    assert!(short.metadata.truncation && short.answers.is_empty());
    let whole = Message::from_vec(&reply.bytes(TCP_MAX)).unwrap();
    assert!(!whole.metadata.truncation && whole.answers.len() == RECORDS_MAX);
}

#[test]
fn own_names_have_addresses_of_the_kind_asked_for() {
    let both = [
        [172, 16, 0, 1].into(),
        IpAddr::from([0xfd68, 0, 0, 0, 0, 0, 0, 1]),
    ];
    for (about, count) in [
        (RecordType::A, 1),
        (RecordType::AAAA, 1),
        (RecordType::MX, 0),
    ] {
        let reply = question("web.hutch.internal", about).with_addresses(&both, 5);
        let reply = Message::from_vec(&reply.bytes(512)).unwrap();
        assert_eq!(reply.answers.len(), count);
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    }
    let asked = question("1.0.16.172.in-addr.arpa", RecordType::PTR);
    let reply = asked.with_pointer(&"web.hutch.internal".parse().unwrap(), 5);
    let reply = Message::from_vec(&reply.bytes(512)).unwrap();
    assert_eq!(
        reply.answers[0].data,
        RData::PTR(PTR(name("web.hutch.internal")))
    );
}

/// Names that are pointers to themselves, to each other, and forward; lengths that lie.
#[test]
fn messages_that_lie_about_themselves_are_not_heard() {
    let asked = question("example.com", RecordType::A);
    let honest = answer(&asked, 5, vec![a("example.com", 60, [203, 0, 113, 10])]);
    let honest = honest.to_vec().unwrap();
    let question_at = HEADER;
    let record_at = honest.len() - 16;
    assert_eq!(honest[record_at] & 0xc0, 0xc0, "the owner is a pointer");
    let to = |at: usize| [0xc0 | (at >> 8) as u8, at as u8];
    let lies = [
        (record_at, to(record_at).to_vec()),
        (record_at, to(honest.len() - 1).to_vec()),
        (record_at, vec![0xff, 0xff]),
        (record_at, vec![0x40, 0]),
        (question_at, to(question_at).to_vec()),
        (question_at, to(record_at).to_vec()),
        // More records, and longer ones, than there are.
        (6, vec![0xff, 0xff]),
        (record_at + 10, vec![0xff, 0xff]),
        (record_at + 10, vec![0, 3]),
    ];
    for (number, (at, bytes)) in lies.iter().enumerate() {
        let mut message = honest.clone();
        message[*at..at + bytes.len()].copy_from_slice(bytes);
        let heard = asked.hear(5, &message);
        assert!(matches!(heard, Heard::NotOurs), "{number}: {heard:?}");
    }
    // As long as a message can be, of pointers only.
    let mut long = honest[..HEADER].to_vec();
    while long.len() + 2 <= TCP_MAX {
        let at = long.len() - 2;
        long.extend(to(at.min(0x3fff)));
    }
    assert!(matches!(asked.hear(5, &long), Heard::NotOurs));
}

proptest! {
    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let asked = question("example.com", RecordType::A);
        let _ = read(&bytes);
        prop_assert!(!matches!(asked.hear(5, &bytes), Heard::Answer(_)) || bytes.len() > HEADER);
    }

    /// Whatever a liar changes, what is heard is about the name, short, and can be written again.
    #[test]
    fn what_is_heard_can_be_told(
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..8),
        last in 0_usize..20,
    ) {
        let asked = question("n0.example.com", RecordType::A);
        let step = |n: usize| alias(&format!("n{n}.example.com"), 60, &format!("n{}.example.com", n + 1));
        let mut records: Vec<_> = (0..last).map(step).collect();
        records.push(a(&format!("n{last}.example.com"), 60, [203, 0, 113, 10]));
        let mut bytes = answer(&asked, 5, records).to_vec().unwrap();
        for (at, byte) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        let _ = read(&bytes);
        if let Heard::Answer(answer) = asked.hear(5, &bytes) {
            prop_assert!(answer.chain.len() <= CHAIN_MAX && answer.records.len() <= RECORDS_MAX);
            let reply = answer.reply(&asked).bytes(UDP_MAX);
            prop_assert!(reply.len() <= UDP_MAX);
            let reply = Message::from_vec(&reply).unwrap();
            prop_assert_eq!(reply.metadata.id, 77);
        }
    }
}
