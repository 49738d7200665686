//! The clock chip of a PC: an MC146818 and its battery-backed RAM.
//!
//! Its time is the host's `CLOCK_REALTIME` moved by what the guest has set it
//! to, in whole seconds. It raises no interrupt, and the guest is told of none:
//! alarm and periodic registers keep what is written and do nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use migr_proto::v1 as proto;

/// The port that selects a register. Bit 7 masks NMIs on a PC and is not kept.
pub const INDEX: u16 = 0x70;
/// The port through which the selected register is read and written.
pub const DATA: u16 = 0x71;
/// Register of the century, in the FADT too (ACPI 6.5, 5.2.9).
pub const CENTURY: u8 = 0x32;

const REGISTERS: usize = 128;
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 10;
const REGISTER_B: u8 = 11;
const REGISTER_C: u8 = 12;
const REGISTER_D: u8 = 13;

/// Register A: an update is about to come.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Register A at power-on: the 32,768 Hz crystal, 1,024 Hz periodic rate.
const RATES: u8 = 0x26;
/// Register B: the guest sets the time, which stands still meanwhile.
const SET: u8 = 1 << 7;
/// Register B: the three interrupts, which a reset switches off.
const INTERRUPTS: u8 = 7 << 4;
/// Register B: numbers are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Register B: hours count to 23, not twice to 12.
const HOURS_24: u8 = 1 << 1;
/// Register D: RAM and time are valid.
const VALID: u8 = 1 << 7;
/// Hour register, when hours count to 12: afternoon.
const AFTERNOON: u8 = 1 << 7;

/// How long before an update the chip announces it (its data sheet: 244 µs).
const ANNOUNCED_NS: u32 = 244_000;
const SECOND_NS: u32 = 1_000_000_000;
const DAY_S: i64 = 86_400;

/// A saved state that no chip can have.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ClockChipError {
    /// Registers too few or too many.
    #[error("the saved clock chip has {0} registers, not {REGISTERS}: the state is damaged")]
    Registers(usize),
    /// No such register.
    #[error("the saved clock chip has register {0} selected, of {REGISTERS}: the state is damaged")]
    Index(u32),
}

/// An instant of the host's `CLOCK_REALTIME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Whole seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds beyond them.
    pub nanoseconds: u32,
}

impl Now {
    /// This instant. A host whose clock is before 1970 counts as in 1970.
    #[must_use]
    pub fn read() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        Self { seconds, nanoseconds: since.subsec_nanos() }
    }
}

/// The chip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockChip {
    index: u8,
    /// The guest's time beyond the host's, in seconds.
    offset_s: i64,
    /// The registers of the time count only while the guest sets it.
    registers: [u8; REGISTERS],
}

impl Default for ClockChip {
    /// As a PC's firmware leaves it, at the host's time in UTC.
    fn default() -> Self {
        let mut chip = Self { index: 0, offset_s: 0, registers: [0; REGISTERS] };
        chip.put(REGISTER_A, RATES);
        chip.put(REGISTER_B, HOURS_24);
        chip.put(REGISTER_D, VALID);
        chip
    }
}

impl ClockChip {
    /// What travels.
    #[must_use]
    pub fn state(&self) -> proto::ClockChipState {
        let Self { index, offset_s, registers } = self;
        let registers = registers.to_vec().into();
        proto::ClockChipState { index: (*index).into(), offset_s: *offset_s, registers }
    }

    /// From what travelled.
    ///
    /// # Errors
    /// When no chip can be like that.
    pub fn restored(state: &proto::ClockChipState) -> Result<Self, ClockChipError> {
        let proto::ClockChipState { index, offset_s, registers } = state;
        let count = ClockChipError::Registers(registers.len());
        let registers = registers[..].try_into().map_err(|_| count)?;
        let index = u8::try_from(*index).ok().filter(|i| *i <= INDEX_MASK);
        let index = index.ok_or(ClockChipError::Index(state.index))?;
        Ok(Self { index, offset_s: *offset_s, registers })
    }

    /// The machine's reset line: the battery keeps the time and the RAM.
    pub fn reset(&mut self) {
        self.put(REGISTER_B, self.get(REGISTER_B) & !INTERRUPTS);
    }

