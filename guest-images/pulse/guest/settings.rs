//! The kernel command line. Pure: the host's unit tests compile this file too.

/// Most vCPUs the guest can use; boot.s reserves as many stacks.
pub const MAX_CPUS: usize = 16;
/// Bytes in a page.
pub const PAGE: u64 = 4096;

/// What the command line asks for. Sizes are bytes and whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes each vCPU rewrites in every pass.
    pub hot: u64,
    /// Bytes filled once and only read afterwards (`static=`).
    pub fixed: u64,
    /// Bytes of the static region read in every pass.
    pub check: u64,
    /// Most passes a second; 0 is no limit.
    pub rate: u64,
    /// Selects the pattern.
    pub seed: u64,
    /// vCPUs to start, the first one included.
    pub cpus: usize,
    /// Bytes of the lowest RAM above the image that are in no region.
    pub skip: u64,
}

/// A known key whose value makes no sense; holds the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadValue(pub &'static str);

impl Settings {
    /// Reads `key=value` tokens in any order; unknown tokens belong to somebody else.
    pub fn parse(line: &[u8]) -> Result<Self, BadValue> {
        let mut settings =
            Self { hot: 1 << 20, fixed: 0, check: 1 << 20, rate: 0, seed: 1, cpus: 1, skip: 0 };
        for token in line.split(u8::is_ascii_whitespace) {
            let Some(split) = token.iter().position(|&byte| byte == b'=') else { continue };
            let (key, value) = (&token[..split], &token[split + 1..]);
            match key {
                b"hot" => settings.hot = size(value).ok_or(BadValue("hot"))?,
                b"static" => settings.fixed = size(value).ok_or(BadValue("static"))?,
                b"check" => settings.check = size(value).ok_or(BadValue("check"))?,
                b"rate" => settings.rate = number(value).ok_or(BadValue("rate"))?,
                b"seed" => settings.seed = number(value).ok_or(BadValue("seed"))?,
                b"cpus" => settings.cpus = cpus(value).ok_or(BadValue("cpus"))?,
                b"skip" => settings.skip = size(value).ok_or(BadValue("skip"))?,
                _ => {}
            }
        }
        Ok(settings)
    }
}

fn number(text: &[u8]) -> Option<u64> {
    core::str::from_utf8(text).ok()?.parse().ok()
}

fn size(text: &[u8]) -> Option<u64> {
    let (&last, head) = text.split_last()?;
    let (digits, shift) = match last {
        b'K' | b'k' => (head, 10),
        b'M' | b'm' => (head, 20),
        b'G' | b'g' => (head, 30),
        _ => (text, 0),
    };
    let bytes = number(digits)?.checked_mul(1 << shift)?;
    (bytes % PAGE == 0).then_some(bytes)
}

fn cpus(text: &[u8]) -> Option<usize> {
    let count = usize::try_from(number(text)?).ok()?;
    (1..=MAX_CPUS).contains(&count).then_some(count)
}
