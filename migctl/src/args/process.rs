//! What the command line says of process trees.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;

use crate::units::{parse_mac, parse_size};

pub(super) const EXEC_PROCESS_AFTER_HELP: &str = "\
Everything after `--` is the command; the daemon looks for it in the PATH of its environment.
The command gets the environment that --env gives and a PATH, and none of yours. Its stdout
and stderr are in `migctl logs`.

Without --net it uses the host's network, and its connections stay behind when it moves. With
--net it has a network of its own, whose address and connections move with it: a bridge of the
same name must lead to the same network on every host.

Examples:
  migctl exec-process job -- /usr/bin/python3 /srv/job.py --all
  migctl exec-process job --cwd /srv --env LANG=C.UTF-8 --env DEBUG=1 -- ./job
  migctl exec-process db --net ip=10.0.0.5/24,bridge=br0,gateway=10.0.0.1 -- redis-server";

pub(super) const ADOPT_AFTER_HELP: &str = "\
The process and all below it stand still for a moment, in which a copy of them is made that has the
same numbers in a PID namespace of its own; then the original is killed. Until the copy is complete
the original goes on after any failure. Whoever started it sees it end by SIGKILL.

Exit status: 0 adopted (with --dry-run: nothing stands in the way), 1 failed, 2 wrong usage,
3 refused before anything was touched: something stands in the way.

Examples:
  migctl adopt 4711 --name job --dry-run
  migctl adopt 4711 --name job";

#[derive(Debug, Args)]
pub struct AdoptArgs {
    /// Number of its first process, on the daemon's host.
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: u32,
    /// Name of the new workload.
    #[arg(long)]
    pub name: String,
    /// Largest deleted file to carry that is still open; by default 1M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub ghost_limit: Option<u64>,
    /// Only say what stands in the way; touches nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct ExecProcessArgs {
    /// Name of the new workload.
    pub name: String,
    /// Variable of its environment. May be given several times.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub env: Vec<String>,
    /// Directory it starts in, on the daemon's host.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub cwd: PathBuf,
    /// A network of its own, joined to a bridge of the host; it moves with its address.
    #[arg(long, value_name = "ip=ADDR/LEN,bridge=BR[,gateway=ADDR][,mac=MAC]",
          value_parser = parse_process_net)]
    pub net: Option<ProcessNet>,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

fn parse_variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a variable is given as NAME=VALUE".to_owned()),
    }
}

/// A network of a process tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessNet {
    /// Its address with the prefix length.
    pub address: String,
    /// The bridge that it is joined to.
    pub bridge: String,
    /// Where packets to other networks go; `None`: nowhere.
    pub gateway: Option<IpAddr>,
    /// Hardware address; `None`: the daemon chooses one.
    pub mac: Option<[u8; 6]>,
}

pub(super) fn parse_process_net(text: &str) -> Result<ProcessNet, String> {
    let mut net = ProcessNet::default();
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("ip", address)) if net.address.is_empty() => {
                check_address(address)?;
                address.clone_into(&mut net.address);
            }
            Some(("bridge", name)) if net.bridge.is_empty() && !name.is_empty() => {
                name.clone_into(&mut net.bridge);
            }
            Some(("gateway", address)) if net.gateway.is_none() => {
                let parsed = address.parse();
                net.gateway = Some(parsed.map_err(|_| format!("{address:?} is not an address"))?);
            }
            Some(("mac", mac)) if net.mac.is_none() => {
                net.mac = Some(parse_mac(mac).map_err(|error| error.to_string())?);
            }
            _ => {
                let text = format!(
                    "{part:?} is not ip=ADDR/LEN, bridge=BR, gateway=ADDR or mac=MAC, each once"
                );
                return Err(text);
            }
        }
    }
    if net.address.is_empty() || net.bridge.is_empty() {
        return Err("a network needs ip=ADDR/LEN and bridge=BR".to_owned());
    }
    Ok(net)
}

fn check_address(text: &str) -> Result<(), String> {
    let parsed = text.split_once('/').and_then(|(address, bits)| {
        let address: IpAddr = address.parse().ok()?;
        let bits: u8 = bits.parse().ok()?;
        Some((bits, if address.is_ipv4() { 32 } else { 128 }))
    });
    match parsed {
        Some((bits, longest)) if (1..=longest).contains(&bits) => Ok(()),
        Some((bits, longest)) => {
            Err(format!("a prefix of {bits} bits is not possible in {text}: 1 to {longest}"))
        }
        None => {
            Err(format!("{text:?} is not an address with its prefix length, as in 10.0.0.5/24"))
        }
    }
}

/// What may be done to a process tree that moves or is saved.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(next_help_heading = "Of process trees")]
pub struct ProcessArgs {
    /// Carry locks on files; nobody at the destination may hold one of them.
    #[arg(long)]
    pub file_locks: bool,
    /// Make names for open files that were deleted and have other names (hard links) left.
    #[arg(long)]
    pub link_remap: bool,
    /// Largest deleted file to carry that is still open; by default 1M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub ghost_limit: Option<u64>,
    /// Close established TCP connections: the programs see them broken.
    #[arg(long)]
    pub drop_connections: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_an_address_and_a_bridge() {
        let least = parse_process_net("ip=10.0.0.5/24,bridge=br0").unwrap();
        let expected = ProcessNet {
            address: "10.0.0.5/24".into(),
            bridge: "br0".into(),
            ..ProcessNet::default()
        };
        assert_eq!(least, expected);
        let most = "mac=02:00:00:00:00:07,gateway=fe80::1,bridge=br0,ip=fd00::5/64";
        let most = parse_process_net(most).unwrap();
        assert_eq!(most.gateway, Some("fe80::1".parse().unwrap()));
        assert_eq!(most.mac, Some([2, 0, 0, 0, 0, 7]));
        for odd in [
            "",
            "ip=10.0.0.5/24",
            "bridge=br0",
            "ip=10.0.0.5,bridge=br0",
            "ip=10.0.0.5/33,bridge=br0",
            "ip=10.0.0.5/24,bridge=",
            "ip=10.0.0.5/24,bridge=a,bridge=b",
            "ip=10.0.0.5/24,bridge=a,gateway=gw",
            "ip=10.0.0.5/24,bridge=a,mac=2",
            "ip=10.0.0.5/24,bridge=a,tap=t0",
        ] {
            assert!(parse_process_net(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn a_variable_has_a_name() {
        assert_eq!(parse_variable("A="), Ok("A=".to_owned()));
        assert!(parse_variable("A").is_err());
        assert!(parse_variable("=1").is_err());
    }
}
