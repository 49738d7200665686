//! Every other verb: requests, objects, tables and errors.

use std::io::Write;
use std::net::TcpListener;

use migr_proto::v1::*;
use serde_json::json;

use crate::fake::*;

fn some() -> Fake {
    let workloads = vec![
        workload("web", WorkloadState::Running),
        Workload { reason: "triple fault".into(), ..workload("db", WorkloadState::Stopped) },
        Workload { moved_to: "b:1".into(), ..workload("old", WorkloadState::Gone) },
        Workload { moved_to: "b:1".into(), ..workload("mail", WorkloadState::InDoubt) },
    ];
    let inspect = Some(InspectReply {
        workload: Some(workload("web", WorkloadState::Running)),
        kernel: "/k".into(),
        cpu: Some(CpuOrder { name: "rack".into(), features: vec!["avx2".into()] }),
        last_migration: Some(result(MigrationOutcome::Completed)),
        ..Default::default()
    });
    let host = HostReply {
        address: "a:1".into(),
        version: "9.9.9".into(),
        protocol: 1,
        kvm: true,
        cpu: Some(HostCpu {
            vendor: "GenuineIntel".into(),
            features: vec!["avx2".into()],
            tsc_khz: 2_300_000,
            tsc_scaling: true,
        }),
        ..Default::default()
    };
    Fake::start(Script { workloads, inspect, host, ..Script::default() })
}

#[test]
fn the_list_has_the_documented_fields() {
    let run = some().migctl(&["-o", "json", "list"]);
    let object = run.object();
    let states: Vec<_> = object["workloads"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| (w["name"].as_str().unwrap(), w["state"].as_str().unwrap()))
        .collect();
    assert_eq!(states, [("db", "stopped"), ("mail", "in_doubt"), ("web", "running")]);
    assert_eq!(
        object["workloads"][2],
        json!({"name": "web", "kind": "vm", "state": "running", "epoch": 2, "id": "id-web",
               "memory_bytes": 1 << 30, "cpus": 1, "reason": null, "moved_to": null,
               "migration_id": null, "created_unix_ms": 0})
    );
}

#[test]
fn the_table_shows_what_people_need() {
    let fake = some();
    let all = fake.migctl(&["list", "--all"]).stdout;
    let lines: Vec<_> = all.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[0], ["NAME", "KIND", "STATE", "EPOCH", "MEMORY", "CPUS", "NOTE"]);
    assert_eq!(lines[1], ["db", "vm", "stopped", "2", "1.00", "GiB", "1", "triple", "fault"]);
    assert!(all.contains("b:1 has not said the last word") && all.contains("now at b:1"), "{all}");
    assert!(!fake.migctl(&["list"]).stdout.contains("old"));
}

#[test]
fn inspect_shows_the_last_migration() {
    let fake = some();
    let object = fake.migctl(&["-o", "json", "inspect", "web"]).object();
    assert_eq!(object["last_migration"]["downtime_ms"], 9.1);
    assert_eq!((&object["vmm_pid"], &object["initrd"]), (&json!(null), &json!(null)));
    assert_eq!(object["cpu"], json!({"name": "rack", "features": ["avx2"]}));
    let text = fake.migctl(&["inspect", "web"]).stdout;
    assert!(text.contains("web now runs at b:1") && text.contains("rack (1 features)"), "{text}");
}

#[test]
fn paths_are_sent_absolute() {
    let fake = some();
    let run = fake.migctl(&["-o", "json", "run", "vm1", "--kernel", "k.elf", "--memory", "512M"]);
    assert_eq!((run.status, &run.object()["workload"]["memory_bytes"]), (0, &json!(512 << 20)));
    fake.migctl(&["checkpoint", "web", "--to", "snap"]);
    fake.migctl(&["restore", "--from", "snap", "--name", "web2"]);
    let here = std::env::current_dir().unwrap();
    let requests = fake.requests();
    for (request, path) in requests.iter().zip(["k.elf", "snap", "snap"]) {
        assert!(request.contains(&format!("{:?}", here.join(path))), "{path} in {request}");
    }
    assert!(requests[0].contains("cpus: 1"));
    assert!(requests[2].contains("web2"));
}

