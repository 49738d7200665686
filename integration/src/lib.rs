//! Whole daemons, real virtual machines: what the tests, the demo, the soak and
//! the bench are made of.
//!
//! [`binaries`] finds the programs under test, [`daemon`] and [`host_pair`] run
//! them, [`migctl`] asks them, [`scenario`] runs pulse and judges its
//! heartbeats, [`process`] does so with process trees, [`programs`] finds some that nobody
//! here wrote, [`faulty_link`] spoils the way
//! between two daemons, [`leaks`] counts what is left behind, [`measure`] and [`soak`]
//! say what moves cost, [`two_nets`] gives each daemon a network of its own.
//! [`lab`] does the same on stock Linux hosts of their own.

pub mod binaries;
pub mod daemon;
pub mod faulty_link;
pub mod host_pair;
pub mod lab;
pub mod leaks;
pub mod measure;
pub mod migctl;
pub mod process;
pub mod programs;
pub mod scenario;
pub mod soak;
pub mod tidy;
pub mod two_nets;
pub mod wait;

/// Makes tests that have the function in common, each with its name and arguments:
/// `tests_of! { crash: at_the_start(1); at_the_end(2); }`.
#[macro_export]
macro_rules! tests_of {
    ($function:ident: $($name:ident($($argument:expr),*);)*) => {
        $(#[test]
        fn $name() -> ::anyhow::Result<()> {
            $function($($argument),*)
        })*
    };
}
