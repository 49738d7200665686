//! The devices of one VM, by slot, and what is done to all of them.
//!
//! | slot | device |
//! |---|---|
//! | 0 | entropy |
//! | 1 | balloon |
//! | from 2 on | network interfaces, in the order of the configuration |
//! | after them | disks, in the order of the configuration |

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use migr_proto::v1 as proto;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::balloon::Balloon;
use super::blk::Disk;
use super::blk::log::DiskLog;
use super::device::{Device, StateError};
use super::entropy::Entropy;
use super::gate::Gate;
use super::mmio::{LENGTH, Transport};
use super::net::Net;
use super::thread;
use crate::sys::vm::Memory;
use crate::units::Mac;
use crate::vmm::boot::acpi::MmioDevice;
use crate::vmm::lifecycle::{Lifecycle, Stop};
use crate::vmm::sandbox::SandboxError;

/// The devices' registers, in the hole below 4 GiB.
const FIRST_ADDRESS: u64 = 0xd000_0000;
/// Interrupts in the order of slots: pins of the one IOAPIC that nothing else
/// has. First those that no PC had.
const INTERRUPTS: [u32; 15] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 12];
/// Slots before the first network interface.
const OWN: usize = 2;
/// Most network interfaces and disks of a VM.
const NETS: usize = 4;
const DISKS: usize = 8;

