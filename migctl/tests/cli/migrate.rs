//! Outcomes of a migration, and what scripts and people see of them.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use migr_proto::v1::*;
use nix::sys::signal::Signal;
use serde_json::json;
use tonic::Code;

use crate::fake::*;

const MIGRATE: [&str; 6] = ["-o", "json", "migrate", "web", "--to", "b:1"];

fn ending(result: MigrationResult) -> Fake {
    let events = vec![progress(1, 10, 100), progress(2, 90, 200), event(result)];
    Fake::start(Script { events, ..Script::default() })
}

fn failed(outcome: MigrationOutcome) -> MigrationResult {
    MigrationResult {
        failure: Some(MigrationFailure {
            message: "the link broke".into(),
            host: "b:1".into(),
            phase: MigrationPhase::Sealed.into(),
            remedy: "mend the link".into(),
        }),
        ..result(outcome)
    }
}

#[test]
fn a_completed_migration_prints_the_documented_object() {
    let run =
        ending(MigrationResult { verified: Some(true), ..result(MigrationOutcome::Completed) })
            .migctl(&MIGRATE);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert_eq!(
        run.object(),
        json!({
            "migration_id": "m-1", "workload": "web", "kind": "vm", "mode": "precopy",
            "mode_reason": null, "outcome": "completed", "source": "a:1", "destination": "b:1", "epoch": 2,
            "total_ms": 812.4, "downtime_ms": 9.1,
            "downtime_breakdown_ms":
                {"pause": 0.3, "memory": 6.0, "state": 0.9, "restore": 1.2, "resume": 0.7, "verify": 0.0},
            "predicted_downtime_ms": 8.5,
            "rounds": [{"pages": 139264, "bytes": 570425344, "ms": 640.0, "dirty_after": 4096}],
            "pages_sent": 143360, "pages_zero": 12, "pages_skipped": 118772,
            "pages_after_switch": 0,
            "bytes_on_wire": 587333120, "verified": true, "failure": null, "blockers": [],
        })
    );
    let progress = run.side_objects();
    assert_eq!(progress.len(), 2);
    assert_eq!(progress[1]["bytes_sent"], 90);
    assert_eq!(progress[1]["phase"], "precopy");
}

#[test]
fn without_verify_nothing_is_said_to_be_verified() {
    let run = ending(result(MigrationOutcome::Completed)).migctl(&MIGRATE);
    assert_eq!(run.object()["verified"], json!(null));
    assert!(run.object()["downtime_breakdown_ms"].get("verify").is_none());
}

#[test]
fn every_outcome_has_its_exit_status_and_names_the_cause() {
    for (outcome, name, status) in [
        (MigrationOutcome::Failed, "failed", 4),
        (MigrationOutcome::Cancelled, "cancelled", 5),
        (MigrationOutcome::InDoubt, "in_doubt", 6),
        (MigrationOutcome::Unspecified, "in_doubt", 6),
    ] {
        let fake = ending(failed(outcome));
        let run = fake.migctl(&MIGRATE);
        assert_eq!(run.status, status, "{name}");
        assert_eq!(run.object()["outcome"], name);
        assert_eq!(
            run.object()["failure"],
            json!({"message": "the link broke", "host": "b:1", "phase": "sealed", "remedy": "mend the link"})
        );
        let human = fake.migctl(&["migrate", "web", "--to", "b:1"]);
        assert_eq!(human.status, status);
        for fact in ["the link broke", "host: b:1", "phase: sealed", "what to do: mend the link"] {
            assert!(human.stderr.contains(fact), "{fact} not in {}", human.stderr);
        }
    }
}

#[test]
fn blockers_refuse_the_migration() {
    let blocker = Blocker {
        code: "destination-memory".into(),
        message: "1 GiB is needed, 0.5 GiB is free".into(),
        remedy: "free some".into(),
        host: "b:1".into(),
    };
    let refused =
        MigrationResult { blockers: vec![blocker.clone()], ..result(MigrationOutcome::Failed) };
    let plan = MigrationPlan { blockers: vec![blocker], ..MigrationPlan::default() };
    let fake = Fake::start(Script { events: vec![event(refused)], plan, ..Script::default() });
    let run = fake.migctl(&MIGRATE);
    assert_eq!(run.status, 3);
    assert_eq!(
        run.object()["blockers"],
        json!([{"code": "destination-memory", "message": "1 GiB is needed, 0.5 GiB is free",
                "host": "b:1", "remedy": "free some"}])
    );
    let dry = fake.migctl(&[&MIGRATE[..], &["--dry-run"]].concat());
    assert_eq!((dry.status, &dry.object()["possible"]), (3, &json!(false)));
    let human = fake.migctl(&["migrate", "web", "--to", "b:1"]);
    assert!(human.stderr.contains("what to do: free some"), "{}", human.stderr);
}

