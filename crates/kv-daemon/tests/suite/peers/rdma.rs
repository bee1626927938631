//! Two nodes that read each other by RDMA, in the guest that `cargo xtask test rdma` boots.

use super::net::Network;
use super::{cluster_of, get, put, until};
use crate::daemon::{Daemon, words};

/// Two hosts with a NIC each, and a node on both.
fn nodes() -> Option<(Network, Vec<Daemon>)> {
    if std::env::var_os("KVTIER_VERBS_WORLD").is_none() {
        eprintln!("skipped: verbs world: two nodes with RDMA: run `cargo xtask test rdma`");
        return None;
    }
    let network = Network::with_nics()?;
    let plan = network.plan().with(&["--peer-transport", "verbs"]);
    let nodes = network.start_all(&plan);
    Some((network, nodes))
}

#[test]
fn a_block_is_read_by_rdma_and_the_metrics_say_over_which_rail() {
    let Some((_network, nodes)) = nodes() else { return };
    put(&nodes[0], "by rdma");
    assert_eq!(get(&nodes[1], "by rdma").as_deref(), Some("remote"));
    let cluster = cluster_of(&nodes[1]);
    let peer = &cluster["peers"][0];
    assert_eq!(peer["transport"], "verbs", "{cluster}");
    assert_eq!(peer["blocks"], 1, "{cluster}");
    let rail = &peer["rails"][0];
    assert!(rail["name"].as_str().expect("a name").contains("rxe"), "{cluster}");
    assert!(
        rail["bytes"].as_u64().expect("a number") >= super::BLOCK_BYTES as u64,
        "{cluster}"
    );
    assert_eq!(cluster_of(&nodes[0])["segments_registered"], 1);
}

#[test]
fn a_node_with_a_gpu_finds_out_at_its_start_how_nics_reach_it() {
    if std::env::var_os("KVTIER_VERBS_WORLD").is_none() {
        eprintln!("skipped: verbs world: a node with RDMA and a GPU: run `cargo xtask test rdma`");
        return;
    }
    let Some(network) = Network::with_nics() else { return };
    let plan = network.plan().with(&["--peer-transport", "verbs"]);
    let program = std::env::current_exe().expect("a program");
    let library = program.with_file_name("libkvtier_softgpu.so");
    let device = format!("hbm_bytes = \"4MiB\"\nhbm_segment_bytes = \"2MiB\"\nhbm_library = {library:?}\n");
    let node = network.start_with(&plan, 0, &device);
    let status = node.ask(&["status"]);
    let path = status["hbm_path"].as_str().expect("it has a device");
    assert!(path.starts_with("peer_memory (dma_buf: rxe"), "{path}");
    // Blocks of peers go on as before.
    let other = network.start(&plan, 1);
    put(&other, "by rdma");
    until("it is read", || get(&node, "by rdma").as_deref() == Some("remote"));
}

#[test]
fn a_physical_purge_takes_the_memory_back_from_nics_and_later_blocks_are_read_again() {
    let Some((network, nodes)) = nodes() else { return };
    for round in 0..3 {
        let key = format!("round {round}");
        put(&nodes[0], &key);
        until("it is read", || get(&nodes[1], &key).is_some());
        let purged = network.purge(0, &nodes[0], &["--mode", "physical", "--wait"]);
        assert!(purged.status.success(), "{}", words(&purged));
        assert_eq!(cluster_of(&nodes[0])["segments_registered"], 0);
        assert_eq!(cluster_of(&nodes[1])["segments_registered"], 0);
        for node in &nodes {
            assert_eq!(get(node, &key), None);
        }
    }
    assert_eq!(super::sum_of_peers(&nodes[1], "corrupt"), 0);
}

#[test]
fn reads_by_rdma_while_the_namespace_is_purged_never_return_what_was_purged_before() {
    let Some((network, nodes)) = nodes() else { return };
    super::cluster::purge_while_reading(&network, &nodes, 3);
}

#[test]
fn a_cable_that_is_pulled_is_a_miss_and_is_used_again() {
    let Some((network, nodes)) = nodes() else { return };
    put(&nodes[0], "before");
    assert_eq!(get(&nodes[1], "before").as_deref(), Some("remote"));
    put(&nodes[0], "unreachable");
    network.cut(0);
    assert_eq!(get(&nodes[1], "unreachable"), None);
    network.join(0);
    until("it is read once the cable is back", || {
        get(&nodes[1], "unreachable").is_some()
    });
    assert_eq!(cluster_of(&nodes[1])["peers"][0]["transport"], "verbs");
}
