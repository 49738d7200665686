//! What migr does on stock Linux hosts: each test brings up a lab of its own.
//! `MIGR_LAB_MOVES` says how often what is moved there and back goes, `MIGR_LAB_MEMORY`
//! how much memory (MiB) the process has whose stops are compared.

use anyhow::{Context, Result, ensure};
use integration::lab::scenario::moves::Storage;
use integration::lab::scenario::{boots, cpus, cut, freed, moves, power, trees};
use integration::lab::watch::attempts;

/// What the variable asks for, or `usual`.
fn number(variable: &str, usual: u32) -> Result<u32> {
    let Ok(asked) = std::env::var(variable) else { return Ok(usual) };
    let number = asked.parse().with_context(|| format!("{variable} is not a number"))?;
    ensure!(number > 0, "{variable} is 0: nothing would be moved");
    Ok(number)
}

/// How often what is moved there and back goes, where nothing else was asked for.
fn moves(usual: u32) -> Result<usize> {
    Ok(number("MIGR_LAB_MOVES", usual)?.try_into()?)
}

#[test]
fn a_stock_kernel_boots_to_a_shell_and_its_power_is_obeyed() -> Result<()> {
    attempts(boots::boots_and_ends)
}

#[test]
fn a_guest_with_shared_storage_does_not_notice_its_moves() -> Result<()> {
    let number = moves(4)?;
    attempts(|| moves::there_and_back(Storage::Shared, number))
}

#[test]
fn a_guest_whose_disk_is_copied_does_not_notice_its_moves() -> Result<()> {
    let number = moves(4)?;
    attempts(|| moves::there_and_back(Storage::Copied, number))
}

#[test]
fn memory_that_a_guest_has_freed_is_not_sent() -> Result<()> {
    attempts(freed::is_not_sent)
}

#[test]
fn a_network_that_is_cut_for_half_a_minute_does_not_disturb_the_guest() -> Result<()> {
    attempts(cut::in_the_middle_of_precopy)
}

#[test]
fn a_source_that_goes_off_after_released_leaves_the_guest_at_the_destination() -> Result<()> {
    attempts(power::source_off_after_released)
}

#[test]
fn a_source_that_goes_off_before_it_told_leaves_nobody_to_run_the_guest_until_it_is_on()
-> Result<()> {
    attempts(power::source_off_before_it_told)
}

#[test]
fn a_destination_that_goes_off_at_sealed_leaves_the_guest_at_the_source() -> Result<()> {
    attempts(power::destination_off_at_sealed)
}

#[test]
fn hosts_whose_cpus_differ_exchange_a_guest_of_the_baseline_only() -> Result<()> {
    attempts(cpus::differ)
}

#[test]
fn a_process_and_a_container_with_connections_do_not_notice_their_moves() -> Result<()> {
    // There and back in both modes.
    let number = moves(4)?;
    attempts(|| trees::there_and_back(number))
}

#[test]
fn the_memory_of_a_process_goes_ahead_and_arrives_whole() -> Result<()> {
    let mib = number("MIGR_LAB_MEMORY", 128)?;
    attempts(|| trees::memory_goes_ahead(mib))
}

#[test]
fn snapshots_of_a_tree_build_on_each_other() -> Result<()> {
    let mib = number("MIGR_LAB_MEMORY", 128)?;
    attempts(|| trees::snapshots_build_on_each_other(mib))
}
