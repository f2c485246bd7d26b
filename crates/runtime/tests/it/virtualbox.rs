//! What only VirtualBox has: the commands that are given to it, and how it can fail. The program that stands for it runs
//! no guest here, so that none of this needs QEMU.

use std::path::PathBuf;

use hutch_contract::error::Kind;
use hutch_contract::machine::Exit;
use hutch_runtime::{Adopted, Error, ImageLayer, MachineDir, RuntimeConfig, table::Runtimes};
use rustix::process::{Pid, Signal};

use crate::lab::{Lab, alive, is_root, runtime, status};

struct VirtualBox {
    lab: Lab,
    home: PathBuf,
}

impl VirtualBox {
    fn new(behaviour: &str) -> Self {
        let lab = Lab::bare("virtualbox");
        let home = lab.dir.path().with_file_name("virtualbox");
        let this = Self { lab, home };
        this.behave(behaviour);
        this
    }

    fn behave(&self, behaviour: &str) {
        let all = format!("{{\"guest\": \"none\"{behaviour}}}");
        std::fs::write(self.home.join("behave.json"), all).unwrap();
    }

    /// The commands since the last time, with the machine's UUID and directory by name.
    fn commands(&self) -> Vec<String> {
        let path = self.home.join("commands");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let _ = std::fs::remove_file(path);
        let dir = self.lab.dir.path().display().to_string();
        let named = text
            .replace(&dir, "DIR")
            .replace(&self.lab.spec.label, "LABEL");
        let uuid = self.uuid();
        let named = named.lines().map(|line| match &uuid {
            Some(uuid) => line.replace(uuid, "UUID"),
            None => line.to_owned(),
        });
        named.collect()
    }

    fn uuid(&self) -> Option<String> {
        let record = std::fs::read(self.lab.dir.file("virtualbox.json")).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        Some(record["uuid"].as_str().unwrap().to_owned())
    }

    fn machine(&self) -> PathBuf {
        self.home.join(format!("{}.json", self.uuid().unwrap()))
    }

    /// The machines that it has.
    fn machines(&self) -> usize {
        let files = std::fs::read_dir(&self.home).unwrap().flatten();
        let names = files.map(|file| file.file_name().into_string().unwrap());
        names
            .filter(|name| name.ends_with(".json") && name != "behave.json")
            .count()
    }

    async fn fails(&self) -> Error {
        let started = self.lab.runtime.start(&self.lab.dir, &self.lab.spec).await;
        started.unwrap_err()
    }
}

const OWNER: &str = "setextradata|UUID|hutch/machine|mch-LABEL";
const SHAPE: [&str; 2] = [
    "modifyvm|UUID|--memory|128|--cpus|1|--nic1|null|--nic2|none|--uart1|0x3F8|4|--uart-mode1|server|run/vmm/serial|\
     --uart2|0x2F8|3|--uart-mode2|file|/proc/self/fd/1",
    "setextradata|UUID|VBoxInternal2/TurnResetIntoPowerOff|1",
];

#[tokio::test]
async fn a_start_makes_a_linked_clone_and_takes_from_it_what_leads_outside() {
    let vb = VirtualBox::new("");
    let process = vb.lab.start().await;
    let expected = [
        "showvminfo|UUID|--machinereadable",
        "clonevm|debian base|--snapshot|clean|--mode|machine|--options|Link|--name|LABEL|--uuid|UUID|--basefolder|\
         DIR/vm|--register",
        "showvminfo|UUID|--machinereadable",
        OWNER,
        SHAPE[0],
        SHAPE[1],
        "sharedfolder|remove|UUID|--name|home",
    ];
    assert_eq!(vb.commands(), expected);

    process.kill().await.unwrap();
    vb.lab.start().await;
    // It knows the machine, and that its VMM was killed.
    let shape = SHAPE[0].replace("--nic2|none|", "");
    let again = ["showvminfo|UUID|--machinereadable", OWNER, &shape, SHAPE[1]];
    assert_eq!(vb.commands(), again);
    assert_eq!(vb.machines(), 1);
}

