//! Against a real server.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Config, Region, SharedCredentialsProvider};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::types::{BucketVersioningStatus, VersioningConfiguration};

use super::*;

/// A bucket of one test.
struct Real {
    client: Client,
    runtime: Runtime,
    settings: S3Settings,
}

impl Real {
    fn new(bucket: &str) -> Option<Real> {
        let (endpoint, file) = real_server()?;
        let settings = S3Settings {
            bucket: format!("kvtier-{bucket}-{}", std::process::id()),
            ..settings(endpoint.clone(), file)
        };
        let http = aws_smithy_http_client::Builder::new().build_http();
        let config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .credentials_provider(SharedCredentialsProvider::new(FromFile(settings.credentials.clone())))
            .endpoint_url(endpoint)
            .force_path_style(true)
            .http_client(http)
            .build();
        let (client, runtime) = (Client::from_conf(config), Runtime::new().expect("threads"));
        let made = client.create_bucket().bucket(&settings.bucket).send();
        runtime.block_on(made).expect("a bucket");
        Some(Real {
            client,
            runtime,
            settings,
        })
    }

    fn store(&self) -> S3Store {
        S3Store::new(&self.settings).expect("settings")
    }

    fn keys(&self) -> Vec<String> {
        let asked = self.client.list_objects_v2().bucket(&self.settings.bucket).send();
        let page = self.runtime.block_on(asked).expect("a listing");
        page.contents()
            .iter()
            .filter_map(|object| object.key().map(str::to_owned))
            .collect()
    }

    fn version_this(&self) {
        let on = VersioningConfiguration::builder()
            .status(BucketVersioningStatus::Enabled)
            .build();
        let asked = self.client.put_bucket_versioning().bucket(&self.settings.bucket);
        let asked = asked.versioning_configuration(on).send();
        self.runtime.block_on(asked).expect("it keeps versions");
    }

    /// Objects, versions of them and marks, as the server counts.
    fn versions(&self) -> usize {
        let asked = self.client.list_object_versions().bucket(&self.settings.bucket).send();
        let page = self.runtime.block_on(asked).expect("a listing");
        page.versions().len() + page.delete_markers().len()
    }

    /// Begins one and sends a part: whether that came before somebody took the upload back.
    fn begin_upload(&self, key: &str) -> bool {
        let asked = self
            .client
            .create_multipart_upload()
            .bucket(&self.settings.bucket)
            .key(key)
            .send();
        let upload = self.runtime.block_on(asked).expect("begun");
        let part = self.client.upload_part().bucket(&self.settings.bucket).key(key);
        let part = part.upload_id(upload.upload_id().expect("an upload")).part_number(1);
        let sent = part
            .body(aws_sdk_s3::primitives::ByteStream::from(vec![7; 100_000]))
            .send();
        match self.runtime.block_on(sent) {
            Ok(_) => true,
            Err(refused) => {
                assert_eq!(refused.code(), Some("NoSuchUpload"), "{refused:?}");
                false
            }
        }
    }

    fn uploads(&self) -> usize {
        let asked = self
            .client
            .list_multipart_uploads()
            .bucket(&self.settings.bucket)
            .send();
        self.runtime.block_on(asked).expect("a listing").uploads().len()
    }
}

