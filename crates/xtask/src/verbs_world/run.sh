# In the guest: one Soft-RoCE device for what needs one host, then the two hosts that the tests make for themselves, then
# the same with iWARP. iproute2 is called by its path, because the shell prefers applets of its own.
cp /host/unit /host/suite /host/kv-daemon /host/kvctl /host/nodes /tmp/
cd /tmp
ulimit -l unlimited
failed=0
echo "guest: $(uname -r)"
host() {
    /bin/ip link add d0 type dummy
    /bin/ip addr add 10.0.0.1/24 dev d0
    /bin/ip link set d0 mtu 4200 up
}
await() {
    turns=0
    while ! $1; do
        turns=$((turns + 1))
        if [ $turns -gt 100 ]; then
            echo "the device got no address"
            exit 1
        fi
        sleep 0.1
    done
}
rxe_is_up() { grep -q ffff: /sys/class/infiniband/rxe0/ports/1/gids/1 2>/dev/null; }
siw_is_up() { grep -q ACTIVE /sys/class/infiniband/siw0/ports/1/state 2>/dev/null; }

host
/bin/rdma link add rxe0 type rxe netdev d0
await rxe_is_up
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
