//! `pulse-image OUT`: writes the pulse guest's image to a file.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(out), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: pulse-image OUT");
        return ExitCode::from(2);
    };
    // A file of such a name can be had as ./-name.
    if out.as_encoded_bytes().starts_with(b"-") {
        eprintln!("usage: pulse-image OUT");
        let asked = matches!(out.to_str(), Some("-h" | "--help"));
        return if asked { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    let out = PathBuf::from(out);
    match pulse::write_image(&out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write the image to {}: {error}", out.display());
            ExitCode::FAILURE
        }
    }
}
