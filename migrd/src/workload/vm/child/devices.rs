//! What a child is asked about its devices, and given for them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use migr_proto::v1::{self as proto, child_backing, child_request};

use super::{Child, ChildError};

/// A device that needs something of the host behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The disk of this index in `VmConfig.disks`.
    Disk(u32),
    /// The interface of this index in `VmConfig.nets`.
    Net(u32),
}

/// What goes behind a device.
#[derive(Debug)]
pub struct Backing {
    /// The device.
    pub device: Device,
    /// The image or tap.
    pub fd: OwnedFd,
}

impl Device {
    fn to_wire(self) -> proto::ChildBacking {
        let device = match self {
            Self::Disk(index) => child_backing::Device::Disk(index),
            Self::Net(index) => child_backing::Device::Net(index),
        };
        proto::ChildBacking { device: Some(device) }
    }

    /// From what the child says; `None` for a device of a newer child.
    pub(super) fn from_wire(backing: proto::ChildBacking) -> Option<Self> {
        Some(match backing.device? {
            child_backing::Device::Disk(index) => Self::Disk(index),
            child_backing::Device::Net(index) => Self::Net(index),
        })
    }
}

impl Child {
    /// Gives devices what is behind them; the child has its own descriptors of
    /// that afterwards.
    ///
    /// # Errors
    /// When it has no such device, or something is behind one already.
    pub async fn give(&self, backings: Vec<Backing>) -> Result<(), ChildError> {
        if backings.is_empty() {
            return Ok(());
        }
        let wire = backings.iter().map(|b| b.device.to_wire()).collect();
        let fds = backings.into_iter().map(|b| b.fd).collect();
        let request = child_request::Request::Attach(proto::ChildAttach { backings: wire });
        self.done_with(request, fds).await
    }

    /// Has it make everything durable that was written to its disks, and close
    /// them.
    ///
    /// # Errors
    /// When the guest runs, or a disk does not take it.
    pub async fn detach(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Detach(proto::ChildDetach {})).await
    }

    /// Has its devices finish what they have begun and begin nothing new, while
    /// the vCPUs go on. [`Self::pause`] and [`Self::undrain`] end that.
    ///
    /// # Errors
    /// When a device is not done after `limit`; all of them go on then.
    pub async fn drain(&self, limit: Duration) -> Result<(), ChildError> {
        let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        self.done(child_request::Request::Drain(proto::ChildDrain { limit_ms })).await
    }

    /// Has its devices go on after [`Self::drain`]. Harmless otherwise.
    ///
    /// # Errors
    /// When it is dead.
    pub async fn undrain(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::Undrain(proto::ChildUndrain {})).await
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    /// When nothing in the guest listens to it.
    pub async fn power_button(&self) -> Result<(), ChildError> {
        self.done(child_request::Request::PowerButton(proto::ChildPowerButton {})).await
    }

    /// Of a guest that has stopped with a reset: starts it anew with a kernel.
    /// It does not run yet.
    ///
    /// # Errors
    /// When it has not stopped with a reset, or the kernel is not one.
    pub async fn reboot(&self, kernel: File, initrd: Option<File>) -> Result<(), ChildError> {
        let request = proto::ChildReboot { initrd: initrd.is_some() };
        let fds = std::iter::once(kernel).chain(initrd).map(OwnedFd::from).collect();
        self.done_with(child_request::Request::Reboot(request), fds).await
    }

    /// The devices that had something behind them when this daemon connected.
    #[must_use]
    pub fn held(&self) -> &[Device] {
        &self.held
    }
}
