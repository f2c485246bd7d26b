//! Measures how many commits a SQLite store makes: `cargo run --example commits [DIRECTORY]`.

use std::sync::Arc;
use std::time::Instant;

use hutch_store::{Key, SqliteStore, Store, Write};

const COMMITS: usize = 4_096;
const RECORDS: usize = 1_024;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let parent = std::env::args()
        .nth(1)
        .map_or_else(std::env::temp_dir, Into::into);
    for tasks in [1, 8, 64] {
        let dir = tempfile::tempdir_in(&parent)?;
        let store = Arc::new(SqliteStore::open(dir.path().join("store.db"))?);
        let start = Instant::now();
        let work: Vec<_> = (0..tasks)
            .map(|task| tokio::spawn(write(store.clone(), task, COMMITS / tasks)))
            .collect();
        let mut waits = Vec::with_capacity(COMMITS);
        for task in work {
            waits.extend(task.await??);
        }
        let rate = COMMITS as f64 / start.elapsed().as_secs_f64();
        waits.sort_by(f64::total_cmp);
        let at = |part: f64| waits[(waits.len() as f64 * part) as usize];
        println!(
            "commits tasks {tasks} rate {rate:.0}/s p50 {:.2} ms p99 {:.2} ms transactions {}",
            at(0.50),
            at(0.99),
            store.stats().transactions
        );
    }
    Ok(())
}

/// Commits of two records of 1 KiB each; returns how long each took, in milliseconds.
async fn write(
    store: Arc<SqliteStore>,
    task: usize,
    times: usize,
) -> Result<Vec<f64>, hutch_store::Error> {
    let mut waits = Vec::with_capacity(times);
    for i in 0..times {
        let record = (task * times + i) % RECORDS;
        let key = |kind: &str| Key::new(format!("{kind}/{record}"));
        let writes = vec![
            Write::Put(key("machine")?, vec![7; 1024]),
            Write::Put(key("operation")?, vec![7; 1024]),
        ];
        let start = Instant::now();
        store.commit(vec![], writes).await?;
        waits.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(waits)
}
