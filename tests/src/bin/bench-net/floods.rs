//! What a healthy client of the gateway notices of clients that mean no good.
//!
//! They need a processor themselves: so the same is measured while they go to a port that takes everything and answers
//! nothing. What they cost beyond that is the gateway's.

use std::time::Duration;

use hutch_tests::resident_kib;

use crate::client::Load;
use crate::flood::{PER_SECOND, SLOW};
use crate::helper::Helper;
use crate::numbers::Times;
use crate::roles::DOMAIN;

const ROUNDS: usize = 3;
/// One that asks about 300 times a second, and comes on a new connection for every tenth request.
const HEALTHY: Load = Load {
    connections: 1,
    time: Duration::from_secs(2),
    pause: Duration::from_millis(2),
    renew: 10,
};
/// Until a flood is there.
const RISE: Duration = Duration::from_millis(1500);
/// Until one is gone.
const FALL: Duration = Duration::from_millis(300);

/// Each flood in turn, alone and against the port beside it.
pub fn run() {
    let upstream = Helper::start(None, &["upstream"]);
    let gateway = Helper::start(None, &["gateway", &upstream.address()]);
    let host = format!("web.{DOMAIN}");
    let to = gateway.address();
    let healthy = |times: &mut Times| -> usize {
        let done = HEALTHY.run(None, &to, &host);
        times.merge(done.times);
        done.errors
    };
    healthy(&mut Times::default());
    println!(
        "floods: a healthy client beside each, {ROUNDS} rounds of {} s in turn; floods give way on the processors",
        HEALTHY.time.as_secs()
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
        let [mut alone, mut beside, mut under] = [(); 3].map(|()| Times::default());
        let (mut errors, mut memory) = (0, 0);
        for _ in 0..ROUNDS {
            errors += healthy(&mut alone);
            {
                let sink = Helper::start(None, &["sink"]);
                let _flood = Helper::modest(&["flood", flood, &sink.address()]);
                std::thread::sleep(RISE);
                errors += healthy(&mut beside);
            }
            std::thread::sleep(FALL);
            {
                let _flood = Helper::modest(&["flood", flood, &to]);
                std::thread::sleep(RISE);
                errors += healthy(&mut under);
                memory = memory.max(resident_kib(gateway.pid()));
            }
            std::thread::sleep(FALL);
        }
        println!("floods: {what}");
        println!("floods:   alone                  {}", alone.shown());
        for (name, times) in [
            ("flood goes elsewhere", &mut beside),
            ("flood of the gateway", &mut under),
        ] {
            println!(
                "floods:   {name:<22} {}; ratio to alone p50 {:.2}, p95 {:.2}",
                times.shown(),
                times.percentile(50) / alone.percentile(50),
                times.percentile(95) / alone.percentile(95),
            );
        }
        println!(
            "floods:   {errors} errors of the healthy client; the gateway's memory at most {:.1} MiB",
            memory as f64 / 1024.0
        );
    }
}
