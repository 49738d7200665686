//! The registers that a driver sets: what vCPUs read and write.

use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
};

use super::mmio::{DRIVER_OK, FEATURES_OK};
use super::queue::Setup;

/// All of them; nobody holds them for long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub status: u32,
    pub device_features_sel: u32,
    pub driver_features_sel: u32,
    pub driver_features: u64,
    pub queue_sel: u32,
    pub queues: Vec<Setup>,
}

impl Registers {
    pub fn of(max_sizes: &[u16]) -> Self {
        let queues = max_sizes.iter().map(|size| Setup { size: *size, ..Setup::default() });
        Self { queues: queues.collect(), ..Self::default() }
    }

    /// The queue that is selected, if there is such a one.
    pub fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|i| *i < self.queues.len())
    }

    /// The driver writes one of them, but for the status.
    pub fn write(&mut self, offset: u32, value: u32, max_sizes: &[u16]) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & FEATURES_OK == 0 => {
                let sel = self.driver_features_sel;
                set_half(&mut self.driver_features, sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            _ => self.write_queue(offset, value, max_sizes),
        }
    }

    /// What a driver may set only before it is ready; later it is ignored.
    fn write_queue(&mut self, offset: u32, value: u32, max_sizes: &[u16]) {
        let Some(index) = self.selected().filter(|_| self.status & DRIVER_OK == 0) else { return };
        let most = max_sizes.get(index).copied().unwrap_or(0);
        let Some(queue) = self.queues.get_mut(index) else { return };
        match offset {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 != 0,
            VIRTIO_MMIO_QUEUE_NUM => {
                let size = u16::try_from(value).ok();
                queue.size = size.filter(|n| n.is_power_of_two() && *n <= most).unwrap_or(0);
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }
}

/// 32 bits of 64: the low ones for 0, the high ones for 1, nothing beyond.
pub(super) fn half(value: u64, which: u32) -> u32 {
    let shifted = which.checked_mul(32).and_then(|by| value.checked_shr(by)).unwrap_or(0);
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

fn set_half(value: &mut u64, which: u32, half: u32) {
    match which {
        0 => *value = (*value & !u64::from(u32::MAX)) | u64::from(half),
        1 => *value = (*value & u64::from(u32::MAX)) | (u64::from(half) << 32),
        _ => {}
    }
}
