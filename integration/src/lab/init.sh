#!/bin/busybox sh
# The first program of a lab host. It loads Debian's modules, puts a layer in
# memory over the machine's root file system, joins the network, and leaves the
# host to busybox init, which starts the agent.
bb=/bin/busybox
fail() {
    $bb echo "lab: $*"
    # The last words reach the console before the power goes.
    $bb sleep 1
    $bb poweroff -f
}
$bb mount -t proc proc /proc || fail "no /proc"
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev

# parameter NAME: its value on the kernel's command line.
parameter() {
    for word in $($bb cat /proc/cmdline); do
        case $word in "$1"=*) $bb echo "${word#*=}" ;; esac
    done
}
for module in $($bb cat /modules/always); do
    $bb insmod "/modules/$module" || fail "cannot load $module"
done
if $bb grep -qw svm /proc/cpuinfo; then
    kvm="kvm-amd"
elif $bb grep -qw vmx /proc/cpuinfo; then
    kvm="kvm-intel"
else
    fail "this CPU has no virtualization"
fi
for module in $($bb cat "/modules/$kvm"); do
    options=
    # As in "lab.kvm_amd=npt=0".
    [ "$module" = kvm-amd.ko ] && options=$(parameter lab.kvm_amd)
    # A module that another one has brought along is loaded already.
    # shellcheck disable=SC2086
    $bb insmod "/modules/$module" $options || $bb grep -q "^${module%.ko} " /proc/modules ||
        fail "cannot load $module"
done

$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host ||
    fail "no root file system"
$bb mount -t tmpfs -o mode=755 layer /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root ||
    fail "no layer over the root file system"
for directory in proc sys dev run lab lab/shared lab/disk; do
    $bb mkdir -p /root/$directory
done
$bb mount -t proc proc /root/proc
$bb mount -t sysfs sys /root/sys
$bb mount -t cgroup2 cgroup /root/sys/fs/cgroup
$bb mount -t devtmpfs dev /root/dev
$bb mkdir -p /root/dev/pts /root/dev/shm
$bb mount -t devpts -o ptmxmode=666 devpts /root/dev/pts
$bb mount -t tmpfs shm /root/dev/shm
$bb mount -t tmpfs -o mode=755 run /root/run
# What one host writes there every other sees at once: nothing is cached.
$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none shared /root/lab/shared ||
    fail "no shared directory"
$bb mount -t ext4 /dev/vda /root/lab/disk || fail "no disk"

host=$(parameter lab.host)
$bb hostname "host$host"
$bb ifconfig lo 127.0.0.1 up
$bb brctl addbr br0
$bb brctl addif br0 eth0
$bb ifconfig eth0 0.0.0.0 up
$bb ifconfig br0 "$(parameter lab.address)" netmask 255.255.255.0 up || fail "no network"
$bb echo 1 >/proc/sys/kernel/sysrq

agent=$(parameter lab.agent)
$bb cp /bin/busybox /root/lab/busybox
# Whoever starts the agent again would find its guests on a changed kernel (see
# StillVm), so it is started once.
$bb echo "::once:$agent agent" >/root/etc/inittab
$bb echo "::shutdown:/lab/busybox umount -a -r" >>/root/etc/inittab
$bb umount /sys /dev
exec $bb switch_root /root /lab/busybox init
