//! Machines whose disk is kept, when asked, as it is before anything runs on it.

use hutch_contract::machine::{CreateMachine, Machine, Status};
use hutch_contract::snapshot::SnapshotState;

use crate::crash::after_a_crash;
use crate::lab::{Lab, spec};
use crate::snapshots::{read, write};

impl Lab {
    async fn create_kept(&self, name: &str) -> Machine {
        let request = CreateMachine {
            snapshot_initial: true,
            ..spec(name)
        };
        let admitted = self.engine.create(&self.who, request, None).await;
        admitted.unwrap().machine
    }

    async fn has_its_initial_disk(&self, name: &str) {
        let machine = self.wait(name, Status::Running).await.unwrap();
        let [initial] = &self.all(Some(name))[..] else {
            panic!("{:?}", self.all(Some(name)))
        };
        assert_eq!(
            (initial.name.as_str(), initial.state, initial.sequence),
            ("initial", SnapshotState::Ready, 1)
        );
        assert_eq!(initial.pause_us, None, "nothing stood still for it");
        write(&self.disk(&machine), "later");
        self.restore(name, "initial").await.unwrap();
        assert_eq!(read(&self.disk(&machine), 5), "\0\0\0\0\0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_back_to_its_very_beginning() {
    let Some(lab) = Lab::new().await else { return };
    lab.create_kept("a").await;
    lab.has_its_initial_disk("a").await;
    let next = lab.snapshot("a").await;
    assert_eq!((next.name.as_str(), next.sequence), ("s2", 2));
    assert_eq!(next.parent, Some(lab.all(Some("a"))[0].id.clone()));
    lab.delete("a").await;
    assert_eq!(lab.home.left(), []);
}

#[test]
fn a_crash_at_any_moment_keeps_the_very_beginning() {
    for ms in [0, 1, 2, 3, 5, 8, 12, 20, 40] {
        after_a_crash(
            async |lab| {
                lab.create_kept("a").await;
                tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
            },
            async |lab| {
                lab.has_its_initial_disk("a").await;
                lab.delete("a").await;
                assert_eq!(lab.home.left(), []);
            },
        );
    }
}
