//! Errors as gRPC statuses, with a stable reason and what to do.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::checkpoint::CheckpointError;
use crate::migration::destination::ArrivalError;
use crate::migration::journal::JournalError;
use crate::migration::mode::NoSuchMode;
use crate::registry::RegistryError;
use crate::workload::WorkloadError;

/// The domain of every reason (google.rpc.ErrorInfo).
const DOMAIN: &str = "migr";

/// An error on `host`, for a client.
pub(super) struct Refusal<'a> {
    pub code: Code,
    pub reason: &'static str,
    pub message: String,
    pub host: &'a str,
    pub remedy: &'a str,
}

impl Refusal<'_> {
    pub(super) fn status(self) -> Status {
        let mut metadata = HashMap::from([("host".to_owned(), self.host.to_owned())]);
        if !self.remedy.is_empty() {
            metadata.insert("remedy".to_owned(), self.remedy.to_owned());
        }
        let details = ErrorDetails::with_error_info(self.reason, DOMAIN, metadata);
        Status::with_error_details(self.code, self.message, details)
    }
}

/// An argument that can't be.
pub(super) fn invalid(host: &str, message: impl Into<String>) -> Status {
    Refusal {
        code: Code::InvalidArgument,
        reason: "INVALID_ARGUMENT",
        message: message.into(),
        host,
        remedy: "",
    }
    .status()
}

pub(super) fn registry(host: &str, error: &RegistryError) -> Status {
    let (code, reason) = match error {
        RegistryError::Unknown(_) => (Code::NotFound, "UNKNOWN_WORKLOAD"),
        RegistryError::NotHereYet(_) => (Code::FailedPrecondition, "BUSY_MIGRATING"),
        RegistryError::CalledOff(_) => (Code::Aborted, "CALLED_OFF"),
        RegistryError::NameTaken(_) => (Code::AlreadyExists, "NAME_TAKEN"),
        RegistryError::BadName(_) => (Code::InvalidArgument, "BAD_NAME"),
        RegistryError::Busy { .. } => (Code::FailedPrecondition, "BUSY_MIGRATING"),
        RegistryError::WrongState { .. } => (Code::FailedPrecondition, "WRONG_STATE"),
        RegistryError::StillRuns { .. } => (Code::DeadlineExceeded, "STILL_RUNS"),
        RegistryError::Left { .. } => (Code::FailedPrecondition, "LEFT"),
        RegistryError::NotMigrating(_) => (Code::FailedPrecondition, "NOT_MIGRATING"),
        RegistryError::TooLate(_) => (Code::FailedPrecondition, "TOO_LATE"),
        RegistryError::NoSuchMode(_) => (Code::Unimplemented, "MODE_UNSUPPORTED"),
        RegistryError::NoRoom(_) => (Code::ResourceExhausted, "NO_MEMORY"),
        RegistryError::AddressTaken(_) => (Code::FailedPrecondition, "ADDRESS_TAKEN"),
        RegistryError::NoEngine(_) => (Code::FailedPrecondition, "NO_ENGINE"),
        RegistryError::Workload(_) => (Code::FailedPrecondition, "WORKLOAD"),
        RegistryError::Journal(_) => (Code::Internal, "JOURNAL"),
        RegistryError::ShuttingDown => (Code::Unavailable, "SHUTTING_DOWN"),
    };
    let remedy = match error {
        RegistryError::NoSuchMode(_) => NoSuchMode::REMEDY,
        _ => "",
    };
    Refusal { code, reason, message: error.to_string(), host, remedy }.status()
}

pub(super) fn workload(host: &str, error: &WorkloadError) -> Status {
    let (code, reason) = (Code::FailedPrecondition, "WORKLOAD");
    Refusal { code, reason, message: error.to_string(), host, remedy: "" }.status()
}

/// No process tree can be had on `host`: why, and what to do.
pub(super) fn no_criu(host: &str, message: String) -> Status {
    let (code, reason) = (Code::FailedPrecondition, "NO_CRIU");
    Refusal { code, reason, message, host, remedy: "" }.status()
}

/// No container can be had on `host`: why, and what to do.
pub(super) fn no_containers(host: &str, message: String) -> Status {
    let (code, reason) = (Code::FailedPrecondition, "NO_CONTAINERS");
    Refusal { code, reason, message, host, remedy: "" }.status()
}

pub(super) fn checkpoint(host: &str, error: &CheckpointError) -> Status {
    if let CheckpointError::Registry(error) = error {
        return registry(host, error);
    }
    let (code, reason) = (Code::FailedPrecondition, "CHECKPOINT");
    Refusal { code, reason, message: error.to_string(), host, remedy: "" }.status()
}

pub(super) fn journal(host: &str, error: &JournalError) -> Status {
    let (code, reason) = (Code::Internal, "JOURNAL");
    Refusal { code, reason, message: error.to_string(), host, remedy: "" }.status()
}

pub(super) fn arrival(host: &str, error: &ArrivalError) -> Status {
    let (code, reason) = match error {
        ArrivalError::Unknown(_) => (Code::NotFound, "UNKNOWN_MIGRATION"),
        ArrivalError::Unexpected { .. } => (Code::FailedPrecondition, "UNEXPECTED"),
        ArrivalError::Incomplete(_) => (Code::DataLoss, "INCOMPLETE"),
        ArrivalError::GivenUp => (Code::Aborted, "GIVEN_UP"),
        ArrivalError::Differs(_) => (Code::DataLoss, "DIFFERS"),
        ArrivalError::OddHashes => (Code::InvalidArgument, "ODD_HASHES"),
        ArrivalError::Workload(_) => (Code::FailedPrecondition, "WORKLOAD"),
        ArrivalError::Journal(_) => (Code::Internal, "JOURNAL"),
    };
    Refusal { code, reason, message: error.to_string(), host, remedy: "" }.status()
}
