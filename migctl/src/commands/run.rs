//! `run`: creates a VM and starts it.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use migr_proto::v1::{CpuOrder, DiskOrder, NetOrder, RunRequest};
use nix::fcntl::OFlag;

use super::{Context, absolute};
use crate::args::{Cpu, Disk, Net, RunArgs};
use crate::failure::Failure;

pub async fn run(ctx: &Context, args: RunArgs) -> Result<u8, Failure> {
    let request = RunRequest {
        kernel: absolute(&args.kernel)?,
        initrd: args.initrd.as_deref().map(absolute).transpose()?.unwrap_or_default(),
        cmdline: args.cmdline,
        memory_bytes: args.memory,
        cpus: args.cpus,
        disks: args.disks.iter().map(disk).collect::<Result<_, _>>()?,
        nets: args.nets.into_iter().map(net).collect(),
        cpu: Some(cpu(&args.cpu)?),
        name: args.name,
    };
    let doing = format!("cannot run {}", request.name);
    let client = ctx.connect(&doing).await?;
    let reply = client.rpc().run(request).await;
    ctx.workload(&client, &doing, reply)
}

fn disk(disk: &Disk) -> Result<DiskOrder, Failure> {
    let Disk { path, read_only } = disk;
    Ok(DiskOrder { path: absolute(path)?, read_only: *read_only })
}

fn net(net: Net) -> NetOrder {
    let Net { tap, bridge, mac } = net;
    NetOrder { tap, bridge, mac: mac.map_or_else(Vec::new, |mac| mac.to_vec()).into() }
}

/// The longest list of CPU features, in bytes.
const LIST_BYTES: u64 = 64 << 10;

/// The order for a guest's CPUs. A list is read here, because it is the user's.
fn cpu(cpu: &Cpu) -> Result<CpuOrder, Failure> {
    match cpu {
        Cpu::Named(name) => Ok(CpuOrder { name: (*name).to_owned(), features: Vec::new() }),
        Cpu::Listed(path) => {
            let unusable = |why: String| {
                Failure::Usage(format!("the list of CPU features {} {why}", path.display()))
            };
            let mut text = String::new();
            // One that is a pipe might never be opened.
            let mut options = std::fs::OpenOptions::new();
            let opened = options.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
            let file = opened.map_err(|e| unusable(format!("can't be read: {e}")))?;
            if !file.metadata().is_ok_and(|found| found.is_file()) {
                return Err(unusable("is no plain file".to_owned()));
            }
            let read = file.take(LIST_BYTES + 1).read_to_string(&mut text);
            read.map_err(|e| unusable(format!("can't be read: {e}")))?;
            if text.len() as u64 > LIST_BYTES {
                return Err(unusable(format!("is longer than {LIST_BYTES} bytes")));
            }
            let features = features(&text);
            if features.is_empty() {
                return Err(unusable("names no feature".to_owned()));
            }
            Ok(CpuOrder { name: stem(path), features })
        }
    }
}

/// One name a line; `#` begins a comment.
fn features(text: &str) -> Vec<String> {
    let names = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_a_name_a_line_and_comments() {
        let text = "# our hosts\navx2\n\n  fma # since Haswell\r\n#aes\n";
        assert_eq!(features(text), ["avx2", "fma"]);
    }

    #[test]
    fn a_list_is_called_by_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rack-1.cpu");
        std::fs::write(&path, "avx\nxsave\n").unwrap();
        let order = cpu(&Cpu::Listed(path.clone())).unwrap();
        assert_eq!((order.name.as_str(), order.features.len()), ("rack-1", 2));
        std::fs::write(&path, "# nothing\n").unwrap();
        assert!(matches!(cpu(&Cpu::Listed(path)), Err(Failure::Usage(_))));
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = cpu(&Cpu::Listed(pipe)).unwrap_err().to_string();
        assert!(refused.contains("no plain file"), "{refused}");
    }
}