fn holds(store: &S3Store, objects: &[(ObjectName, Vec<u8>)]) -> bool {
    let keys: Vec<_> = objects.iter().map(|(name, _)| (GROUP, *name)).collect();
    let (found, outcome) = fetched(store, &keys, after(LONG));
    outcome.expect("fetched");
    found
        .iter()
        .zip(objects)
        .all(|(found, (_, object))| found.as_ref() == Some(object))
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let limit = after(LONG);
    while !is_so() {
        assert!(Instant::now() < limit, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_hundred_small_objects_are_one_pack_and_another_node_finds_them() {
    let Some(real) = Real::new("packs") else { return };
    let (writer, objects) = (
        real.store(),
        (0..100)
            .map(|number| object(number, 20_000 + number))
            .collect::<Vec<_>>(),
    );
    writer.ping(after(LONG)).expect("it lets us in");
    writer
        .put(&GROUP, &objects, Some(Duration::from_secs(3600)), after(LONG))
        .expect("put");
    assert!(holds(&writer, &objects));
    let keys = real.keys();
    assert_eq!(keys.len(), 1);
    assert!(
        keys[0].starts_with("team/a/kvtier/1/01010101010101010101010101010101/0202"),
        "{keys:?}"
    );
    let reader = real.store();
    assert!(holds(&reader, &objects));
    // Put while the reader runs: found by its next look.
    let late = [object(1000, 5000)];
    writer
        .put(&GROUP, &late, Some(Duration::from_secs(3600)), after(LONG))
        .expect("put");
    until("the new pack is found", || {
        reader.exists(&[(GROUP, late[0].0)], after(LONG)) == Ok(vec![true])
    });
    assert!(holds(&reader, &late));
}

#[test]
fn large_objects_go_in_parts_and_come_in_ranges() {
    let Some(real) = Real::new("parts") else { return };
    let objects = [
        object(1, 100),
        object(2, 20 << 20),
        object(3, 9 << 20),
        object(4, 1 << 20),
    ];
    let store = real.store();
    store.put(&GROUP, &objects, None, after(LONG)).expect("put");
    assert_eq!(
        real.keys().len(),
        4,
        "each beyond the first is larger than what is left of a pack"
    );
    assert!(holds(&store, &objects));
    assert!(holds(&real.store(), &objects));
    assert_eq!(real.uploads(), 0);
}

#[test]
fn a_deletion_takes_every_pack_that_has_the_object_also_those_of_others() {
    let Some(real) = Real::new("deleted") else { return };
    let (mine, theirs) = (real.store(), real.store());
    let forever = Some(Duration::from_secs(3600));
    mine.put(&GROUP, &[object(1, 1000), object(2, 1000)], forever, after(LONG))
        .expect("put");
    mine.put(&GROUP, &[object(3, 1000)], forever, after(LONG)).expect("put");
    // The same again, by another node, which this one has not heard of.
    theirs
        .put(&GROUP, &[object(1, 1000)], forever, after(LONG))
        .expect("put");
    assert_eq!(
        mine.remove(&GROUP, &[name(1), name(9)], after(LONG)),
        Ok(vec![true, false])
    );
    assert_eq!(real.keys().len(), 1);
    assert_eq!(mine.exists(&keys([1, 2, 3]), after(LONG)), Ok(vec![false, false, true]));
    assert!(holds(&theirs, &[object(3, 1000)]));
    // Another node learns of it when it fetches.
    let (found, outcome) = fetched(&theirs, &keys([1]), after(LONG));
    assert_eq!((found, outcome), (vec![None], Ok(())));
}

#[test]
fn an_erasure_takes_one_namespace_with_all_its_versions_and_what_was_never_completed() {
    let Some(real) = Real::new("erased") else { return };
    real.version_this();
    let store = real.store();
    let other = ObjectGroup {
        namespace: [9; 16],
        generation: [2; 16],
    };
    for group in [
        GROUP,
        ObjectGroup {
            generation: [3; 16],
            ..GROUP
        },
        other,
    ] {
        store.put(&group, &[object(1, 1000)], None, after(LONG)).expect("put");
    }
    // A mark, and the version that it hides.
    store.remove(&GROUP, &[name(1)], after(LONG)).expect("removed");
    let namespace = ObjectName(GROUP.namespace);
    assert!(real.begin_upload(&format!("team/a/kvtier/1/{namespace}/left-behind")));
    assert!(real.begin_upload("somebody/elses"));
    assert_eq!((real.versions(), real.uploads()), (4, 2));
    let erased = store.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!(erased, Erased { deleted: 4, left: 0 });
    assert_eq!((real.versions(), real.uploads()), (1, 1), "others' stay");
    assert_eq!(store.exists(&keys([1]), after(LONG)), Ok(vec![false]));
    assert_eq!(store.exists(&[(other, name(1))], after(LONG)), Ok(vec![true]));
    let again = store.erase_namespace(&GROUP.namespace, after(LONG)).expect("erased");
    assert_eq!(again, Erased::default());
}

#[test]
fn what_is_over_is_a_miss_at_once_and_deleted_before_long() {
    let Some(real) = Real::new("over") else { return };
    let settings = S3Settings {
        ttl: Duration::from_secs(2),
        ..real.settings.clone()
    };
    let store = S3Store::new(&settings).expect("settings");
    store.put(&GROUP, &[object(1, 1000)], None, after(LONG)).expect("put");
    store
        .put(&GROUP, &[object(2, 1000)], Some(Duration::from_secs(2)), after(LONG))
        .expect("put");
    assert_eq!(store.exists(&keys([1, 2]), after(LONG)), Ok(vec![true, true]));
    until("it is over", || {
        store.exists(&keys([1, 2]), after(LONG)) == Ok(vec![true, false])
    });
    until("it is deleted", || real.keys().len() == 1);
    // So is what a node that is gone began to put and never completed, at times before its first part comes.
    real.begin_upload(&format!(
        "team/a/kvtier/1/x/y/{}",
        PackId {
            expires_s: 1,
            random: 2
        }
    ));
    until("the upload is taken back", || real.uploads() == 0);
}

#[test]
fn an_upload_in_parts_whose_time_is_over_is_taken_back() {
    let Some(real) = Real::new("late") else { return };
    let store = real.store();
    // Enough for the first words, not for a hundred megabytes.
    let mut patience = Duration::from_millis(100);
    loop {
        let put = store.put(&GROUP, &[object(1, 100 << 20)], None, after(patience));
        if matches!(put, Err(StoreError::Late { .. })) {
            break;
        }
        patience /= 2;
    }
    until("nothing is left of it", || real.uploads() == 0);
    thread::sleep(Duration::from_secs(1));
    assert_eq!((real.uploads(), real.keys().len()), (0, 0));
}

#[test]
fn whoever_is_not_let_in_and_a_bucket_that_is_not_there_are_told_in_words() {
    let Some(real) = Real::new("refused") else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let stranger = S3Settings {
        credentials: credentials(&directory),
        ..real.settings.clone()
    };
    let stranger = S3Store::new(&stranger).expect("settings");
    let refused = stranger
        .exists(&keys([1]), after(LONG))
        .expect_err("refused")
        .to_string();
    assert!(refused.contains("InvalidAccessKeyId"), "{refused}");
    let refused = stranger.ping(after(LONG)).expect_err("refused").to_string();
    assert!(refused.contains("access denied"), "{refused}");
    let nowhere = S3Settings {
        bucket: "kvtier-nowhere".to_owned(),
        ..real.settings.clone()
    };
    let nowhere = S3Store::new(&nowhere).expect("settings");
    let refused = nowhere.ping(after(LONG)).expect_err("refused").to_string();
    assert!(refused.contains("no such bucket"), "{refused}");
    let refused = nowhere.put(&GROUP, &[object(1, 10)], None, after(LONG));
    assert!(refused.expect_err("refused").to_string().contains("NoSuchBucket"));
}

#[test]
fn a_pack_that_was_changed_or_is_somebody_elses_is_left_alone() {
    let Some(real) = Real::new("foreign") else { return };
    let store = real.store();
    store.put(&GROUP, &[object(1, 1000)], None, after(LONG)).expect("put");
    let key = real.keys().remove(0);
    let (group, _) = key.rsplit_once('/').expect("a key");
    let mine = PackId {
        expires_s: EXPIRES_NEVER,
        random: 1,
    };
    for (name, content) in [
        ("notes.txt".to_owned(), b"mine".to_vec()),
        (mine.to_string(), vec![0x11; 40_000]),
        ("fffffffffe-000000000000000g".to_owned(), Vec::new()),
    ] {
        let asked = real
            .client
            .put_object()
            .bucket(&real.settings.bucket)
            .key(format!("{group}/{name}"));
        let asked = asked.body(content.into()).send();
        real.runtime.block_on(asked).expect("put");
    }
    let reader = real.store();
    assert!(holds(&reader, &[object(1, 1000)]));
    assert_eq!(reader.indexed(), 1);
}
