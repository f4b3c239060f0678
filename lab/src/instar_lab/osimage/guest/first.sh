#!/bin/busybox sh
# First program of the lab's system: load drivers, find the slot that the kernel's root hash belongs to, start it.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
case " $($b cat /proc/cmdline) " in
*" lab.hangs=early "*) # broken on purpose, before there is any driver: only the watchdog of the kernel before helps
    echo "LAB hangs early" >/dev/console
    while :; do $b sleep 60; done
    ;;
esac
# shellcheck disable=SC2086
while read -r module words; do $b insmod "/modules/$module" $words; done </modules/order
$b mkdir -p /dev/mapper /new
[ -e /dev/mapper/control ] || $b mknod /dev/mapper/control c 10 236
for word in $($b cat /proc/cmdline); do
    case $word in
    instar.roothash=*) hash=${word#*=} ;;
    instar.blocks=*) blocks=${word#*=} ;;
    esac
done
tries=0
until [ -e /dev/nvme0n1p4 ] || [ $tries -ge 100 ]; do
    $b usleep 50000
    tries=$((tries + 1))
done
for part in 2 3; do
    device=/dev/nvme0n1p$part
    table="0 $((blocks * 8)) verity 1 $device $device 4096 4096 $blocks $((blocks + 1)) sha256 $hash -"
    /bin/dmsetup create --readonly root --table "$table" 2>/dev/null || continue
    /bin/dmsetup mknodes root 2>/dev/null
    $b mount -t erofs -o ro /dev/mapper/root /new 2>/dev/null && break
    /bin/dmsetup remove root
done
if [ ! -e /new/sbin/init ]; then
    echo "LAB no slot has this root" >/dev/console
    $b sleep 1
    echo b >/proc/sysrq-trigger
fi
for folder in proc sys dev; do $b mount --move /$folder /new/$folder; done
exec $b switch_root /new /sbin/init
