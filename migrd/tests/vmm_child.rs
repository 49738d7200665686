//! VMM children on real KVM, with the pulse guest in them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migr_proto::v1::{GuestStopKind, VmConfig};
use migrd::pages::{PageBitmap, PageSet};
use migrd::units::{PAGE_SIZE, PageIndex, PageRun, WorkloadId};
use migrd::workload::vm::child::{Child, ChildError, ChildSpec, ChildState};
use migrd::workload::{ChunkSink, ChunkSource, StreamKey};

const MIB: u64 = 1 << 20;
/// Long enough for a busy machine; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

struct Vm {
    child: Child,
    directory: tempfile::TempDir,
}

fn config(memory_bytes: u64, cpus: u32, cmdline: &str) -> VmConfig {
    VmConfig { version: 1, memory_bytes, cpus, cmdline: cmdline.into(), ..Default::default() }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn spec(directory: &Path, config: VmConfig, kernel: Option<File>) -> ChildSpec {
    ChildSpec {
        id: WorkloadId::random(),
        directory: directory.to_owned(),
        config,
        kernel,
        initrd: None,
        program: PathBuf::from(env!("CARGO_BIN_EXE_migrd")),
    }
}

async fn spawn(config: VmConfig, kernel: Option<&[u8]>) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let child = Child::spawn(spec(directory.path(), config, kernel.map(file_of))).await.unwrap();
    Vm { child, directory }
}

async fn pulse(memory_bytes: u64, cpus: u32, cmdline: &str) -> Vm {
    let vm = spawn(config(memory_bytes, cpus, cmdline), Some(pulse::ELF)).await;
    vm.child.boot().await.unwrap();
    vm.child.run().await.unwrap();
    vm
}

impl Vm {
    fn serial(&self) -> String {
        serial(self.directory.path())
    }

    /// Waits until the serial output is as wanted, and gives it back.
    async fn until(&self, wanted: impl Fn(&str) -> bool) -> String {
        let mut length = self.child.log().length;
        let waited = tokio::time::timeout(PATIENCE, async {
            while !wanted(&self.serial()) {
                length.changed().await.unwrap();
            }
        });
        if waited.await.is_err() {
            panic!("{:?}; serial output:\n{}", self.child.states().borrow(), self.serial());
        }
        self.serial()
    }
}

fn serial(directory: &Path) -> String {
    std::fs::read_to_string(directory.join("serial.log")).unwrap()
}

#[tokio::test]
async fn pulse_boots_and_its_heart_beats() {
    let vm = pulse(64 * MIB, 1, "hot=1M static=4M").await;
    let text = vm.until(|t| t.lines().count() > 10).await;
    println!("{text}");
    vm.child.kill().await;
}