    /// The guest writes one of the chip's two ports.
    pub fn write(&mut self, port: u16, value: u8, now: Now) {
        match (port, self.index) {
            (INDEX, _) => self.index = value & INDEX_MASK,
            (_, REGISTER_A) => self.put(REGISTER_A, value & !UPDATE_IN_PROGRESS),
            (_, REGISTER_B) => self.write_control(value, now),
            (_, REGISTER_C | REGISTER_D) => {}
            (_, index) if is_time(index) => self.write_time(index, value, now),
            (_, index) => self.put(index, value),
        }
    }

    /// The guest reads one of the chip's two ports. The index can't be read.
    pub fn read(&self, port: u16, now: Now) -> u8 {
        match (port, self.index) {
            (INDEX, _) => 0xff,
            (_, REGISTER_A) => {
                let soon = now.nanoseconds >= SECOND_NS - ANNOUNCED_NS && !self.is_set();
                self.get(REGISTER_A) | if soon { UPDATE_IN_PROGRESS } else { 0 }
            }
            // No interrupt of the chip's ever comes.
            (_, REGISTER_C) => 0,
            (_, index) if is_time(index) && !self.is_set() => {
                let mut shown = self.clone();
                shown.show(now);
                shown.get(index)
            }
            (_, index) => self.get(index),
        }
    }

    fn get(&self, index: u8) -> u8 {
        self.registers.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn put(&mut self, index: u8, value: u8) {
        if let Some(register) = self.registers.get_mut(usize::from(index)) {
            *register = value;
        }
    }

    fn is_set(&self) -> bool {
        self.get(REGISTER_B) & SET != 0
    }

    fn write_control(&mut self, value: u8, now: Now) {
        let was_set = self.is_set();
        if !was_set {
            self.show(now);
        }
        self.put(REGISTER_B, value);
        if was_set && !self.is_set() {
            self.take(now);
        }
    }

    fn write_time(&mut self, index: u8, value: u8, now: Now) {
        if !self.is_set() {
            self.show(now);
        }
        self.put(index, value);
        if !self.is_set() {
            self.take(now);
        }
    }

    /// Puts the time into its registers.
    fn show(&mut self, now: Now) {
        let time = now.seconds.saturating_add(self.offset_s);
        let (days, second) = (time.div_euclid(DAY_S), time.rem_euclid(DAY_S));
        let (year, month, day) = date_of(days);
        // 1970-01-01 was a Thursday, and Sunday is 1.
        let weekday = (days + 4).rem_euclid(7) + 1;
        let year = year.rem_euclid(10_000);
        let hour = small(second / 3600);
        let hour = if self.get(REGISTER_B) & HOURS_24 != 0 {
            self.encoded(hour)
        } else {
            let half = if hour >= 12 { AFTERNOON } else { 0 };
            self.encoded((hour + 11) % 12 + 1) | half
        };
        self.put(HOURS, hour);
        let plain = [
            (SECONDS, second % 60),
            (MINUTES, second / 60 % 60),
            (WEEKDAY, weekday),
            (DAY, day),
            (MONTH, month),
            (YEAR, year % 100),
            (CENTURY, year / 100),
        ];
        for (index, value) in plain {
            self.put(index, self.encoded(small(value)));
        }
    }

    /// Takes the time in its registers as the guest's time from now on. What
    /// can't be in a date counts on into the next field.
    fn take(&mut self, now: Now) {
        let field = |index| i64::from(self.decoded(self.get(index)));
        let year = field(CENTURY) * 100 + field(YEAR);
        let days = days_to(year, field(MONTH).clamp(1, 12), field(DAY));
        let hour = self.get(HOURS);
        let hour = if self.get(REGISTER_B) & HOURS_24 != 0 {
            i64::from(self.decoded(hour))
        } else {
            let half = if hour & AFTERNOON != 0 { 12 } else { 0 };
            i64::from(self.decoded(hour & !AFTERNOON)) % 12 + half
        };
        let time = days * DAY_S + hour * 3600 + field(MINUTES) * 60 + field(SECONDS);
        self.offset_s = time.saturating_sub(now.seconds);
    }

    fn encoded(&self, value: u8) -> u8 {
        if self.get(REGISTER_B) & BINARY != 0 { value } else { value / 10 * 16 + value % 10 }
    }

    fn decoded(&self, value: u8) -> u8 {
        if self.get(REGISTER_B) & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }
}

/// Whether a register shows the time.
fn is_time(index: u8) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY)
}

