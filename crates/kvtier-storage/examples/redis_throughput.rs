//! What sealing, a Redis server and opening let through: `redis_throughput URL [BYTES] [OBJECTS]`.
//!
//! One thread, one connection. It puts objects under a namespace of its own, fetches them, and erases them again. In turns with that a raw
//! client asks for the same objects, sixteen ahead, and drops the bytes: what the server and the socket can do. The last line has the ratio of
//! the two, medians of the rounds. Servers that want a password are measured without that client.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, Labels, Parent};
use kvtier_storage::compression::Element;
use kvtier_storage::remote::redis::{RedisSettings, RedisStore};
use kvtier_storage::remote::{Contents, OBJECT_OVERHEAD_BYTES, ObjectGroup, ObjectKey, ObjectName, ObjectStore};
use kvtier_transfer::memory::MemoryRegion;

/// Of the comparison with the raw client.
const ROUNDS: usize = 9;

/// Asked for before their answers.
const WINDOW: usize = 16;

/// Gets what the keys name, a few asked for ahead, and drops it.
fn raw(address: &str, keys: &[String], bytes: usize) -> Result<Duration, Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let question = |key: &String| format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len());
    // `$LENGTH\r\n`, the object, `\r\n`.
    let answer_bytes = bytes + bytes.to_string().len() + 5;
    let total = keys.len() * answer_bytes;
    let mut buffer = vec![0; 1 << 20];
    let (mut asked, mut received) = (0, 0);
    let began = Instant::now();
    while received < total {
        let ahead = keys.len().min(received / answer_bytes + WINDOW);
        // A system call for several.
        if asked < ahead && (ahead - asked >= WINDOW / 2 || ahead == keys.len()) {
            let questions: String = keys[asked..ahead].iter().map(question).collect();
            stream.write_all(questions.as_bytes())?;
            asked = ahead;
        }
        let most = (total - received).min(buffer.len());
        let read = stream.read(&mut buffer[..most])?;
        if read == 0 {
            return Err("the server hung up".into());
        }
        received += read;
    }
    Ok(began.elapsed())
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations[durations.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().ok_or("give the server's address: redis://HOST:PORT")?;
    let bytes: usize = arguments.next().map_or(Ok(1 << 20), |bytes| bytes.parse())?;
    let count: usize = arguments.next().map_or(Ok(256), |count| count.parse())?;
    let store = RedisStore::new(RedisSettings {
        url: url.clone(),
        connections: 1,
        timeout: Duration::from_secs(5),
    })?;
    let until = Instant::now() + Duration::from_secs(300);

    let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096))?;
    let block = region.slice(0, bytes)?;
    // Halves between one and two, as compression likes them.
    let mut noise = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    noise
        .iter_mut()
        .skip(1)
        .step_by(2)
        .for_each(|byte| *byte = 0x3c | (*byte & 3));
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

    for (what, compress) in [("plain", None), ("compressed", Some(Element::Fp16))] {
        let mut stood = [Duration::ZERO; 4];
        for names in names.chunks(16) {
            let began = Instant::now();
            let objects: Vec<_> = names
                .iter()
                .map(|name| (*name, key.seal(*name, &contents, &block, compress)))
                .collect();
            stood[0] += began.elapsed();
            let began = Instant::now();
            store.put(&group, &objects, None, until)?;
            stood[1] += began.elapsed();
        }
        let began = Instant::now();
        let mut opened = 0;
        let keys: Vec<_> = names.iter().map(|name| (group, *name)).collect();
        store.fetch(&keys, until, &mut |position, object| {
            let began = Instant::now();
            let object = object.unwrap_or_default();
            opened += usize::from(key.open(names[position], object, &block).is_ok());
            stood[3] += began.elapsed();
        })?;
        stood[2] = began.elapsed().saturating_sub(stood[3]);
        if opened != count {
            return Err(format!("{opened} of {count} objects opened: does the server evict?").into());
        }
        for (step, took) in ["seal", "put", "fetch", "open"].iter().zip(stood) {
            say(&format!("{what}: {step}"), took);
        }
        if compress.is_none() && !url.contains('@') {
            let address = url.split("://").nth(1).unwrap_or_default();
            let address = address.split('/').next().unwrap_or_default();
            let redis_keys: Vec<String> = names.iter().map(|name| format!("kvtier:1:{group}:{name}")).collect();
            let (mut tier, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                bare.push(raw(address, &redis_keys, bytes + OBJECT_OVERHEAD_BYTES)?);
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
            say("raw pipelined client", bare);
            say("fetched and opened", tier);
            println!(
                "of the raw client's rate {:8.2}",
                bare.as_secs_f64() / tier.as_secs_f64()
            );
        }
    }
    let erased = store.erase_namespace(&group.namespace, until)?;
    println!("erased {}, left {}", erased.deleted, erased.left);
    Ok(())
}
