//! A store against servers that do what a test wants, and against a real one.

mod real;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const SHORT: Duration = Duration::from_millis(600);
const LONG: Duration = Duration::from_secs(20);

const GROUP: ObjectGroup = ObjectGroup {
    namespace: [1; 16],
    generation: [2; 16],
};

fn after(duration: Duration) -> Instant {
    Instant::now() + duration
}

fn name(number: usize) -> ObjectName {
    ObjectName((number as u128).to_le_bytes())
}

/// Of bytes that differ from those of any other.
fn object(number: usize, bytes: usize) -> (ObjectName, Vec<u8>) {
    let mut object = vec![0; bytes];
    blake3::Hasher::new()
        .update(&number.to_le_bytes())
        .finalize_xof()
        .fill(&mut object);
    (name(number), object)
}

fn keys(numbers: impl IntoIterator<Item = usize>) -> Vec<(ObjectGroup, ObjectName)> {
    numbers.into_iter().map(|number| (GROUP, name(number))).collect()
}

fn fetched(
    store: &S3Store,
    keys: &[(ObjectGroup, ObjectName)],
    until: Instant,
) -> (Vec<Option<Vec<u8>>>, Result<(), StoreError>) {
    let mut objects = Vec::new();
    let outcome = store.fetch(keys, until, &mut |position, object| {
        assert_eq!(position, objects.len(), "in order");
        objects.push(object.map(<[u8]>::to_vec));
    });
    (objects, outcome)
}

fn credentials(directory: &tempfile::TempDir) -> PathBuf {
    let file = directory.path().join("credentials");
    std::fs::write(
        &file,
        "[default]\naws_access_key_id = AKIDTEST\naws_secret_access_key = hush-hush\n",
    )
    .expect("written");
    file
}

/// Where a real server is, and the file with its keys: from who started it.
fn real_server() -> Option<(String, PathBuf)> {
    let (endpoint, file) = (
        std::env::var("KVTIER_S3_ENDPOINT"),
        std::env::var("KVTIER_S3_CREDENTIALS"),
    );
    if let (Ok(endpoint), Ok(file)) = (endpoint, file) {
        return Some((endpoint, file.into()));
    }
    eprintln!("skipped: S3: no server is named; cargo xtask test remote brings one");
    None
}

fn settings(endpoint: String, credentials: PathBuf) -> S3Settings {
    S3Settings {
        bucket: "blocks".to_owned(),
        prefix: "team/a".to_owned(),
        endpoint: Some(endpoint),
        region: "us-east-1".to_owned(),
        path_style: true,
        credentials,
        requests: 16,
        ttl: Duration::from_secs(3600),
        timeout: Duration::from_secs(2),
        index_objects: 10_000,
    }
}

/// A request, as far as a script wants to know it.
struct Request {
    method: String,
    target: String,
    range: Option<String>,
}

/// A server that answers by a script: the bytes after a request's, or nothing, for ever.
struct Scripted {
    address: String,
    asked: Arc<AtomicUsize>,
    directory: tempfile::TempDir,
}

impl Scripted {
    fn new(script: impl Fn(usize, &Request) -> Option<Vec<u8>> + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let (asked, script) = (Arc::new(AtomicUsize::new(0)), Arc::new(script));
        let count = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (count, script) = (Arc::clone(&count), Arc::clone(&script));
                thread::spawn(move || serve(&stream, &count, &*script));
            }
        });
        Scripted {
            address,
            asked,
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    fn store(&self) -> S3Store {
        S3Store::new(&settings(self.address.clone(), credentials(&self.directory))).expect("settings")
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

fn serve(stream: &TcpStream, count: &AtomicUsize, script: &dyn Fn(usize, &Request) -> Option<Vec<u8>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line == "\r\n" {
                break;
            }
            lines.push(line.trim_end().to_owned());
        }
        let header = |wanted: &str| {
            let found = lines.iter().filter_map(|line| line.split_once(": "));
            let mut found = found.filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
            found.next().map(|(_, value)| value.to_owned())
        };
        let length = header("content-length")
            .and_then(|length| length.parse().ok())
            .unwrap_or(0);
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut first = lines[0].split(' ').map(str::to_owned);
        let request = Request {
            method: first.next().unwrap_or_default(),
            target: first.next().unwrap_or_default(),
            range: header("range"),
        };
        let Some(answer) = script(count.fetch_add(1, Ordering::Relaxed), &request) else {
            thread::sleep(LONG);
            return;
        };
        if (&*stream).write_all(&answer).is_err() {
            return;
        }
    }
}

