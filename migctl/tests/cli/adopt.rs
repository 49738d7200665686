//! `adopt` against a daemon that says what stands in the way, or nothing.

use migr_proto::v1::Blocker;
use serde_json::json;

use super::fake::{Fake, Script, migctl};

fn in_the_way() -> Script {
    let blocker = Blocker {
        code: "socket-bound".into(),
        message: "fd 3 of job (4711) is a socket that has a name, tcp port 80".into(),
        remedy: "start it by exec-process".into(),
        host: "a:1".into(),
    };
    Script { checkpoint_blockers: vec![blocker], ..Script::default() }
}

#[test]
fn an_adopted_process_is_a_workload() {
    let fake = Fake::start(Script::default());
    let run = fake.migctl(&["-o", "json", "adopt", "4711", "--name", "job", "--ghost-limit", "4M"]);
    assert_eq!((run.status, &run.object()["workload"]["name"]), (0, &json!("job")));
    let request = &fake.requests()[0];
    for part in ["pid: 4711", "dry_run: false", "ghost_limit_bytes: 4194304"] {
        assert!(request.contains(part), "{part} in {request}");
    }
}

#[test]
fn what_stands_in_the_way_of_an_adoption_is_told_with_status_3() {
    let fake = Fake::start(in_the_way());
    for options in [&["--dry-run"][..], &[]] {
        let adopt = [&["adopt", "4711", "--name", "job"], options].concat();
        let run = fake.migctl(&adopt);
        assert_eq!(run.status, 3);
        assert!(run.stdout.contains("cannot be adopted; nothing was touched"), "{}", run.stdout);
        assert!(run.stdout.contains("socket-bound"), "{}", run.stdout);
        let object = fake.migctl(&[&["-o", "json"], &adopt[..]].concat()).object();
        assert_eq!((&object["pid"], &object["possible"]), (&json!(4711), &json!(false)));
        assert_eq!(object["blockers"][0]["code"], "socket-bound");
    }
}

#[test]
fn a_process_is_named_by_its_number() {
    for pid in ["0", "job", "-1", "4294967296"] {
        assert_eq!(migctl(&["adopt", pid, "--name", "job"]).status, 2, "{pid}");
    }
    assert_eq!(migctl(&["adopt", "4711"]).status, 2, "it has no name");
}
