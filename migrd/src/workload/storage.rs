//! Waits for storage without holding up everybody else.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Does what may have to wait for storage. A thread of the runtime hands what
/// else it has to do to another one first: a disk that hangs must not hang the
/// daemon.
pub fn waiting<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_of_one_thread_waits_itself() {
        assert_eq!(waiting(|| 1), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_only_thread_of_a_runtime_may_wait_while_others_work() {
        let (tell, told) = std::sync::mpsc::channel();
        // Whoever waits here needs what only another task of the runtime does.
        let waited = tokio::spawn(async move {
            tokio::spawn(async move { tell.send(7) });
            waiting(|| told.recv())
        });
        assert_eq!(waited.await.unwrap(), Ok(7));
    }
}
