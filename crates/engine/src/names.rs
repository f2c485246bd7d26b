//! Names for machines that nobody named: adverb-adjective-noun.

use hutch_contract::name::Name;

use crate::keys::random_bytes;

const ADVERBS: &[&str] = &[
    "always", "barely", "boldly", "bravely", "briskly", "calmly", "clearly", "deeply", "eagerly",
    "easily", "fairly", "firmly", "fondly", "freely", "gently", "gladly", "happily", "highly",
    "humbly", "keenly", "kindly", "lately", "lightly", "loudly", "madly", "merely", "mildly",
    "mostly", "nearly", "neatly", "nicely", "oddly", "openly", "partly", "plainly", "politely",
    "purely", "quickly", "quietly", "rarely", "really", "richly", "safely", "sharply", "simply",
    "slowly", "smartly", "softly", "surely", "sweetly", "swiftly", "truly", "vastly", "very",
    "warmly", "wholly", "widely", "wildly", "wisely", "yearly",
];

const ADJECTIVES: &[&str] = &[
    "agile", "amber", "ample", "azure", "bold", "brave", "bright", "brisk", "calm", "candid",
    "cheerful", "clever", "cosy", "crisp", "curious", "daring", "eager", "early", "fancy", "fast",
    "fluffy", "fond", "fresh", "gentle", "golden", "grand", "happy", "hardy", "humble", "icy",
    "jolly", "keen", "kind", "lively", "loyal", "lucky", "mellow", "merry", "mighty", "modest",
    "noble", "patient", "placid", "plucky", "polite", "proud", "quick", "quiet", "ready", "round",
    "shiny", "silly", "sleepy", "smooth", "snug", "solid", "spry", "steady", "sunny", "tidy",
    "tiny", "vivid", "warm", "wise", "witty", "zesty",
];

const NOUNS: &[&str] = &[
    "badger", "beaver", "bison", "bobcat", "burrow", "canary", "cricket", "curlew", "dolphin",
    "dormouse", "falcon", "ferret", "finch", "fox", "gecko", "gibbon", "hamster", "hare",
    "hedgehog", "heron", "ibis", "jackdaw", "kestrel", "kiwi", "koala", "lark", "lemur", "lynx",
    "magpie", "marmot", "marten", "mole", "moose", "newt", "ocelot", "otter", "owl", "panda",
    "pelican", "penguin", "plover", "puffin", "quail", "rabbit", "raven", "robin", "salmon",
    "seal", "shrew", "sparrow", "squirrel", "starling", "stoat", "swan", "tapir", "toad", "trout",
    "turtle", "vole", "walrus", "weasel", "wombat", "wren", "yak",
];

/// A name by chance: one of about 250,000.
pub(crate) fn generate() -> Name {
    let dice: [u8; 6] = random_bytes();
    let pick = |words: &[&'static str], high: u8, low: u8| {
        words[usize::from(u16::from_be_bytes([high, low])) % words.len()]
    };
    let adverb = pick(ADVERBS, dice[0], dice[1]);
    let adjective = pick(ADJECTIVES, dice[2], dice[3]);
    let noun = pick(NOUNS, dice[4], dice[5]);
    format!("{adverb}-{adjective}-{noun}")
        .parse()
        .expect("three short words make a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_can_stand_in_a_name() {
        for words in [ADVERBS, ADJECTIVES, NOUNS] {
            let mut sorted = words.to_vec();
            sorted.dedup();
            assert_eq!(sorted.len(), words.len(), "a word stands twice");
            assert!(
                words
                    .iter()
                    .all(|word| word.bytes().all(|b| b.is_ascii_lowercase()))
            );
        }
        let longest = [ADVERBS, ADJECTIVES, NOUNS]
            .iter()
            .map(|w| w.iter().map(|w| w.len()).max())
            .sum::<Option<usize>>();
        assert!(longest.expect("lists are not empty") + 2 <= Name::MAX_LEN);
    }

    #[test]
    fn very_silly_penguin_is_possible() {
        assert!(
            ADVERBS.contains(&"very")
                && ADJECTIVES.contains(&"silly")
                && NOUNS.contains(&"penguin")
        );
    }

    #[test]
    fn generated_names_differ() {
        let names: std::collections::HashSet<_> = (0..50).map(|_| generate()).collect();
        assert!(names.len() > 40);
    }
}
