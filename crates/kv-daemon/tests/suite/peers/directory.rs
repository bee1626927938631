//! Members that find each other through a real Redis server.

use super::{Plan, connected, get, put, until};
use crate::daemon::Daemon;
use crate::redis::Redis;

/// A member that knows nobody but the server.
fn member(plan: &Plan, number: usize, redis: &Redis) -> Daemon {
    let password = redis.password_file();
    let address = &plan.addresses[number];
    let settings = format!(
        "peers_redis_password_file = {password:?}\npeers_redis = {:?}\ncluster_name = \"test [1]\"\n{}",
        redis.url(),
        Plan::settings()
    );
    let flags = plan.flags_of(number);
    // Not the list.
    let at = flags.iter().position(|flag| flag == "--peers").expect("a flag");
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.drain(at..at + 2);
    assert!(flags.contains(&address.as_str()));
    Daemon::start_with(&flags, &settings)
}

#[test]
fn members_find_each_other_lose_one_that_goes_and_outlive_the_server() {
    let Some(redis) = Redis::start(None) else { return };
    let plan = Plan::on_loopback(3);
    let nodes = [member(&plan, 0, &redis), member(&plan, 1, &redis)];
    until("both are found", || nodes.iter().all(|node| connected(node) == 1));
    put(&nodes[0], "found");
    assert_eq!(get(&nodes[1], "found").as_deref(), Some("remote"));
    let third = member(&plan, 2, &redis);
    until("the third is found", || nodes.iter().all(|node| connected(node) == 2));
    put(&third, "third's");
    assert_eq!(get(&nodes[0], "third's").as_deref(), Some("remote"));
    // One that stops takes its entry along.
    let (status, log) = third.stop();
    assert!(status.success(), "{log}");
    until("it is no member any more", || {
        let cluster = super::cluster_of(&nodes[0]);
        cluster["members"].as_array().expect("a list").len() == 2
    });
    // The server goes: who is known stays known.
    let port = redis.kill();
    std::thread::sleep(std::time::Duration::from_secs(7));
    put(&nodes[1], "later");
    assert_eq!(get(&nodes[0], "later").as_deref(), Some("remote"));
    // And comes back empty.
    let redis = Redis::start(Some(port)).expect("it was there before");
    std::thread::sleep(std::time::Duration::from_secs(7));
    put(&nodes[1], "even later");
    assert!(get(&nodes[0], "even later").is_some());
    assert!(connected(&nodes[0]) == 1 && redis.port == port);
}

#[test]
fn a_server_that_is_away_at_the_start_is_found_later() {
    let Some(redis) = Redis::start(None) else { return };
    let plan = Plan::on_loopback(2);
    let first = member(&plan, 0, &redis);
    let port = redis.port;
    redis.kill();
    // It starts without it, alone.
    let stand_in = Redis::start(Some(port)).expect("it was there before");
    let url_only = Redis::kill;
    let second = member(&plan, 1, &stand_in);
    url_only(stand_in);
    let back = Redis::start(Some(port)).expect("it was there before");
    until("they find each other", || {
        connected(&first) == 1 && connected(&second) == 1
    });
    assert_eq!(back.port, port);
}