#[test]
fn cpu_models_are_sent_by_name_and_lists_by_what_they_name() {
    let fake = some();
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("rack-1.txt");
    std::fs::write(&list, "# ours\navx2\n\nfma # since Haswell\n").unwrap();
    let list = list.display().to_string();
    let run = |cpu: &[&str]| {
        let args = ["run", "vm1", "--kernel", "k", "--memory", "1G"];
        fake.migctl(&[&args[..], cpu].concat())
    };
    for cpu in [&[][..], &["--cpu", "baseline"], &["--cpu", &list]] {
        assert_eq!(run(cpu).status, 0, "{cpu:?}");
    }
    let missing = run(&["--cpu", "/nonexistent/list"]);
    assert_eq!(missing.status, 2);
    assert!(missing.stderr.contains("/nonexistent/list can't be read"), "{}", missing.stderr);
    let requests = fake.requests();
    let models = [
        r#"CpuOrder { name: "host", features: [] }"#,
        r#"CpuOrder { name: "baseline", features: [] }"#,
        r#"CpuOrder { name: "rack-1", features: ["avx2", "fma"] }"#,
    ];
    assert_eq!(requests.len(), models.len());
    for (request, model) in requests.iter().zip(models) {
        assert!(request.contains(model), "{model} in {request}");
    }
}

#[test]
fn verbs_that_change_a_workload_show_it() {
    let fake = some();
    for args in [&["pause", "web"][..], &["resume", "web"], &["stop", "web", "--force"]] {
        let run = fake.migctl(&[&["-o", "json"], args].concat());
        assert_eq!((run.status, &run.object()["workload"]["name"]), (0, &json!("web")));
    }
    assert!(fake.requests().iter().any(|r| r.contains("force: true")));
    assert_eq!(fake.migctl(&["stop", "web", "--timeout", "90s"]).status, 0);
    let asked = |r: &String| r.contains("force: false") && r.contains("timeout_ms: 90000");
    assert!(fake.requests().iter().any(asked));
    assert_eq!(fake.migctl(&["stop", "web", "--force", "--timeout", "90s"]).status, 2);
    assert_eq!(fake.migctl(&["-o", "json", "rm", "db"]).object(), json!({"removed": "db"}));
    let cancel = fake.migctl(&["-o", "json", "cancel", "web"]).object();
    assert_eq!(cancel, json!({"workload": "web", "migration_id": "m-1", "cancelling": true}));
    let saved = fake.migctl(&["-o", "json", "checkpoint", "web", "--to", "/s"]).object();
    assert_eq!((&saved["pages_written"], &saved["stopped"]), (&1.into(), &false.into()));
}

#[test]
fn a_checkpoint_leaves_a_workload_running_unless_it_is_to_stop_it() {
    let fake = some();
    for (option, stops) in [("--leave-running", false), ("--stop", true)] {
        let saved = fake.migctl(&["checkpoint", "web", "--to", "/s", option]);
        assert_eq!(saved.stdout.contains("and stopped"), stops, "{}", saved.stdout);
    }
    let asked: Vec<_> = fake.requests().iter().map(|r| r.contains("stop: true")).collect();
    assert_eq!(asked, [false, true]);
    let both = fake.migctl(&["checkpoint", "web", "--to", "/s", "--stop", "--leave-running"]);
    assert_eq!(both.status, 2);
}

#[test]
fn forcing_needs_a_direction_and_a_yes() {
    let fake = some();
    let unsure = fake.migctl(&["force", "mail", "--run-here"]);
    assert_eq!(unsure.status, 2);
    assert!(unsure.stderr.contains("TWO copies"), "{}", unsure.stderr);
    assert_eq!(fake.migctl(&["force", "mail", "--yes"]).status, 2);
    assert_eq!(fake.migctl(&["force", "mail", "--give-up", "--run-here", "--yes"]).status, 2);
    assert_eq!(fake.requests(), Vec::<String>::new());
    assert_eq!(fake.migctl(&["force", "mail", "--give-up", "--yes"]).status, 0);
    assert!(fake.requests()[0].contains("GiveUp"));
}

