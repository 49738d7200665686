//! CPUs, as the daemon asks about them: what a new VM is given, and whether
//! this host can keep up what another host has given.

use migr_proto::v1 as proto;

use super::chain;
use super::child::open_kvm;
use crate::vmm::cpu::{self, HostCpu, Model, OrderError};
use crate::workload::{Problem, WorkloadError};

/// A VM can't be given the CPUs that are ordered.
#[derive(Debug, thiserror::Error)]
pub enum CpuOrderError {
    /// The order makes no sense, on whatever host.
    #[error(transparent)]
    Senseless(OrderError),
    /// This host can't.
    #[error(transparent)]
    Host(#[from] WorkloadError),
}

impl From<OrderError> for CpuOrderError {
    fn from(error: OrderError) -> Self {
        if error.senseless() {
            return Self::Senseless(error);
        }
        Self::Host(WorkloadError::new(chain(&error)))
    }
}

/// What this host's CPUs can do.
///
/// # Errors
/// When KVM is missing or does not tell.
pub async fn host() -> Result<HostCpu, WorkloadError> {
    // A VM is made for it and cleared away, which the kernel may take its time
    // over.
    let asked = tokio::task::spawn_blocking(|| {
        let kvm = open_kvm().map_err(|e| WorkloadError::new(chain(&e)))?;
        HostCpu::ask(kvm.into()).map_err(|e| WorkloadError::new(chain(&e)))
    });
    asked.await.unwrap_or_else(|e| Err(WorkloadError::caused("this host was not asked", e)))
}

/// What a new VM's guest is given by this order, for as long as it lives.
///
/// # Errors
/// When the order makes no sense, or this host lacks something of it.
pub async fn model(order: Option<&proto::CpuOrder>) -> Result<proto::CpuModel, CpuOrderError> {
    Ok(Model::ordered(order, &host().await?)?.to_wire())
}

/// What an operator would have to order to get what a VM was given; `None`: it
/// is not known, as of VMs of earlier versions.
#[must_use]
pub fn order(config: &proto::VmConfig) -> Option<proto::CpuOrder> {
    let model = Model::from_wire(config.cpu.as_ref()?).ok()?;
    Some(proto::CpuOrder { name: model.name().to_owned(), features: model.names() })
}

/// What of a VM's CPUs this host can't keep up.
pub(super) async fn problems(config: &proto::VmConfig) -> Vec<Problem> {
    let Some(wire) = &config.cpu else { return Vec::new() };
    let model = match Model::from_wire(wire) {
        Ok(model) => model,
        Err(error) => {
            return vec![Problem::new("engine", error.to_string(), "see the source's log")];
        }
    };
    match host().await {
        Ok(host) => misfits(&model, &host),
        // That there is no KVM is a problem of its own, and found elsewhere.
        Err(_) if open_kvm().is_err() => Vec::new(),
        Err(error) => vec![Problem::new("kvm", error.to_string(), "see `migctl hosts`")],
    }
}

fn misfits(model: &Model, host: &HostCpu) -> Vec<Problem> {
    let mut problems = Vec::new();
    if model.vendor() != host.vendor() {
        let message = format!(
            "the guest was started on CPUs of {}, and this host's are of {}",
            model.vendor(),
            host.vendor()
        );
        let remedy = "choose a host with CPUs of the same vendor";
        problems.push(Problem::new("destination-cpu-vendor", message, remedy));
    }
    let missing = cpu::missing(model, host);
    if !missing.is_empty() {
        let message = format!(
            "this host's CPUs lack features that the guest was given ({}): {}",
            model.name(),
            missing.join(", ")
        );
        let remedy = "choose another host; a guest that is started with `migctl run --cpu \
                      baseline`, or with a list of what all your hosts have, can move between them";
        problems.push(Problem::new("destination-cpu-features", message, remedy));
    }
    let (wanted, has) = (model.tsc_khz(), host.tsc_khz());
    if wanted != 0 && has != 0 && !host.scaling() && !cpu::same_rate(wanted, has) {
        let message = format!(
            "the guest's TSC runs at {wanted} kHz, this host's at {has} kHz, and its KVM can't \
             scale it"
        );
        let remedy = "choose a host with the same TSC frequency or with TSC scaling";
        problems.push(Problem::new("destination-tsc", message, remedy));
    }
    problems
}
