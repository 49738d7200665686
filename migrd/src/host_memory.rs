//! How much memory this host has, as its kernel says.

use std::path::PathBuf;

/// Reads `/proc/meminfo`.
#[derive(Clone, Debug)]
pub struct HostMemory {
    meminfo: PathBuf,
}

impl HostMemory {
    /// Of the host this runs on.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self { meminfo: "/proc/meminfo".into() }
    }

    /// Total and available memory in bytes; zero if the kernel does not say,
    /// which lets nothing in rather than too much.
    #[must_use]
    pub fn read(&self) -> (u64, u64) {
        let text = std::fs::read_to_string(&self.meminfo).unwrap_or_default();
        (field(&text, "MemTotal:"), field(&text, "MemAvailable:"))
    }
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let text = "MemTotal:       100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n";
        assert_eq!((field(text, "MemTotal:"), field(text, "MemAvailable:")), (102_400, 40_960));
        assert_eq!(field("", "MemTotal:"), 0);
        assert_eq!(field("MemTotal: many kB", "MemTotal:"), 0);
    }

    #[test]
    fn this_host_has_memory() {
        let (total, available) = HostMemory::of_this_host().read();
        assert!(total >= available && available > 0);
    }
}
