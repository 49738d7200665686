//! Hosts whose CPUs differ.

use anyhow::{Result, ensure};

use super::table::Table;
use crate::lab::Lab;
use crate::lab::guest::Guest;
use crate::lab::qemu::Accelerator;
use crate::lab::settings::{HostNumber, Settings};

/// What host 2 lacks, as `/proc/cpuinfo` names it.
const LACKING: [&str; 2] = ["avx2", "bmi2"];

/// A guest that was given all that host 1 has is refused by host 2, by the names
/// of what it lacks; one that was given the baseline moves there and back.
///
/// # Errors
/// When it is not so.
pub fn differ() -> Result<()> {
    let model = match Accelerator::of_this_machine() {
        Accelerator::Kvm => "host",
        Accelerator::Emulation => "EPYC,+svm",
    };
    let model = format!("{model},-{},-{}", LACKING[0], LACKING[1]);
    let models = [(HostNumber::new(2)?, model)].into();
    let lab = Lab::start(&Settings { models, ..Settings::default() })?;
    let (one, two) = (lab.host(1)?, lab.host(2)?);
    let to = two.number().migrd().to_string();
    let mut table = Table::new("Hosts whose CPUs differ", &["--cpu", "what", "seen"]);

    let guest = Guest { cpu: Some("host"), ..Guest::on_shared_storage() };
    guest.run(one)?;
    guest.wait_up(one)?;
    for options in [&["--dry-run"][..], &[]] {
        let refused = one.migctl(&[&["migrate", guest.name, "--to", &to], options].concat())?;
        refused.expect(3, &LACKING)?;
        let named = refused.stdout.lines().chain(refused.stderr.lines());
        let named = named.filter(|line| line.contains(LACKING[0])).map(str::trim).next();
        let what = if options.is_empty() { "a move" } else { "a dry run" };
        let seen = format!("refused: {}", named.unwrap_or_default());
        table.row(&["host".to_owned(), what.to_owned(), seen]);
    }
    guest.expect_alive(one)?;
    ensure!(two.state_of(guest.name)?.is_none(), "host 2 has something of a refused guest");
    one.migctl(&["stop", guest.name, "--force"])?.ok()?;
    one.migctl(&["rm", guest.name])?.ok()?;

    let guest = Guest { cpu: Some("baseline"), ..guest };
    guest.run(one)?;
    guest.wait_up(one)?;
    for (from, to) in [(one, two), (two, one)] {
        from.migrate(guest.name, to, &[])?;
        guest.expect_alive(to)?;
        let way = format!("a move from {} to {}", from.number(), to.number());
        table.row(&["baseline".to_owned(), way, "completed".to_owned()]);
    }
    table.print();
    lab.done();
    Ok(())
}
