//! A container that a user wants to run, checked for its form.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use migr_proto::v1 as proto;
use nix::fcntl::OFlag;
use prost::Message;
use tonic::Status;

use super::process_orders;
use super::status::invalid;
use crate::keeper::container::{MAX_SPEC, Spec};
use crate::migration::destination::MAX_CONFIG;

/// Version of the configuration.
const VERSION: u32 = 1;

/// Reads the bundle that a user names. Whether this host can run it is not checked
/// yet.
pub(super) fn read(
    here: &str,
    request: &proto::RunContainerRequest,
) -> Result<proto::ProcessConfig, Status> {
    let proto::RunContainerRequest { name: _, bundle, rootfs: _, net } = request;
    let wrong = |text: String| invalid(here, text);
    let directory = Path::new(bundle);
    if !directory.is_absolute() {
        return Err(wrong(format!(
            "the bundle {bundle:?} is not an absolute path on the daemon's host"
        )));
    }
    let file = directory.join("config.json");
    let spec = read_limited(&file).map_err(|error| {
        wrong(format!(
            "{} can't be read: {error}; a bundle is a directory with a config.json, which `runc \
             spec` makes, and a root file system",
            file.display()
        ))
    })?;
    let spec = Spec::of_bundle(directory, &spec);
    let spec = spec.map_err(|error| wrong(format!("{}: {error}", file.display())))?;
    if !spec.rootfs().is_dir() {
        let text = format!(
            "the root file system {} is not a directory: unpack one there, or correct root.path in {}",
            spec.rootfs().display(),
            file.display()
        );
        return Err(wrong(text));
    }
    let net = net.as_ref().map(|net| process_orders::own_network(here, net)).transpose()?;
    let config = proto::ProcessConfig {
        version: VERSION,
        argv: spec.argv(),
        env: Vec::new(),
        cwd: spec.cwd(),
        net,
        adopted: 0,
        container: Some(proto::ContainerConfig {
            spec: spec.to_bytes().into(),
            bundle: bundle.clone(),
            rootfs_copied: request.rootfs() == proto::RootfsCarrying::Copy,
        }),
    };
    // It travels in an offer, which has that limit.
    if config.encoded_len() > MAX_CONFIG {
        return Err(wrong(format!("{} says too much to be sent to another host", file.display())));
    }
    Ok(config)
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // A pipe might never be opened, or read to its end.
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no plain file"));
    }
    // One byte more, to see that it is too long.
    file.take(MAX_SPEC as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(request: &proto::RunContainerRequest) -> String {
        read("here", request).unwrap_err().message().to_owned()
    }

    #[test]
    fn a_bundle_is_read_and_what_is_none_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let bundle = directory.path().to_str().unwrap().to_owned();
        let mut request =
            proto::RunContainerRequest { bundle: bundle.clone(), ..Default::default() };
        let missing = said(&request);
        assert!(missing.contains("config.json can't be read"), "{missing}");
        let file = directory.path().join("config.json");
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pipe = said(&request);
        assert!(pipe.contains("no plain file"), "{pipe}");
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, "{}").unwrap();
        let lacks = said(&request);
        assert!(lacks.contains("ociVersion"), "{lacks}");
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/sh"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        std::fs::write(&file, spec.to_string()).unwrap();
        let no_root = said(&request);
        assert!(no_root.contains("rootfs is not a directory"), "{no_root}");
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        let config = read("here", &request).unwrap();
        assert_eq!(
            (config.argv.as_slice(), config.cwd.as_str()),
            (&["/bin/sh".to_owned()][..], "/")
        );
        let container = config.container.unwrap();
        assert_eq!((container.bundle, container.rootfs_copied), (bundle, false));
        request.rootfs = proto::RootfsCarrying::Copy.into();
        assert!(read("here", &request).unwrap().container.unwrap().rootfs_copied);
        request = proto::RunContainerRequest { bundle: "bundle".into(), ..Default::default() };
        assert!(said(&request).contains("absolute"));
    }
}
