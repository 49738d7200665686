//! What a guest's CPUs say of themselves, and which host can keep it up.
//!
//! Owns the CPUID of vCPUs and the model of a VM: the feature bits that its
//! guest was given, fixed when it was first started. May not touch memory,
//! devices or files. The child gives vCPUs their CPUID from here; the daemon,
//! which opens `/dev/kvm` but makes no call of its own to it, asks here what
//! this host's CPUs can do.
//!
//! - [`features`]: the words of CPUID that hold features, and their names.
//! - [`HostCpu`]: what this host has.
//! - [`Model`]: what a VM was given: all of the host it was started on, the
//!   baseline, or a list.
//! - `mask`: leaves without what the model leaves out.
//! - `topology`: leaves as one vCPU of several sees them.
//! - `fit`: what of a model or of saved leaves a host lacks.

mod bits;
pub mod features;
mod fit;
mod host;
mod mask;
mod model;
mod order;
#[cfg(test)]
mod tests;
mod topology;

use kvm_bindings::CpuId;

pub use features::{Place, Register};
pub use fit::{CpuMisfit, missing, of_leaves, same_rate, told, unhidden};
pub(crate) use host::register;
pub use host::{CpuidError, HostCpu};
pub use model::{Model, ModelError};
pub use order::OrderError;

/// The CPUID of vCPU `index` of `cpus`, of a VM of this model; without one, all
/// that the host has.
///
/// # Errors
/// When KVM takes fewer leaves than there are.
pub fn for_vcpu(
    host: &HostCpu,
    model: Option<&Model>,
    index: u32,
    cpus: u32,
) -> Result<CpuId, CpuidError> {
    let offered = host.offered();
    let masked = match model {
        Some(model) => mask::masked(&offered, model),
        None => offered,
    };
    let place = topology::Place { index, cpus, deadline: host.deadline() };
    let leaves = topology::patched(&masked, place);
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany)
}
