//! Faults, from a server that plays them; the `real` ones, against a Redis server. `cargo xtask test remote` names one in
//! `KVTIER_REDIS_SERVER`.

mod real;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const GROUP: ObjectGroup = ObjectGroup {
    namespace: [1; 16],
    generation: [2; 16],
};
const LONG: Duration = Duration::from_secs(30);
/// What a deadline may be missed by on a busy machine.
const SLACK: Duration = Duration::from_secs(2);

fn name(number: usize) -> ObjectName {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    ObjectName(bytes)
}

fn store(url: String, connections: usize, timeout: Duration) -> RedisStore {
    RedisStore::new(RedisSettings {
        url,
        connections,
        timeout,
    })
    .expect("an address")
}

fn after(duration: Duration) -> Instant {
    Instant::now() + duration
}

fn all_of(names: &[ObjectName]) -> Vec<(ObjectGroup, ObjectName)> {
    names.iter().map(|name| (GROUP, *name)).collect()
}

fn fetched(store: &RedisStore, names: &[ObjectName], until: Instant) -> (Vec<Option<Vec<u8>>>, Result<(), StoreError>) {
    let mut found = Vec::new();
    let outcome = store.fetch(&all_of(names), until, &mut |position, object| {
        assert_eq!(position, found.len(), "in order, each once");
        found.push(object.map(<[u8]>::to_vec));
    });
    (found, outcome)
}

/// The program, to be run with its settings; `None`, in words, where none is named.
fn real_server() -> Option<Command> {
    let Some(program) = std::env::var_os("KVTIER_REDIS_SERVER") else {
        eprintln!("skipped: redis: no server is named; cargo xtask test remote brings one");
        return None;
    };
    let mut command = Command::new(program);
    if let Some(libraries) = std::env::var_os("KVTIER_REDIS_LIBRARIES") {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    Some(command)
}

/// A server that plays a script on each connection, told which one it is. It lives as long as the test program.
struct Scripted {
    url: String,
    connections: Arc<AtomicUsize>,
}

impl Scripted {
    fn new(script: impl Fn(usize, &mut Caller) + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("redis://{}", listener.local_addr().expect("bound"));
        let connections = Arc::new(AtomicUsize::new(0));
        let (count, script) = (Arc::clone(&connections), Arc::new(script));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let number = count.fetch_add(1, Ordering::Relaxed);
                let (stream, script) = (stream.expect("a connection"), Arc::clone(&script));
                thread::spawn(move || script(number, &mut Caller(BufReader::new(stream))));
            }
        });
        Scripted { url, connections }
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

struct Caller(BufReader<TcpStream>);

impl Caller {
    /// The next command's parts; `None` when the caller has gone.
    fn command(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = self.number('*')?;
        (0..count)
            .map(|_| {
                let mut part = vec![0; self.number('$')? + 2];
                self.0.read_exact(&mut part).ok()?;
                part.truncate(part.len() - 2);
                Some(part)
            })
            .collect()
    }

    fn number(&mut self, kind: char) -> Option<usize> {
        let mut line = String::new();
        self.0.read_line(&mut line).ok()?;
        line.strip_prefix(kind)?.trim_end().parse().ok()
    }

    fn say(&mut self, bytes: &[u8]) {
        // A caller that lost patience has gone.
        let _ = self.0.get_mut().write_all(bytes);
    }

    /// Answers every command so, until the caller goes.
    fn always(&mut self, bytes: &[u8]) {
        while self.command().is_some() {
            self.say(bytes);
        }
    }

    fn wait(&mut self) {
        let _ = self.0.get_mut().read(&mut [0]);
        thread::sleep(LONG);
    }
}