/// What cannot be done with the devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A configuration that no VM can have.
    #[error("cannot have these devices: {0}")]
    Config(String),
    /// The system has no room.
    #[error("cannot make the devices' eventfds: raise the limit of open files")]
    Events(#[source] io::Error),
    /// Asked for what is not there.
    #[error("this VM has no {what} {index}")]
    None {
        /// Disk or network interface.
        what: &'static str,
        /// Its index.
        index: u32,
    },
    /// Descriptors and names that do not match.
    #[error("{named} devices shall be attached, and {came} descriptors came with that")]
    Descriptors {
        /// How many were named.
        named: usize,
        /// How many came.
        came: usize,
    },
    /// A file that cannot be what is behind a device.
    #[error("cannot attach {device}")]
    Attach {
        /// For people.
        device: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Asked to run without.
    #[error("{0} has nothing behind it: attach it before the guest runs")]
    NotAttached(String),
    /// A disk that did not take everything.
    #[error("not everything that the guest wrote is on {device}")]
    Detach {
        /// For people.
        device: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A device that does not finish.
    #[error("{device} has not finished its work within {limit_ms} ms: look at what is behind it")]
    Busy {
        /// For people.
        device: String,
        /// How long it was waited for.
        limit_ms: u128,
    },
    /// A saved state that is none of these devices'.
    #[error("the state of {device} is not valid")]
    State {
        /// For people.
        device: String,
        /// Why not.
        #[source]
        source: StateError,
    },
    /// States of more or fewer devices.
    #[error("the state has {found} virtio devices, this VM has {own}")]
    Count {
        /// In the state.
        found: usize,
        /// Of this VM.
        own: usize,
    },
}

/// All virtio devices of a VM; none of one of version 1.
#[derive(Debug)]
pub struct Slots {
    all: Vec<Arc<Transport>>,
    gate: Arc<Gate>,
    nets: Range<usize>,
    disks: Range<usize>,
    logs: Vec<Arc<DiskLog>>,
}

impl Slots {
    /// Those that `config` names.
    ///
    /// # Errors
    /// When no VM can have them.
    pub fn new(config: &proto::VmConfig, memory: &Arc<Memory>) -> Result<Self, DeviceError> {
        check(config)?;
        let mut devices: Vec<Box<dyn Device>> = Vec::new();
        let mut logs = Vec::new();
        if config.version > 1 {
            devices.push(Box::<Entropy>::default());
            devices.push(Box::<Balloon>::default());
        }
        let first_net = devices.len();
        for (index, net) in config.nets.iter().enumerate() {
            devices.push(Box::new(Net::new(mac(index, net)?)));
        }
        let nets = first_net..devices.len();
        let first_disk = devices.len();
        for (index, disk) in config.disks.iter().enumerate() {
            let disk = Disk::new(index, disk.bytes, disk.read_only);
            logs.push(disk.log());
            devices.push(Box::new(disk));
        }
        let disks = first_disk..devices.len();
        Self::of(devices, memory, nets, disks, logs)
    }

    fn of(
        devices: Vec<Box<dyn Device>>,
        memory: &Arc<Memory>,
        nets: Range<usize>,
        disks: Range<usize>,
        logs: Vec<Arc<DiskLog>>,
    ) -> Result<Self, DeviceError> {
        let gate = Arc::new(Gate::new(devices.len()));
        let event = || EventFd::new(EFD_NONBLOCK).map_err(DeviceError::Events);
        let mut all = Vec::new();
        for (slot, device) in devices.into_iter().enumerate() {
            let bells = device.queue_sizes().iter().map(|_| event()).collect::<Result<_, _>>()?;
            let (memory, gate) = (Arc::clone(memory), Arc::clone(&gate));
            let events = super::mmio::Events { line: event()?, bells, wake: event()? };
            all.push(Arc::new(Transport::new(slot, device, memory, gate, events)));
        }
        Ok(Self { all, gate, nets, disks, logs })
    }

    /// Each device with the place of its registers and its interrupt.
    pub fn placed(&self) -> impl Iterator<Item = (&Transport, MmioDevice)> {
        let places = (FIRST_ADDRESS..).step_by(0x1000).zip(INTERRUPTS);
        self.all.iter().zip(places).map(|(device, (address, gsi))| {
            (device.as_ref(), MmioDevice { address, length: LENGTH, gsi })
        })
    }

    /// The device whose registers are at a guest-physical address, and where
    /// among them that is.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(FIRST_ADDRESS)?;
        let slot = usize::try_from(offset / LENGTH).ok()?;
        self.all.get(slot).map(|device| (device.as_ref(), offset % LENGTH))
    }

    /// Reads registers; says whether there is a device.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let found = self.at(address);
        if let Some((device, offset)) = found {
            device.read(offset, data);
        }
        found.is_some()
    }

    /// Writes registers; says so if that ends the guest.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Stop> {
        self.at(address).and_then(|(device, offset)| device.write(offset, data))
    }

    /// Starts a thread for each, which tells `ready` when it is confined.
    ///
    /// # Errors
    /// When there is no room for a thread.
    pub fn start(
        &self,
        lifecycle: &Arc<Lifecycle>,
        ready: &Sender<Result<(), SandboxError>>,
    ) -> io::Result<()> {
        self.all.iter().try_for_each(|device| {
            thread::spawn(Arc::clone(device), Arc::clone(lifecycle), ready.clone())
        })
    }

    /// Lets the devices work.
    pub fn run(&self) {
        self.gate.open();
    }

    /// Has them stand as soon as each can. Does not wait for that.
    pub fn stop(&self) {
        self.gate.close();
        self.all.iter().for_each(|device| device.wake());
    }

    /// Has every device finish what it has begun and stand. Requests that it
    /// has not begun stay in their rings.
    ///
    /// # Errors
    /// Names a device that does not finish within `limit`; the gate is as it
    /// was before then.
    pub fn drain(&self, limit: Duration) -> Result<(), DeviceError> {
        let was_open = !self.gate.is_closed();
        self.stop();
        let Err(slot) = self.gate.wait_all(limit) else { return Ok(()) };
        if was_open {
            self.gate.open();
        }
        let device = self.all.get(slot).map_or_else(String::new, |device| self.name(device));
        Err(DeviceError::Busy { device, limit_ms: limit.as_millis() })
    }

    /// For people: as the user counts them.
    fn name(&self, device: &Transport) -> String {
        let slot = device.slot();
        if self.disks.contains(&slot) {
            format!("disk {}", slot - self.disks.start)
        } else if self.nets.contains(&slot) {
            format!("network interface {}", slot - self.nets.start)
        } else {
            format!("the {} device", device.kind())
        }
    }

    /// Puts a file behind each of `backings`, of devices that stand.
    ///
    /// # Errors
    /// Names the device that does not take its file; those before it have
    /// theirs.
    pub fn attach(
        &self,
        backings: &[proto::ChildBacking],
        files: Vec<File>,
    ) -> Result<(), DeviceError> {
        if backings.len() != files.len() {
            return Err(DeviceError::Descriptors { named: backings.len(), came: files.len() });
        }
        for (backing, file) in backings.iter().zip(files) {
            use proto::child_backing::Device as Named;
            let (what, range, index) = match backing.device {
                Some(Named::Disk(index)) => ("disk", &self.disks, index),
                Some(Named::Net(index)) => ("network interface", &self.nets, index),
                None => ("such device", &(0..0), 0),
            };
            let slot = usize::try_from(index).ok().and_then(|i| range.start.checked_add(i));
            let device = slot.filter(|slot| range.contains(slot)).and_then(|i| self.all.get(i));
            let device = device.ok_or(DeviceError::None { what, index })?;
            let attached = device.with_device(|device| device.attach(file));
            attached.map_err(|source| DeviceError::Attach { device: self.name(device), source })?;
            device.wake();
        }
        Ok(())
    }

    /// The disks and interfaces that have a file behind them.
    #[must_use]
    pub fn backed(&self) -> Vec<proto::ChildBacking> {
        use proto::child_backing::Device as Named;
        let has = |slot: usize| {
            self.all.get(slot).is_some_and(|device| device.with_device(|device| device.attached()))
        };
        let disks = (0..).zip(self.disks.clone()).map(|(i, slot)| (Named::Disk(i), slot));
        let nets = (0..).zip(self.nets.clone()).map(|(i, slot)| (Named::Net(i), slot));
        let backed = disks.chain(nets).filter(|(_, slot)| has(*slot));
        backed.map(|(device, _)| proto::ChildBacking { device: Some(device) }).collect()
    }

    /// Closes what is behind the disks, of devices that stand.
    ///
    /// # Errors
    /// Names a disk that could not make all writes last, which stays attached.
    pub fn detach(&self) -> Result<(), DeviceError> {
        for device in self.all.get(self.disks.clone()).into_iter().flatten() {
            let detached = device.with_device(|device| device.detach());
            detached.map_err(|source| DeviceError::Detach { device: self.name(device), source })?;
        }
        Ok(())
    }

    /// Whether every device has what it needs to work.
    ///
    /// # Errors
    /// Names one that has not.
    pub fn expect_attached(&self) -> Result<(), DeviceError> {
        let mut all = self.all.iter();
        match all.find(|device| !device.with_device(|device| device.attached())) {
            Some(device) => Err(DeviceError::NotAttached(self.name(device))),
            None => Ok(()),
        }
    }

    /// What was written of each disk, in the order of the configuration.
    #[must_use]
    pub fn logs(&self) -> &[Arc<DiskLog>] {
        &self.logs
    }

    /// As after power-on, of devices that stand.
    pub fn reset(&self) {
        self.all.iter().for_each(|device| device.reset());
    }

    /// What travels, of devices that stand.
    #[must_use]
    pub fn save(&self) -> Vec<proto::VirtioState> {
        self.all.iter().map(|device| device.save()).collect()
    }

    /// Checks what [`Self::save`] gave elsewhere, without a change.
    ///
    /// # Errors
    /// Names the device whose state is none.
    pub fn check(
        &self,
        states: &[proto::VirtioState],
    ) -> Result<Vec<super::snapshot::Checked>, DeviceError> {
        if states.len() != self.all.len() {
            return Err(DeviceError::Count { found: states.len(), own: self.all.len() });
        }
        let both = self.all.iter().zip(states);
        let check = both.map(|(device, state)| {
            device
                .check(state)
                .map_err(|source| DeviceError::State { device: self.name(device), source })
        });
        check.collect()
    }

    /// Becomes what was checked, when the interrupt controllers are in place.
    ///
    /// # Errors
    /// Names the device whose state is none.
    pub fn restore(&self, states: Vec<super::snapshot::Checked>) -> Result<(), DeviceError> {
        self.all.iter().zip(states).try_for_each(|(device, state)| {
            device
                .restore(state)
                .map_err(|source| DeviceError::State { device: self.name(device), source })
        })
    }
}

