//! The messages on CRIU's socket: the part of its RPC interface that is used
//! here. Numbers and types are those of CRIU's `images/rpc.proto`, in proto2:
//! what is not sent keeps CRIU's default, which may also come from how it was
//! built.

use prost::{Enumeration, Message};

/// What is asked, or what an answer is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum RequestType {
    /// An answer to a request that CRIU does not know.
    Empty = 0,
    /// Write a tree into images.
    Dump = 1,
    /// Make a tree from images.
    Restore = 2,
    /// Try what the kernel offers.
    Check = 3,
    /// Write the memory of a tree that runs on. CRIU then waits for another
    /// request of this kind, or for the dump.
    PreDump = 4,
    /// CRIU stands still at a step; the answer to that has this type too.
    Notify = 6,
    /// Which of some features there are.
    FeatureCheck = 9,
    /// Which version it is.
    Version = 10,
}

impl RequestType {
    /// For a sentence: "CRIU failed while it …".
    #[must_use]
    pub fn doing(self) -> &'static str {
        match self {
            Self::Empty => "read a request",
            Self::Dump => "wrote the processes into images",
            Self::Restore => "restored the processes",
            Self::Check => "checked the kernel",
            Self::PreDump => "wrote memory ahead",
            Self::Notify => "was held",
            Self::FeatureCheck => "looked for features",
            Self::Version => "told its version",
        }
    }
}

/// What becomes of cgroups (`criu_cg_mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum CgroupMode {
    /// Nothing is saved; restored processes stay in the cgroup of CRIU.
    Ignore = 0,
    /// Cgroups must be there already.
    None = 1,
    /// Properties only.
    Props = 2,
    /// Made unless they are there, and only those that are made get properties.
    Soft = 3,
    /// Made, with properties.
    Full = 4,
    /// Must not be there before.
    Strict = 5,
    /// As CRIU was built.
    Default = 6,
}

/// How connections are kept still during a dump (`criu_network_lock_method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum NetworkLock {
    /// By `iptables`, and CRIU's default.
    Iptables = 1,
    /// By nftables.
    Nftables = 2,
    /// Not: somebody else does it.
    Skip = 3,
}

/// A descriptor of CRIU's that takes the place of one in the images.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct InheritFd {
    /// What it replaces, such as `pipe:[INODE]`.
    #[prost(string, required, tag = "1")]
    pub key: String,
    /// Its number in the CRIU process ([`super::session::inherited`]).
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// A namespace that restored processes join.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct JoinNamespace {
    /// Its kind, such as `net`.
    #[prost(string, required, tag = "1")]
    pub ns: String,
    /// The file that names it.
    #[prost(string, required, tag = "2")]
    pub ns_file: String,
    /// What the kind needs besides.
    #[prost(string, optional, tag = "3")]
    pub extra_opt: Option<String>,
}

/// Where memory is sent to (`criu_page_server_info`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct PageServerInfo {
    /// A connection to it, by its number in the CRIU process
    /// ([`super::session::inherited`]).
    #[prost(int32, optional, tag = "4")]
    pub fd: Option<i32>,
}

/// How a dump or restore is done (`criu_opts`). The names are CRIU's own.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Options {
    /// The directory of images, by its number in the process that made the
    /// socket, which is the caller: CRIU opens `/proc/PID/fd/N`.
    #[prost(int32, required, tag = "1", default = "-1")]
    pub images_dir_fd: i32,
    /// The root of the tree, by its number in CRIU's pid namespace.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Let the tree run on after the dump.
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    /// Allow datagram unix sockets whose peer is outside the tree.
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    /// Save and restore established TCP connections.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// Allow a session and a terminal that began outside the tree.
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    /// Save and restore file locks.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// From 0 (nothing) to 4 (debugging); 2 is errors and warnings.
    #[prost(int32, optional, tag = "9", default = "2")]
    pub log_level: Option<i32>,
    /// The name of the log in the working directory; no path.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Send memory there instead of writing it into images.
    #[prost(message, optional, tag = "11")]
    pub ps: Option<PageServerInfo>,
    /// Notify, and wait for an answer, at each step.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// The root directory of the restored tree; it must be a mount point.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// The images before these, relative to the directory of images.
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    /// Have the kernel track which pages change from now on.
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    /// Dump: free what these images replace in their parent. Restore: free
    /// each page of the images once it is read.
    #[prost(bool, optional, tag = "16")]
    pub auto_dedup: Option<bool>,
    /// The directory of the log, by its number in the caller; the directory of
    /// images unless it is given.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// Allow hard links to be made for files that lost the name they were
    /// opened by.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// How strictly the CPUs are compared.
    #[prost(uint32, optional, tag = "20")]
    pub cpu_cap: Option<u32>,
    /// Whether cgroups are managed at all; `manage_cgroups_mode` says more.
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    /// Make the restored root a child of the caller.
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    /// Descriptors that replace those of the images.
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    /// Find mounts from outside the namespace by itself.
    #[prost(bool, optional, tag = "28")]
    pub auto_ext_mnt: Option<bool>,
    /// Allow mounts from outside in a peer group.
    #[prost(bool, optional, tag = "29")]
    pub ext_sharing: Option<bool>,
    /// Allow mounts from outside with a master outside.
    #[prost(bool, optional, tag = "30")]
    pub ext_masters: Option<bool>,
    /// What becomes of cgroups.
    #[prost(enumeration = "CgroupMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// The largest deleted file that is put into the images (bytes).
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// Things outside the tree, such as `mnt[MOUNTPOINT]:KEY`.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// Namespaces that restored processes join.
    #[prost(message, repeated, tag = "39")]
    pub join_ns: Vec<JoinNamespace>,
    /// Freeze the tree by this cgroup instead of one by one.
    #[prost(string, optional, tag = "44")]
    pub freeze_cgroup: Option<String>,
    /// How long the tree may take to stop (seconds).
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Leave out connections that are not accepted yet.
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    /// Leave memory out, to be fetched later.
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// Restore established connections as closed ones.
    #[prost(bool, optional, tag = "52")]
    pub tcp_close: Option<bool>,
    /// How connections are kept still.
    #[prost(enumeration = "NetworkLock", optional, tag = "64")]
    pub network_lock: Option<i32>,
    /// The directory of images by its path; taken when `images_dir_fd` is -1.
    #[prost(string, optional, tag = "68")]
    pub images_dir: Option<String>,
    /// Leave the tree stopped after the dump or restore.
    #[prost(bool, optional, tag = "69")]
    pub leave_stopped: Option<bool>,
}