#[test]
fn a_server_that_says_nothing_costs_the_deadline_and_no_more() {
    let server = Scripted::new(|_, caller| caller.wait());
    let store = store(server.url.clone(), 4, LONG);
    let limit = Duration::from_millis(300);
    let calls: [&dyn Fn(Instant) -> Result<(), StoreError>; 6] = [
        &|until| store.ping(until),
        &|until| store.exists(&all_of(&[name(1)]), until).map(drop),
        &|until| fetched(&store, &[name(1)], until).1,
        &|until| store.put(&GROUP, &[(name(1), vec![0; 100])], None, until),
        &|until| store.erase_group(&GROUP, until).map(drop),
        // One that does not read, either: what the sockets hold is soon full.
        &|until| store.put(&GROUP, &[(name(1), vec![0; 64 << 20])], None, until),
    ];
    for call in calls {
        let began = Instant::now();
        assert!(matches!(call(began + limit), Err(StoreError::Late { .. })));
        assert!(
            began.elapsed() >= limit && began.elapsed() < limit + SLACK,
            "{:?}",
            began.elapsed()
        );
    }
}

#[test]
fn a_server_that_dribbles_does_not_outlive_the_deadline() {
    let server = Scripted::new(|_, caller| {
        caller.command();
        caller.say(b"$1000000\r\n");
        for _ in 0..1000 {
            caller.say(b"x");
            thread::sleep(Duration::from_millis(20));
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    let began = Instant::now();
    let (found, outcome) = fetched(&store, &[name(1)], began + Duration::from_millis(300));
    assert!(
        found.is_empty() && matches!(outcome, Err(StoreError::Late { .. })),
        "{outcome:?}"
    );
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
}

#[test]
fn a_server_that_stalls_is_given_up_before_the_deadline() {
    let server = Scripted::new(|_, caller| caller.wait());
    let store = store(server.url.clone(), 1, Duration::from_millis(200));
    let began = Instant::now();
    let error = store.ping(after(LONG)).expect_err("it says nothing");
    assert!(
        matches!(&error, StoreError::Unavailable { reason, .. } if reason.contains("stalled")),
        "{error}"
    );
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
}

#[test]
fn a_deadline_that_has_passed_asks_nobody() {
    let server = Scripted::new(|_, caller| caller.always(b"+PONG\r\n"));
    let store = store(server.url.clone(), 1, LONG);
    let past = Instant::now();
    assert!(matches!(store.ping(past), Err(StoreError::Late { .. })));
    assert_eq!(store.ping(after(LONG)), Ok(()));
    assert!(matches!(store.ping(past), Err(StoreError::Late { .. })));
}

#[test]
fn a_server_that_hangs_up_or_is_not_there_is_unavailable() {
    let server = Scripted::new(|_, caller| {
        // What it has not read makes closing a reset.
        let _ = caller.0.get_ref().peek(&mut [0]);
    });
    let store = store(server.url.clone(), 1, LONG);
    for _ in 0..3 {
        assert!(matches!(store.ping(after(LONG)), Err(StoreError::Unavailable { .. })));
    }
    assert_eq!(server.count(), 3, "a fresh connection is not tried again");
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound")
        .port();
    let nobody = self::store(format!("redis://127.0.0.1:{port}"), 1, LONG);
    assert!(matches!(nobody.ping(after(LONG)), Err(StoreError::Unavailable { .. })));
    let nameless = self::store("redis://no-such-host.invalid".to_owned(), 1, LONG);
    let error = nameless.ping(after(LONG)).expect_err("there is no such name");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
}

#[test]
fn garbage_is_an_error_and_its_connection_is_not_used_again() {
    let server = Scripted::new(|number, caller| match number {
        0 => caller.always(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        1 => caller.always(b":1\r\n"),
        _ => caller.always(b"+PONG\r\n"),
    });
    let store = store(server.url.clone(), 1, LONG);
    for expected in 1..=2 {
        let error = store.ping(after(LONG)).expect_err("no answer to PING");
        assert!(matches!(error, StoreError::Garbled { command: "PING", .. }), "{error}");
        assert_eq!(server.count(), expected);
    }
    assert_eq!(store.ping(after(LONG)), Ok(()));
    assert_eq!(store.ping(after(LONG)), Ok(()));
    assert_eq!(server.count(), 3);
}

/// A late answer is not the next command's.
#[test]
fn an_answer_that_came_too_late_is_nobodys() {
    let server = Scripted::new(|number, caller| {
        while caller.command().is_some() {
            if number == 0 {
                thread::sleep(Duration::from_millis(400));
            }
            caller.say(format!("$1\r\n{number}\r\n").as_bytes());
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    let (_, outcome) = fetched(&store, &[name(1)], after(Duration::from_millis(100)));
    assert!(matches!(outcome, Err(StoreError::Late { .. })));
    thread::sleep(Duration::from_millis(500));
    assert_eq!(
        fetched(&store, &[name(2)], after(LONG)),
        (vec![Some(b"1".to_vec())], Ok(()))
    );
}

#[test]
fn an_answer_that_nobody_asked_for_is_no_answer_to_the_next_command() {
    let server = Scripted::new(|number, caller| {
        while caller.command().is_some() {
            caller.say(format!("$1\r\n{number}\r\n").as_bytes());
            if number == 1 {
                thread::sleep(Duration::from_millis(50));
            }
            if number < 2 {
                caller.say(b"$5\r\nfalse\r\n");
            }
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    // Beside the answer that was asked for, then after it.
    for number in ["0", "1", "2", "2"] {
        let object = Some(number.as_bytes().to_vec());
        assert_eq!(fetched(&store, &[name(1)], after(LONG)), (vec![object], Ok(())));
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn an_idle_connection_that_was_closed_is_replaced_unseen() {
    // Closed while idle; then one that is closed by the next command, which cannot be seen before.
    let server = Scripted::new(|number, caller| match number {
        0 | 1 => {
            caller.command();
            caller.say(b"+PONG\r\n");
            if number == 1 {
                caller.command();
            }
        }
        _ => caller.always(b"+PONG\r\n"),
    });
    let store = store(server.url.clone(), 1, LONG);
    for expected in [1, 2, 3] {
        assert_eq!(store.ping(after(LONG)), Ok(()));
        assert_eq!(server.count(), expected);
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_replacement_that_fails_is_not_replaced() {
    let server = Scripted::new(|number, caller| {
        caller.command();
        if number == 0 {
            caller.say(b"+PONG\r\n");
            caller.command();
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    assert_eq!(store.ping(after(LONG)), Ok(()));
    assert!(matches!(store.ping(after(LONG)), Err(StoreError::Unavailable { .. })));
    assert_eq!(server.count(), 2);
}

#[test]
fn a_fetch_that_breaks_off_keeps_what_came_and_asks_for_nothing_twice() {
    let server = Scripted::new(|_, caller| {
        caller.command();
        caller.say(b"+PONG\r\n");
        caller.command();
        caller.say(b"$3\r\none\r\n$-1\r\n$5\r\nth");
    });
    let store = store(server.url.clone(), 1, LONG);
    assert_eq!(store.ping(after(LONG)), Ok(()));
    let names = [1, 2, 3, 4].map(name);
    let (found, outcome) = fetched(&store, &names, after(LONG));
    assert_eq!(found, [Some(b"one".to_vec()), None]);
    assert!(matches!(outcome, Err(StoreError::Unavailable { .. })), "{outcome:?}");
    assert_eq!(server.count(), 1);
}

#[test]
fn what_is_refused_is_told_in_the_servers_words_and_the_connection_goes_on() {
    let server = Scripted::new(|_, caller| {
        while let Some(command) = caller.command() {
            caller.say(match command[0].as_slice() {
                b"SET" => b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
                b"EXISTS" => b"-LOADING Redis is loading the dataset in memory\r\n",
                b"GET" => b"-MOVED 3999 127.0.0.1:6381\r\n",
                b"CLUSTER" => b"-ERR This instance has cluster support disabled\r\n",
                _ => b"+PONG\r\n",
            });
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    let objects: Vec<(ObjectName, Vec<u8>)> = (0..600).map(|number| (name(number), vec![7; 10])).collect();
    let error = store.put(&GROUP, &objects, None, after(LONG)).expect_err("refused");
    assert!(
        matches!(&error, StoreError::Refused { command: "SET", reason, .. } if reason.starts_with("OOM")),
        "{error}"
    );
    let error = store
        .exists(&all_of(&[name(1), name(2)]), after(LONG))
        .expect_err("refused");
    assert!(
        matches!(&error, StoreError::Unavailable { reason, .. } if reason.starts_with("LOADING")),
        "{error}"
    );
    let error = fetched(&store, &[name(1)], after(LONG)).1.expect_err("refused");
    assert!(error.to_string().contains("cluster"), "{error}");
    assert_eq!(store.ping(after(LONG)), Ok(()));
    assert_eq!(server.count(), 1, "every answer was taken");
}

#[test]
fn a_password_is_shown_by_nothing_not_even_by_a_server_that_repeats_it() {
    let server = Scripted::new(|_, caller| {
        caller.command();
        caller.say(b"-ERR unknown command `AUTH`, with args beginning with: `hunter2`\r\n");
    });
    let settings = RedisSettings {
        url: server.url.replace("redis://", "redis://me:hunter2@"),
        connections: 1,
        timeout: LONG,
    };
    let shown = format!("{settings:?}");
    let store = RedisStore::new(settings).expect("an address");
    let error = store.ping(after(LONG)).expect_err("refused");
    assert!(matches!(error, StoreError::Refused { .. }));
    for text in [
        shown,
        format!("{store:?}"),
        error.to_string(),
        format!("{error:?}"),
        store.address().to_owned(),
    ] {
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("redis://127.0.0.1:"), "{text}");
    }
}

#[test]
fn no_more_connections_are_made_than_allowed_and_waiting_for_one_ends_at_the_deadline() {
    let server = Scripted::new(|_, caller| {
        while caller.command().is_some() {
            thread::sleep(Duration::from_millis(500));
            caller.say(b"+PONG\r\n");
        }
    });
    let store = store(server.url.clone(), 2, LONG);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(store.ping(after(LONG)), Ok(())));
        }
        thread::sleep(Duration::from_millis(100));
        let began = Instant::now();
        let waited = store.ping(after(Duration::from_millis(100)));
        assert!(matches!(waited, Err(StoreError::Late { .. })), "{waited:?}");
        assert!(began.elapsed() < SLACK);
    });
    assert_eq!(server.count(), 2);
}

#[test]
fn a_scan_that_answers_with_others_keys_deletes_none_of_them() {
    let unlinked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&unlinked);
    let server = Scripted::new(move |_, caller| {
        while let Some(command) = caller.command() {
            match command[0].as_slice() {
                b"SCAN" => caller.say(b"*2\r\n$1\r\n0\r\n*1\r\n$7\r\nsession\r\n"),
                b"CLUSTER" => caller.say(b"-ERR This instance has cluster support disabled\r\n"),
                _ => {
                    count.fetch_add(1, Ordering::Relaxed);
                    caller.say(b":1\r\n");
                }
            }
        }
    });
    let store = store(server.url.clone(), 1, LONG);
    let error = store
        .erase_namespace(&GROUP.namespace, after(LONG))
        .expect_err("not asked for");
    assert!(matches!(error, StoreError::Garbled { .. }), "{error}");
    assert_eq!(unlinked.load(Ordering::Relaxed), 0);
}

#[test]
fn an_object_that_redis_cannot_keep_is_not_sent() {
    let store = store("redis://127.0.0.1:1".to_owned(), 1, LONG);
    let large = vec![0; STRING_BYTES_MAX + 1];
    let bytes = large.len();
    let refused = store.put(&GROUP, &[(name(1), large)], None, after(LONG));
    assert!(matches!(refused, Err(StoreError::TooLarge { bytes: told, .. }) if told == bytes));
}

#[test]
fn as_much_is_asked_for_at_once_as_the_window_holds() {
    assert_eq!(window(None), 16);
    assert_eq!(window(Some(64 << 10)), 256);
    assert_eq!(window(Some(1 << 20)), 16);
    assert_eq!(window(Some(100 << 20)), 1);
    assert_eq!(window(Some(0)), 256);
    assert_eq!(
        key(&GROUP, &name(0xabc)),
        format!(
            "kvtier:1:{}:{}:bc0a{}",
            "01".repeat(16),
            "02".repeat(16),
            "00".repeat(14)
        )
    );
}
