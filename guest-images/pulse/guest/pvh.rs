//! What the loader left for us: `struct hvm_start_info`, its command line and memory map
//! (Xen's public header `arch-x86/hvm/start_info.h`).

use crate::plan::Region;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const LONGEST_COMMAND_LINE: usize = 2048;

#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_at: u64,
    command_line_at: u64,
    rsdp_at: u64,
    memory_map_at: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// The loader's structures, found good.
pub struct Boot {
    info: StartInfo,
}

impl Boot {
    /// Reads the start info at `addr`; the error says what is wrong with it.
    ///
    /// # Safety
    /// `addr` must be what the loader passed in EBX, and nothing it left may have been
    /// overwritten.
    pub unsafe fn read(addr: u64) -> Result<Self, &'static str> {
        // SAFETY: identity-mapped; the caller vouches for the address.
        let info = unsafe { (addr as *const StartInfo).read_unaligned() };
        if info.magic != MAGIC {
            return Err("EBX holds no hvm_start_info");
        }
        if info.version == 0 || info.memory_map_at == 0 {
            return Err("hvm_start_info has no memory map: version 1 is needed");
        }
        Ok(Self { info })
    }

    /// The command line without its terminating zero.
    pub fn command_line(&self) -> &'static [u8] {
        if self.info.command_line_at == 0 {
            return &[];
        }
        let start = self.info.command_line_at as *const u8;
        let mut len = 0;
        // SAFETY: a zero ends the string, and identity-mapped RAM that nobody writes while
        // the settings are being read lies behind it.
        unsafe {
            while len < LONGEST_COMMAND_LINE && start.add(len).read() != 0 {
                len += 1;
            }
            core::slice::from_raw_parts(start, len)
        }
    }

    /// RAM above the image. Stretches that do not fit the plan's table are left unused.
    pub fn ram(&self) -> Region {
        let mut ram = Region::default();
        for i in 0..u64::from(self.info.memory_map_entries) {
            let at = self.info.memory_map_at + i * size_of::<MapEntry>() as u64;
            // SAFETY: the loader says that so many entries are there.
            let entry = unsafe { (at as *const MapEntry).read_unaligned() };
            if entry.kind == TYPE_RAM {
                ram.add_ram(entry.addr, entry.size);
            }
        }
        ram
    }
}
