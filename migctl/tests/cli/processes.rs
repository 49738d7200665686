//! Process trees: how they are ordered, what is said of them, and what may be
//! done to them.

use migr_proto::v1::*;
use serde_json::json;
use tonic::Code;

use crate::fake::*;

fn net() -> ProcessNet {
    ProcessNet {
        address: "10.0.0.5/24".into(),
        bridge: "br0".into(),
        gateway: "10.0.0.1".into(),
        mac: vec![2, 0, 0, 0, 0, 7].into(),
    }
}

/// A daemon with the process tree `job`.
fn some() -> Fake {
    let job = Workload {
        kind: WorkloadKind::Process.into(),
        memory_bytes: 0,
        cpus: 0,
        ..workload("job", WorkloadState::Running)
    };
    let process = ProcessInfo {
        argv: vec!["/usr/bin/job".into(), "two words".into(), "it's".into()],
        cwd: "/srv".into(),
        net: Some(net()),
        pid: 4711,
        processes: 3,
        container: None,
    };
    let inspect = Some(InspectReply {
        workload: Some(job.clone()),
        process: Some(process),
        memory_populated_bytes: 3 << 20,
        ..Default::default()
    });
    Fake::start(Script { workloads: vec![job], inspect, ..Script::default() })
}

#[test]
fn a_command_is_sent_word_for_word() {
    let fake = some();
    let run = fake.migctl(&[
        "-o",
        "json",
        "exec-process",
        "job",
        "--env",
        "A=1 2",
        "--env",
        "B=",
        "--cwd",
        "/srv",
        "--net",
        "ip=10.0.0.5/24,bridge=br0,gateway=10.0.0.1,mac=02:00:00:00:00:07",
        "--",
        "sh",
        "-c",
        "exec sleep 9",
        "--env",
        "",
    ]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let object = run.object();
    assert_eq!(
        (&object["workload"]["kind"], &object["workload"]["name"]),
        (&json!("process"), &json!("job"))
    );
    let expected = ExecProcessRequest {
        name: "job".into(),
        argv: ["sh", "-c", "exec sleep 9", "--env", ""].map(str::to_owned).to_vec(),
        env: vec!["A=1 2".into(), "B=".into()],
        cwd: "/srv".into(),
        net: Some(net()),
    };
    assert_eq!(fake.requests(), [format!("{expected:?}")]);
}

#[test]
fn a_command_needs_nothing_but_itself() {
    let fake = some();
    let run = fake.migctl(&["exec-process", "job", "--", "true"]);
    assert_eq!((run.status, run.stdout.as_str()), (0, "job is running (epoch 2)\n"));
    let request = &fake.requests()[0];
    for part in [r#"argv: ["true"]"#, "env: []", r#"cwd: "/""#, "net: None"] {
        assert!(request.contains(part), "{part} in {request}");
    }
}

#[test]
fn a_host_without_criu_is_told_with_what_to_do() {
    let error = refusal(
        Code::FailedPrecondition,
        "NO_CRIU",
        "this daemon has no CRIU",
        &[("host", "a:1"), ("remedy", "install it")],
    );
    let fake = Fake::start(Script { exec_error: Some(error), ..Script::default() });
    let run = fake.migctl(&["exec-process", "job", "--", "true"]);
    assert_eq!((run.status, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.contains("cannot start job: this daemon has no CRIU"), "{}", run.stderr);
    assert!(run.stderr.contains("what to do: install it"), "{}", run.stderr);
}

#[test]
fn a_process_tree_is_listed_as_one() {
    let fake = some();
    let list = fake.migctl(&["list"]).stdout;
    let line: Vec<_> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(line[..3], ["job", "process", "running"]);
    assert_eq!(fake.migctl(&["-o", "json", "list"]).object()["workloads"][0]["kind"], "process");
}

#[test]
fn inspect_tells_what_a_process_tree_is() {
    let fake = some();
    let object = fake.migctl(&["-o", "json", "inspect", "job"]).object();
    let net = json!({"ip": "10.0.0.5/24", "bridge": "br0", "gateway": "10.0.0.1",
                     "mac": "02:00:00:00:00:07"});
    let process = json!({"argv": ["/usr/bin/job", "two words", "it's"], "cwd": "/srv", "net": net,
                         "pid": 4711, "processes": 3});
    assert_eq!((&object["process"], &object["vmm_pid"]), (&process, &json!(null)));
    let text = fake.migctl(&["inspect", "job"]).stdout;
    for fact in [
        r"/usr/bin/job 'two words' 'it'\''s'",
        "/srv",
        "10.0.0.5/24 in br0, gateway 10.0.0.1, 02:00:00:00:00:07",
        "4711",
        "3.00 MiB",
    ] {
        assert!(text.contains(fact), "{fact} in {text}");
    }
    assert!(!text.contains("kernel") && !text.contains("cpu model"), "{text}");
}

#[test]
fn a_vm_has_no_process_part() {
    let inspect = Some(InspectReply {
        workload: Some(workload("web", WorkloadState::Running)),
        kernel: "/k".into(),
        ..Default::default()
    });
    let fake = Fake::start(Script { inspect, ..Script::default() });
    let object = fake.migctl(&["-o", "json", "inspect", "web"]).object();
    assert_eq!(object["process"], json!(null));
    let text = fake.migctl(&["inspect", "web"]).stdout;
    assert!(text.contains("kernel") && !text.contains("command"), "{text}");
}

const ALL: [&str; 5] =
    ["--file-locks", "--link-remap", "--ghost-limit", "16M", "--drop-connections"];

#[test]
fn what_may_be_done_to_a_process_tree_is_sent_and_nothing_unasked() {
    let all = ProcessOptions {
        file_locks: true,
        link_remap: true,
        ghost_limit_bytes: 16 << 20,
        drop_connections: true,
    };
    for verb in
        [&["migrate", "job", "--to", "b:1", "--dry-run"][..], &["checkpoint", "job", "--to", "/s"]]
    {
        let fake = some();
        fake.migctl(&[verb, &ALL].concat());
        fake.migctl(verb);
        let requests = fake.requests();
        for (request, options) in requests.iter().zip([all, ProcessOptions::default()]) {
            let expected = format!("process: Some({options:?})");
            assert!(request.contains(&expected), "{expected} in {request}");
        }
        assert_eq!(requests.len(), 2);
    }
}

#[test]
fn a_dry_run_of_a_checkpoint_tells_what_is_in_the_way_and_exits_with_3() {
    let blocker = Blocker {
        code: "file-lock".into(),
        message: "process 7 (job) holds a lock".into(),
        remedy: "use --file-locks".into(),
        host: "a:1".into(),
    };
    let fake = Fake::start(Script { checkpoint_blockers: vec![blocker], ..Script::default() });
    let dry_run = ["checkpoint", "job", "--to", "/s", "--dry-run"];
    let run = fake.migctl(&[&["-o", "json"], &dry_run[..]].concat());
    let blocker = json!({"code": "file-lock", "message": "process 7 (job) holds a lock",
                         "host": "a:1", "remedy": "use --file-locks"});
    let plan = json!({"workload": "job", "directory": "/s", "possible": false,
                      "blockers": [blocker]});
    assert_eq!((run.status, run.object()), (3, plan));
    let run = fake.migctl(&dry_run);
    assert_eq!(run.status, 3);
    assert!(
        run.stdout.contains("job cannot be saved in /s; nothing was touched"),
        "{}",
        run.stdout
    );
    assert!(run.stdout.contains("what to do: use --file-locks"), "{}", run.stdout);

    let free = some();
    let run = free.migctl(&[&["-o", "json"], &dry_run[..]].concat());
    assert_eq!((run.status, &run.object()["possible"]), (0, &json!(true)));
    assert!(free.requests()[0].contains("dry_run: true"));
    let run = free.migctl(&dry_run);
    assert_eq!(
        (run.status, run.stdout.as_str()),
        (0, "job can be saved in /s; nothing was touched\n")
    );
}

#[test]
fn hosts_tell_whether_there_is_a_criu_that_works() {
    let hosts = |criu: &str, problem: &str| {
        let host =
            HostReply { criu: criu.into(), criu_problem: problem.into(), ..Default::default() };
        let fake = Fake::start(Script { host, ..Script::default() });
        let object = fake.migctl(&["-o", "json", "hosts"]).object();
        let host = object["hosts"][0].clone();
        (host["criu"].clone(), host["criu_problem"].clone(), fake.migctl(&["hosts"]).stdout)
    };
    let (criu, problem, text) = hosts("4.2.1", "");
    assert_eq!((criu, problem), (json!("4.2.1"), json!(null)));
    assert!(text.contains("CRIU") && text.contains("4.2.1"), "{text}");
    let (criu, problem, text) = hosts("", "criu 3.11 is too old");
    assert_eq!((criu, problem), (json!(null), json!("criu 3.11 is too old")));
    assert!(text.contains("criu 3.11 is too old"), "{text}");
}

#[test]
fn the_help_of_exec_process_shows_how() {
    let help = migctl(&["exec-process", "--help"]).stdout;
    for fact in ["-- redis-server", "none of yours", "migctl logs", "--env <NAME=VALUE>"] {
        assert!(help.contains(fact), "{fact} not in {help}");
    }
}