#[tokio::test]
async fn the_vmm_has_only_what_it_needs() {
    let vb = VirtualBox::new("");
    let pid = vb.lab.start().await.pid();
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let mut names: Vec<_> = environment
        .split(|byte| *byte == 0)
        .filter_map(|pair| std::str::from_utf8(pair).ok()?.split_once('='))
        .map(|(name, _)| name)
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["LC_ALL", "PATH", "VBOX_USER_HOME"]);
    // A set-uid program must be able to become what it is; as root nothing is to be gained.
    assert_eq!(status(pid, "NoNewPrivs"), if is_root() { "1" } else { "0" });
}

#[tokio::test]
async fn saved_memory_is_thrown_away_at_a_start() {
    let vb = VirtualBox::new("");
    vb.lab.start().await.kill().await.unwrap();
    let text = std::fs::read_to_string(vb.machine()).unwrap();
    let mut machine: serde_json::Value = serde_json::from_str(&text).unwrap();
    machine["state"] = "saved".into();
    machine["process"] = serde_json::Value::Null;
    std::fs::write(vb.machine(), machine.to_string()).unwrap();
    vb.commands();
    vb.lab.start().await;
    assert_eq!(vb.commands()[2], "discardstate|UUID");
}

#[tokio::test]
async fn a_refusal_or_nonsense_is_told_and_starts_nothing() {
    for (behaviour, words) in [
        (r#", "clonevm": "fail""#, "clonevm: VBoxManage: error"),
        (
            r#", "clonevm": "garbage""#,
            "setextradata: VBoxManage: error: Could not find",
        ),
        (r#", "showvminfo": "garbage""#, "without a state"),
        (r#", "showvminfo": "fail""#, "showvminfo: VBoxManage: error"),
        (r#", "modifyvm": "fail""#, "modifyvm: VBoxManage: error"),
    ] {
        let vb = VirtualBox::new(behaviour);
        let error = vb.fails().await;
        assert_eq!(error.kind(), Kind::Unavailable, "{behaviour}: {error}");
        assert!(error.to_string().contains(words), "{behaviour}: {error}");
        assert!(matches!(vb.lab.adopt().await, Adopted::Absent));
        // What was made is this machine's, and used by the next start.
        vb.behave("");
        vb.lab.start().await;
        assert_eq!(vb.machines(), 1, "{behaviour}");
    }
}

#[tokio::test]
async fn a_question_that_hangs_is_given_up() {
    let vb = VirtualBox::new(r#", "showvminfo": "hang""#);
    assert_eq!(vb.fails().await.kind(), Kind::Timeout);
    assert!(matches!(vb.lab.adopt().await, Adopted::Absent));
    assert_eq!(vb.machines(), 0);
}

#[tokio::test]
async fn a_clone_that_is_made_after_we_gave_up_does_not_stay() {
    let vb = VirtualBox::new(r#", "clonevm": "late""#);
    assert_eq!(vb.fails().await.kind(), Kind::Timeout);
    assert_eq!(vb.machines(), 0);
    for left in ["virtualbox.json", "vm"] {
        assert!(!vb.lab.dir.file(left).exists(), "{left}");
    }
}

#[tokio::test]
async fn a_vmm_that_ends_at_once_says_why() {
    let vb = VirtualBox::new(r#", "headless": "exit""#);
    match vb.fails().await {
        Error::Exited { report, .. } => {
            assert_eq!(report.exit, Exit::Code { code: 1 });
            assert!(report.stderr_tail.contains("VERR_VMX_NO_VMX"), "{report:?}");
        }
        error => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_vmm_that_hangs_is_given_up_and_ended() {
    let vb = VirtualBox::new(r#", "headless": "hang""#);
    assert_eq!(vb.fails().await.kind(), Kind::Timeout);
    let record = std::fs::read(vb.lab.dir.file("run/shim.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    for who in ["shim", "vmm"] {
        assert!(!alive(record[who]["pid"].as_u64().unwrap() as u32), "{who}");
    }
}

/// After a set-uid exec the kernel does not end a VMM with its shim.
#[tokio::test]
async fn a_vmm_that_outlives_its_shim_is_ended_at_the_next_look() {
    let vb = VirtualBox::new(r#", "orphans": true"#);
    let process = vb.lab.start().await;
    let vmm = process.pid();
    let shim = Pid::from_raw(process.shim_pid().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(shim, Signal::KILL).unwrap();
    assert_eq!(process.wait().await.exit, Exit::Lost);
    assert!(alive(vmm), "the test is about a VMM that lives on");
    match vb.lab.adopt().await {
        Adopted::Exited(report) => assert_eq!(report.exit, Exit::Lost),
        other => panic!("{other:?}"),
    }
    assert!(!alive(vmm));
    vb.lab.start().await;
}

#[tokio::test]
async fn what_is_missing_is_said() {
    let vb = VirtualBox::new("");
    let info = vb.lab.runtime.probe().await;
    assert!(info.usable, "{info:?}");
    assert_eq!(info.version.as_deref(), Some("7.0.20"));

    let other = |base: Option<&str>, program: &str| {
        let config = RuntimeConfig {
            program: Some(vb.home.with_file_name("programs").join(program)),
            base: base.map(str::to_owned),
            environment: [("VBOX_USER_HOME".to_owned(), vb.home.display().to_string())].into(),
            ..RuntimeConfig::default()
        };
        let runtimes = Runtimes::new(|_| config.clone());
        runtimes.get("virtualbox").unwrap().clone()
    };
    for (base, program, reason) in [
        (None, "VBoxManage", "no base VM"),
        (Some("debian"), "VBoxManage", "no VM@SNAPSHOT"),
        (Some("fedora@clean"), "VBoxManage", "no VM \"fedora\""),
        (Some("debian base@clean"), "VBoxManager", "not found"),
    ] {
        let info = other(base, program).probe().await;
        assert!(!info.usable && info.hint.is_some(), "{info:?}");
        assert!(info.reason.as_ref().unwrap().contains(reason), "{info:?}");
    }
    // A snapshot that is not there shows when a machine is made.
    let error = other(Some("debian base@gone"), "VBoxManage")
        .start(&vb.lab.dir, &vb.lab.spec)
        .await
        .unwrap_err();
    assert!(error.hint().unwrap().contains("list vms"), "{error}");
    assert_eq!(vb.machines(), 0);

    std::fs::remove_file(vb.home.with_file_name("programs").join("VBoxHeadless")).unwrap();
    let dir = MachineDir::new(vb.lab.dir.path());
    let info = runtime("virtualbox", &dir).probe().await;
    assert!(!info.usable && info.reason.unwrap().contains("VBoxHeadless"));
}

#[tokio::test]
async fn what_lies_outside_is_listed_and_removed_and_nothing_else_is() {
    let vb = VirtualBox::new("");
    let (runtime, lab) = (&vb.lab.runtime, &vb.lab);
    let image = ImageLayer {
        id: "img-test".into(),
        path: "/nonexistent".into(),
    };
    runtime.prepare(&lab.dir, &lab.spec, &image).await.unwrap();
    let found = runtime.outside(lab.tag()).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].of.as_str(), &found[0].name),
        (lab.spec.id.as_str(), &vb.uuid().unwrap())
    );
    assert_eq!(runtime.outside("othr").await.unwrap(), []);
    vb.behave(r#", "getextradata": "fail""#);
    assert_eq!(runtime.outside(lab.tag()).await.unwrap(), []);
    vb.behave("");

    // An attempt whose directory is gone is replaced.
    for left in ["virtualbox.json", "vm"] {
        let left = lab.dir.file(left);
        std::fs::remove_dir_all(&left)
            .or_else(|_| std::fs::remove_file(&left))
            .unwrap();
    }
    runtime.prepare(&lab.dir, &lab.spec, &image).await.unwrap();
    assert_eq!(vb.machines(), 1);

    lab.start().await.kill().await.unwrap();
    runtime.remove(&lab.spec).await.unwrap();
    runtime.remove(&lab.spec).await.unwrap();
    assert_eq!(vb.machines(), 0);
    assert!(!lab.dir.file("vm").join(&lab.spec.label).exists());
    runtime.prepare(&lab.dir, &lab.spec, &image).await.unwrap();
    runtime.remove_outside(&found[0]).await.unwrap();
    assert_eq!(runtime.outside(lab.tag()).await.unwrap(), []);
    assert!(
        vb.commands()
            .iter()
            .all(|line| !line.starts_with("unregistervm|debian"))
    );
}
