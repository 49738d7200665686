use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;

use super::*;
use crate::sys::fds;

fn pair() -> (OwnedReadHalf, OwnedWriteHalf, std::os::unix::net::UnixStream) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (read, write) = tokio::net::UnixStream::from_std(ours).unwrap().into_split();
    (read, write, theirs)
}

fn file_with(contents: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file.into()
}

/// What the child reads of one request: the frame, and what came with it.
fn hear(socket: &std::os::unix::net::UnixStream) -> (proto::ChildRequest, Vec<OwnedFd>) {
    let (mut received, mut beside) = (Vec::new(), Vec::new());
    loop {
        if let Some(request) = frame::decode(&mut received).unwrap() {
            assert!(received.is_empty(), "more than one request");
            return (request, beside);
        }
        let mut buffer = [0; 4096];
        let (length, fds) = fds::receive(socket, &mut buffer).unwrap();
        assert!(length > 0, "the connection ended");
        received.extend_from_slice(&buffer[..length]);
        beside.extend(fds);
    }
}

fn contents(fd: OwnedFd) -> String {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(fd);
    let mut bytes = vec![0; 16];
    let length = file.read_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}

#[tokio::test]
async fn descriptors_come_with_the_request_they_were_given_for_and_in_order() {
    let (_read, write, child) = pair();
    let link = Link::new(write, watch::channel(ChildState::Ready).0);
    let backings = vec![proto::ChildBacking::default(); 2];
    let attach = child_request::Request::Attach(proto::ChildAttach { backings });
    let asking = tokio::spawn({
        let link = link.clone();
        async move { link.ask_with(attach, vec![file_with(b"one"), file_with(b"two")]).await }
    });
    let heard = tokio::task::spawn_blocking(move || hear(&child));
    let (request, beside) = heard.await.unwrap();
    assert!(matches!(request.request, Some(child_request::Request::Attach(_))));
    let held: Vec<_> = beside.into_iter().map(contents).collect();
    assert_eq!(held, ["one", "two"]);
    link.close("the test is over");
    assert!(matches!(asking.await.unwrap(), Err(LinkError::Dead(_))));
}

#[tokio::test]
async fn what_was_sent_is_closed_here() {
    let (_read, write, child) = pair();
    let link = Link::new(write, watch::channel(ChildState::Ready).0);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let asking = tokio::spawn({
        let link = link.clone();
        let reboot = child_request::Request::Reboot(proto::ChildReboot { initrd: false });
        async move { link.ask_with(reboot, vec![writer.into()]).await }
    });
    // The pipe ends when the child's end of it, the only one left, is closed.
    let ended = tokio::task::spawn_blocking(move || {
        let (_, beside) = hear(&child);
        assert_eq!(beside.len(), 1);
        assert!(beside[0].as_raw_fd() > 2);
        drop(beside);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        rest
    });
    assert_eq!(ended.await.unwrap(), Vec::<u8>::new());
    link.close("the test is over");
    assert!(asking.await.unwrap().is_err());
}