fn answer(status: &str, body: &[u8]) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    answer
}

fn refusal(status: &str, code: &str) -> Vec<u8> {
    answer(
        status,
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>words</Message></Error>").as_bytes(),
    )
}

fn listing(keys: &[(String, usize)]) -> Vec<u8> {
    let object = |(key, bytes): &(String, usize)| {
        format!(
            "<Contents><Key>{key}</Key><Size>{bytes}</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        )
    };
    let objects: String = keys.iter().map(object).collect();
    let page = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
    );
    answer("200 OK", page.as_bytes())
}

/// A server with one pack, which answers ranges of it as `get` wants.
fn with_pack(
    objects: &[(ObjectName, Vec<u8>)],
    get: impl Fn(Vec<u8>) -> Option<Vec<u8>> + Send + Sync + 'static,
) -> Scripted {
    let (pack, _) = pack::encode(objects);
    let id = PackId {
        expires_s: EXPIRES_NEVER,
        random: 5,
    };
    let key = format!(
        "team/a/kvtier/1/{}/{}/{id}",
        ObjectName(GROUP.namespace),
        ObjectName(GROUP.generation)
    );
    Scripted::new(move |_, request| {
        if request.target.contains("list-type=2") {
            return Some(listing(&[(key.clone(), pack.len())]));
        }
        let range = request.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
        let (from, to) = range.and_then(|range| range.split_once('-')).expect("a range");
        let (from, to): (usize, usize) = (from.parse().expect("a number"), to.parse().expect("a number"));
        let bytes = pack[from..=to.min(pack.len() - 1)].to_vec();
        // The front is told as it is.
        if from == 0 {
            Some(answer("206 Partial Content", &bytes))
        } else {
            get(bytes)
        }
    })
}

fn ok(bytes: &[u8]) -> Option<Vec<u8>> {
    Some(answer("206 Partial Content", bytes))
}

#[test]
fn what_a_listing_found_is_fetched_neighbours_with_one_request() {
    let objects: Vec<_> = (0..40).map(|number| object(number, 10_000)).collect();
    let server = with_pack(&objects, |bytes| ok(&bytes));
    let store = server.store();
    assert_eq!(store.exists(&keys([3, 99]), after(LONG)), Ok(vec![true, false]));
    assert_eq!(store.indexed(), 40);
    let before = server.asked();
    let (found, outcome) = fetched(&store, &keys(0..40), after(LONG));
    assert_eq!(outcome, Ok(()));
    assert!(
        found
            .iter()
            .zip(&objects)
            .all(|(found, (_, object))| found.as_ref() == Some(object))
    );
    assert_eq!(server.asked() - before, 1);
    // Gaps, and another order.
    let (found, outcome) = fetched(&store, &keys([99, 7, 8, 98, 2, 97]), after(LONG));
    assert_eq!(outcome, Ok(()));
    let expected = [None, Some(7), Some(8), None, Some(2), None];
    let expected: Vec<_> = expected
        .map(|number: Option<usize>| number.map(|number| object(number, 10_000).1))
        .into();
    assert_eq!(found, expected);
    assert_eq!(server.asked() - before, 3);
}

#[test]
fn a_large_object_is_read_in_ranges_and_put_together() {
    let bytes = usize::try_from(RANGE_BYTES).expect("small") * 2 + 12_345;
    let objects = [object(1, 1000), object(2, bytes), object(3, 1000)];
    let server = with_pack(&objects, |bytes| ok(&bytes));
    let store = server.store();
    let (found, outcome) = fetched(&store, &keys([1, 2, 3]), after(LONG));
    assert_eq!(outcome, Ok(()));
    assert!(
        found
            .iter()
            .zip(&objects)
            .all(|(found, (_, object))| found.as_ref() == Some(object))
    );
}

#[test]
fn an_answer_that_is_too_short_or_too_long_gives_no_object() {
    let objects = [object(1, 1000), object(2, 1000)];
    let server = with_pack(&objects, |bytes| ok(&bytes[..bytes.len() - 1]));
    let (found, outcome) = fetched(&server.store(), &keys([1, 2]), after(LONG));
    assert_eq!(
        (&found[0], &found[1], outcome),
        (&Some(objects[0].1.clone()), &None, Ok(()))
    );
    let server = with_pack(&objects, |bytes| ok(&[bytes.as_slice(), b"more"].concat()));
    let (found, outcome) = fetched(&server.store(), &keys([1, 2]), after(LONG));
    assert!(found.is_empty());
    assert!(matches!(outcome, Err(StoreError::Garbled { .. })), "{outcome:?}");
}