#[test]
fn an_error_before_anything_started_is_a_refusal() {
    let error = refusal(Code::FailedPrecondition, "busy", "web is migrating", &[("host", "a:1")]);
    let fake = Fake::start(Script { migrate_error: Some(error), ..Script::default() });
    let run = fake.migctl(&MIGRATE);
    assert_eq!(run.status, 3);
    assert_eq!(run.object()["outcome"], "failed");
    assert_eq!(run.object()["blockers"][0]["code"], "busy");
    let dry = fake.migctl(&[&MIGRATE[..], &["--dry-run"]].concat());
    assert_eq!((dry.status, dry.stdout.as_str()), (3, ""));
}

#[test]
fn a_dry_run_asks_only_for_the_plan() {
    let plan =
        MigrationPlan { workload: "web".into(), max_downtime_us: 50_500, ..Default::default() };
    let fake = Fake::start(Script { plan, ..Script::default() });
    let run = fake.migctl(&[&MIGRATE[..], &["--dry-run", "--max-downtime", "50500us"]].concat());
    assert_eq!((run.status, &run.object()["possible"]), (0, &json!(true)));
    assert_eq!(run.object()["max_downtime_ms"], 50.5);
    assert_eq!(fake.requests().len(), 1);
    assert!(fake.requests()[0].contains("max_downtime_us: 50500"));
}

#[test]
fn options_reach_the_daemon() {
    let fake = ending(result(MigrationOutcome::Completed));
    let options = ["--mode", "hybrid", "--max-downtime", "20ms", "--timeout", "5m", "--verify"];
    assert_eq!(fake.migctl(&[&MIGRATE[..], &options].concat()).status, 0);
    let request = &fake.requests()[0];
    for part in ["mode: Hybrid", "max_downtime_us: 20000", "timeout_ms: 300000", "verify: true"] {
        assert!(request.contains(part), "{part} not in {request}");
    }
}

#[test]
fn people_get_a_summary_and_plain_lines() {
    let run =
        ending(MigrationResult { verified: Some(true), ..result(MigrationOutcome::Completed) })
            .migctl(&["migrate", "web", "--to", "b:1"]);
    for fact in [
        "web now runs at b:1",
        "812 ms",
        "9.1 ms (pause 0.3 ms, memory 6.0 ms, state 0.9 ms, restore 1.2 ms, resume 0.7 ms",
        "predicted 8.5 ms",
        "1 (544.00 MiB)",
        "143360 sent, 12 zero, 118772 skipped",
        "yes: memory is the same at both ends",
    ] {
        assert!(run.stdout.contains(fact), "{fact:?} not in {}", run.stdout);
    }
    let lines: Vec<_> = run.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{}", run.stderr);
    assert!(lines[0].starts_with(" 10.0% precopy, round 1: 10 B of 100 B"), "{}", lines[0]);
    assert!(lines[1].starts_with(" 45.0% precopy, round 2:"), "{}", lines[1]);
    assert!(!run.stderr.contains('\x1b'));
}

