//! The workload's own namespace, before it is in there.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use super::INNER_NAME;
use super::config::{self, Plan};
use super::error::{NetError, system};
use super::route::Route;
use crate::sys::netns;

/// `lo` has this index in every namespace.
const LOOPBACK: u32 = 1;

/// Gives the interface `index` of that namespace what the plan says, and switches
/// it and `lo` on.
pub(super) fn set_up(namespace: BorrowedFd<'_>, index: u32, plan: &Plan) -> Result<(), NetError> {
    let done = netns::within(namespace, || set_up_here(index, plan));
    done.map_err(system("enter the namespace of", &config::name_of(plan.id)))?
}

fn set_up_here(index: u32, plan: &Plan) -> Result<(), NetError> {
    let mut here = Route::open().map_err(system("ask about", INNER_NAME))?;
    here.switch(LOOPBACK, true).map_err(system("switch on", "lo"))?;
    let own = match plan.address {
        // What it would choose for itself nobody has asked for.
        IpAddr::V4(_) => {
            set("disable_ipv6", "1")?;
            None
        }
        IpAddr::V6(_) => {
            set("accept_ra", "0")?;
            // It would not find out while it is cut off.
            set("accept_dad", "0")?;
            Some(IpAddr::from(config::link_local(plan.mac)))
        }
    };
    here.switch(index, true).map_err(system("switch on", INNER_NAME))?;
    let address = system("give its address to", INNER_NAME);
    here.add_address(index, plan.address, plan.prefix, plan.broadcast()).map_err(address)?;
    if let Some(own) = own {
        // The kernel adds it only when there is a link, which is too late for a
        // socket that is bound to it.
        here.add_address(index, own, 64, None)
            .map_err(system("give its own address to", INNER_NAME))?;
    }
    match plan.gateway {
        Some(gateway) => {
            here.add_default(index, gateway).map_err(system("set the gateway of", INNER_NAME))
        }
        None => Ok(()),
    }
}

/// Sets one of the interface's IPv6 parameters. A kernel without IPv6 has none.
fn set(name: &str, value: &str) -> Result<(), NetError> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{INNER_NAME}/{name}"), value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(system("set IPv6 parameters of", INNER_NAME)),
    }
}