#[test]
fn what_is_gone_is_a_miss_and_not_looked_for_again() {
    let objects = [object(1, 1000)];
    let server = with_pack(&objects, |_| Some(refusal("404 Not Found", "NoSuchKey")));
    let store = server.store();
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![true]));
    assert_eq!(fetched(&store, &keys([1]), after(LONG)), (vec![None], Ok(())));
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![false]));
}

#[test]
fn a_server_that_says_nothing_costs_the_deadline_and_is_away_until_it_answers() {
    let objects = [object(1, 1000)];
    let server = with_pack(&objects, |_| None);
    let store = server.store();
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![true]));
    let begun = Instant::now();
    let (found, outcome) = fetched(&store, &keys([1]), after(SHORT));
    assert!(begun.elapsed() < SHORT * 3, "{:?}", begun.elapsed());
    assert!(
        found.is_empty() && matches!(outcome, Err(StoreError::Late { .. })),
        "{outcome:?}"
    );
    // It lists, so it is there: what is known from memory alone would not have said so.
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![true]));
    let silent = Scripted::new(|_, _| None);
    let store = silent.store();
    let begun = Instant::now();
    assert!(matches!(store.ping(after(SHORT)), Err(StoreError::Late { .. })));
    assert!(store.exists(&keys([1]), after(SHORT)).is_err());
    assert!(begun.elapsed() < SHORT * 5, "{:?}", begun.elapsed());
}

#[test]
fn a_server_that_is_not_there_is_unavailable_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    let directory = tempfile::tempdir().expect("a directory");
    let store = S3Store::new(&settings(address.clone(), credentials(&directory))).expect("settings");
    let begun = Instant::now();
    for outcome in [
        store.ping(after(LONG)).err(),
        store.exists(&keys([1]), after(LONG)).err(),
        store.put(&GROUP, &[object(1, 100)], None, after(LONG)).err(),
        store.erase_namespace(&GROUP.namespace, after(LONG)).err(),
    ] {
        let error = outcome.expect("nobody is there");
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().contains(&address), "{error}");
    }
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
}

#[test]
fn what_is_refused_is_told_in_the_servers_words_and_never_with_a_secret() {
    let server = Scripted::new(|_, request| {
        Some(match request.method.as_str() {
            "HEAD" => b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_vec(),
            "PUT" => refusal("400 Bad Request", "QuotaExceeded"),
            _ => refusal("403 Forbidden", "SignatureDoesNotMatch"),
        })
    });
    let store = server.store();
    let refused = [
        (store.ping(after(LONG)), "access denied"),
        (
            store.put(&GROUP, &[object(1, 10)], None, after(LONG)),
            "QuotaExceeded words",
        ),
        (
            store.exists(&keys([1]), after(LONG)).map(drop),
            "SignatureDoesNotMatch words",
        ),
    ];
    for (outcome, words) in refused {
        let error = outcome.expect_err("refused");
        assert!(
            matches!(&error, StoreError::Refused { reason, .. } if reason == words),
            "{error:?}"
        );
        assert!(!format!("{error} {error:?} {store:?}").contains("hush"), "{error}");
    }
}

#[test]
fn a_busy_server_is_asked_again_and_then_given_up() {
    let busy_once = Scripted::new(|number, _| {
        Some(if number == 0 {
            refusal("503 Service Unavailable", "SlowDown")
        } else {
            answer("200 OK", b"")
        })
    });
    assert_eq!(
        busy_once.store().put(&GROUP, &[object(1, 10)], None, after(LONG)),
        Ok(())
    );
    let busy = Scripted::new(|_, _| Some(refusal("503 Service Unavailable", "SlowDown")));
    let outcome = busy.store().put(&GROUP, &[object(1, 10)], None, after(LONG));
    assert!(matches!(outcome, Err(StoreError::Unavailable { .. })), "{outcome:?}");
    assert_eq!(busy.asked(), 3);
}