#[test]
fn hosts_and_versions_are_told() {
    let fake = some();
    let hosts = fake.migctl(&["-o", "json", "hosts", "b:1"]).object();
    assert_eq!(hosts["hosts"].as_array().unwrap().len(), 2);
    assert_eq!(hosts["hosts"][1]["address"], "b:1");
    let cpu = json!({"vendor": "GenuineIntel", "tsc_khz": 2_300_000, "tsc_scaling": true,
                     "features": ["avx2"]});
    assert_eq!(hosts["hosts"][0]["cpu"], cpu);
    assert!(fake.migctl(&["hosts"]).stdout.contains("GenuineIntel"));
    let version = fake.migctl(&["-o", "json", "version"]).object();
    assert_eq!(version["daemon"], json!({"address": "a:1", "version": "9.9.9", "protocol": 1}));
    assert_eq!(version["client"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_refusal_says_what_where_and_what_to_do() {
    let run = some().migctl(&["pause", "nobody"]);
    assert_eq!((run.status, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.contains("cannot pause nobody: there is no workload nobody"));
    assert!(run.stderr.contains("what to do: see the list"), "{}", run.stderr);
    let json = some().migctl(&["-o", "json", "pause", "nobody"]);
    assert_eq!(json.side_objects()[0]["error"]["code"], "no-such-workload");
}

#[test]
fn an_unreachable_daemon_is_named_with_what_to_check() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let run = migctl(&["--host", &free, "list"]);
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains(&format!("no answer from {free}")), "{}", run.stderr);
    assert!(run.stderr.contains("MIGCTL_HOST"));
    let version = migctl(&["--host", &free, "-o", "json", "version"]);
    assert_eq!((version.status, &version.object()["daemon"]), (0, &json!(null)));
}

#[test]
fn a_web_server_is_not_taken_for_a_daemon() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
            let _ = stream.and_then(|mut stream| {
                let _request = std::io::Read::read(&mut stream, &mut [0; 512])?;
                stream.write_all(answer)
            });
        }
    });
    for verb in [&["list"][..], &["migrate", "web", "--to", "b:1"]] {
        let run = migctl(&[&["--host", &address], verb].concat());
        assert_eq!(run.status, 1, "{}", run.stderr);
        assert!(run.stderr.contains("is not a migrd"), "{}", run.stderr);
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_right() {
    for (args, hint) in [
        (&["migrate", "web"][..], "--to"),
        (&["migrate", "web", "--to", "nowhere"], "ADDR:PORT"),
        (&["migrate", "web", "--to", "b:1", "--max-downtime", "0ms"], "more than zero"),
        (&["migrate", "web", "--to", "b:1", "--timeout", "5"], "with a unit"),
        (&["migrate", "web", "--to", "b:1", "--mode", "fast"], "precopy"),
        (&["run", "web", "--kernel", "k", "--memory", "lots"], "512M"),
        (&["run", "web", "--kernel", "k", "--memory", "1G", "--cpus", "0"], "--cpus"),
        (&["run", "web", "--kernel", "k", "--memory", "1G", "--disk", ",ro"], "path of an image"),
        (&["run", "web", "--kernel", "k", "--memory", "1G", "--net", "tap0"], "tap=IF"),
        (&["run", "web", "--kernel", "k", "--memory", "1G", "--net", "tap=t,mac=2"], "six bytes"),
        (&["exec-process", "p"], "CMD"),
        (&["exec-process", "p", "sleep", "9"], "unexpected argument"),
        (&["exec-process", "p", "--env", "A", "--", "x"], "NAME=VALUE"),
        (&["exec-process", "p", "--net", "ip=10.0.0.5,bridge=b", "--", "x"], "prefix length"),
        (&["exec-process", "p", "--net", "bridge=b", "--", "x"], "needs ip=ADDR/LEN"),
        (&["migrate", "web", "--to", "b:1", "--ghost-limit", "0"], "more than zero"),
        (&["list", "--host", "nowhere"], "ADDR:PORT"),
        (&["dance"], "unrecognized subcommand"),
    ] {
        let run = migctl(args);
        assert_eq!(run.status, 2, "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(hint), "{args:?}: {}", run.stderr);
    }
}

#[test]
fn completions_know_the_verbs() {
    for shell in ["bash", "zsh", "fish"] {
        let run = migctl(&["completions", shell]);
        assert_eq!(run.status, 0);
        for word in ["migctl", "checkpoint", "exec-process", "ghost-limit"] {
            assert!(run.stdout.contains(word), "{word} for {shell}");
        }
    }
}

#[test]
fn the_help_of_migrate_lists_the_exit_statuses() {
    let help = migctl(&["migrate", "--help"]).stdout;
    for fact in ["3    refused", "5    cancelled", "6    in doubt", "Ctrl-C", "--dry-run"] {
        assert!(help.contains(fact), "{fact} not in {help}");
    }
}
