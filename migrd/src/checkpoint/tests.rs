//! Snapshots of a workload that is only an object, written and restored.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::migration::journal::{Identity, Journal};
use crate::registry::{Setup, State};
use crate::units::WorkloadId;
use crate::workload::fake::{Census, FakeArriving, FakeWorkload, Guest, Op};
use crate::workload::{Arriving, Engine, Kind, Manifest, Problem};

const PAGES: u64 = 64;
const NAME: &str = "job";

/// Makes guests that wait for what is restored into them.
#[derive(Default)]
struct Guests {
    census: Arc<Census>,
    made: Mutex<Vec<Arc<Guest>>>,
}

#[async_trait]
impl Engine for Guests {
    async fn check(&self, _: &Manifest) -> Vec<Problem> {
        Vec::new()
    }

    async fn clear(&self, _: WorkloadId) {}

    async fn prepare(&self, _: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError> {
        let guest = Guest::empty(&self.census, PAGES);
        self.made.lock().unwrap().push(guest.clone());
        Ok(Box::new(FakeArriving(guest)))
    }
}

struct World {
    registry: Registry,
    guest: Arc<Guest>,
    guests: Arc<Guests>,
    directory: tempfile::TempDir,
}

impl World {
    /// A host with one process tree, which runs.
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("journal.redb")).unwrap();
        let guests = Arc::new(Guests::default());
        let registry = Registry::new(Setup {
            here: "a:1".into(),
            host: journal.host_id().unwrap(),
            journal,
            engines: vec![(Kind::Process, guests.clone() as Arc<dyn Engine>)],
            peers: Arc::new(|address| panic!("nobody is asked for {address}")),
            lanes: 1,
            shutdown: CancellationToken::new(),
        });
        let guest = Guest::empty(&guests.census, PAGES);
        for page in 0..PAGES / 2 {
            guest.write_page(page, u8::try_from(page + 1).unwrap());
        }
        let identity = Identity {
            id: WorkloadId::random(),
            name: NAME.into(),
            kind: Kind::Process,
            config: vec![1, 2, 3],
            memory_bytes: 0,
            cpus: 0,
            created_unix_ms: 0,
        };
        registry.create(identity, Box::new(FakeWorkload(guest.clone()))).await.unwrap();
        Self { registry, guest, guests, directory }
    }

    fn place(&self) -> PathBuf {
        self.directory.path().join("snap")
    }

    async fn write(&self) -> Result<Written, CheckpointError> {
        write(&self.registry, NAME, &self.place(), How::default()).await
    }
}

fn with(process: ProcessOptions) -> How {
    How { process, ..How::default() }
}

#[tokio::test]
async fn a_workload_that_is_to_end_does_so_only_when_its_snapshot_is_complete() {
    let world = World::new().await;
    let ends = How { ends: true, ..How::default() };
    world.guest.failing_at(Op::Save, 1);
    write(&world.registry, NAME, &world.place(), ends.clone()).await.unwrap_err();
    assert!(world.guest.runs() && !world.place().exists(), "it failed and changed nothing");
    write(&world.registry, NAME, &world.place(), ends).await.unwrap();
    let state = world.registry.find(NAME).unwrap().state;
    assert!(state == State::Stopped && !world.guest.runs(), "{state:?}");
    restore(&world.registry, &world.place(), Some("copy".into())).await.unwrap();
    let copy = world.guests.made.lock().unwrap()[0].clone();
    assert_eq!(copy.checksum(), world.guest.checksum());
}

#[tokio::test]
async fn a_directory_without_a_manifest_was_not_written_to_its_end() {
    let world = World::new().await;
    world.write().await.unwrap();
    std::fs::remove_file(world.place().join(MANIFEST)).unwrap();
    let error = restore(&world.registry, &world.place(), Some("copy".into())).await.unwrap_err();
    assert!(error.to_string().contains("no manifest.json"), "{error}");
}