/// The address of a network interface.
fn mac(index: usize, net: &proto::NetConfig) -> Result<Mac, DeviceError> {
    let mac = Mac::try_from(&net.mac[..]).ok();
    // One to one interface, not to many (IEEE 802, 8.2.2).
    let mac = mac.filter(|mac| mac[0] & 1 == 0 && *mac != Mac::default());
    mac.ok_or_else(|| {
        let bytes = &net.mac[..];
        let why = format!("network interface {index} can't have the address {bytes:02x?}");
        DeviceError::Config(why)
    })
}

/// Refuses a configuration that no VM can have.
fn check(config: &proto::VmConfig) -> Result<(), DeviceError> {
    let refuse = |why: String| Err(DeviceError::Config(why));
    let (nets, disks) = (config.nets.len(), config.disks.len());
    match config.version {
        1 if nets + disks > 0 => return refuse("a VM of version 1 has no devices".into()),
        1 | 2 => {}
        newer => {
            return refuse(format!(
                "the VM is of version {newer}, this migrd knows versions 1 and 2: use a newer migrd"
            ));
        }
    }
    if nets > NETS || disks > DISKS {
        return refuse(format!(
            "{nets} network interfaces and {disks} disks: at most {NETS} and {DISKS}"
        ));
    }
    for (index, disk) in config.disks.iter().enumerate() {
        if disk.bytes == 0 || !disk.bytes.is_multiple_of(512) || i64::try_from(disk.bytes).is_err()
        {
            let bytes = disk.bytes;
            return refuse(format!("disk {index} has {bytes} bytes: use a multiple of 512"));
        }
    }
    Ok(())
}

const _: () = assert!(OWN + NETS + DISKS <= INTERRUPTS.len(), "an interrupt for every device");