/// A number that is below 256 by its making.
fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}

/// Days from 1970-01-01 to the first of March of `year`, from which leap days
/// are at the end of the year.
fn days_to_march(year: i64) -> i64 {
    const FROM_YEAR_0: i64 = 719_468;
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) - FROM_YEAR_0
}

/// Days from March to the beginning of the `month`th month after it.
fn days_of_months(month: i64) -> i64 {
    (month * 153 + 2) / 5
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days_to(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    days_to_march(year) + days_of_months(month) + day - 1
}

/// Year, month and day of the date so many days after 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    const IN_400_YEARS: i64 = 146_097;
    let (era, day) = {
        let since_march_0 = days.saturating_sub(days_to_march(0));
        (since_march_0.div_euclid(IN_400_YEARS), since_march_0.rem_euclid(IN_400_YEARS))
    };
    let start = |year: i64| days_to_march(year) - days_to_march(0);
    // At most one too many, by the leap days before it.
    let mut year = day / 365;
    if start(year) > day {
        year -= 1;
    }
    let day = day - start(year);
    let month = (day * 5 + 2) / 153;
    let day = day - days_of_months(month) + 1;
    let year = era.saturating_mul(400).saturating_add(year);
    if month < 10 { (year, month + 3, day) } else { (year + 1, month - 9, day) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-28 13:07:42 UTC, a Saturday.
    const NOW: Now = Now { seconds: 1_795_871_262, nanoseconds: 0 };

    fn read(chip: &mut ClockChip, index: u8, now: Now) -> u8 {
        chip.write(INDEX, index, now);
        chip.read(DATA, now)
    }

    fn write(chip: &mut ClockChip, index: u8, value: u8, now: Now) {
        chip.write(INDEX, index, now);
        chip.write(DATA, value, now);
    }

    fn time(chip: &mut ClockChip, now: Now) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|i| read(chip, i, now))
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        let mut chip = ClockChip::default();
        assert_eq!(time(&mut chip, NOW), [0x20, 0x26, 0x11, 0x28, 7, 0x13, 0x07, 0x42]);
        assert_eq!(read(&mut chip, REGISTER_D, NOW), VALID);
    }

    #[test]
    fn the_time_can_be_binary_and_in_halves_of_a_day() {
        let mut chip = ClockChip::default();
        write(&mut chip, REGISTER_B, BINARY, NOW);
        assert_eq!(time(&mut chip, NOW), [20, 26, 11, 28, 7, 1 | AFTERNOON, 7, 42]);
        let midnight = Now { seconds: NOW.seconds - NOW.seconds.rem_euclid(DAY_S), ..NOW };
        assert_eq!(read(&mut chip, HOURS, midnight), 12);
        let noon = Now { seconds: midnight.seconds + 12 * 3600, ..NOW };
        assert_eq!(read(&mut chip, HOURS, noon), 12 | AFTERNOON);
    }

    #[test]
    fn a_guest_sets_the_time_as_linux_does() {
        let mut chip = ClockChip::default();
        write(&mut chip, REGISTER_B, HOURS_24 | SET, NOW);
        write(&mut chip, REGISTER_A, RATES | 0x70, NOW);
        let new = [
            (YEAR, 0x24),
            (MONTH, 2),
            (DAY, 0x29),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
            (CENTURY, 0x20),
        ];
        for (index, value) in new {
            write(&mut chip, index, value, NOW);
        }
        let later = Now { seconds: NOW.seconds + 100, ..NOW };
        assert_eq!(read(&mut chip, SECONDS, later), 0x58, "it stands while it is set");
        write(&mut chip, REGISTER_B, HOURS_24, later);
        write(&mut chip, REGISTER_A, RATES, later);
        assert_eq!(time(&mut chip, later), [0x20, 0x24, 2, 0x29, 5, 0x23, 0x59, 0x58]);
        let next = Now { seconds: later.seconds + 2, ..later };
        assert_eq!(time(&mut chip, next), [0x20, 0x24, 3, 1, 6, 0, 0, 0]);
    }

    #[test]
    fn one_field_can_be_set_while_the_time_goes_on() {
        let mut chip = ClockChip::default();
        write(&mut chip, HOURS, 0x03, NOW);
        assert_eq!(time(&mut chip, NOW), [0x20, 0x26, 0x11, 0x28, 7, 0x03, 0x07, 0x42]);
    }

    #[test]
    fn an_update_is_announced_and_over_with_the_second() {
        let mut chip = ClockChip::default();
        let at = |nanoseconds| Now { nanoseconds, ..NOW };
        assert_eq!(read(&mut chip, REGISTER_A, at(0)), RATES);
        assert_eq!(read(&mut chip, REGISTER_A, at(999_755_999)), RATES);
        assert_eq!(read(&mut chip, REGISTER_A, at(999_756_000)), RATES | UPDATE_IN_PROGRESS);
        write(&mut chip, REGISTER_B, SET, NOW);
        assert_eq!(read(&mut chip, REGISTER_A, at(999_999_999)), RATES);
    }

    #[test]
    fn ram_keeps_what_is_written_and_status_does_not() {
        let mut chip = ClockChip::default();
        write(&mut chip, 0x7f, 0xa5, NOW);
        write(&mut chip, 0x80 | 0x0e, 0x5a, NOW);
        write(&mut chip, REGISTER_C, 0xff, NOW);
        write(&mut chip, REGISTER_D, 0, NOW);
        assert_eq!(read(&mut chip, 0x7f, NOW), 0xa5);
        assert_eq!(read(&mut chip, 0x0e, NOW), 0x5a);
        assert_eq!(read(&mut chip, REGISTER_C, NOW), 0);
        assert_eq!(read(&mut chip, REGISTER_D, NOW), VALID);
        assert_eq!(chip.read(INDEX, NOW), 0xff);
    }

    #[test]
    fn a_set_clock_survives_the_wire_and_a_reset() {
        let mut chip = ClockChip::default();
        write(&mut chip, HOURS, 0x03, NOW);
        write(&mut chip, 0x40, 9, NOW);
        let mut there = ClockChip::restored(&chip.state()).unwrap();
        assert_eq!(there, chip);
        write(&mut there, REGISTER_B, HOURS_24 | INTERRUPTS, NOW);
        there.reset();
        assert_eq!(read(&mut there, REGISTER_B, NOW), HOURS_24);
        assert_eq!(read(&mut there, HOURS, NOW), 0x03);
        assert_eq!(read(&mut there, 0x40, NOW), 9);
    }

    #[test]
    fn a_state_that_no_chip_can_have_is_refused() {
        let good = ClockChip::default().state();
        let short = proto::ClockChipState { registers: vec![0; 127].into(), ..good.clone() };
        assert_eq!(ClockChip::restored(&short), Err(ClockChipError::Registers(127)));
        let odd = proto::ClockChipState { index: 128, ..good };
        assert_eq!(ClockChip::restored(&odd), Err(ClockChipError::Index(128)));
    }

    proptest! {
        #[test]
        fn every_day_is_found_again(days in -4_000_000_i64..4_000_000) {
            let (year, month, day) = date_of(days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
            prop_assert_eq!(days_to(year, month, day), days);
        }

        #[test]
        fn no_state_and_no_access_upsets_it(
            offset_s: i64,
            registers in proptest::collection::vec(any::<u8>(), REGISTERS),
            accesses in proptest::collection::vec((INDEX..=DATA, any::<u8>()), 0..64),
            seconds: i64,
        ) {
            let state = proto::ClockChipState { index: 0, offset_s, registers: registers.into() };
            let mut chip = ClockChip::restored(&state).unwrap();
            let now = Now { seconds, nanoseconds: 0 };
            for (port, value) in accesses {
                chip.write(port, value, now);
                chip.read(port, now);
            }
        }
    }
}
