# In the guest: one Soft-RoCE device. iproute2 is called by its path, because the shell prefers applets of its own.
cd /tmp
ulimit -l unlimited
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
