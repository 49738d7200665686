//! The connection to a daemon, and what its failures mean to a person.

use std::error::Error as _;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use migr_proto::v1::control_client::ControlClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pings notice a peer that is silent: a dead host, or no HTTP/2 server at all.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer that broke the connection may take to show what it is.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// The domain of the error details that migrd attaches to its refusals.
const ERROR_DOMAIN: &str = "migr";

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection: nothing was asked of the daemon.
    #[error("{doing}: no answer from {address} ({detail})")]
    Unreachable { doing: String, address: String, detail: String },
    /// Something else answers at that address.
    #[error("{doing}: what answers at {address} is not a migrd ({detail})")]
    NotMigrd { doing: String, address: String, detail: String },
    /// The connection broke after the request went out.
    #[error("{doing}: the connection to {address} was lost ({detail})")]
    Lost { doing: String, address: String, detail: String },
    /// The daemon answered with an error.
    #[error("{doing}: {}", refusal.message)]
    Refused { doing: String, refusal: Box<Refusal> },
}

/// An error as the daemon reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: Code,
    /// Stable name for scripts; the gRPC code's if the daemon gave none.
    pub code: String,
    pub message: String,
    pub host: String,
    pub phase: Option<String>,
    pub remedy: Option<String>,
}

impl ClientError {
    /// Stable name of the error, for scripts.
    pub fn code(&self) -> &str {
        match self {
            Self::Unreachable { .. } => "daemon-unreachable",
            Self::NotMigrd { .. } => "not-migrd",
            Self::Lost { .. } => "connection-lost",
            Self::Refused { refusal, .. } => &refusal.code,
        }
    }

    /// Address of the host where it happened.
    pub fn host(&self) -> &str {
        match self {
            Self::Unreachable { address, .. }
            | Self::NotMigrd { address, .. }
            | Self::Lost { address, .. } => address,
            Self::Refused { refusal, .. } => &refusal.host,
        }
    }

    /// The phase it happened in, if the daemon named one.
    pub fn phase(&self) -> Option<&str> {
        match self {
            Self::Unreachable { .. } | Self::NotMigrd { .. } => Some("connecting"),
            Self::Lost { .. } => None,
            Self::Refused { refusal, .. } => refusal.phase.as_deref(),
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Unreachable { address, .. } => Some(format!(
                "check that migrd runs there (`migrd serve --listen {address} …`) and that --host \
                 or MIGCTL_HOST names the right address"
            )),
            Self::NotMigrd { .. } => Some(
                "check the port in --host or MIGCTL_HOST; a migrd of another version may lack \
                 this request"
                    .to_owned(),
            ),
            Self::Lost { .. } => Some(
                "look at the daemon's log, and at `migctl list` for what became of the request"
                    .to_owned(),
            ),
            Self::Refused { refusal, .. } => refusal.remedy.clone(),
        }
    }
}

/// A connection to the daemon at one address.
#[derive(Clone, Debug)]
pub struct Client {
    control: ControlClient<Channel>,
    address: String,
}

impl Client {
    /// Connects to `address`; `doing` begins the message if it fails.
    pub async fn connect(address: &str, doing: &str) -> Result<Self, ClientError> {
        let unreachable = |error: tonic::transport::Error| ClientError::Unreachable {
            doing: doing.to_owned(),
            address: address.to_owned(),
            detail: innermost(&error),
        };
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(unreachable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .connect()
            .await
            .map_err(unreachable)?;
        Ok(Self { control: ControlClient::new(channel), address: address.to_owned() })
    }

    /// The address this is connected to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The requests; cheap, shares the connection.
    pub fn rpc(&self) -> ControlClient<Channel> {
        self.control.clone()
    }

    /// What a failed request means; `doing` begins the message.
    pub fn explain(&self, doing: &str, status: &Status) -> ClientError {
        explain(&self.address, doing, status)
    }
}

fn explain(address: &str, doing: &str, status: &Status) -> ClientError {
    let doing = doing.to_owned();
    let address = address.to_owned();
    let details = status.get_details_error_info().filter(|info| info.domain == ERROR_DOMAIN);
    if details.is_none() {
        if let Some(cause) = status.source() {
            let detail = innermost(cause);
            return if answers_otherwise(&address) {
                ClientError::NotMigrd { doing, address, detail }
            } else {
                ClientError::Lost { doing, address, detail }
            };
        }
        if status.code() == Code::Unimplemented {
            let detail = status.message().to_owned();
            return ClientError::NotMigrd { doing, address, detail };
        }
    }
    let field = |key: &str| {
        let info = details.as_ref()?;
        info.metadata.get(key).filter(|value| !value.is_empty()).cloned()
    };
    let code = match &details {
        Some(info) => info.reason.clone(),
        None => format!("{:?}", status.code()).to_lowercase(),
    };
    let message = if status.message().is_empty() {
        status.code().description().to_owned()
    } else {
        status.message().to_owned()
    };
    let refusal = Refusal {
        status: status.code(),
        code,
        message,
        host: field("host").unwrap_or(address),
        phase: field("phase"),
        remedy: field("remedy"),
    };
    ClientError::Refused { doing, refusal: Box::new(refusal) }
}

/// Whether something at `address` answers, and not as an HTTP/2 server does.
///
/// How a connection to such a server breaks depends on who writes first, so
/// the failure alone does not tell. A server must open with a SETTINGS frame
/// (RFC 9113, 3.4), whose fourth byte is its type.
fn answers_otherwise(address: &str) -> bool {
    // The client's connection preface and an empty SETTINGS frame.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const SETTINGS: u8 = 4;
    let first_bytes = || -> io::Result<[u8; 4]> {
        let target = address.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
        let mut stream = TcpStream::connect_timeout(&target, PROBE_TIMEOUT)?;
        stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
        stream.write_all(HELLO)?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    };
    first_bytes().is_ok_and(|answer| answer[3] != SETTINGS)
}

/// The messages of an error and of everything that caused it.
fn chain(error: &(dyn std::error::Error + 'static)) -> impl Iterator<Item = String> {
    let first = Some(error);
    std::iter::successors(first, |error| std::error::Error::source(*error)).map(ToString::to_string)
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    chain(error).last().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_refusal_keeps_every_detail_the_daemon_gave() {
        let metadata = HashMap::from(
            [("host", "b:1"), ("phase", "offered"), ("remedy", "free some memory")]
                .map(|(k, v)| (k.to_owned(), v.to_owned())),
        );
        let details = ErrorDetails::with_error_info("destination-memory", ERROR_DOMAIN, metadata);
        let status =
            Status::with_error_details(Code::ResourceExhausted, "too little memory", details);
        let error = explain("a:1", "cannot migrate web", &status);
        assert_eq!(error.to_string(), "cannot migrate web: too little memory");
        assert_eq!(
            (error.code(), error.host(), error.phase(), error.remedy().as_deref()),
            ("destination-memory", "b:1", Some("offered"), Some("free some memory"))
        );
    }

    #[test]
    fn a_refusal_without_details_names_the_daemon_asked() {
        let error = explain("a:1", "cannot pause web", &Status::not_found("no workload web"));
        assert_eq!((error.code(), error.host(), error.phase()), ("notfound", "a:1", None));
    }

    #[test]
    fn a_grpc_server_without_the_service_is_not_a_migrd() {
        let error = explain("a:1", "cannot list", &Status::unimplemented(""));
        assert!(matches!(error, ClientError::NotMigrd { .. }));
    }
}
