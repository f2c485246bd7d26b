#!/bin/sh
# PID 1 of the lab: sets up what udev and systemd set up elsewhere, runs /lab/job, and brings /out out.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
at() { mountpoint -q "$2" || { mkdir -p "$2" && mount -t "$1" "$1" "$2"; }; }
at proc /proc
at sysfs /sys
at devpts /dev/pts
at tmpfs /dev/shm
at tmpfs /run
at cgroup2 /sys/fs/cgroup
modprobe -a virtio_console kvm_amd vhost_vsock vhost_net tun bridge veth nf_tables overlay loop
chgrp kvm /dev/kvm /dev/vhost-vsock /dev/vhost-net
chmod 660 /dev/kvm /dev/vhost-vsock /dev/vhost-net
chmod 666 /dev/net/tun
ip link set lo up
hostname lab
for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name") in
        lab.talk) talk=/dev/${port##*/} ;;
        lab.out) out=/dev/${port##*/} ;;
    esac
done
mkdir -p /out
# The machine's console is not for talk: emulated byte by byte it would be half of the run.
exec >"$talk" 2>&1
# Programs are not links: the jailer takes none.
[ ! -d /lab/vmm ] || cp /lab/vmm/* /usr/local/bin/
[ ! -d /lab/cache ] || { mkdir -p /var/cache/hutch && cp -a /lab/cache/. /var/cache/hutch/; }
. /lab/environment
mkdir -p "$LAB_PROGRAMS" /kernel
# Tests look for programs where they were built.
mount --bind /lab/programs "$LAB_PROGRAMS"
for part in "/var/cache/hutch/kernels/$LAB_KERNEL"/*; do ln -s "$part" /kernel/; done
# The first start of a program takes many times as long as the next, and more than its version is waited for.
for program in qemu-system-x86_64 /lab/vmm/*; do "${program##*/}" --version >/dev/null 2>&1; done
cd /tmp || exit
if [ -n "$LAB_TERMINAL" ]; then
    setsid -c sh /lab/job <>/dev/hvc0 >&0 2>&0
else
    setsid sh /lab/job </dev/null
fi
echo "lab:end $?"
exec >/dev/console 2>&1
tar -C /out -cf "$out" .
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
