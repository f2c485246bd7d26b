//! Any bytes in any pieces.

use proptest::prelude::*;

use super::*;

fn frames() -> impl Strategy<Value = Frame> {
    let kind = prop_oneof![
        Just(Kind::Syn),
        Just(Kind::Ack),
        Just(Kind::Data),
        Just(Kind::Fin)
    ];
    (kind, any::<u32>(), any::<u32>()).prop_flat_map(|(kind, session, sequence)| {
        let length = match kind {
            Kind::Syn | Kind::Ack => NONCE..=NONCE,
            Kind::Data => 1..=PAYLOAD,
            Kind::Fin => 0..=0,
        };
        prop::collection::vec(any::<u8>(), length).prop_map(move |payload| Frame {
            kind,
            session,
            sequence,
            payload: payload.into(),
        })
    })
}

/// Bytes with many beginnings of frames in them.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(MAGIC.to_vec()),
        Just(MAGIC[..2].to_vec()),
        // A header that claims the largest payload.
        Just(
            [
                &MAGIC[..],
                &[3, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0, 1, 2, 3, 4]
            ]
            .concat()
        ),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    encode(
        &mut out,
        frame.kind,
        frame.session,
        frame.sequence,
        &frame.payload,
    );
    out
}

/// Decodes `bytes` in pieces and checks that little is kept between them.
fn decode(bytes: &[u8], piece: usize) -> Vec<Found> {
    let mut decoder = Decoder::default();
    let mut all = Vec::new();
    for piece in bytes.chunks(piece) {
        decoder.buffer().extend_from_slice(piece);
        all.extend(std::iter::from_fn(|| decoder.next_found()));
        assert!(decoder.buffer().len() < FILLER, "more than a frame is kept");
    }
    all
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_the_bytes_are_split(
        sent in prop::collection::vec(frames(), 1..6),
        piece in 1_usize..9000,
    ) {
        let bytes: Vec<u8> = sent.iter().flat_map(encoded).collect();
        let expected: Vec<_> = sent.into_iter().map(Found::Frame).collect();
        prop_assert_eq!(decode(&bytes, piece), expected);
    }

    #[test]
    fn any_garbage_is_survived_and_what_follows_filler_is_found(
        garbage in garbage(), old in frames(), cut in any::<prop::sample::Index>(),
        nonce in any::<[u8; NONCE]>(), session in any::<u32>(), piece in 1_usize..9000,
    ) {
        let mut bytes = BytesMut::from(&garbage[..]);
        let old = encoded(&old);
        bytes.extend_from_slice(&old[..cut.index(old.len())]);
        encode_handshake(&mut bytes, Kind::Syn, session, &nonce);
        let syn = Frame { kind: Kind::Syn, session, sequence: 0, payload: nonce.to_vec().into() };
        prop_assert_eq!(decode(&bytes, piece).pop(), Some(Found::Frame(syn)));
    }

    #[test]
    fn a_changed_byte_is_noticed(
        frame in frames(), at in any::<prop::sample::Index>(), change in 1_u8..,
    ) {
        let mut bytes = encoded(&frame);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        bytes.put_bytes(0, FILLER);
        let found = decode(&bytes, usize::MAX);
        prop_assert!(found.contains(&Found::Garbage));
        prop_assert!(!found.iter().any(|found| matches!(found, Found::Frame(_))));
    }
}

#[test]
fn filler_alone_says_nothing() {
    assert_eq!(decode(&vec![0; 3 * FILLER], 1000), []);
}