#[test]
fn a_put_that_an_earlier_try_has_done_is_done() {
    let server = Scripted::new(|number, _| {
        Some(if number == 0 {
            refusal("500 Internal Server Error", "InternalError")
        } else {
            refusal("412 Precondition Failed", "PreconditionFailed")
        })
    });
    let store = server.store();
    assert_eq!(store.put(&GROUP, &[object(1, 10)], None, after(LONG)), Ok(()));
    assert_eq!(store.located(&keys([1]))[0].map(|at| at.length), Some(10));
}

#[test]
fn a_listing_with_keys_of_others_deletes_none_of_them() {
    let server = Scripted::new(|_, request| {
        let body: &[u8] = if request.target.contains("versions") {
            b"<ListVersionsResult><Version><Key>somebody/elses</Key><VersionId>null</VersionId></Version></ListVersionsResult>"
        } else if request.target.contains("uploads") {
            b"<ListMultipartUploadsResult><Upload><Key>somebody/elses</Key><UploadId>7</UploadId></Upload></ListMultipartUploadsResult>"
        } else {
            panic!("{} {}", request.method, request.target)
        };
        Some(answer("200 OK", body))
    });
    let erased = server.store().erase_namespace(&GROUP.namespace, after(LONG));
    assert!(matches!(erased, Err(StoreError::Garbled { .. })), "{erased:?}");
    assert_eq!(server.asked(), 3, "uploads with the prefix and without, and versions");
}

#[test]
fn a_page_without_anything_is_not_the_end() {
    let (pack, _) = pack::encode(&[object(1, 100)]);
    let (group, id) = (
        format!("{}/{}", ObjectName(GROUP.namespace), ObjectName(GROUP.generation)),
        EXPIRES_NEVER,
    );
    let key = format!(
        "team/a/kvtier/1/{group}/{}",
        PackId {
            expires_s: id,
            random: 5
        }
    );
    let deleted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&deleted);
    let server = Scripted::new(move |_, request| {
        let target = request.target.as_str();
        let (empty, marker) = ("<IsTruncated>true</IsTruncated>", "<NextKeyMarker>m</NextKeyMarker>");
        let body = if request.method == "POST" {
            count.fetch_add(1, Ordering::Relaxed);
            "<DeleteResult></DeleteResult>".to_owned()
        } else if target.contains("list-type=2") && !target.contains("continuation-token=t") {
            format!("<ListBucketResult>{empty}<NextContinuationToken>t</NextContinuationToken></ListBucketResult>")
        } else if target.contains("list-type=2") {
            return Some(listing(&[(key.clone(), pack.len())]));
        } else if target.contains("uploads") {
            "<ListMultipartUploadsResult></ListMultipartUploadsResult>".to_owned()
        } else if target.contains("versions") && !target.contains("key-marker=m") {
            format!("<ListVersionsResult>{empty}{marker}</ListVersionsResult>")
        } else if target.contains("versions") {
            format!(
                "<ListVersionsResult><Version><Key>{key}</Key><VersionId>3</VersionId></Version></ListVersionsResult>"
            )
        } else {
            return ok(&pack);
        };
        Some(answer("200 OK", body.as_bytes()))
    });
    let store = server.store();
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![true]));
    // The server lists it whatever is deleted: behind an empty page, in the second look, too.
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG));
    assert_eq!(erased, Ok(Erased { deleted: 1, left: 1 }));
    assert_eq!(deleted.load(Ordering::Relaxed), 1);
}

#[test]
fn a_part_of_a_listing_that_does_not_say_where_it_goes_on_is_no_listing() {
    let server = Scripted::new(|_, request| {
        let kind = ["versions", "uploads"]
            .into_iter()
            .find(|kind| request.target.contains(kind));
        let root = match kind {
            Some("versions") => "ListVersionsResult",
            Some(_) => {
                return Some(answer(
                    "200 OK",
                    b"<ListMultipartUploadsResult></ListMultipartUploadsResult>",
                ));
            }
            None => "ListBucketResult",
        };
        Some(answer(
            "200 OK",
            format!("<{root}><IsTruncated>true</IsTruncated></{root}>").as_bytes(),
        ))
    });
    let store = server.store();
    assert!(matches!(
        store.exists(&keys([1]), after(LONG)),
        Err(StoreError::Garbled { .. })
    ));
    assert!(matches!(
        store.erase_namespace(&GROUP.namespace, after(LONG)),
        Err(StoreError::Garbled { .. })
    ));
}

