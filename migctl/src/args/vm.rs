//! What the command line says of a VM that is to be made.

use std::path::PathBuf;

use clap::Args;

use crate::units::{parse_mac, parse_size};

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of the new VM.
    pub name: String,
    /// Kernel: a PVH ELF or a Linux bzImage, read by the daemon.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Memory, with K, M, G or T (powers of 1024).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: u64,
    /// Number of virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_cpus)]
    pub cpus: u32,
    /// Kernel command line.
    #[arg(long, value_name = "STR", default_value = "", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Initial RAM disk, read by the daemon.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Disk: a raw image or a block device, opened by the daemon; `,ro` at the end makes it
    /// read-only. May be given several times.
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk)]
    pub disks: Vec<Disk>,
    /// Network interface: the tap behind it, found by name on every host; or a bridge into which
    /// a tap is put, and made where it is missing. May be given several times.
    #[arg(long = "net", value_name = "tap=IF|bridge=BR[,tap=IF][,mac=MAC]", value_parser = parse_net)]
    pub nets: Vec<Net>,
    /// CPU features that the guest sees, for as long as it lives: host, all that this host has;
    /// baseline, what any host of the last ten years has; or a file that lists features.
    #[arg(long, value_name = "host|baseline|FILE", default_value = "host", value_parser = parse_cpu)]
    pub cpu: Cpu,
}

/// How many are possible is the daemon's to say.
fn parse_cpus(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("a VM has at least 1 virtual CPU".to_owned()),
        Ok(cpus) => Ok(cpus),
        Err(_) => Err(format!("{text:?} is not a number of virtual CPUs")),
    }
}

/// A network interface of a new VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Net {
    /// Name of the tap; empty: the daemon chooses one.
    pub tap: String,
    /// Name of the bridge, or empty.
    pub bridge: String,
    /// Hardware address; `None`: the daemon chooses one.
    pub mac: Option<[u8; 6]>,
}

fn parse_net(text: &str) -> Result<Net, String> {
    let mut net = Net::default();
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", name)) if net.tap.is_empty() && !name.is_empty() => {
                name.clone_into(&mut net.tap)
            }
            Some(("bridge", name)) if net.bridge.is_empty() && !name.is_empty() => {
                name.clone_into(&mut net.bridge);
            }
            Some(("mac", mac)) if net.mac.is_none() => {
                net.mac = Some(parse_mac(mac).map_err(|error| error.to_string())?);
            }
            _ => return Err(format!("{part:?} is not tap=IF, bridge=BR or mac=MAC, each once")),
        }
    }
    if net.tap.is_empty() && net.bridge.is_empty() {
        return Err("a network interface needs tap=IF or bridge=BR".to_owned());
    }
    Ok(net)
}

/// A disk of a new VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Nothing is written to it.
    pub read_only: bool,
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    let (path, read_only) = match text.strip_suffix(",ro") {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err("a disk needs the path of an image".to_owned());
    }
    Ok(Disk { path: path.into(), read_only })
}

/// Which CPU features a guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// Those that the daemon knows by this name.
    Named(&'static str),
    /// Those in a list.
    Listed(PathBuf),
}

fn parse_cpu(text: &str) -> Result<Cpu, String> {
    match text {
        "host" => Ok(Cpu::Named("host")),
        "baseline" => Ok(Cpu::Named("baseline")),
        "" => Err("give host, baseline or the path of a list of features".to_owned()),
        path => Ok(Cpu::Listed(PathBuf::from(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_a_tap_or_a_bridge_and_may_have_an_address() {
        let mac = Some([2, 0, 0, 0, 0, 0xab]);
        let net =
            |tap: &str, bridge: &str, mac| Net { tap: tap.into(), bridge: bridge.into(), mac };
        assert_eq!(parse_net("tap=t0"), Ok(net("t0", "", None)));
        assert_eq!(parse_net("bridge=br0"), Ok(net("", "br0", None)));
        assert_eq!(parse_net("bridge=br0,tap=t0,mac=02:00:00:00:00:AB"), Ok(net("t0", "br0", mac)));
        for odd in ["", "t0", "tap=", "mac=02:00:00:00:00:01", "tap=a,tap=b", "tap=a,mac=2"] {
            assert!(parse_net(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn a_vm_has_at_least_one_cpu() {
        assert_eq!(parse_cpus("64"), Ok(64));
        for odd in ["0", "-1", "", "two", "4294967296"] {
            assert!(!parse_cpus(odd).unwrap_err().contains("4294967295"), "{odd:?}");
        }
    }

    #[test]
    fn a_disk_is_a_path_and_may_be_read_only() {
        let disk = |path: &str, read_only| Ok(Disk { path: path.into(), read_only });
        assert_eq!(parse_disk("a.img"), disk("a.img", false));
        assert_eq!(parse_disk("a,b.img,ro"), disk("a,b.img", true));
        assert!(parse_disk("").is_err());
        assert!(parse_disk(",ro").is_err());
    }

    #[test]
    fn what_is_no_named_cpu_model_is_a_list() {
        assert_eq!(parse_cpu("baseline"), Ok(Cpu::Named("baseline")));
        assert_eq!(parse_cpu("./host"), Ok(Cpu::Listed(PathBuf::from("./host"))));
        assert!(parse_cpu("").is_err());
    }
}
