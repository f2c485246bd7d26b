# Runs in the lab's Debian root when that is made: puts /boot/kernel there, and /boot/initramfs with no more in it than
# mounting the two disks takes. Debian's own initramfs, with udev, takes half a minute under emulation.
set -eu
release=$(ls /lib/modules)
work=$(mktemp -d)
mkdir "$work/bin" "$work/modules" "$work/root"
cp /bin/busybox "$work/bin/"
number=10
for path in $(modprobe --show-depends -S "$release" -a virtio_pci virtio_blk ext4 | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'); do
    name=$number-$(basename "$path" .xz)
    case $path in
        *.xz) xzcat "$path" >"$work/modules/$name" ;;
        *) cp "$path" "$work/modules/$name" ;;
    esac
    number=$((number + 1))
done
cat >"$work/init" <<'END'
#!/bin/busybox sh
/bin/busybox mkdir -p /dev
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done
until [ -b /dev/vda ] && [ -b /dev/vdb ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o noatime /dev/vda /root
/bin/busybox mount -t ext4 -o ro /dev/vdb /root/lab
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /bin/sh /lab/init
END
chmod 755 "$work/init"
(cd "$work" && find . | busybox cpio -o -H newc) | gzip -1 >/boot/initramfs
cp "/boot/vmlinuz-$release" /boot/kernel
rm -r "$work"
mkdir /lab