#[test]
fn a_pack_that_may_not_be_read_keeps_nobody_from_the_others_and_goes_with_a_deletion() {
    let group = format!(
        "team/a/kvtier/1/{}/{}",
        ObjectName(GROUP.namespace),
        ObjectName(GROUP.generation)
    );
    let id = |random| PackId {
        expires_s: EXPIRES_NEVER,
        random,
    };
    let (good, locked) = (format!("{group}/{}", id(1)), format!("{group}/{}", id(2)));
    let (pack, _) = pack::encode(&[object(1, 100)]);
    let (asked, deleted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, posts) = (Arc::clone(&asked), Arc::clone(&deleted));
    let server = Scripted::new(move |_, request| {
        if request.method == "POST" {
            posts.fetch_add(1, Ordering::Relaxed);
            return Some(answer("200 OK", b"<DeleteResult></DeleteResult>"));
        }
        if request.target.contains("list-type=2") {
            return Some(listing(&[(good.clone(), pack.len()), (locked.clone(), 100)]));
        }
        if request.target.contains(&id(2).to_string()) {
            count.fetch_add(1, Ordering::Relaxed);
            return Some(refusal("403 Forbidden", "InvalidObjectState"));
        }
        ok(&pack)
    });
    let store = server.store();
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![true]));
    thread::sleep(LOOK_AGAIN + Duration::from_millis(100));
    assert_eq!(store.exists(&keys([1, 2]), after(LONG)), Ok(vec![true, false]));
    assert_eq!(asked.load(Ordering::Relaxed), 1, "it is not tried every two seconds");
    // Whether it has the block nobody can say: it goes.
    assert_eq!(store.remove(&GROUP, &[name(7)], after(LONG)), Ok(vec![false]));
    assert_eq!(deleted.load(Ordering::Relaxed), 1);
}

#[test]
fn a_deletion_among_more_than_the_index_holds_is_not_sure() {
    let objects: Vec<_> = (0..10).map(|number| object(number, 100)).collect();
    let server = with_pack(&objects, |bytes| ok(&bytes));
    let small = S3Settings {
        index_objects: 9,
        ..settings(server.address.clone(), credentials(&server.directory))
    };
    let store = S3Store::new(&small).expect("settings");
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![false]));
    let removed = store.remove(&GROUP, &[name(1)], after(LONG));
    assert!(matches!(removed, Err(StoreError::Unsure { .. })), "{removed:?}");
}

#[test]
fn a_deletion_that_the_server_did_not_do_is_an_error() {
    let server = Scripted::new(|_, request| {
        let key = format!("team/a/kvtier/1/{}/x", ObjectName(GROUP.namespace));
        let body = if request.method == "POST" {
            format!(
                "<DeleteResult><Error><Key>{key}</Key><Code>AccessDenied</Code><Message>locked</Message></Error></DeleteResult>"
            )
        } else if request.target.contains("versions") {
            format!(
                "<ListVersionsResult><Version><Key>{key}</Key><VersionId>3</VersionId></Version></ListVersionsResult>"
            )
        } else {
            "<ListMultipartUploadsResult></ListMultipartUploadsResult>".to_owned()
        };
        Some(answer("200 OK", body.as_bytes()))
    });
    let erased = server.store().erase_namespace(&GROUP.namespace, after(LONG));
    assert!(
        matches!(&erased, Err(StoreError::Refused { reason, .. }) if reason == "AccessDenied locked"),
        "{erased:?}"
    );
}

#[test]
fn settings_that_cannot_be_meant_are_refused_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let good = settings("http://127.0.0.1:1".to_owned(), credentials(&directory));
    assert!(S3Store::new(&good).is_ok());
    let refused = |change: &dyn Fn(&mut S3Settings)| {
        let mut settings = good.clone();
        change(&mut settings);
        let error = S3Store::new(&settings).expect_err("refused").to_string();
        assert!(!error.contains("hush"), "{error}");
        error
    };
    assert!(refused(&|settings| settings.bucket = "a/b".to_owned()).contains("bucket"));
    assert!(refused(&|settings| settings.prefix = "/x".to_owned()).contains("slash"));
    assert!(refused(&|settings| settings.endpoint = Some("localhost:9000".to_owned())).contains("http://"));
    assert!(refused(&|settings| settings.endpoint = Some("http://me:word@host".to_owned())).contains("user"));
    assert!(refused(&|settings| settings.credentials = "/nonexistent".into()).contains("aws configure"));
}
