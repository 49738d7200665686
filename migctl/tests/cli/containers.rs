//! Containers: how they are ordered, and what is said of them.

use migr_proto::v1::*;
use serde_json::json;

use crate::fake::*;

/// A daemon with the container `web`.
fn some() -> Fake {
    let web = Workload {
        kind: WorkloadKind::Container.into(),
        memory_bytes: 0,
        cpus: 0,
        ..workload("web", WorkloadState::Running)
    };
    let process = ProcessInfo {
        argv: vec!["/bin/server".into()],
        cwd: "/".into(),
        pid: 4711,
        processes: 2,
        container: Some(ContainerInfo {
            bundle: "/srv/web".into(),
            rootfs: "/srv/web/rootfs".into(),
            runc_id: "7b0c".into(),
            carrying: RootfsCarrying::Copy.into(),
        }),
        ..ProcessInfo::default()
    };
    let inspect = Some(InspectReply {
        workload: Some(web.clone()),
        process: Some(process),
        ..InspectReply::default()
    });
    Fake::start(Script { workloads: vec![web], inspect, ..Script::default() })
}

#[test]
fn a_bundle_is_sent_with_its_whole_path() {
    let fake = some();
    let net = "ip=10.0.0.5/24,bridge=br0";
    let order = ["-o", "json", "run-container", "web", "--bundle", "web/bundle", "--net", net];
    let run = fake.migctl(&order);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let object = run.object();
    assert_eq!(
        (&object["workload"]["kind"], &object["workload"]["name"]),
        (&json!("container"), &json!("web"))
    );
    let bundle = std::path::absolute("web/bundle").unwrap();
    let net =
        ProcessNet { address: "10.0.0.5/24".into(), bridge: "br0".into(), ..ProcessNet::default() };
    let expected = RunContainerRequest {
        name: "web".into(),
        bundle: bundle.to_str().unwrap().into(),
        rootfs: RootfsCarrying::Shared.into(),
        net: Some(net),
    };
    assert_eq!(fake.requests(), [format!("{expected:?}")]);
}

#[test]
fn a_root_file_system_that_is_to_be_copied_is_asked_for_by_name() {
    let fake = some();
    let run = fake.migctl(&["run-container", "web", "--bundle", "/srv/web", "--rootfs", "copy"]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    assert!(fake.requests()[0].contains("rootfs: Copy"), "{:?}", fake.requests());
    let odd = migctl(&["run-container", "web", "--bundle", "/srv/web", "--rootfs", "else"]);
    assert_eq!(odd.status, 2, "{}", odd.stderr);
    let none = migctl(&["run-container", "web"]);
    assert_eq!(none.status, 2, "{}", none.stderr);
    assert!(none.stderr.contains("--bundle"), "{}", none.stderr);
}

#[test]
fn inspect_says_what_runc_calls_a_container() {
    let fake = some();
    let object = fake.migctl(&["-o", "json", "inspect", "web"]).object();
    let process = object.get("process").or_else(|| object["workload"].get("process"));
    let container = &process.unwrap()["container"];
    let expected = json!({"bundle": "/srv/web", "rootfs": "/srv/web/rootfs", "rootfs_mode": "copy",
                          "runc_id": "7b0c"});
    assert_eq!(*container, expected);
    let text = fake.migctl(&["inspect", "web"]).stdout;
    for fact in ["container", "/srv/web/rootfs (copy)", "7b0c"] {
        assert!(text.contains(fact), "{fact} not in {text}");
    }
}
