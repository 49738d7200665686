//! What a child does, and how a guest ended.

use migr_proto::v1 as proto;

/// What a child does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// Not ready yet.
    Starting,
    /// Ready; nothing is loaded.
    Ready,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest has ended; the child is there and can be read.
    Stopped(StopReason),
    /// The child itself is gone, with the reason.
    Dead(String),
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopReason {
    /// What ended it.
    pub kind: proto::GuestStopKind,
    /// What else there is to say.
    pub details: String,
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use proto::GuestStopKind::{
            DeviceAbused, EmulationFailure, InternalError, Reset, Shutdown, TripleFault,
            Unspecified,
        };
        f.write_str(match self.kind {
            Unspecified => "the guest ended",
            Shutdown => "the guest shut down",
            Reset => "the guest asked for a reset",
            TripleFault => "the guest crashed with a triple fault",
            EmulationFailure => "KVM could not emulate an instruction of the guest",
            InternalError => "KVM failed to run the guest",
            DeviceAbused => "a driver of the guest misused a device",
        })?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl ChildState {
    /// From what the child says.
    #[must_use]
    pub fn from_wire(status: proto::ChildStatus) -> Self {
        match status.phase() {
            proto::ChildPhase::Unspecified => Self::Starting,
            proto::ChildPhase::Ready => Self::Ready,
            proto::ChildPhase::Running => Self::Running,
            proto::ChildPhase::Paused => Self::Paused,
            proto::ChildPhase::Stopped => {
                let stop = status.stop.unwrap_or_default();
                Self::Stopped(StopReason { kind: stop.kind(), details: stop.details })
            }
        }
    }
}
