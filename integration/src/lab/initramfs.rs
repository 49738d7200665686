//! What a host boots: Debian's own kernel modules, busybox and a script. The
//! script mounts this machine's root file system, read-only, under a layer in
//! memory, and goes on in there: every program built here is there too.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::cpio::Archive;
use super::layout::Layout;
use crate::binaries;

const INIT: &str = include_str!("init.sh");
const BUSYBOX: &str = "/bin/busybox";

/// What every host needs; what they depend on comes by itself.
const MODULES: &[&str] = &[
    // To find the root.
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    // What it has.
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "crc32c_generic",
    "ext4",
    "loop",
    // Networks of guests and of containers.
    "tun",
    "bridge",
    "veth",
    "nf_tables",
    "nf_conntrack",
    "nft_ct",
    // CRIU asks these about sockets.
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "netlink_diag",
    "af_packet_diag",
    "raw_diag",
    // What a connection may have above it.
    "tls",
    // And about connections that the kernel tracks, where a tree has its own network.
    "nf_conntrack_netlink",
];

/// The modules for each maker's CPUs. `init.sh` loads one of them last.
const KVM_MODULES: &[&str] = &["kvm-amd", "kvm-intel"];

/// A Debian kernel that was unpacked for the lab.
#[derive(Clone, Debug)]
pub struct Kernel {
    directory: PathBuf,
}

impl Kernel {
    /// The one that `lab.sh` has unpacked.
    ///
    /// # Errors
    /// When it has not.
    pub fn find() -> Result<Self> {
        let directory = match std::env::var_os("MIGR_LAB_KERNEL") {
            Some(directory) => PathBuf::from(directory),
            None => binaries::build_dir()?.join("debian/kernel"),
        };
        let kernel = Self { directory };
        ensure!(
            kernel.image().is_file(),
            "{} is missing: fetch it with `integration/lab/lab.sh build`",
            kernel.image().display()
        );
        Ok(kernel)
    }

    /// The kernel itself, a bzImage.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Where its modules are: the one directory below `lib/modules`.
    fn modules(&self) -> Result<PathBuf> {
        let above = self.directory.join("lib/modules");
        let mut entries =
            fs::read_dir(&above).with_context(|| format!("read {}", above.display()))?;
        let only = entries.next().with_context(|| format!("nothing in {}", above.display()))??;
        ensure!(entries.next().is_none(), "more than one kernel in {}", above.display());
        Ok(only.path())
    }
}

/// Writes what the hosts of a lab boot. The kernel is copied: one that is
/// fetched anew meanwhile would not fit the modules of a host that is powered
/// on again.
///
/// # Errors
/// When the kernel or busybox is missing, or those of writing.
pub fn write(layout: &Layout) -> Result<()> {
    let kernel = Kernel::find()?;
    fs::copy(kernel.image(), layout.kernel())?;
    let modules = kernel.modules()?;
    let dependencies = Dependencies::read(&modules)?;
    let path = layout.initramfs();
    let out = File::create(&path).with_context(|| format!("write {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(out));
    for directory in ["bin", "modules", "proc", "sys", "dev", "host", "layer", "root"] {
        archive.directory(directory)?;
    }
    let busybox = fs::read(BUSYBOX)
        .with_context(|| format!("{BUSYBOX} is missing: install busybox-static"))?;
    archive.program("bin/busybox", &busybox)?;
    archive.program("init", INIT.as_bytes())?;
    let always = dependencies.in_order(MODULES)?;
    let mut packed = Vec::new();
    let mut list = |name: &str, paths: &[String], archive: &mut Archive<_>| -> Result<()> {
        let mut names = String::new();
        for path in paths {
            let file = file_name(path)?;
            if !packed.iter().any(|other| other == path) {
                let content = fs::read(modules.join(path))
                    .with_context(|| format!("read the module {path}"))?;
                archive.file(&format!("modules/{file}"), &content)?;
                packed.push(path.clone());
            }
            names.push_str(file);
            names.push('\n');
        }
        Ok(archive.file(&format!("modules/{name}"), names.as_bytes())?)
    };
    list("always", &always, &mut archive)?;
    for module in KVM_MODULES {
        list(module, &dependencies.in_order(&[module])?, &mut archive)?;
    }
    archive.finish()?;
    Ok(())
}

fn file_name(path: &str) -> Result<&str> {
    let name = Path::new(path).file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{path:?} has no file name"))
}

/// `modules.dep` and `modules.builtin`: what must be loaded before what.
#[derive(Debug, Default)]
struct Dependencies {
    /// By name (with underscores): path, and the paths it needs, those that
    /// must come first last.
    modules: HashMap<String, (String, Vec<String>)>,
    /// Names of what is in the kernel itself.
    builtin: Vec<String>,
}

impl Dependencies {
    fn read(modules: &Path) -> Result<Self> {
        let read = |name: &str| {
            fs::read_to_string(modules.join(name))
                .with_context(|| format!("read {name} in {}", modules.display()))
        };
        Self::parse(&read("modules.dep")?, &read("modules.builtin")?)
    }

    fn parse(dependencies: &str, builtin: &str) -> Result<Self> {
        let mut all = Self::default();
        for line in dependencies.lines() {
            let (path, needs) =
                line.split_once(':').with_context(|| format!("modules.dep says {line:?}"))?;
            let needs = needs.split_whitespace().map(ToOwned::to_owned).collect();
            all.modules.insert(module_name(path)?, (path.to_owned(), needs));
        }
        for line in builtin.lines() {
            all.builtin.push(module_name(line)?);
        }
        Ok(all)
    }

    /// The paths of `wanted` and of all they need, in an order in which each
    /// can be loaded. What is built in is left out.
    fn in_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in wanted {
            let name = name.replace('-', "_");
            if self.builtin.contains(&name) {
                continue;
            }
            let Some((path, needs)) = self.modules.get(&name) else {
                bail!("this kernel has no module {name}: is it Debian's linux-image-amd64?");
            };
            for path in needs.iter().rev().chain([path]) {
                if !order.contains(path) {
                    order.push(path.clone());
                }
            }
        }
        Ok(order)
    }
}

/// `kernel/fs/9p/9p.ko` is `9p`; dashes and underscores are the same.
fn module_name(path: &str) -> Result<String> {
    let name = file_name(path)?;
    Ok(name.split('.').next().unwrap_or(name).replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/fscache.ko \
                       kernel/fs/netfs.ko\n\
                       kernel/net/9p/9pnet.ko:\n\
                       kernel/arch/x86/kvm/kvm-amd.ko: kernel/net/9p/9pnet.ko\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let all = Dependencies::parse(DEP, "kernel/drivers/pci.ko\n").expect("dependencies");
        let order = all.in_order(&["9p", "pci", "kvm_amd", "9pnet"]).expect("an order");
        let names: Vec<_> = order.iter().map(|path| file_name(path).expect("a name")).collect();
        assert_eq!(names, ["netfs.ko", "fscache.ko", "9pnet.ko", "9p.ko", "kvm-amd.ko"]);
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_named() {
        let all = Dependencies::parse(DEP, "").expect("dependencies");
        let error = all.in_order(&["bridge"]).expect_err("it is not there");
        assert!(error.to_string().contains("bridge"), "{error}");
    }
}
