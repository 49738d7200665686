//! What leads out of the tree.

use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

use migrd::workload::process::preflight::Options;

use crate::harness::{Helper, Tree};

fn take(helper: &Helper) -> String {
    format!("text, fds = take({:?})", helper.name)
}

#[test]
fn a_pipe_to_another_process_is_named_unless_it_is_migrs() {
    let helper = Helper::start("r, w = os.pipe(); fds = [r]");
    let tree = Tree::start(&take(&helper));
    tree.is_a_problem("pipe-outside", &tree.options());
    let found = tree.scan(&tree.options());
    assert!(found.problems[0].message.contains(&format!("({})", helper.pid())), "{found:?}");

    // CRIU takes it, and the tree would wait for ever.
    tree.dump(&[]).unwrap();
    // Its output is such a pipe too, and the test holds the other end.
    let nothing_kept = Options::default();
    assert_eq!(tree.scan(&nothing_kept).problems.len(), 2);
}

#[test]
fn a_terminal_of_another_process_is_refused() {
    let helper = Helper::start("m, s = pty.openpty(); text = os.ttyname(s).encode()");
    let open = "f = os.open(text.decode(), os.O_RDWR | os.O_NOCTTY)";
    let tree = Tree::start(&format!("{}\n{open}", take(&helper)));
    tree.is_refused("tty-outside", "without correspond");
}

#[test]
fn a_pidfd_of_another_process_is_refused() {
    let helper = Helper::start("fds = [os.pidfd_open(os.getpid())]");
    let tree = Tree::start(&take(&helper));
    tree.is_refused("pidfd", "not a part of process tree");
}

#[test]
fn a_unix_socket_to_another_process_is_refused() {
    let name = format!("migr-preflight-{}-stream", std::process::id());
    let listener =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let program = format!("s = socket.socket(socket.AF_UNIX); s.connect('\\0{name}')");
    let tree = Tree::start(&program);
    // Not accepted yet: the other end is nobody's. CRIU takes it, and then can't
    // make it again.
    tree.is_a_problem("unix-peer-outside", &tree.options());
    let (_accepted, _) = listener.accept().unwrap();
    tree.is_refused("unix-peer-outside", "External socket is used");
    let told = &tree.scan(&tree.options()).problems[0].message;
    assert!(told.contains(&format!("({})", std::process::id())) && told.contains(&name), "{told}");
}

#[test]
fn datagrams_to_another_process_are_refused() {
    let name = format!("migr-preflight-{}-datagram", std::process::id());
    let _log = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let program =
        format!("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect('\\0{name}')");
    Tree::start(&program).is_refused("unix-peer-outside", "External socket is used");
}

#[test]
fn a_connection_ends_with_the_hosts_address_unless_it_may_be_dropped() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let tree =
        Tree::start(&format!("s = socket.create_connection(('127.0.0.1', {}))", address.port()));
    tree.is_a_problem("established-tcp", &tree.options());
    let found = tree.scan(&tree.options());
    assert_eq!(found.established.len(), 1);
    assert_eq!((found.established[0].remote, found.established[0].pid), (address, tree.init));

    for options in [
        Options { drop_connections: true, ..tree.options() },
        Options { own_network: true, ..tree.options() },
    ] {
        let found = tree.scan(&options);
        assert!(found.problems.is_empty(), "{found:?}");
        assert_eq!(found.established.len(), 1, "it is listed all the same");
    }
}

#[test]
fn a_connection_within_the_tree_is_dropped_only_when_all_are() {
    let program = "
l = socket.create_server(('::1', 0), family=socket.AF_INET6)
s = socket.create_connection(l.getsockname()[:2]); a, _ = l.accept()";
    let tree = Tree::start(program);
    tree.is_carried(&tree.options(), &[]);
    assert!(tree.scan(&tree.options()).established.is_empty());
    let drop = Options { drop_connections: true, ..tree.options() };
    assert_eq!(tree.scan(&drop).established.len(), 2);
}

#[test]
fn a_connection_that_nobody_accepts_is_refused() {
    let tree = Tree::start("l = socket.create_server(('127.0.0.1', 0)); print(l.getsockname()[1])");
    tree.is_carried(&tree.options(), &[]);
    let port: u16 = tree.said[0].parse().unwrap();
    let _waiting = TcpStream::connect(("127.0.0.1", port)).unwrap();
    tree.is_refused("tcp-not-accepted", "In-flight connection");
}
