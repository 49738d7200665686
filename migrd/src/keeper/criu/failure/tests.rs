//! The lines are what CRIU 4.2.1 wrote when it was made to fail in each way, with
//! shorter paths; that about the vDSO is 3.17.1's.

use super::*;

const RLIMIT: &str = "(00.038709) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for \
                      self: Operation not permitted\n";

fn of_log(text: &str) -> Failure {
    Failure::explain(&Response::default(), &Log::read(text.as_bytes()).unwrap())
}

/// What CRIU writes after the cause of a failed dump.
fn dump_failing_with(lines: &str) -> Failure {
    of_log(&format!(
        "(00.000000) Will dump/restore TCP connections\n{RLIMIT}{lines}\n\
         (00.042438) Error (criu/cr-dump.c:1545): Dump files (pid: 18446) failed with -1\n\
         (00.042656) Error (criu/cr-dump.c:1975): Dumping FAILED.\n"
    ))
}

fn restore_failing_with(lines: &str) -> Failure {
    of_log(&format!(
        "{RLIMIT}{lines}\n\
         (00.064306)      1: Error (criu/files.c:1221): Unable to open fd=3 id=0x16\n\
         (00.064926) Error (criu/cr-restore.c:2331): Restoring FAILED.\n"
    ))
}

#[test]
fn each_known_way_to_fail_a_dump_has_its_cause() {
    let table = [
        (
            "connection_tracking",
            "(00.519898) Error (criu/libnetlink.c:54): -22 reported by netlink: Invalid argument",
        ),
        (
            "tcp_established",
            "(00.042426) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using \
             --tcp-established option.",
        ),
        (
            "capability_resource",
            "(00.043112) Error (criu/cr-dump.c:318): Can't get rlimit 0: Operation not permitted",
        ),
        (
            "file_locks",
            "(00.044355) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! \
             You can try --file-locks to dump them.",
        ),
        (
            "ghost_file",
            "(00.049053) Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/gh of 2097152 \
             size, increase limit",
        ),
        (
            "link_remap",
            "(00.067244) Error (criu/files-reg.c:1122): Can't create link remap for /tmp/lr. Use \
             link-remap option.",
        ),
        (
            "outer_terminal",
            "(00.050596) Error (criu/tty.c:410): tty: Found slave peer index 0 without correspond \
             master peer",
        ),
        (
            "outer_session",
            "(00.035422) Error (criu/pstree.c:304): The root process 19916 is not a session \
             leader. Consider using --shell-job option",
        ),
        (
            "outer_unix_socket",
            "(00.049818) Error (criu/sk-unix.c:874): unix: External socket is used. Consider using \
             --ext-unix-sk option.",
        ),
        (
            "outer_unix_socket",
            "(00.075809) Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix \
             connection. name: (null); peer name: /tmp/us",
        ),
        (
            "io_uring",
            "pie: 1: Error (criu/pie/parasite.c:588): send_fds failed (-22)\n\
             (00.041413) Error (criu/parasite-syscall.c:280): Can't retrieve FDs from socket\n\
             (00.041415) Error (compel/src/lib/infect-rpc.c:44): Message reply from daemon is \
             trimmed (12/0)",
        ),
        (
            "vsock",
            "(00.038798) Error (criu/sockets.c:767): sockets: BUG! Unknown socket collected \
             (family 40)",
        ),
        (
            "file_type",
            "(00.035067) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon \
             anon_inode:[userfaultfd])",
        ),
        (
            "outer_mount",
            "(00.050846) Error (criu/files-reg.c:1790): Can't lookup mount=24 for fd=0 \
             path=/dev/null",
        ),
        (
            "no_space",
            "(00.039719) Error (criu/page-xfer.c:263): page-xfer: Unable to spice data: No space \
             left on device\n\
             (00.039729) Error (criu/bfd.c:131): bfd: Error flushing image: No space left on \
             device\n\
             (00.039809) Error (criu/mem.c:718): Can't dump page with parasite",
        ),
        (
            "memory_tracking",
            "(00.044871) Error (criu/config.c:1131): Tracking memory is not available. Consider \
             omitting --track-mem option.",
        ),
        (
            "traced",
            "(00.041828) Warn  (compel/src/lib/infect.c:132): Unable to interrupt task: 19242 \
             (Operation not permitted)\n\
             (00.041846) Error (compel/src/lib/infect.c:417): Unable to detach from 19242: No such \
             process",
        ),
        (
            "gone",
            "(00.042248) Warn  (compel/src/lib/infect.c:132): Unable to interrupt task: 4000000 \
             (No such process)\n\
             (00.042367) Error (compel/src/lib/infect.c:417): Unable to detach from 4000000: No \
             such process",
        ),
    ];
    for (code, lines) in table {
        assert_eq!(dump_failing_with(lines).code, code, "{lines}");
    }
}

#[test]
fn each_known_way_to_fail_a_restore_has_its_cause() {
    let table = [
        (
            "file_changed",
            "(00.063771)      1: Error (criu/files-reg.c:2175): File tmp/ff has bad size 12 (expect \
             5)",
        ),
        (
            "file_missing",
            "(00.064369)      1: Error (criu/files-reg.c:2353): Can't open file tmp/ff on restore: \
             No such file or directory\n\
             (00.064371)      1: Error (criu/files-reg.c:2267): Can't open file tmp/ff: No such \
             file or directory",
        ),
        (
            "pid_taken",
            "(00.033495) Error (criu/cr-restore.c:1237): Can't fork for 22705: File exists",
        ),
        (
            "address_taken",
            "(00.068788)      1: Error (criu/sk-inet.c:1059): inet: Can't bind inet socket (id 23): \
             Address already in use",
        ),
        (
            "tcp_established",
            "(00.030642)      1: Error (criu/sk-inet.c:912): inet: Connected TCP socket in image",
        ),
        (
            "cpu",
            "(00.054226) Error (criu/arch/x86/cpu.c:223): cpu: CPU instruction capabilities do not \
             match run time",
        ),
        (
            "mounts",
            "(00.020278) Error (criu/mount.c:3141): mnt: No mapping for 133:(null) mountpoint",
        ),
        ("images", "(00.029187) Error (criu/image.c:554): Head magic doesn't match for core-1.img"),
        (
            "images",
            "(00.040572) pie: 1: Error (criu/pie/restorer.c:1907): Can't read pages data (-9)",
        ),
    ];
    for (code, lines) in table {
        assert_eq!(restore_failing_with(lines).code, code, "{lines}");
    }
}

