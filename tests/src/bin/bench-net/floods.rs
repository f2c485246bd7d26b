//! What a healthy client of the gateway notices of clients that mean no good.
//!
//! They need a processor themselves: so the same is measured while they go to a port that takes everything and answers
//! nothing. What they cost beyond that is the gateway's.
//!
//! Numbers are medians of those of the rounds: a neighbour of the machine spoils a round, not the result.

use std::time::Duration;

use hutch_tests::resident_kib;

use crate::client::Load;
use crate::flood::{PER_SECOND, SLOW};
use crate::numbers::median;
use crate::role::Role;
use crate::roles::DOMAIN;

const ROUNDS: usize = 5;
/// One that asks about 300 times a second, and comes on a new connection for every tenth request.
const HEALTHY: Load = Load {
    connections: 1,
    time: Duration::from_millis(1500),
    pause: Duration::from_millis(2),
    renew: 10,
};
/// Until a flood is there.
const RISE: Duration = Duration::from_millis(1200);
/// Until one is gone.
const FALL: Duration = Duration::from_millis(300);

/// Each flood in turn, alone and against the port beside it.
pub fn run() {
    let upstream = Role::start(None, &["upstream"]);
    let gateway = Role::start(None, &["gateway", &upstream.address()]);
    let host = format!("web.{DOMAIN}");
    let to = gateway.address();
    let healthy = |rounds: &mut Rounds| -> usize {
        let mut done = HEALTHY.run(None, &to, &host);
        rounds.p50.push(done.times.percentile(50));
        rounds.p95.push(done.times.percentile(95));
        done.errors
    };
    healthy(&mut Rounds::default());
    println!(
        "floods: a healthy client beside each, {ROUNDS} rounds of {} s in turn; floods give way on the processors",
        HEALTHY.time.as_secs_f64()
    );
    for (flood, what) in [
        (
            "slow-many",
            format!("{SLOW} slowloris clients, 100 addresses"),
        ),
        ("slow-one", format!("{SLOW} slowloris clients, one address")),
        (
            "resets",
            format!("{PER_SECOND} HTTP/2 rapid resets a second"),
        ),
        (
            "malformed",
            format!("{PER_SECOND} malformed requests a second"),
        ),
    ] {
        let [mut alone, mut beside, mut under] = [(); 3].map(|()| Rounds::default());
        let (mut errors, mut memory) = (0, 0);
        for _ in 0..ROUNDS {
            errors += healthy(&mut alone);
            {
                let sink = Role::start(None, &["sink"]);
                let _flood = Role::modest(&["flood", flood, &sink.address()]);
                std::thread::sleep(RISE);
                errors += healthy(&mut beside);
            }
            std::thread::sleep(FALL);
            {
                let _flood = Role::modest(&["flood", flood, &to]);
                std::thread::sleep(RISE);
                errors += healthy(&mut under);
                memory = memory.max(resident_kib(gateway.pid()));
            }
            std::thread::sleep(FALL);
        }
        println!("floods: {what}");
        for (name, rounds) in [
            ("alone", &alone),
            ("flood goes elsewhere", &beside),
            ("flood of the gateway", &under),
        ] {
            let (p50, p95) = (median(&rounds.p50), median(&rounds.p95));
            println!(
                "floods:   {name:<20} p50 {p50:>6.3} ms, p95 {p95:>6.3} ms; ratio to alone p50 {:.2}, p95 {:.2}",
                p50 / median(&alone.p50),
                p95 / median(&alone.p95),
            );
        }
        println!(
            "floods:   {errors} errors of the healthy client; the gateway's memory at most {:.1} MiB",
            memory as f64 / 1024.0
        );
    }
}

/// Percentiles of each round, in milliseconds.
#[derive(Default)]
struct Rounds {
    p50: Vec<f64>,
    p95: Vec<f64>,
}