/// Features to ask for, or that were found (`criu_features`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct FeatureSet {
    /// The kernel can tell which pages were written to.
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    /// Memory can come after the processes run.
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
}

/// To CRIU (`criu_req`).
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Request {
    /// What is asked.
    #[prost(enumeration = "RequestType", required, tag = "1")]
    pub r#type: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub opts: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// Ask more after this.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// What to look for.
    #[prost(message, optional, tag = "5")]
    pub features: Option<FeatureSet>,
}

impl Request {
    fn of(kind: RequestType, opts: Option<Options>) -> Self {
        Self { r#type: kind.into(), opts, ..Self::default() }
    }

    /// Write a tree into images.
    #[must_use]
    pub fn dump(options: Options) -> Self {
        Self::of(RequestType::Dump, Some(options))
    }

    /// Write the memory of a tree that runs on.
    #[must_use]
    pub fn pre_dump(options: Options) -> Self {
        Self::of(RequestType::PreDump, Some(options))
    }

    /// Make a tree from images.
    #[must_use]
    pub fn restore(options: Options) -> Self {
        Self::of(RequestType::Restore, Some(options))
    }

    /// Try what the kernel offers.
    #[must_use]
    pub fn check(options: Option<Options>) -> Self {
        Self::of(RequestType::Check, options)
    }

    /// Which of `features` there are.
    #[must_use]
    pub fn feature_check(features: FeatureSet) -> Self {
        Self { features: Some(features), ..Self::of(RequestType::FeatureCheck, None) }
    }

    /// Which version it is.
    #[must_use]
    pub fn version() -> Self {
        Self::of(RequestType::Version, None)
    }

    /// Go on after a notification, or do not.
    #[must_use]
    pub fn answer(go_on: bool) -> Self {
        Self { notify_success: Some(go_on), ..Self::of(RequestType::Notify, None) }
    }
}

/// A restored tree.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Restored {
    /// Its root, in CRIU's pid namespace.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// A step CRIU stands still at.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Notify {
    /// Its name, such as `post-dump`.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The root of the tree, at the steps of a restore that have one.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// CRIU's version (`criu_version`).
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct VersionReply {
    /// The 4 of 4.2.1.
    #[prost(int32, required, tag = "1")]
    pub major_number: i32,
    /// The 2 of 4.2.1.
    #[prost(int32, required, tag = "2")]
    pub minor_number: i32,
    /// The 1 of 4.2.1.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// From CRIU (`criu_resp`).
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Response {
    /// What this is the answer to.
    #[prost(enumeration = "RequestType", required, tag = "1")]
    pub r#type: i32,
    /// Whether it was done.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// After a restore; -1 for the process if there is none.
    #[prost(message, optional, tag = "4")]
    pub restore: Option<Restored>,
    /// The step, in a notification.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// What went wrong, as in errno(3).
    #[prost(int32, optional, tag = "7")]
    pub cr_errno: Option<i32>,
    /// The features that there are.
    #[prost(message, optional, tag = "8")]
    pub features: Option<FeatureSet>,
    /// The first error CRIU met, which need not be the cause.
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
    /// The version.
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionReply>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_proto2_requires_and_nothing_that_was_not_set() {
        let request = Request::dump(Options { pid: Some(7), ..Options::default() });
        // type = DUMP, opts = { images_dir_fd = -1, pid = 7 }
        let minus_one = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        let expected = [&[0x08, 1, 0x12, 13, 0x08][..], &minus_one, &[0x10, 7]].concat();
        assert_eq!(request.encode_to_vec(), expected);
    }

    #[test]
    fn a_false_answer_is_sent_and_not_left_out() {
        assert_eq!(Request::answer(false).encode_to_vec(), [0x08, 6, 0x18, 0]);
    }

    #[test]
    fn options_with_two_byte_numbers_stand_under_them() {
        let options = Options {
            network_lock: Some(NetworkLock::Skip.into()),
            leave_stopped: Some(true),
            ..Options::default()
        };
        let bytes = options.encode_to_vec();
        // 64 << 3 and 69 << 3 as varints.
        assert_eq!(bytes[11..], [0x80, 0x04, 3, 0xa8, 0x04, 1]);
    }
}