#[test]
fn a_terminal_gets_a_bar_that_is_gone_at_the_end() {
    let fake = Fake::start(Script {
        events: vec![progress(1, 10, 100), progress(2, 50, 100)],
        when_cancelled: Some(event(failed(MigrationOutcome::Cancelled))),
        ..Script::default()
    });
    let size = nix::pty::Winsize { ws_row: 24, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(&size, None).unwrap();
    let mut child = Command::new(BINARY)
        .env("TERM", "xterm")
        .args(["--host", &fake.address.to_string(), "migrate", "web", "--to", "b:1"])
        .stdout(Stdio::null())
        .stderr(Stdio::from(pty.slave))
        .spawn()
        .unwrap();
    let mut screen = File::from(pty.master);
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    let mut asked = false;
    // The read fails when migctl, the terminal's last user, has ended.
    while let Ok(length @ 1..) = screen.read(&mut buffer) {
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
        if !asked && seen.contains("50.0%") && seen.contains("round 2") {
            asked = fake.migctl(&["cancel", "web"]).status == 0;
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(5), "{seen}");
    assert!(seen.contains("dirtying") && seen.contains("predicted downtime 8.5 ms"), "{seen}");
    let last = seen.rsplit("\x1b[2K").next().unwrap();
    assert!(last.contains("the link broke") && !last.contains('%'), "{seen}");
}

#[test]
fn the_first_ctrl_c_cancels_and_waits_for_the_result() {
    let fake = Fake::start(Script {
        events: vec![progress(1, 10, 100)],
        when_cancelled: Some(event(failed(MigrationOutcome::Cancelled))),
        ..Script::default()
    });
    let mut running = fake.spawn(&MIGRATE);
    running.wait_for("bytes_sent");
    running.signal(Signal::SIGINT);
    let run = running.end();
    assert_eq!(run.status, 5, "{}", run.stderr);
    assert_eq!(run.object()["outcome"], "cancelled");
}

#[test]
fn the_second_ctrl_c_detaches() {
    let late = refusal(Code::FailedPrecondition, "released", "past the point of no return", &[]);
    let fake = Fake::start(Script {
        events: vec![progress(1, 10, 100)],
        hold: true,
        cancel_error: Some(late),
        ..Script::default()
    });
    let mut running = fake.spawn(&["migrate", "web", "--to", "b:1"]);
    running.wait_for("round 1");
    running.signal(Signal::SIGINT);
    running.wait_for("past the point of no return");
    running.signal(Signal::SIGINT);
    let run = running.end();
    assert_eq!((run.status, run.stdout.as_str()), (130, ""));
    assert!(run.stderr.contains("the migration of web goes on"), "{}", run.stderr);
    assert!(run.stderr.contains("watch web"), "{}", run.stderr);
}

/// A migration is running, then its daemon dies; `after` is there when it is back.
fn interrupted(after: Option<Script>) -> Finished {
    let first =
        Fake::start(Script { events: vec![progress(1, 10, 100)], hold: true, ..Script::default() });
    let mut running = first.spawn(&MIGRATE);
    running.wait_for("bytes_sent");
    let address = first.address;
    drop(first);
    let _second = after.map(|script| Fake::start_at(address, script));
    running.end()
}

#[test]
fn a_daemon_that_stays_away_leaves_the_outcome_unknown() {
    let run = interrupted(None);
    assert_eq!(run.status, 6, "{}", run.stderr);
    let object = run.object();
    assert_eq!((&object["outcome"], &object["migration_id"]), (&json!("in_doubt"), &json!("m-1")));
    assert_eq!(object["total_ms"], json!(null));
    assert!(object["failure"]["remedy"].as_str().unwrap().contains("inspect web"), "{object}");
}

#[test]
fn a_report_is_taken_up_again_when_the_daemon_is_back() {
    let events = vec![progress(2, 50, 100), event(result(MigrationOutcome::Completed))];
    let run = interrupted(Some(Script { events, watchable: true, ..Script::default() }));
    assert_eq!((run.status, &run.object()["downtime_ms"]), (0, &json!(9.1)), "{}", run.stderr);
}

#[test]
fn what_became_of_it_is_read_from_the_daemon_that_is_back() {
    let inspect = |state, last_migration| {
        let workload = Workload { moved_to: "b:1".into(), ..workload("web", state) };
        let reply = InspectReply { workload: Some(workload), last_migration, ..Default::default() };
        Some(Script { inspect: Some(reply), ..Script::default() })
    };
    let another =
        MigrationResult { migration_id: "m-0".into(), ..result(MigrationOutcome::Completed) };
    let still = interrupted(inspect(WorkloadState::Running, Some(another)));
    assert_eq!((still.status, &still.object()["outcome"]), (4, &json!("failed")));
    let gone = interrupted(inspect(WorkloadState::Gone, None));
    assert_eq!((gone.status, &gone.object()["outcome"]), (0, &json!("completed")));
    assert_eq!(gone.object()["downtime_ms"], json!(null));
    let doubt = interrupted(inspect(WorkloadState::InDoubt, None));
    assert_eq!((doubt.status, &doubt.object()["outcome"]), (6, &json!("in_doubt")));
    let own =
        interrupted(inspect(WorkloadState::Running, Some(failed(MigrationOutcome::Cancelled))));
    assert_eq!((own.status, &own.object()["outcome"]), (5, &json!("cancelled")));
}

#[test]
fn watching_exits_like_migrating() {
    let script = Script {
        events: vec![progress(1, 10, 100), event(failed(MigrationOutcome::Failed))],
        watchable: true,
        ..Script::default()
    };
    let run = Fake::start(script).migctl(&["-o", "json", "watch", "web"]);
    assert_eq!((run.status, &run.object()["outcome"]), (4, &json!("failed")));
    let idle = Fake::start(Script::default()).migctl(&["watch", "web"]);
    assert_eq!(idle.status, 1);
    assert!(idle.stderr.contains("cannot watch web: no migration is running"), "{}", idle.stderr);
}

#[test]
fn nothing_started_without_a_daemon() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let run = run(Command::new(BINARY).args(["--host", &free.to_string()]).args(MIGRATE));
    assert_eq!((run.status, run.stdout.as_str()), (1, ""));
    assert_eq!(run.side_objects()[0]["error"]["code"], "daemon-unreachable");
}
