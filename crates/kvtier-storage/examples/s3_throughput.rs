//! What sealing, an S3 server and opening let through: `s3_throughput ENDPOINT BUCKET CREDENTIALS_FILE [BYTES] [OBJECTS]`.
//!
//! One thread asks. It makes the bucket where there is none, puts objects under a namespace of its own, fetches them, and erases them again. In
//! turns with that the SDK alone asks for as many bytes, in sixteen ranges beside each other, and drops them: what the server and the
//! sockets can do. The last line has the ratio of the two, medians of the rounds.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Config, Region, ResponseChecksumValidation};
use kvtier_core::{BlockHash, Labels, Parent};
use kvtier_storage::remote::s3::{S3Settings, S3Store};
use kvtier_storage::remote::{Contents, ObjectGroup, ObjectKey, ObjectName, ObjectStore};
use kvtier_transfer::memory::MemoryRegion;

const ROUNDS: usize = 9;
/// Of the SDK alone.
const RANGES: usize = 16;
const PLAIN: &str = "throughput-check";

/// Reads one object in ranges beside each other, and drops it.
async fn raw(client: &Client, bucket: &str, bytes: usize) -> Result<Duration, Box<dyn Error>> {
    let began = Instant::now();
    let each = bytes.div_ceil(RANGES);
    let mut reading = Vec::new();
    for from in (0..bytes).step_by(each) {
        let asked = client.get_object().bucket(bucket).key(PLAIN);
        let asked = asked.range(format!("bytes={from}-{}", bytes.min(from + each) - 1));
        reading.push(tokio::spawn(async move {
            let mut got = asked.send().await.map_err(|error| error.to_string())?;
            let mut read = 0;
            while let Some(piece) = got.body.next().await {
                read += piece.map_err(|error| error.to_string())?.len();
            }
            Ok::<usize, String>(read)
        }));
    }
    let mut read = 0;
    for one in reading {
        read += one.await??;
    }
    if read != bytes {
        return Err(format!("{read} of {bytes} bytes came").into());
    }
    Ok(began.elapsed())
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations[durations.len() / 2]
}

/// The keys of the file's first section: enough for a measurement.
fn keys_of(file: &PathBuf) -> Result<Credentials, Box<dyn Error>> {
    let text = std::fs::read_to_string(file)?;
    let value = |wanted: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| name.trim() == wanted);
        found
            .map(|(_, value)| value.trim().to_owned())
            .ok_or(format!("no {wanted}"))
    };
    let (key, secret) = (value("aws_access_key_id")?, value("aws_secret_access_key")?);
    Ok(Credentials::new(key, secret, None, None, "file"))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || {
        arguments
            .next()
            .ok_or("give ENDPOINT BUCKET CREDENTIALS_FILE [BYTES] [OBJECTS]")
    };
    let (endpoint, bucket, credentials) = (next()?, next()?, PathBuf::from(next()?));
    let bytes: usize = arguments.next().map_or(Ok(1 << 20), |bytes| bytes.parse())?;
    let count: usize = arguments.next().map_or(Ok(64), |count| count.parse())?;
    let until = Instant::now() + Duration::from_secs(300);
    let store = S3Store::new(&S3Settings {
        bucket: bucket.clone(),
        prefix: String::new(),
        endpoint: Some(endpoint.clone()),
        region: "us-east-1".to_owned(),
        path_style: true,
        credentials: credentials.clone(),
        requests: RANGES,
        ttl: Duration::from_secs(3600),
        timeout: Duration::from_secs(5),
        index_objects: 1_000_000,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let http = aws_smithy_http_client::Builder::new().build_http();
    let client = Client::from_conf(
        Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .credentials_provider(keys_of(&credentials)?)
            .endpoint_url(endpoint)
            .force_path_style(true)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .http_client(http)
            .build(),
    );
    if store.ping(until).is_err() {
        runtime.block_on(client.create_bucket().bucket(&bucket).send())?;
    }

    let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096))?;
    let block = region.slice(0, bytes)?;
    let mut noise = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    block.copy_from_slice(&noise)?;
    let key = ObjectKey::new(&[7; 32]);
    let group = ObjectGroup {
        namespace: *b"throughput check",
        generation: [1; 16],
    };
    let contents = Contents {
        length: u32::try_from(bytes)?,
        tokens: 16,
        parent: Parent::Root,
        labels: Labels::None,
        checksum: block.crc32c(),
    };
    let names: Vec<ObjectName> = (0..count)
        .map(|number| {
            let mut hash = [0; 16];
            hash[..8].copy_from_slice(&(number as u64).to_le_bytes());
            key.name(&[0; 32], BlockHash(hash))
        })
        .collect();
    let mib = (bytes * count) as f64 / f64::from(1 << 20);
    let say = |what: &str, took: Duration| println!("{what:24} {:8.0} MiB/s", mib / took.as_secs_f64());

    let began = Instant::now();
    for names in names.chunks(8) {
        let seal = |name: &ObjectName| (*name, key.seal(*name, &contents, &block, None));
        let objects: Vec<_> = names.iter().map(seal).collect();
        store.put(&group, &objects, None, until)?;
    }
    say("seal and put", began.elapsed());
    let plain = client
        .put_object()
        .bucket(&bucket)
        .key(PLAIN)
        .body(vec![0x5a; bytes * count].into());
    runtime.block_on(plain.send())?;

    let keys: Vec<_> = names.iter().map(|name| (group, *name)).collect();
    let (mut tier, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(runtime.block_on(raw(&client, &bucket, bytes * count))?);
        let began = Instant::now();
        let mut opened = 0;
        store.fetch(&keys, until, &mut |position, object| {
            let object = object.unwrap_or_default();
            opened += usize::from(key.open(names[position], object, &block).is_ok());
        })?;
        tier.push(began.elapsed());
        if opened != count {
            return Err(format!("{opened} of {count} objects opened").into());
        }
    }
    let (tier, bare) = (median(tier), median(bare));
    say("fetch and open", tier);
    say("16 ranges, SDK alone", bare);
    println!("ratio {:.2}", bare.as_secs_f64() / tier.as_secs_f64());
    let erased = store.erase_namespace(&group.namespace, until)?;
    println!("erased {} packs, {} left", erased.deleted, erased.left);
    runtime.block_on(client.delete_object().bucket(&bucket).key(PLAIN).send())?;
    Ok(())
}