#[test]
fn the_file_that_is_in_the_way_is_named_in_plain_words() {
    let failure = restore_failing_with(
        "(00.063771)      1: Error (criu/files-reg.c:2175): File tmp/ff has bad size 12 (expect 5)",
    );
    assert_eq!(
        failure.message,
        "an open file is not what it was when the process was stopped (File tmp/ff has bad size 12 (expect 5))"
    );
}

#[test]
fn an_option_of_crius_is_not_advised_because_ours_has_another_name() {
    let failure = dump_failing_with(
        "(00.042426) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using \
         --tcp-established option.",
    );
    assert_eq!(
        failure.to_string(),
        "there is an established TCP connection: close it, give --drop-connections, or run the \
         process in a network of its own"
    );
}

#[test]
fn an_unknown_cause_is_the_first_error_that_is_not_about_the_descriptor_limit() {
    let failure = dump_failing_with("(00.1) Error (criu/new.c:7): thing: It broke: Bad message");
    assert_eq!(
        (failure.code, failure.message.as_str()),
        ("unknown", "thing: It broke: Bad message")
    );
}

#[test]
fn the_descriptor_limit_is_no_cause_even_when_it_is_all_there_is() {
    let response = Response {
        cr_errno: Some(libc::EBADMSG),
        cr_errmsg: Some(RLIMIT.into()),
        ..Response::default()
    };
    let failure = Failure::explain(&response, &Log::read(RLIMIT.as_bytes()).unwrap());
    assert_eq!(failure.code, "unknown");
    assert!(failure.message.contains("Not a data message"), "{failure}");
    assert!(!failure.message.contains("RLIMIT"), "{failure}");
}

#[test]
fn without_a_log_the_answer_says_why() {
    let said = "Error (criu/cr-restore.c:1237): Can't fork for 22705: File exists";
    let response = Response { cr_errmsg: Some(said.into()), ..Response::default() };
    assert_eq!(Failure::explain(&response, &Log::default()).code, "pid_taken");
}

#[test]
fn a_warning_does_not_hide_an_error() {
    let failure = dump_failing_with(
        "(00.041828) Warn  (compel/src/lib/infect.c:132): Unable to interrupt task: 7 (Operation \
         not permitted)\n\
         (00.044355) Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You \
         can try --file-locks to dump them.",
    );
    assert_eq!(failure.code, "file_locks");
}

#[test]
fn what_a_workload_put_into_the_log_cannot_reach_a_terminal() {
    let path = format!("/tmp/\u{1b}[2J{}", "x".repeat(10_000));
    let line =
        format!("(0.1) Error (criu/files-reg.c:1031): Can't dump ghost file {path} of 9 size");
    let failure = dump_failing_with(&line);
    assert_eq!(failure.code, "ghost_file");
    assert!(failure.message.contains("/tmp/?[2J"), "{failure}");
    assert!(failure.message.len() < 500, "{}", failure.message.len());
}

#[test]
fn an_endless_log_is_kept_in_part_and_its_first_error_is_found() {
    let first = "(0.1) Error (criu/sk-unix.c:874): unix: External socket is used.\n";
    let noise = format!("{}Error (x.c:1): {}\n", "\u{0}".repeat(9), "y".repeat(100_000));
    let text = [first, &noise.repeat(300)].concat();
    let log = Log::read(text.as_bytes()).unwrap();
    assert!(log.tail().len() <= 64 << 10);
    let kept: usize = log.errors().map(str::len).sum();
    assert!(kept <= 256 * (4 << 10), "{kept}");
    assert_eq!(Failure::explain(&Response::default(), &log).code, "outer_unix_socket");
}

#[test]
fn bytes_that_are_no_text_do_not_hide_the_cause() {
    let mut text =
        b"(0.1) Error (criu/files-reg.c:1031): Can't dump ghost file /\xff\xfe of 9 size".to_vec();
    text.extend(b", increase limit");
    let log = Log::read(text.as_slice()).unwrap();
    assert_eq!(Failure::explain(&Response::default(), &log).code, "ghost_file");
}

#[test]
fn a_check_without_the_capability_says_so() {
    let said = "CRIU needs to have the CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE capability: \n\
                setcap cap_checkpoint_restore+eip /usr/sbin/criu\n";
    assert_eq!(Failure::of_check(&Log::read(said.as_bytes()).unwrap()).code, "capability");
}

#[test]
fn a_check_of_a_criu_older_than_the_kernel_says_so() {
    let said = "Error (criu/vdso.c:401): vdso: Unexpected rt vDSO area bounds\n";
    assert_eq!(Failure::of_check(&Log::read(said.as_bytes()).unwrap()).code, "old_criu");
}

#[test]
fn a_cause_can_be_found_by_its_name_only_once() {
    let mut codes: Vec<_> = CAUSES.iter().map(|cause| cause.code).collect();
    codes.sort_unstable();
    let all = codes.len();
    codes.dedup();
    assert_eq!(codes.len(), all);
}
