//! CPUs, as the daemon asks about them: what a new VM is given, and whether
//! this host can keep up what another host has given.

use migr_proto::v1 as proto;
use tokio::sync::OnceCell;

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

/// What this host's CPUs can do. KVM is asked once in the life of a daemon,
/// since a VM is made for it and cleared away, which the kernel may take its
/// time over.
///
/// # Errors
/// When KVM is missing or does not tell; it is asked again the next time.
pub async fn host() -> Result<&'static HostCpu, WorkloadError> {
    static KNOWN: OnceCell<HostCpu> = OnceCell::const_new();
    let ask = || {
        let kvm = open_kvm().map_err(|e| WorkloadError::new(chain(&e)))?;
        HostCpu::ask(kvm.into()).map_err(|e| WorkloadError::new(chain(&e)))
    };
    let asked = KNOWN.get_or_try_init(async || {
        let asked = tokio::task::spawn_blocking(ask).await;
        asked.unwrap_or_else(|e| Err(WorkloadError::caused("this host was not asked", e)))
    });
    asked.await
}

/// What a new VM's guest is given by this order, for as long as it lives.
///
/// # Errors
/// When the order makes no sense, or this host lacks something of it.
pub async fn model(order: Option<&proto::CpuOrder>) -> Result<proto::CpuModel, CpuOrderError> {
    Ok(Model::ordered(order, host().await?)?.to_wire())
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
        Ok(host) => misfits(&model, host),
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
            cpu::told(&missing)
        );
        let remedy = "choose another host; a guest that is started with `migctl run --cpu \
                      baseline`, or with a list of what all your hosts have, can move between them";
        problems.push(Problem::new("destination-cpu-features", message, remedy));
    }
    let unhidden = cpu::unhidden(model, host);
    if !unhidden.is_empty() {
        let message = format!(
            "this host's KVM shows every guest features beyond what the guest was given ({}): {}",
            model.name(),
            cpu::told(&unhidden)
        );
        let remedy = "choose a host whose KVM can hide them";
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::cpu::{Place, Register};

    const LEAF_7: Place = Place { function: 7, index: 0, register: Register::Ebx };
    const AVX2: u32 = 1 << 5;

    fn made_of(vendor: &[u8; 12], ebx: u32, tsc_khz: u32, scaling: bool) -> HostCpu {
        let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        let names = kvm_bindings::kvm_cpuid_entry2 {
            ebx: word(0),
            edx: word(4),
            ecx: word(8),
            ..Default::default()
        };
        let features = kvm_bindings::kvm_cpuid_entry2 { function: 7, ebx, ..Default::default() };
        HostCpu::made_of(vec![names, features], tsc_khz, scaling)
    }

    fn codes(model: &Model, host: &HostCpu) -> Vec<&'static str> {
        misfits(model, host).into_iter().map(|problem| problem.code).collect()
    }

    #[test]
    fn each_way_in_which_hosts_differ_has_its_own_name() {
        let source = made_of(b"GenuineIntel", AVX2 | 1, 2_300_000, false);
        let model = Model::all_of(&source);
        assert_eq!(model.word(LEAF_7), Some(AVX2 | 1));
        assert_eq!(codes(&model, &source), [""; 0]);
        let more = made_of(b"GenuineIntel", u32::MAX, 2_300_100, false);
        assert_eq!(codes(&model, &more), [""; 0]);
        let less = made_of(b"GenuineIntel", 1, 2_300_000, false);
        let problems = misfits(&model, &less);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].code, "destination-cpu-features");
        assert!(problems[0].message.ends_with("(host): avx2"), "{}", problems[0].message);
        assert!(problems[0].remedy.contains("--cpu baseline"));
        let slower = made_of(b"GenuineIntel", AVX2 | 1, 2_200_000, false);
        assert_eq!(codes(&model, &slower), ["destination-tsc"]);
        let scaling = made_of(b"GenuineIntel", AVX2 | 1, 2_200_000, true);
        assert_eq!(codes(&model, &scaling), [""; 0]);
        let all = ["destination-cpu-vendor", "destination-cpu-features", "destination-tsc"];
        assert_eq!(codes(&model, &made_of(b"AuthenticAMD", 0, 2_200_000, false)), all);
    }

    #[tokio::test]
    async fn this_host_can_keep_up_what_it_gave_and_no_feature_beyond() {
        let config = |cpu| proto::VmConfig { cpu, ..Default::default() };
        assert_eq!(problems(&config(None)).await, []);
        let given = model(None).await.unwrap();
        assert_eq!(problems(&config(Some(given.clone()))).await, []);
        assert_eq!(order(&config(Some(given.clone()))).unwrap().name, "host");
        // Leaf 1, ECX, bit 10: no KVM gives it.
        let mut more = given;
        let ecx = i32::from(proto::CpuRegister::Ecx);
        let wanted = |f: &&mut proto::CpuFeatures| f.function == 1 && f.register == ecx;
        more.features.iter_mut().filter(wanted).for_each(|f| f.bits |= 1 << 10);
        let found = problems(&config(Some(more.clone()))).await;
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].code, "destination-cpu-features");
        assert!(found[0].message.ends_with(": cid"), "{}", found[0].message);
        more.features.iter_mut().for_each(|f| f.register = 77);
        assert_eq!(problems(&config(Some(more))).await[0].code, "engine");
    }
}
