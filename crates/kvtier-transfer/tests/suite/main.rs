//! One suite for every transport: each case a test with a name, under the name of its transport.
//!
//! `kvtier_transfer::rdma` runs where a device is: in the verbs world that `cargo xtask test rdma` boots, or on a machine
//! with a NIC. Cases that need two hosts make them of network namespaces and run in that world only.

mod between_hosts;
mod cases;
mod child;
mod devices;
mod stand;
mod tcp_between;
mod tls;
mod world;

use stand::Kind;

/// Cases that a transport cannot have, and why.
const CANNOT: &[(Kind, &str, &str)] = &[
    (
        Kind::Loopback,
        "a_peer_killed_in_the_middle_of_a_thousand_transfers",
        "both ends are one process",
    ),
    (
        Kind::Loopback,
        "a_stopped_peer_costs_at_most_the_deadline",
        "both ends are one process",
    ),
    (
        Kind::Loopback,
        "a_peer_that_was_restarted_is_used_again",
        "both ends are one process",
    ),
    (
        Kind::Loopback,
        "sixty_four_peers_survive_a_storm_of_reconnects",
        "there is nothing to connect anew",
    ),
    (
        Kind::Shm,
        "a_stopped_peer_costs_at_most_the_deadline",
        "a stopped peer's memory is still mapped: it serves",
    ),
    (
        Kind::Shm,
        "a_peer_that_was_restarted_is_used_again",
        "the memory went with the process: connect again",
    ),
    (
        Kind::Shm,
        "sixty_four_peers_survive_a_storm_of_reconnects",
        "the memory went with the process: connect again",
    ),
    (
        Kind::Verbs,
        "a_stopped_peer_costs_at_most_the_deadline",
        "the NIC of a stopped process still serves",
    ),
    (
        Kind::Loopback,
        "a_batch_past_the_limit_is_refused_as_busy_with_its_pieces",
        "its limit is fixed and it copies at once",
    ),
    (
        Kind::Shm,
        "a_batch_past_the_limit_is_refused_as_busy_with_its_pieces",
        "its limit is fixed and it copies at once",
    ),
    (
        Kind::Tls,
        "peers in processes of their own",
        "their certificates are made in the test's; connections are repaired as for tcp",
    ),
    (
        Kind::Loopback,
        "notices_arrive_once_and_in_order_behind_what_they_are_about",
        "who owns the memory is this process",
    ),
    (
        Kind::Shm,
        "notices_arrive_once_and_in_order_behind_what_they_are_about",
        "nothing pushes over it",
    ),
    (
        Kind::Tcp,
        "notices_arrive_once_and_in_order_behind_what_they_are_about",
        "nothing pushes over it",
    ),
    (
        Kind::Iwarp,
        "notices_arrive_once_and_in_order_behind_what_they_are_about",
        "iWARP has no immediate data",
    ),
    (
        Kind::Loopback,
        "packet loss, links that go down, several rails",
        "there is no wire",
    ),
    (
        Kind::Shm,
        "packet loss, links that go down, several rails",
        "there is no wire",
    ),
    (
        Kind::Verbs,
        "memory of a GPU as a DMA-BUF",
        "Soft-RoCE answers EOPNOTSUPP, and the software device has none",
    ),
    (
        Kind::Iwarp,
        "a_stopped_peer_costs_at_most_the_deadline",
        "the NIC of a stopped process still serves",
    ),
    (
        Kind::Iwarp,
        "hosts_with_different_mtus_agree_on_the_smaller_one",
        "TCP cuts its packets by itself",
    ),
    (
        Kind::Iwarp,
        "packet loss, links that go down, several rails (world)",
        "siw of Linux 7.2 never lets go of a device that was connected to another network namespace: the second test would wait for ever",
    ),
    (
        Kind::Iwarp,
        "a_message_that_the_peer_has_no_room_for_fails_and_never_completes_as_done",
        "iWARP knows no receiver that is not ready: it ends the connection",
    ),
    (
        Kind::Iwarp,
        "a status that names the refused request",
        "iWARP ends the connection without a word: requests go again one by one, and the one that ends it again was refused",
    ),
    (
        Kind::Iwarp,
        "memory of a GPU without a copy by way of the host",
        "siw cannot, and the target of a read is memory that the peer may write",
    ),
];

