//! The keyboard controller, as far as guests use it without a keyboard: to
//! reset the machine. It has no state.

/// Its data port.
pub const DATA: u16 = 0x60;
/// Its command port; reads give its status.
pub const COMMAND: u16 = 0x64;
/// The command that pulses the reset line.
pub const RESET: u8 = 0xfe;
/// Status and data of a controller with nothing to say and room for commands.
pub const IDLE: u8 = 0;
