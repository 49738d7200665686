use super::*;

fn least() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"terminal": false, "args": ["/bin/sh", "-c", "true"], "cwd": "/"},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "none", "source": "data", "options": ["rbind", "ro"]},
            {"destination": "/srv", "type": "bind", "source": "/srv/files"}
        ],
        "hooks": {"poststop": [{"path": "/usr/bin/true"}]},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}],
            "maskedPaths": ["/proc/keys"],
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]
        }
    })
}

fn read(spec: &Value) -> Result<Spec, SpecError> {
    Spec::of_bundle(Path::new("/srv/web"), &serde_json::to_vec(spec).unwrap())
}

#[test]
fn paths_of_a_bundle_become_absolute_and_stay_so() {
    let spec = read(&least()).unwrap();
    assert_eq!(spec.rootfs(), Path::new("/srv/web/rootfs"));
    assert!(spec.is_read_only());
    assert_eq!(spec.binds()[0], ("/data".into(), "/srv/web/data".into()));
    assert_eq!(spec.binds()[1], ("/srv".into(), "/srv/files".into()));
    assert_eq!(spec.hooks(), [Path::new("/usr/bin/true")]);
    assert_eq!(spec.devices(), [Path::new("/dev/fuse")]);
    assert_eq!(spec.masked(), ["/proc/keys"]);
    assert_eq!((spec.argv().len(), spec.cwd().as_str()), (3, "/"));
    assert_eq!(Spec::parse(&spec.to_bytes()).unwrap(), spec);
}

#[test]
fn each_host_has_its_own_cgroup_and_network() {
    let spec = read(&least()).unwrap();
    let on_host = |network| Spec::parse(&spec.on_host("migr-1-2", network)).unwrap();
    let plain = on_host(None);
    assert_eq!(plain.at("/linux/cgroupsPath"), Some(&json!("/migr-1-2")));
    assert_eq!(plain.network(), Network::Own);
    let joined = on_host(Some("/proc/9/fd/7"));
    assert_eq!(joined.network(), Network::At("/proc/9/fd/7".into()));
    assert_eq!(joined.namespaces().count(), 3);
}

#[test]
fn without_a_network_namespace_it_is_the_hosts() {
    let mut spec = least();
    spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}]);
    let spec = read(&spec).unwrap();
    assert_eq!(spec.network(), Network::Host);
    assert!(spec.has_cgroup_namespace());
}

#[test]
fn what_cannot_move_is_refused_with_what_to_do() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut spec = least();
        change(&mut spec);
        read(&spec).unwrap_err().to_string()
    };
    let terminal = refused(&|spec| spec["process"]["terminal"] = json!(true));
    assert!(terminal.contains("set process.terminal to false"), "{terminal}");
    let pid = refused(&|spec| spec["linux"]["namespaces"] = json!([{"type": "mount"}]));
    assert!(pid.contains("no pid namespace") && pid.contains("linux.namespaces"), "{pid}");
    let user = refused(&|spec| {
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, {"type": "user"}]);
    });
    assert!(user.contains("user namespace"), "{user}");
    let joins = refused(&|spec| {
        let ipc = json!({"type": "ipc", "path": "/proc/1/ns/ipc"});
        spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, ipc]);
    });
    assert!(joins.contains("ipc") && joins.contains("/proc/1/ns/ipc"), "{joins}");
    for (pointer, name) in
        [("/root/path", "root.path"), ("/process/args", "process.args"), ("/process/cwd", "cwd")]
    {
        let said = refused(&|spec| *spec.pointer_mut(pointer).unwrap() = json!(7));
        assert!(said.contains(name), "{said}");
    }
    let listener = refused(&|spec| spec["linux"]["seccomp"] = json!({"listenerPath": "/run/x"}));
    assert!(listener.contains("listenerPath"), "{listener}");
}

#[test]
fn what_is_no_specification_is_refused() {
    let refused = |bytes: &[u8]| Spec::parse(bytes).unwrap_err();
    assert!(matches!(refused(b"not json"), SpecError::NotJson(_)));
    assert!(matches!(refused(b"[]"), SpecError::NotJson(_)));
    assert_eq!(refused(b"{}"), SpecError::Lacks("ociVersion"));
    assert_eq!(refused(&vec![b' '; MAX_SPEC + 1]), SpecError::TooLong(MAX_SPEC + 1));
}
