//! A connection to another daemon that is kept between calls.
//!
//! A channel of tonic remembers an attempt to connect that failed after its
//! caller had gone, and hands that failure to the next caller, at once and
//! though the daemon may be back since. So a channel on which a call failed, or
//! was given up, is not used again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The connection. Cheap to clone; all clones share it.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    endpoint: Endpoint,
    now: Arc<Mutex<Now>>,
}

#[derive(Debug)]
struct Now {
    channel: Channel,
    /// How many there were before it.
    generation: u64,
}

impl Kept {
    /// To `endpoint`; connects at the first call.
    pub(super) fn new(endpoint: Endpoint) -> Self {
        let channel = endpoint.connect_lazy();
        Self { endpoint, now: Arc::new(Mutex::new(Now { channel, generation: 0 })) }
    }

    /// For connections of one's own to the same place.
    pub(super) fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// Makes one call.
    ///
    /// # Errors
    /// Those of the call.
    pub(super) async fn call<T, F>(&self, call: impl FnOnce(Channel) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let (channel, generation) = {
            let now = self.lock();
            (now.channel.clone(), now.generation)
        };
        let mut attempt = Attempt { kept: self, generation, answered: false };
        let done = call(channel).await;
        // A status that the peer itself sent has no source: its connection is well.
        attempt.answered =
            done.as_ref().err().is_none_or(|s| std::error::Error::source(s).is_none());
        done
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call under way.
struct Attempt<'a> {
    kept: &'a Kept,
    generation: u64,
    answered: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut now = self.kept.lock();
        // Whoever else met the same failure has not replaced it yet.
        if now.generation == self.generation {
            now.channel = self.kept.endpoint.connect_lazy();
            now.generation += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use migr_proto::v1 as proto;
    use migr_proto::v1::peer_client::PeerClient;
    use tokio::net::TcpListener;

    use super::*;

    async fn identify(channel: Channel) -> Result<(), Status> {
        PeerClient::new(channel).identify(proto::IdentifyRequest::default()).await.map(drop)
    }

    #[tokio::test]
    async fn a_call_that_was_given_up_leaves_no_failure_behind() {
        // Accepts and never speaks: the connection hangs in its handshake.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", silent.local_addr().unwrap());
        let kept = Kept::new(Endpoint::from_shared(address).unwrap());
        let hanging = kept.call(identify);
        assert!(tokio::time::timeout(Duration::from_millis(50), hanging).await.is_err());
        assert_eq!(kept.lock().generation, 1);
    }

    #[tokio::test]
    async fn a_failed_connection_is_replaced_and_the_next_call_connects_anew() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let kept = Kept::new(Endpoint::from_shared(format!("http://{address}")).unwrap());
        kept.call(identify).await.expect_err("nobody listens");
        assert_eq!(kept.lock().generation, 1);
        let back = TcpListener::bind(address).await.unwrap();
        let call = tokio::spawn({
            let kept = kept.clone();
            async move { kept.call(identify).await }
        });
        back.accept().await.expect("it tries again");
        call.abort();
    }
}
