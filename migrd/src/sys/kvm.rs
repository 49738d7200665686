//! KVM ioctls that kvm-ioctls marks unsafe or does not have.

#[cfg(test)]
pub(crate) fn map_test_memory(
    vm: &kvm_ioctls::VmFd,
    region: kvm_bindings::kvm_userspace_memory_region,
) {
    // SAFETY: the tests that call this keep the mapping until the VM is gone.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
}
