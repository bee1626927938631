# After device.sh: what needs one host, then the two hosts that the tests make for themselves, then the same with iWARP.
cp /host/unit /host/suite /host/libkvtier_softgpu.so /host/kv-daemon /host/kvctl /host/nodes /tmp/
failed=0
echo "guest: $(uname -r)"
/tmp/unit --test-threads=1 --show-output rdma:: || failed=1
/tmp/suite --test-threads=1 --show-output verbs:: || failed=1
/bin/rdma link del rxe0
/bin/ip link del d0
KVTIER_VERBS_WORLD=1 /tmp/suite --test-threads=1 --show-output world:: || failed=1
echo "whole nodes, that read each other by RDMA"
KVTIER_VERBS_WORLD=1 KVTIER_BIN_DIR=/tmp /tmp/nodes --test-threads=1 --show-output peers::rdma:: || failed=1

if ! grep -q siw_init_module /proc/kallsyms; then
    echo "skipped: iwarp: the kernel has no siw"
    exit $failed
fi
echo "iWARP: siw, connected through librdmacm"
host
/bin/rdma link add siw0 type siw netdev d0
await siw_is_up
/tmp/suite --exact what_a_transport_cannot_have_is_listed_with_a_reason --nocapture | sed -n 's/^.*cannot: Iwarp: /impossible on siw: /p'
/tmp/unit --test-threads=1 --show-output --skip no_room_for rdma::verbs:: || failed=1
/tmp/suite --test-threads=1 --show-output iwarp:: || failed=1
exit $failed
