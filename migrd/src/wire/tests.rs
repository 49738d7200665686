use std::collections::BTreeMap;
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migr_proto::v1::lanes_client::LanesClient;
use migr_proto::v1::{Batch, BatchAck, Run as ProtoRun};
use proptest::prelude::*;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Code, Request, Status};

use super::codec::{Apply, BatchHead, Decoder, Run, RunKind, encode_head};
use super::limits::{BatchError, MAX_BATCH_BYTES};
use super::receive::{LaneDirectory, LaneService, ReceiveError, Receiver};
use super::send::SendLanes;
use super::{LANE_KEY, MIGRATION_KEY, incoming, server_settings};
use crate::migration::link::{LinkError, PageLanes};
use crate::units::{MigrationId, PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{ChunkSink, ChunkSource, OutOfStream, StreamKey, StreamSpec};

const LONG: Duration = Duration::from_secs(60);

/// Streams in plain memory.
struct Memory(Mutex<BTreeMap<StreamKey, Vec<u8>>>);

impl Memory {
    fn new(lengths: &[usize]) -> Arc<Self> {
        let streams = (0..).map(StreamKey).zip(lengths.iter().map(|length| vec![0; *length]));
        Arc::new(Self(Mutex::new(streams.collect())))
    }

    fn bytes(&self, key: u32) -> Vec<u8> {
        self.0.lock().expect("not poisoned")[&StreamKey(key)].clone()
    }

    fn specs(&self) -> Vec<StreamSpec> {
        let streams = self.0.lock().expect("not poisoned");
        let spec = |(key, bytes): (&StreamKey, &Vec<u8>)| StreamSpec {
            key: *key,
            name: "memory".into(),
            length: bytes.len() as u64,
            used: 0,
        };
        streams.iter().map(spec).collect()
    }

    fn with<T>(
        &self,
        key: StreamKey,
        offset: u64,
        length: u64,
        on: impl FnOnce(&mut [u8]) -> T,
    ) -> Result<T, OutOfStream> {
        let mut streams = self.0.lock().expect("not poisoned");
        let at = usize::try_from(offset).ok();
        let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
        at.zip(end)
            .and_then(|(at, end)| streams.get_mut(&key)?.get_mut(at..end))
            .map(on)
            .ok_or(OutOfStream { key, offset, length })
    }
}

impl ChunkSource for Memory {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        self.with(key, offset, into.len() as u64, |bytes| into.copy_from_slice(bytes))
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        self.with(key, offset, length, |bytes| bytes.iter().all(|b| *b == 0))
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for Memory {
    fn write(&self, key: StreamKey, offset: u64, from: &[u8]) -> Result<(), OutOfStream> {
        self.with(key, offset, from.len() as u64, |bytes| bytes.copy_from_slice(from))
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        self.with(key, offset, length, |bytes| bytes.fill(0))
    }
}

/// A destination that listens on loopback.
struct Destination {
    address: std::net::SocketAddr,
    directory: LaneDirectory,
    migration: MigrationId,
    receiver: Arc<Receiver>,
    memory: Arc<Memory>,
}

async fn destination(lengths: &[usize], lanes: usize) -> Destination {
    let memory = Memory::new(lengths);
    let receiver = Arc::new(Receiver::new(&memory.specs(), Arc::clone(&memory) as _, lanes));
    let (directory, migration) = (LaneDirectory::default(), MigrationId::random());
    assert!(directory.insert(migration, Arc::clone(&receiver)));
    assert!(!directory.insert(migration, Arc::clone(&receiver)));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = server_settings(Server::builder())
        .add_service(LaneService::new(directory.clone()))
        .serve_with_incoming(incoming(listener));
    tokio::spawn(server);
    Destination { address, directory, migration, receiver, memory }
}

fn endpoint(address: std::net::SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("a URI")
}

fn fill(memory: &Memory, key: u32, seed: u64) {
    let length = memory.bytes(key).len() as u64;
    let mut state = seed | 1;
    let fill = |bytes: &mut [u8]| {
        for (n, page) in bytes.chunks_mut(PAGE_BYTES).enumerate() {
            // Every third page stays zero.
            for byte in page.iter_mut().filter(|_| n % 3 != 1) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = state.to_be_bytes()[0];
            }
        }
    };
    memory.with(StreamKey(key), 0, length, fill).expect("in the stream");
}

fn all_of(memory: &Memory, key: u32) -> PageRun {
    PageRun { first: PageIndex(0), count: memory.bytes(key).len() as u64 / PAGE_SIZE }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_arrives_and_the_second_round_wins() {
    for lanes in [1, 3] {
        let sizes = [1500 * PAGE_BYTES, 700 * PAGE_BYTES];
        let to = destination(&sizes, lanes).await;
        let from = Memory::new(&sizes);
        let connect =
            SendLanes::connect(endpoint(to.address), to.migration, lanes, Arc::clone(&from) as _);
        let mut link = connect.await.expect("a destination");
        for round in 1..3 {
            for key in 0..2 {
                fill(&from, key, round * 77);
                link.send(StreamKey(key), all_of(&from, key)).await.expect("sent");
            }
            let totals = link.flush().await.expect("flushed");
            assert_eq!(totals.batches, to.receiver.applied());
            assert_eq!(totals.data_pages + totals.zero_pages, round * 2200);
            assert!(totals.zero_pages >= round * 732 && totals.zero_pages < round * 735);
            assert_eq!(from.bytes(0), to.memory.bytes(0));
            assert_eq!(from.bytes(1), to.memory.bytes(1));
        }
        let totals = Box::new(link).close().await.expect("closed");
        to.receiver.wait_applied(&totals.batches, LONG).await.expect("all there");
        assert_eq!(to.receiver.error(), None);
        let more = vec![u64::MAX; lanes];
        let missing = to.receiver.wait_applied(&more, Duration::from_millis(1)).await;
        assert!(matches!(missing, Err(ReceiveError::Missing { .. })), "{missing:?}");
    }
}

fn proto_run(offset: u64, length: u64, kind: i32) -> ProtoRun {
    ProtoRun { stream: 0, offset, length, kind }
}

/// A batch as any client might make it, with the checksum the protocol asks for.
fn batch(sequence: u64, runs: Vec<ProtoRun>, data: Vec<u8>) -> Batch {
    let only_runs = Batch { runs: runs.clone(), ..Batch::default() };
    let mut summed = only_runs.encode_to_vec();
    summed.extend_from_slice(&data);
    Batch { sequence, crc32: crc32fast::hash(&summed), runs, data: data.into() }
}

fn page_batch(sequence: u64, page: u64) -> Batch {
    batch(sequence, vec![proto_run(page * PAGE_SIZE, PAGE_SIZE, 1)], vec![7; PAGE_BYTES])
}

/// Sends `batches` with the generated client and gives its last words.
async fn with_generated_client(
    to: &Destination,
    lane: &str,
    batches: Vec<Batch>,
) -> Result<Vec<BatchAck>, Status> {
    let channel = endpoint(to.address).connect().await.expect("a destination");
    let mut request = Request::new(tokio_stream::iter(batches));
    let id = to.migration.to_string().parse().expect("printable");
    request.metadata_mut().insert(MIGRATION_KEY, id);
    request.metadata_mut().insert(LANE_KEY, lane.parse().expect("printable"));
    let mut answers = LanesClient::new(channel)
        .max_encoding_message_size(usize::MAX)
        .transfer(request)
        .await?
        .into_inner();
    let mut acks = Vec::new();
    while let Some(ack) = answers.message().await? {
        acks.push(ack);
    }
    Ok(acks)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_grpc_client_can_send() {
    let to = destination(&[4 * PAGE_BYTES], 1).await;
    let mixed = vec![proto_run(0, PAGE_SIZE, 2), proto_run(2 * PAGE_SIZE, 2 * PAGE_SIZE, 1)];
    let batches = vec![page_batch(0, 0), batch(1, mixed, vec![9; 2 * PAGE_BYTES])];
    let acks = with_generated_client(&to, "0", batches).await.expect("accepted");
    assert_eq!(acks.last().map(|ack| ack.applied), Some(2));
    let bytes = to.memory.bytes(0);
    assert!(bytes[..2 * PAGE_BYTES].iter().all(|b| *b == 0));
    assert!(bytes[2 * PAGE_BYTES..].iter().all(|b| *b == 9));
}

async fn refused(batches: Vec<Batch>) -> (Code, String, BatchError) {
    let to = destination(&[4 * PAGE_BYTES], 1).await;
    let told = with_generated_client(&to, "0", batches).await.expect_err("refused");
    match to.receiver.error() {
        Some(ReceiveError::Batch { lane: 0, error }) => {
            assert!(told.message().contains(&error.to_string()), "{told:?}");
            (told.code(), told.message().into(), error)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_batch_is_named_at_both_ends() {
    let data = |offset, length, bytes| batch(0, vec![proto_run(offset, length, 1)], vec![1; bytes]);
    let mut corrupt = page_batch(0, 0);
    corrupt.crc32 ^= 1;
    let (code, _, error) = refused(vec![corrupt]).await;
    assert_eq!((code, error), (Code::DataLoss, BatchError::Checksum { sequence: 0 }));

    let (_, _, error) = refused(vec![page_batch(0, 0), page_batch(2, 1)]).await;
    assert_eq!(error, BatchError::OutOfSequence { expected: 1, got: 2 });
    let (_, _, error) = refused(vec![page_batch(0, 0), page_batch(0, 0)]).await;
    assert_eq!(error, BatchError::OutOfSequence { expected: 1, got: 0 });

    let mut unknown = page_batch(0, 0);
    unknown.runs[0].stream = 5;
    let (_, _, error) = refused(vec![unknown]).await;
    assert_eq!(error, BatchError::UnknownStream(5));

    let (offset, length) = (4 * PAGE_SIZE, PAGE_SIZE);
    let (_, _, error) = refused(vec![data(offset, length, PAGE_BYTES)]).await;
    assert_eq!(error, BatchError::OutOfStream { stream: 0, offset, length });
    let offset = u64::MAX - PAGE_SIZE + 1;
    let (_, _, error) = refused(vec![data(offset, length, PAGE_BYTES)]).await;
    assert_eq!(error, BatchError::OutOfStream { stream: 0, offset, length });
    let (_, _, error) = refused(vec![data(1, length, PAGE_BYTES)]).await;
    assert_eq!(error, BatchError::NotPages { offset: 1, length });
    let (_, _, error) = refused(vec![data(0, 2 * PAGE_SIZE, PAGE_BYTES)]).await;
    assert_eq!(error, BatchError::DataLength { runs: 2 * PAGE_SIZE, data: PAGE_SIZE });
    let (_, _, error) = refused(vec![batch(0, vec![proto_run(0, PAGE_SIZE, 3)], vec![])]).await;
    assert_eq!(error, BatchError::Malformed("a run is of no known kind"));
    let many = (0..2000).map(|_| proto_run(0, PAGE_SIZE, 2)).collect();
    let (_, _, error) = refused(vec![batch(0, many, vec![])]).await;
    assert_eq!(error, BatchError::TooManyRuns);
    let (code, _, error) = refused(vec![data(0, PAGE_SIZE, MAX_BATCH_BYTES)]).await;
    assert_eq!(code, Code::ResourceExhausted);
    assert!(matches!(error, BatchError::TooLong { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_nobody_expects_are_refused() {
    let to = destination(&[PAGE_BYTES], 2).await;
    let code = async |lane| with_generated_client(&to, lane, vec![]).await.map_err(|s| s.code());
    assert_eq!(code("2").await, Err(Code::InvalidArgument));
    assert_eq!(code("x").await, Err(Code::InvalidArgument));
    assert_eq!(code("1").await, Ok(vec![]));
    assert_eq!(code("1").await, Err(Code::AlreadyExists));
    assert_eq!(to.receiver.error(), None);
    to.directory.remove(to.migration).expect("it is there");
    assert_eq!(code("0").await, Err(Code::NotFound));
    let memory = Memory::new(&[PAGE_BYTES]);
    let refused = SendLanes::connect(endpoint(to.address), to.migration, 1, memory).await;
    assert!(matches!(refused.err(), Some(LinkError::Rejected { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_closes_says_why_to_a_waiting_source() {
    let to = destination(&[600 * PAGE_BYTES], 2).await;
    // The source has a stream more than the manifest said.
    let from = Memory::new(&[600 * PAGE_BYTES, PAGE_BYTES]);
    let connect = SendLanes::connect(endpoint(to.address), to.migration, 2, Arc::clone(&from) as _);
    let mut link = connect.await.expect("a destination");
    link.send(StreamKey(0), all_of(&from, 0)).await.expect("sent");
    link.flush().await.expect("flushed");
    to.receiver.close("the operator changed their mind");
    link.send(StreamKey(0), all_of(&from, 0)).await.ok();
    let error = link.flush().await.expect_err("closed");
    assert!(
        matches!(&error, LinkError::Rejected { message, .. } if message.contains("changed their mind")),
        "{error:?}"
    );
    link.send(StreamKey(0), all_of(&from, 0)).await.expect_err("it stays failed");
    Box::new(link).close().await.expect_err("it stays failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_destination_refuses_and_what_the_source_lacks_are_told_apart() {
    let to = destination(&[PAGE_BYTES], 1).await;
    let from = Memory::new(&[PAGE_BYTES, PAGE_BYTES]);
    let connect = SendLanes::connect(endpoint(to.address), to.migration, 1, Arc::clone(&from) as _);
    let mut link = connect.await.expect("a destination");
    link.send(StreamKey(1), all_of(&from, 1)).await.expect("queued");
    let error = link.flush().await.expect_err("an unknown stream");
    assert!(matches!(error, LinkError::Rejected { .. }), "{error:?}");

    let to = destination(&[PAGE_BYTES], 1).await;
    let connect = SendLanes::connect(endpoint(to.address), to.migration, 1, Arc::clone(&from) as _);
    let mut link = connect.await.expect("a destination");
    link.send(StreamKey(9), all_of(&from, 1)).await.expect("queued");
    let error = link.flush().await.expect_err("no such stream here");
    assert!(matches!(error, LinkError::Source(OutOfStream { .. })), "{error:?}");
}

/// Passes one connection on, until `cut` says so.
async fn proxy(
    to: std::net::SocketAddr,
    cut: tokio::sync::oneshot::Receiver<()>,
) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.expect("a connection");
        let mut far = TcpStream::connect(to).await.expect("the destination");
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => pending().await,
            _ = cut => {}
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_lost_at_both_ends() {
    let to = destination(&[600 * PAGE_BYTES], 1).await;
    let from = Memory::new(&[600 * PAGE_BYTES]);
    let (cut, when) = tokio::sync::oneshot::channel();
    let address = proxy(to.address, when).await;
    let connect = SendLanes::connect(endpoint(address), to.migration, 1, Arc::clone(&from) as _);
    let mut link = connect.await.expect("a destination");
    fill(&from, 0, 3);
    link.send(StreamKey(0), all_of(&from, 0)).await.expect("sent");
    link.flush().await.expect("flushed");
    cut.send(()).expect("the proxy waits");
    link.send(StreamKey(0), all_of(&from, 0)).await.ok();
    let error = link.flush().await.expect_err("cut");
    assert!(matches!(error, LinkError::Lost { .. }), "{error:?}");
    let error = to.receiver.failed().await;
    assert!(matches!(error, ReceiveError::Lost { lane: 0, .. }), "{error:?}");
    let error = to.receiver.wait_applied(&[99], LONG).await.expect_err("cut");
    assert!(matches!(error, ReceiveError::Lost { .. }), "{error:?}");
}

/// Keeps what a decoder finds.
#[derive(Default)]
struct Seen {
    batches: Vec<(BatchHead, Vec<u8>)>,
    whole: usize,
}

impl Apply for Seen {
    fn begin(&mut self, head: BatchHead) -> Result<(), BatchError> {
        self.batches.push((head, Vec::new()));
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), BatchError> {
        self.batches.last_mut().expect("it began").1.extend_from_slice(bytes);
        Ok(())
    }

    fn end(&mut self) -> Result<(), BatchError> {
        self.whole += 1;
        Ok(())
    }
}

fn framed(batch: &Batch) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend_from_slice(&u32::try_from(batch.encoded_len()).expect("small").to_be_bytes());
    bytes.extend_from_slice(&batch.encode_to_vec());
    bytes
}

fn any_run() -> impl Strategy<Value = Run> {
    (any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(
        |(s, offset, length, data)| {
            let kind = if data { RunKind::Data } else { RunKind::Zero };
            Run { stream: StreamKey(s), offset, length, kind }
        },
    )
}

fn as_proto(run: &Run) -> ProtoRun {
    let kind = if run.kind == RunKind::Data { 1 } else { 2 };
    ProtoRun { stream: run.stream.0, offset: run.offset, length: run.length, kind }
}

#[test]
fn a_lane_that_ends_within_a_batch_is_truncated_wherever_it_ends() {
    let bytes = framed(&page_batch(0, 1));
    for cut in 1..bytes.len() {
        let mut decoder = Decoder::default();
        decoder.feed(&bytes[..cut], &mut Seen::default()).expect("so far it is good");
        assert_eq!(decoder.finish(), Err(BatchError::Truncated), "at {cut}");
    }
}

#[test]
fn an_announced_length_over_the_limit_is_refused_with_its_prefix() {
    let fed = Decoder::default().feed(&[0, 0xff, 0xff, 0xff, 0xff], &mut Seen::default());
    assert_eq!(fed, Err(BatchError::TooLong { length: u64::from(u32::MAX) }));
    let fed = Decoder::default().feed(&[1], &mut Seen::default());
    assert_eq!(fed, Err(BatchError::Compressed));
}

proptest! {
    #[test]
    fn what_is_encoded_is_what_prost_reads(
        sequence in any::<u64>(), runs in prop::collection::vec(any_run(), 0..20),
        data in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut wire = encode_head(sequence, &runs, &data).to_vec();
        wire.extend_from_slice(&data);
        let read = Batch::decode(&wire[5..]).expect("a batch");
        let expected = batch(sequence, runs.iter().map(as_proto).collect(), data);
        prop_assert_eq!(read, expected);
        prop_assert_eq!(u64::from(u32::from_be_bytes(wire[1..5].try_into().expect("four"))), wire.len() as u64 - 5);
    }

    #[test]
    fn what_prost_encodes_is_read_however_it_is_cut(
        all in prop::collection::vec((any::<u64>(), prop::collection::vec(any_run(), 0..20),
            prop::collection::vec(any::<u8>(), 0..300)), 1..4),
        cut in 1..400usize,
    ) {
        let mut wire = Vec::new();
        for (sequence, runs, data) in &all {
            wire.extend(framed(&batch(*sequence, runs.iter().map(as_proto).collect(), data.clone())));
        }
        let (mut decoder, mut seen) = (Decoder::default(), Seen::default());
        for part in wire.chunks(cut) {
            decoder.feed(part, &mut seen).expect("a good batch");
        }
        prop_assert_eq!(decoder.finish(), Ok(()));
        prop_assert_eq!(seen.whole, all.len());
        for ((head, bytes), (sequence, runs, data)) in seen.batches.iter().zip(&all) {
            prop_assert_eq!((head.sequence, head.data_length), (*sequence, data.len()));
            prop_assert_eq!(&head.runs, runs);
            prop_assert_eq!(bytes, data);
        }
    }

    #[test]
    fn hostile_bytes_never_panic_the_decoder(
        body in prop::collection::vec(any::<u8>(), 0..300), cut in 1..50usize,
        at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let feed = |bytes: &[u8]| {
            let (mut decoder, mut seen) = (Decoder::default(), Seen::default());
            let fed = bytes.chunks(cut).try_for_each(|part| decoder.feed(part, &mut seen));
            (fed, seen)
        };
        let mut wire = vec![0, 0, 0, 0, u8::try_from(body.len().min(255)).expect("small")];
        wire.extend_from_slice(&body);
        let _ = feed(&wire);
        let mut wire = framed(&page_batch(0, 0));
        let at = at.index(wire.len());
        prop_assume!(wire[at] != byte);
        wire[at] = byte;
        let (fed, seen) = feed(&wire);
        // Only the sequence is not under the checksum, and it is checked by itself.
        let sequence = seen.batches.first().is_some_and(|(head, _)| head.sequence != 0);
        prop_assert!(fed.is_err() || seen.whole == 0 || sequence);
    }
}
