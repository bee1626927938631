//! Against a Redis server.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::*;

/// A server of one test. Killed when dropped.
struct Redis {
    child: Child,
    port: u16,
    directory: TempDir,
}

impl Redis {
    /// `settings` are lines of its file, `PORT` in them its port.
    fn start(settings: &str) -> Option<Redis> {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("bound").port();
        drop(free);
        let directory = TempDir::new().expect("a directory");
        std::fs::write(
            directory.path().join("redis.conf"),
            settings.replace("PORT", &port.to_string()),
        )
        .expect("written");
        let child = Redis::spawn(&directory.path().join("redis.conf"), port)?;
        Some(Redis { child, port, directory })
    }

    fn plain() -> Option<Redis> {
        Redis::start("port PORT")
    }

    fn spawn(file: &PathBuf, port: u16) -> Option<Child> {
        let child = real_server()?
            .arg(file)
            .args(["--bind", "127.0.0.1", "--save", ""])
            .current_dir(file.parent().expect("a directory"))
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server starts");
        let limit = after(LONG);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < limit, "redis listens");
            thread::sleep(Duration::from_millis(20));
        }
        Some(child)
    }

    fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("gone");
    }

    fn restart(&mut self) {
        self.child = Redis::spawn(&self.directory.path().join("redis.conf"), self.port).expect("it was there before");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn store(&self, connections: usize) -> RedisStore {
        store(self.url(), connections, Duration::from_secs(5))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn other(namespace: u8, generation: u8) -> ObjectGroup {
    ObjectGroup {
        namespace: [namespace; 16],
        generation: [generation; 16],
    }
}

fn object(number: usize, bytes: usize) -> (ObjectName, Vec<u8>) {
    let mut object = vec![0; bytes];
    blake3::Hasher::new()
        .update(&number.to_le_bytes())
        .finalize_xof()
        .fill(&mut object);
    (name(number), object)
}

fn names(objects: &[(ObjectName, Vec<u8>)]) -> Vec<ObjectName> {
    objects.iter().map(|(name, _)| *name).collect()
}

/// Servers of one cluster, each with a third of the slots.
struct Clustered(Vec<(Redis, u16)>);

impl Clustered {
    fn start() -> Option<Clustered> {
        Clustered::of(3)
    }

    /// Those beyond the third have no slots.
    fn of(servers_wanted: usize) -> Option<Clustered> {
        let mut servers = Vec::new();
        for _ in 0..servers_wanted {
            let free = TcpListener::bind("127.0.0.1:0").expect("a port");
            let bus = free.local_addr().expect("bound").port();
            drop(free);
            let settings = format!(
                "port PORT\ncluster-enabled yes\ncluster-port {bus}\ncluster-node-timeout 5000\ncluster-require-full-coverage no"
            );
            servers.push((Redis::start(&settings)?, bus));
        }
        let cluster = Clustered(servers);
        for (server, slots) in [("0", "5460"), ("5461", "10922"), ("10923", "16383")]
            .into_iter()
            .enumerate()
        {
            cluster.ask(server, &["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]);
        }
        for (redis, bus) in &cluster.0[1..] {
            let (port, bus) = (redis.port.to_string(), bus.to_string());
            cluster.ask(0, &["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
        }
        let limit = after(LONG * 3);
        let known = format!("cluster_known_nodes:{servers_wanted}");
        for server in 0..servers_wanted {
            let is_ready = || {
                let state = cluster.ask(server, &["CLUSTER", "INFO"]);
                let wanted = ["cluster_state:ok", "cluster_slots_ok:16384", &known];
                wanted.iter().all(|wanted| state.contains(wanted))
            };
            while !is_ready() {
                assert!(Instant::now() < limit, "the cluster forms");
                thread::sleep(Duration::from_millis(50));
            }
        }
        Some(cluster)
    }

    /// What a server answers, in words.
    fn ask(&self, server: usize, command: &[&str]) -> String {
        let settings = RedisSettings {
            url: self.0[server].0.url(),
            connections: 1,
            timeout: LONG,
        };
        let server = Server::new(&settings, None).expect("an address");
        let mut connection = Connection::open(&server, after(LONG)).expect("connected");
        let parts: Vec<&[u8]> = command.iter().map(|part| part.as_bytes()).collect();
        connection.ask(&parts).expect("asked");
        connection.flush().expect("sent");
        match connection.answer() {
            Ok(Answer::String(Some(text))) => String::from_utf8_lossy(&text).into_owned(),
            Ok(Answer::Status(text)) => text,
            Ok(Answer::Number(number)) => number.to_string(),
            other => panic!("{command:?}: {other:?}"),
        }
    }

    fn keys(&self) -> Vec<u64> {
        let count = |server| self.ask(server, &["DBSIZE"]).parse().expect("a number");
        (0..3).map(count).collect()
    }
}

#[test]
fn a_cluster_is_found_out_and_each_object_goes_where_it_belongs() {
    let Some(cluster) = Clustered::start() else { return };
    let store = cluster.0[1].0.store(2);
    let objects: Vec<_> = (0..90).map(|number| object(number, 1 + number * 1000)).collect();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    assert_eq!(store.servers(), 3);
    let keys = cluster.keys();
    assert_eq!(keys.iter().sum::<u64>(), 90);
    assert!(keys.iter().all(|keys| *keys > 10), "{keys:?}");
    let fresh = cluster.0[2].0.store(1);
    let (found, outcome) = fetched(&fresh, &names(&objects), after(LONG));
    assert_eq!(outcome, Ok(()));
    for ((_, object), found) in objects.iter().zip(found) {
        assert_eq!(found.as_ref(), Some(object));
    }
    let gone = fresh
        .remove(&GROUP, &names(&objects[10..20]), after(LONG))
        .expect("removed");
    assert_eq!(gone, vec![true; 10]);
    let there = store
        .exists(&all_of(&names(&objects[5..15])), after(LONG))
        .expect("asked");
    assert_eq!(there, [[true; 5], [false; 5]].concat());
    store.put(&other(7, 7), &objects[..3], None, after(LONG)).expect("put");
    let erased = fresh.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!((erased.deleted, erased.left), (80, 0));
    assert_eq!(cluster.keys().iter().sum::<u64>(), 3, "another namespace stays");
}

#[test]
fn a_slot_that_moved_is_followed_and_one_that_moves_is_not_gone_through() {
    let Some(cluster) = Clustered::start() else { return };
    let store = cluster.0[0].0.store(1);
    let objects: Vec<_> = (0..30).map(|number| object(number, 5000)).collect();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let key = key(&GROUP, &objects[0].0);
    let slot = cluster::slot(key.as_bytes());
    let from = [5460, 10_922, 16_383]
        .iter()
        .position(|last| slot <= *last)
        .expect("a slot");
    let to = (from + 1) % 3;
    let ids: Vec<String> = (0..3).map(|server| cluster.ask(server, &["CLUSTER", "MYID"])).collect();
    let slot = slot.to_string();
    cluster.ask(to, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]);
    cluster.ask(from, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]);
    let error = store
        .erase_namespace(&GROUP.namespace, after(LONG))
        .expect_err("a key may be on its way");
    assert!(error.to_string().contains("moves slots"), "{error}");
    let port = cluster.0[to].0.port.to_string();
    cluster.ask(from, &["MIGRATE", "127.0.0.1", &port, &key, "0", "5000"]);
    for server in [to, from, (from + 2) % 3] {
        cluster.ask(server, &["CLUSTER", "SETSLOT", &slot, "NODE", &ids[to]]);
    }
    let (found, outcome) = fetched(&store, &names(&objects), after(LONG));
    assert_eq!(outcome, Ok(()));
    assert!(found.iter().all(Option::is_some));
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!((erased.deleted, erased.left), (30, 0));
}

#[test]
fn a_replica_that_takes_over_is_found() {
    let Some(mut cluster) = Clustered::of(4) else { return };
    let master = cluster.ask(2, &["CLUSTER", "MYID"]);
    cluster.ask(3, &["CLUSTER", "REPLICATE", &master]);
    let limit = after(LONG * 3);
    while !cluster
        .ask(3, &["INFO", "replication"])
        .contains("master_link_status:up")
    {
        assert!(Instant::now() < limit, "it replicates");
        thread::sleep(Duration::from_millis(50));
    }
    let store = store(cluster.0[0].0.url(), 1, Duration::from_secs(1));
    let objects: Vec<_> = (0..30).map(|number| object(number, 5000)).collect();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let keys = |server| cluster.ask(server, &["DBSIZE"]);
    while keys(2) != keys(3) {
        assert!(Instant::now() < limit, "it has them");
        thread::sleep(Duration::from_millis(50));
    }
    cluster.0[2].0.kill();
    loop {
        let (found, outcome) = fetched(&store, &names(&objects), after(LONG));
        if outcome.is_ok() {
            assert!(found.iter().all(Option::is_some));
            break;
        }
        assert!(Instant::now() < limit, "it takes over");
        thread::sleep(Duration::from_millis(100));
    }
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!((erased.deleted, erased.left), (30, 0));
}

#[test]
fn a_server_of_a_cluster_that_dies_takes_its_part_along_and_nothing_else() {
    let Some(mut cluster) = Clustered::start() else { return };
    let store = store(cluster.0[0].0.url(), 1, Duration::from_secs(1));
    let objects: Vec<_> = (0..30).map(|number| object(number, 5000)).collect();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let on_last = |(name, _): &&(ObjectName, Vec<u8>)| cluster::slot(key(&GROUP, name).as_bytes()) > 10_922;
    let lost: Vec<_> = objects.iter().filter(on_last).cloned().collect();
    let kept: Vec<_> = objects.iter().filter(|object| !on_last(object)).cloned().collect();
    assert!(!lost.is_empty() && !kept.is_empty());
    cluster.0[2].0.kill();
    let (_, outcome) = fetched(&store, &names(&lost), after(LONG));
    assert!(matches!(outcome, Err(StoreError::Unavailable { .. })), "{outcome:?}");
    let (found, outcome) = fetched(&store, &names(&kept), after(LONG));
    assert_eq!(outcome, Ok(()));
    assert!(found.iter().all(Option::is_some));
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG));
    assert!(matches!(erased, Err(StoreError::Unavailable { .. })), "{erased:?}");
    cluster.0[2].0.restart();
    let limit = after(LONG * 3);
    while fetched(&store, &names(&lost), after(LONG)).1.is_err() {
        assert!(Instant::now() < limit, "it is asked again");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn five_hundred_objects_come_back_in_order_and_go_when_they_are_erased() {
    let Some(redis) = Redis::plain() else { return };
    let store = redis.store(2);
    // Of every size up to 1 MiB, each tenth of that, one empty.
    let bytes = |number: usize| {
        if number.is_multiple_of(10) {
            1 << 20
        } else {
            (number - 1) * 97
        }
    };
    let objects: Vec<_> = (0..500).map(|number| object(number, bytes(number))).collect();
    let names = names(&objects);
    assert_eq!(store.exists(&all_of(&names), after(LONG)), Ok(vec![false; 500]));
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let asked: Vec<ObjectName> = (0..1000).map(name).collect();
    let there = store.exists(&all_of(&asked), after(LONG)).expect("asked");
    assert!(there.iter().enumerate().all(|(number, there)| *there == (number < 500)));
    let (found, outcome) = fetched(&store, &asked, after(LONG));
    assert_eq!(outcome, Ok(()));
    assert_eq!(found.len(), 1000);
    for (number, found) in found.iter().enumerate() {
        assert!(
            found.as_ref() == objects.get(number).map(|(_, object)| object),
            "object {number}"
        );
    }
    let erased = store.erase_group(&GROUP, after(LONG)).expect("erased");
    assert_eq!(erased, Erased { deleted: 500, left: 0 });
    assert_eq!(store.exists(&all_of(&names), after(LONG)), Ok(vec![false; 500]));
    assert_eq!(fetched(&store, &names[..3], after(LONG)), (vec![None; 3], Ok(())));
}

#[test]
fn an_erasure_takes_one_namespace_or_generation_and_leaves_everybody_else_alone() {
    let Some(redis) = Redis::plain() else { return };
    let store = redis.store(1);
    let objects: Vec<_> = (0..3000).map(|number| object(number, 20)).collect();
    for group in [other(1, 1), other(1, 2), other(2, 1), other(0x11, 1)] {
        store.put(&group, &objects, None, after(LONG)).expect("put");
    }
    let mut stranger = Connection::open(&store.seed.server, after(LONG)).expect("connected");
    stranger.ask(&[b"SET", b"kvtier:1:mine", b"1"]).expect("asked");
    stranger.flush().expect("sent");
    stranger.done().expect("set");
    let count = |group: &ObjectGroup| {
        let asked: Vec<_> = names(&objects).into_iter().map(|name| (*group, name)).collect();
        let there = store.exists(&asked, after(LONG)).expect("asked");
        there.iter().filter(|there| **there).count()
    };
    let erased = store.erase_group(&other(1, 1), after(LONG)).expect("erased");
    assert_eq!(erased, Erased { deleted: 3000, left: 0 });
    assert_eq!(
        [other(1, 1), other(1, 2), other(2, 1)].map(|group| count(&group)),
        [0, 3000, 3000]
    );
    store.put(&other(1, 1), &objects, None, after(LONG)).expect("put");
    let erased = store.erase_namespace(&[1; 16], after(LONG)).expect("erased");
    assert_eq!(erased, Erased { deleted: 6000, left: 0 });
    assert_eq!(
        [other(1, 1), other(1, 2), other(2, 1), other(0x11, 1)].map(|group| count(&group)),
        [0, 0, 3000, 3000]
    );
    assert_eq!(store.erase_namespace(&[9; 16], after(LONG)), Ok(Erased::default()));
    stranger.ask(&[b"EXISTS", b"kvtier:1:mine"]).expect("asked");
    stranger.flush().expect("sent");
    assert_eq!(stranger.number().expect("counted"), 1);
}

#[test]
fn what_somebody_puts_during_an_erasure_is_reported_or_erased() {
    let Some(redis) = Redis::plain() else { return };
    let store = redis.store(2);
    let objects: Vec<_> = (0..20_000).map(|number| object(number, 8)).collect();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let late: Vec<_> = (20_000..40_000).map(|number| object(number, 8)).collect();
    let erased = thread::scope(|scope| {
        scope.spawn(|| store.put(&GROUP, &late, None, after(LONG)).expect("put"));
        store.erase_group(&GROUP, after(LONG)).expect("erased")
    });
    assert!((20_000..=40_000).contains(&erased.deleted), "{erased:?}");
    let again = store.erase_group(&GROUP, after(LONG)).expect("erased");
    assert_eq!((erased.deleted + again.deleted, again.left), (40_000, 0));
}

#[test]
fn the_server_drops_what_has_a_ttl_and_keeps_the_rest() {
    let Some(redis) = Redis::plain() else { return };
    let store = redis.store(1);
    store
        .put(&GROUP, &[object(1, 10)], Some(Duration::from_millis(300)), after(LONG))
        .expect("put");
    store
        .put(&GROUP, &[object(2, 10)], Some(LONG * 100), after(LONG))
        .expect("put");
    store.put(&GROUP, &[object(3, 10)], None, after(LONG)).expect("put");
    let there = || store.exists(&all_of(&[1, 2, 3].map(name)), after(LONG)).expect("asked");
    assert_eq!(there(), [true, true, true]);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(there(), [false, true, true]);
}

#[test]
fn a_server_with_a_password_lets_in_who_knows_it() {
    let file = "port PORT\nrequirepass \"a pass/word\"\nuser reader on >other ~kvtier:* +get +ping";
    let Some(redis) = Redis::start(file) else { return };
    let with = |user: &str| store(redis.url().replace("redis://", &format!("redis://{user}@")), 1, LONG);
    let known = with(":a%20pass%2Fword");
    known.put(&GROUP, &[object(1, 10)], None, after(LONG)).expect("put");
    assert_eq!(
        fetched(&known, &[name(1)], after(LONG)),
        (vec![Some(object(1, 10).1)], Ok(()))
    );
    let refused = |store: RedisStore, word: &str| {
        let error = store
            .put(&GROUP, &[object(2, 10)], None, after(LONG))
            .expect_err("it must not be let in");
        assert!(
            matches!(&error, StoreError::Refused { reason, .. } if reason.starts_with(word)),
            "{error}"
        );
        assert!(!error.to_string().contains("other"), "{error}");
    };
    refused(with(":wrong"), "WRONGPASS");
    refused(with("reader:wrong"), "WRONGPASS");
    refused(redis.store(1), "NOAUTH");
    assert_eq!(with("reader:other").ping(after(LONG)), Ok(()));
    refused(with("reader:other"), "NOPERM");
}

#[test]
fn a_database_is_chosen_by_the_address() {
    let Some(redis) = Redis::plain() else { return };
    let third = store(format!("{}/3", redis.url()), 1, LONG);
    third.put(&GROUP, &[object(1, 10)], None, after(LONG)).expect("put");
    assert_eq!(third.exists(&all_of(&[name(1)]), after(LONG)), Ok(vec![true]));
    assert_eq!(redis.store(1).exists(&all_of(&[name(1)]), after(LONG)), Ok(vec![false]));
    let none = store(format!("{}/99", redis.url()), 1, LONG);
    assert!(matches!(none.ping(after(LONG)), Err(StoreError::Refused { .. })));
}

#[test]
fn a_server_that_is_killed_is_unavailable_at_once_and_one_that_is_back_serves_the_same_store() {
    let Some(mut redis) = Redis::plain() else { return };
    let store = redis.store(4);
    let objects: Vec<_> = (0..64).map(|number| object(number, 1 << 20)).collect();
    let names = names(&objects);
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let (found, outcome) = fetched(&store, &names, after(LONG));
                        for (found, (_, object)) in found.iter().zip(&objects) {
                            assert!(found.as_ref() == Some(object), "what came is whole");
                        }
                        if let Err(error) = outcome {
                            return (error, Instant::now());
                        }
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        redis.kill();
        let killed = Instant::now();
        for reader in readers {
            let (error, at) = reader.join().expect("no panic");
            assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
            assert!(at < killed + SLACK, "{:?}", at - killed);
        }
    });
    assert!(matches!(store.ping(after(LONG)), Err(StoreError::Unavailable { .. })));
    redis.restart();
    assert_eq!(store.exists(&all_of(&names[..1]), after(LONG)), Ok(vec![false]));
    store.put(&GROUP, &objects[..2], None, after(LONG)).expect("put");
    assert_eq!(
        fetched(&store, &names[..1], after(LONG)),
        (vec![Some(objects[0].1.clone())], Ok(()))
    );
    // Restarted while every connection lies idle: nobody notices.
    redis.kill();
    redis.restart();
    assert_eq!(store.ping(after(LONG)), Ok(()));
}

#[test]
fn a_server_that_stands_still_costs_the_deadline_and_serves_again_afterwards() {
    let Some(redis) = Redis::plain() else { return };
    let store = redis.store(1);
    store
        .put(&GROUP, &[object(1, 10), object(2, 10)], None, after(LONG))
        .expect("put");
    redis.signal(Signal::STOP);
    let began = Instant::now();
    let (found, outcome) = fetched(&store, &[name(1)], began + Duration::from_millis(300));
    assert!(
        found.is_empty() && matches!(outcome, Err(StoreError::Late { .. })),
        "{outcome:?}"
    );
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    redis.signal(Signal::CONT);
    assert_eq!(
        fetched(&store, &[name(2)], after(LONG)),
        (vec![Some(object(2, 10).1)], Ok(()))
    );
}

#[test]
fn tls_is_spoken_with_a_server_whose_certificate_is_signed_by_an_authority_that_is_given() {
    let authority = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&authority).expect("signed").pem();
    let issuer = Issuer::new(params, authority);
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    let certificate = params.signed_by(&key, &issuer).expect("signed").pem();
    let files = TempDir::new().expect("a directory");
    for (name, text) in [
        ("root", &root),
        ("certificate", &certificate),
        ("key", &key.serialize_pem()),
    ] {
        std::fs::write(files.path().join(name), text).expect("written");
    }
    let at = files.path().display();
    let file = format!(
        "port 0\ntls-port PORT\ntls-auth-clients no\ntls-cert-file {at}/certificate\ntls-key-file {at}/key\ntls-ca-cert-file {at}/root"
    );
    let Some(mut redis) = Redis::start(&file) else { return };
    let settings = |host: &str| RedisSettings {
        url: format!("rediss://{host}:{}", redis.port),
        connections: 2,
        timeout: Duration::from_secs(5),
    };
    let store = RedisStore::with_authorities(settings("127.0.0.1"), root.as_bytes()).expect("an address");
    let objects: Vec<_> = (0..40)
        .map(|number| object(number, if number == 7 { 5 << 20 } else { 70_001 }))
        .collect();
    let names = names(&objects);
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    let (found, outcome) = fetched(&store, &names, after(LONG));
    assert_eq!(outcome, Ok(()));
    assert!(
        found
            .iter()
            .zip(&objects)
            .all(|(found, (_, object))| found.as_ref() == Some(object))
    );
    // Another name than the certificate's, and an authority that did not sign it.
    let elsewhere = RedisStore::with_authorities(settings("localhost"), root.as_bytes()).expect("an address");
    assert!(matches!(
        elsewhere.ping(after(LONG)),
        Err(StoreError::Unavailable { .. })
    ));
    let stranger = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let stranger = params.self_signed(&stranger).expect("signed").pem();
    let misled = RedisStore::with_authorities(settings("127.0.0.1"), stranger.as_bytes()).expect("an address");
    let error = misled.ping(after(LONG)).expect_err("a stranger's certificate");
    assert!(error.to_string().contains("certificate"), "{error}");
    // No TLS where TLS is wanted, and the other way round.
    let plain = self::store(redis.url(), 1, Duration::from_secs(5));
    assert!(plain.ping(after(LONG)).is_err());
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!(erased, Erased { deleted: 40, left: 0 });
    redis.kill();
    redis.restart();
    assert_eq!(store.ping(after(LONG)), Ok(()));
}
