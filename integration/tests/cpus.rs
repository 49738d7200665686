//! What a guest's CPUs may be: chosen at its start, kept where it goes, and
//! compared with what a host has before it comes.

use std::fs;

use anyhow::{Context, Result, ensure};
use integration::daemon::Daemon;
use integration::host_pair::HostPair;
use integration::leaks::expect_nothing_left;
use integration::scenario::{Pulse, expect_alive, wait_for_pass};
use migr_proto::v1::peer_client::PeerClient;
use migr_proto::v1::{
    CpuFeatures, CpuModel, CpuRegister, Manifest, OfferProblem, OfferRequest, StreamSpec, VmConfig,
};
use prost::Message;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// `hosts` of one daemon.
fn about(daemon: &Daemon) -> Result<Value> {
    Ok(daemon.ask(&["hosts"])?["hosts"][0].clone())
}

fn names(value: &Value) -> Result<Vec<String>> {
    let list = value.as_array().with_context(|| format!("no list: {value}"))?;
    let name = |v: &Value| v.as_str().map(str::to_owned).context("not a name");
    list.iter().map(name).collect()
}

/// Starts `pulse` with `--cpu model`.
fn run_with(pair: &HostPair, pulse: &Pulse, model: &str) -> Result<integration::migctl::Ran> {
    let (kernel, memory) = (pair.kernel().display().to_string(), format!("{}M", pulse.memory));
    let args = ["run", pulse.name, "--kernel", &kernel, "--memory", &memory];
    pair.a.migctl(&[&args[..], &["--cmdline", &pulse.cmdline(), "--cpu", model]].concat())
}

#[test]
fn a_guest_keeps_the_features_that_it_was_given_where_it_moves() -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    let all = names(&about(&pair.a)?["cpu"]["features"])?;
    let (left_out, kept): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|name| name.starts_with("kvm_pv_"));
    ensure!(!left_out.is_empty(), "this host has nothing that could be left out");
    let list = pair.directory().join("rack-1.txt");
    fs::write(&list, format!("# all but some\n{}\n", kept.join("\n")))?;
    run_with(&pair, &pulse, &list.display().to_string())?.ok()?;
    wait_for_pass(&pair.a, pulse.name, 1)?;

    let given = pair.a.ask(&["inspect", pulse.name])?["cpu"].clone();
    ensure!(given["name"] == "rack-1", "{given}");
    let features = names(&given["features"])?;
    ensure!(!features.iter().any(|name| left_out.contains(name)), "{features:?}");
    pair.there(pulse.name, &["--verify"])?;
    expect_alive(&pair.b, pulse.name, 5)?;
    let there = pair.b.ask(&["inspect", pulse.name])?["cpu"].clone();
    ensure!(there == given, "{given} became {there}");
    pair.finish(pulse.name)
}

#[test]
fn a_list_that_makes_no_sense_is_refused_by_name() -> Result<()> {
    let pair = HostPair::start()?;
    let list = pair.directory().join("rack-1.txt");
    for (text, words) in [
        ("sse2\navx22\n", &["rack-1", "avx22", "no CPU feature"][..]),
        ("xsave\navx2\n", &["rack-1", "avx2 without avx"]),
        ("svm\n", &["rack-1", "svm", "no guest"]),
        // No KVM gives it to a guest.
        ("cid\n", &["rack-1", "lack", "cid"]),
    ] {
        fs::write(&list, text)?;
        run_with(&pair, &Pulse::small(), &list.display().to_string())?.expect(1, words)?;
        expect_nothing_left(&pair.a)?;
    }
    fs::write(&list, "# nothing\n")?;
    let empty = run_with(&pair, &Pulse::small(), &list.display().to_string())?;
    empty.expect(2, &["rack-1.txt", "names no feature"])
}

/// What `daemon` says to a VM of this configuration, without taking it.
fn offer(daemon: &Daemon, config: &VmConfig) -> Result<Vec<OfferProblem>> {
    let protocol = about(daemon)?["protocol"].as_u64().context("no protocol")?;
    let stream =
        |key, name: &str, length| StreamSpec { key, name: name.to_owned(), length, used: 0 };
    let manifest = Manifest {
        workload_id: "0c8c1f2e-55b5-4f3e-9d0e-3a8b6c1f7a01".to_owned(),
        name: "guest".to_owned(),
        kind: "vm".to_owned(),
        streams: vec![stream(0, "ram0", config.memory_bytes), stream(64, "serial-log", 16 * MIB)],
        config: config.encode_to_vec().into(),
        memory_bytes: config.memory_bytes,
        cpus: config.cpus,
        ..Manifest::default()
    };
    let request = OfferRequest {
        protocol: u32::try_from(protocol)?,
        migration_id: "0c8c1f2e-55b5-4f3e-9d0e-3a8b6c1f7a02".to_owned(),
        epoch: 2,
        source_address: "127.0.0.1:1".to_owned(),
        source_host_id: "0c8c1f2e-55b5-4f3e-9d0e-3a8b6c1f7a03".to_owned(),
        manifest: Some(manifest),
        lanes: 1,
        dry_run: true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut peer = PeerClient::connect(format!("http://{}", daemon.to())).await?;
        Ok(peer.offer(request).await?.into_inner().problems)
    })
}

fn config(cpu: CpuModel) -> VmConfig {
    VmConfig { version: 1, memory_bytes: 64 * MIB, cpus: 1, cpu: Some(cpu), ..VmConfig::default() }
}

#[test]
fn an_offered_guest_with_a_feature_that_this_host_lacks_is_refused_by_name() -> Result<()> {
    let pair = HostPair::start()?;
    let cpu = about(&pair.b)?["cpu"].clone();
    let vendor = cpu["vendor"].as_str().context("no vendor")?;
    let with = |bits| {
        let register = CpuRegister::Ebx.into();
        let features = vec![CpuFeatures { function: 0x8000_0008, index: 0, register, bits }];
        let (name, vendor) = ("rack-1".to_owned(), vendor.to_owned());
        CpuModel { name, vendor, features, tsc_khz: 0 }
    };
    // RDPRU, which no KVM gives to guests.
    let model = with(1 << 4);
    let problems = offer(&pair.b, &config(model))?;
    let [problem] = problems.as_slice() else { anyhow::bail!("{problems:?}") };
    ensure!(problem.code == "destination-cpu-features", "{problem:?}");
    ensure!(problem.message.ends_with("(rack-1): rdpru"), "{problem:?}");
    ensure!(problem.remedy.contains("--cpu baseline"), "{problem:?}");

    let possible = with(0);
    let problems = offer(&pair.b, &config(possible.clone()))?;
    ensure!(problems.is_empty(), "{problems:?}");
    let other = CpuModel { vendor: "GenuineOther".to_owned(), ..possible.clone() };
    let problems = offer(&pair.b, &config(other))?;
    ensure!(problems.iter().any(|p| p.code == "destination-cpu-vendor"), "{problems:?}");
    let odd = CpuModel { features: vec![CpuFeatures::default(); 5000], ..possible };
    let problems = offer(&pair.b, &config(odd))?;
    ensure!(problems.iter().any(|p| p.message.contains("damaged")), "{problems:?}");
    expect_nothing_left(&pair.b)?;
    Ok(())
}