#[tokio::test]
async fn a_snapshot_of_a_workload_whose_rest_comes_in_parts_is_whole() {
    for parts in [0, 1, 3] {
        let world = World::new().await;
        world.guest.in_parts(parts);
        let written = world.write().await.unwrap();
        assert_eq!(written.pages, PAGES / 2);
        assert!(world.guest.runs(), "it goes on");
        let status = restore(&world.registry, &world.place(), Some("copy".into())).await.unwrap();
        assert_eq!((status.identity.kind, status.state), (Kind::Process, State::Running));
        assert_eq!(status.identity.config, [1, 2, 3]);
        let copy = world.guests.made.lock().unwrap()[0].clone();
        assert_eq!(copy.checksum(), world.guest.checksum(), "in {parts} parts");
        assert_ne!(copy.checksum(), Guest::empty(&Arc::default(), PAGES).checksum());
    }
}

#[tokio::test]
async fn a_part_that_never_comes_leaves_no_snapshot_and_the_workload_running() {
    for spared in 0..4 {
        let world = World::new().await;
        world.guest.in_parts(3);
        world.guest.failing_after(Op::Rest, spared, 1);
        let error = world.write().await.unwrap_err();
        assert!(error.to_string().contains("fails at Rest"), "{error}");
        assert!(world.guest.runs() && !world.place().exists(), "after {spared} parts");
        assert_eq!(world.write().await.unwrap().pages, PAGES / 2, "the next succeeds");
    }
}

#[tokio::test]
async fn what_keeps_it_from_being_saved_is_found_before_it_is_stopped() {
    let world = World::new().await;
    let options = ProcessOptions { file_locks: true, ..ProcessOptions::default() };
    world.guest.has(vec![
        Problem::new("vsock", "process 7 has a vsock socket", "close it"),
        Problem::new("io-uring", "process 8 has an io_uring", "end it"),
    ]);
    let found = plan(&world.registry, NAME, &world.place(), options, None).await.unwrap();
    let codes: Vec<_> = found.iter().map(|problem| problem.code).collect();
    assert_eq!(codes, ["vsock", "io-uring"]);
    assert!(world.guest.carried().process.file_locks, "it was looked at with what is allowed");
    let error = write(&world.registry, NAME, &world.place(), with(options)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("process 7") && text.contains("close it"), "{text}");
    assert!(text.contains("1 more"), "{text}");
    assert!(!world.guest.calls().contains(&Op::Freeze), "it was never stopped");
    assert!(!world.place().exists());
}

#[tokio::test]
async fn a_dry_run_finds_nothing_in_the_way_and_touches_nothing() {
    let world = World::new().await;
    let options = ProcessOptions::default();
    assert_eq!(plan(&world.registry, NAME, &world.place(), options, None).await.unwrap(), []);
    assert!(!world.place().exists() && world.guest.runs());
    world.write().await.unwrap();
    let found = plan(&world.registry, NAME, &world.place(), options, None).await.unwrap();
    assert_eq!(found[0].code, "snapshot-directory");
}

#[tokio::test]
async fn what_may_be_done_to_a_process_tree_is_chosen_before_it_is_stopped() {
    let world = World::new().await;
    let options = ProcessOptions { ghost_limit_bytes: 1 << 24, ..ProcessOptions::default() };
    write(&world.registry, NAME, &world.place(), with(options)).await.unwrap();
    let carried = world.guest.carried();
    assert_eq!((carried.disks, carried.to_files, carried.process), (false, true, options));
}

#[tokio::test]
async fn a_snapshot_of_what_saves_no_files_builds_on_no_other() {
    let world = World::new().await;
    world.write().await.unwrap();
    let next = world.place().with_extension("next");
    let onto = |parent: PathBuf| How { parent: Some(parent), ..How::default() };
    let said = |error: CheckpointError| error.to_string();
    let kind = write(&world.registry, NAME, &next, onto(world.place())).await.unwrap_err();
    assert!(said(kind).contains("not one that others can build on"));
    let none = write(&world.registry, NAME, &next, onto(next.clone())).await.unwrap_err();
    assert!(said(none).contains("no manifest.json"));
    assert!(!next.exists() && world.guest.runs());
    let options = ProcessOptions::default();
    let found = plan(&world.registry, NAME, &next, options, Some(&next)).await.unwrap();
    assert_eq!(found[0].code, "snapshot-parent");
}