macro_rules! suite {
    ($($transport:ident = $kind:expr => [$($case:ident),* $(,)?];)*) => {
        $(mod $transport {
            $(#[test]
            fn $case() {
                super::cases::$case($kind);
            })*

            #[test]
            fn memory_of_a_device_is_read_into_and_written_from() {
                super::devices::memory_of_a_device_is_read_into_and_written_from($kind);
            }

            #[test]
            fn what_cannot_go_into_a_device_is_an_error_and_the_next_read_is_none() {
                super::devices::what_cannot_go_into_a_device_is_an_error_and_the_next_read_is_none($kind);
            }
        })*
    };
}

suite! {
    loopback = crate::Kind::Loopback => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_notice_is_refused_in_words,
    ];
    shm = crate::Kind::Shm => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_peer_killed_in_the_middle_of_a_thousand_transfers,
        a_stopped_peer_still_serves_what_is_mapped,
        a_notice_is_refused_in_words,
    ];
    tcp = crate::Kind::Tcp => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_batch_past_the_limit_is_refused_as_busy_with_its_pieces,
        a_peer_killed_in_the_middle_of_a_thousand_transfers,
        a_stopped_peer_costs_at_most_the_deadline,
        a_peer_that_was_restarted_is_used_again,
        sixty_four_peers_survive_a_storm_of_reconnects,
        who_does_not_know_the_secret_is_refused,
        a_notice_is_refused_in_words,
    ];
    tcp_tls = crate::Kind::Tls => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_batch_past_the_limit_is_refused_as_busy_with_its_pieces,
        who_does_not_know_the_secret_is_refused,
        a_notice_is_refused_in_words,
    ];
    verbs = crate::Kind::Verbs => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_batch_past_the_limit_is_refused_as_busy_with_its_pieces,
        a_peer_killed_in_the_middle_of_a_thousand_transfers,
        a_stopped_peer_still_serves_what_is_mapped,
        a_peer_that_was_restarted_is_used_again,
        sixty_four_peers_survive_a_storm_of_reconnects,
        who_does_not_know_the_secret_is_refused,
        notices_arrive_once_and_in_order_behind_what_they_are_about,
        notices_that_nobody_takes_wait_for_their_deadline_and_reads_go_on,
    ];
    iwarp = crate::Kind::Iwarp => [
        bytes_read_are_the_owner_s,
        bytes_written_arrive_and_nothing_beside_them_changes,
        a_batch_of_many_pieces_moves_both_ways,
        a_large_piece_arrives_whole,
        a_region_that_was_never_registered_is_refused_and_the_peer_goes_on,
        a_revoked_region_is_refused_and_another_still_serves,
        a_range_past_the_end_is_refused,
        a_write_to_what_was_registered_for_reads_is_refused,
        a_dropped_transfer_keeps_its_memory_until_it_is_at_rest,
        a_future_is_woken,
        many_threads_read_at_once,
        a_dropped_peer_ends_its_transfers,
        an_owner_that_is_gone_is_told_as_a_failure,
        a_gibibyte_is_registered,
        a_batch_past_the_limit_is_refused_as_busy_with_its_pieces,
        a_peer_killed_in_the_middle_of_a_thousand_transfers,
        a_stopped_peer_still_serves_what_is_mapped,
        a_peer_that_was_restarted_is_used_again,
        sixty_four_peers_survive_a_storm_of_reconnects,
        who_does_not_know_the_secret_is_refused,
        a_notice_is_refused_in_words,
    ];
}

/// For the list that `cargo xtask test transfer --list` prints.
#[test]
fn what_a_transport_cannot_have_is_listed_with_a_reason() {
    for (kind, case, reason) in CANNOT {
        println!("cannot: {kind:?}: {case}: {reason}");
        assert!(!reason.is_empty());
    }
}

/// Over one transport: a device of this process that broke stays so.
#[test]
fn a_device_that_breaks_in_a_read_fails_it_and_nothing_hangs() {
    devices::a_device_that_breaks_in_a_read_fails_it_and_nothing_hangs(Kind::Tcp);
}

/// No test: the other end of one, started by [`child::Child`] in a process of its own.
#[test]
fn child_process() {
    child::main();
}
