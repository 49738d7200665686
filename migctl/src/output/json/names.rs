//! The names of the protocol's enumerations, as people and scripts see them.

use migr_proto::v1;

/// The name of a kind.
pub fn kind(kind: v1::WorkloadKind) -> &'static str {
    match kind {
        v1::WorkloadKind::Unspecified => "unknown",
        v1::WorkloadKind::Vm => "vm",
        v1::WorkloadKind::Process => "process",
        v1::WorkloadKind::Container => "container",
    }
}

/// The name of a state.
pub(super) fn state(state: v1::WorkloadState) -> &'static str {
    match state {
        v1::WorkloadState::Unspecified => "unknown",
        v1::WorkloadState::Running => "running",
        v1::WorkloadState::Paused => "paused",
        v1::WorkloadState::Stopped => "stopped",
        v1::WorkloadState::Migrating => "migrating",
        v1::WorkloadState::InDoubt => "in_doubt",
        v1::WorkloadState::Gone => "gone",
    }
}

/// The name of a mode, as `--mode` takes it.
pub fn mode(mode: v1::MigrationMode) -> &'static str {
    match mode {
        v1::MigrationMode::Unspecified => "unknown",
        v1::MigrationMode::Precopy => "precopy",
        v1::MigrationMode::Stop => "stop",
        v1::MigrationMode::Postcopy => "postcopy",
        v1::MigrationMode::Hybrid => "hybrid",
    }
}

/// The name of a phase; none if the daemon gave none.
pub fn phase(phase: v1::MigrationPhase) -> Option<&'static str> {
    match phase {
        v1::MigrationPhase::Unspecified => None,
        v1::MigrationPhase::Planning => Some("planning"),
        v1::MigrationPhase::Offered => Some("offered"),
        v1::MigrationPhase::Precopy => Some("precopy"),
        v1::MigrationPhase::Stopped => Some("stopped"),
        v1::MigrationPhase::Sealed => Some("sealed"),
        v1::MigrationPhase::Released => Some("released"),
        v1::MigrationPhase::Running => Some("running"),
    }
}
