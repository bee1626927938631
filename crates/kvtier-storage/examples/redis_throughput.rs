//! What sealing, a Redis server and opening let through: `redis_throughput URL [BYTES] [OBJECTS]`.
//!
//! One thread, one connection. It puts objects under a namespace of its own, fetches them, and erases them again.

use std::error::Error;
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, Labels, Parent};
use kvtier_storage::compression::Element;
use kvtier_storage::remote::redis::{RedisSettings, RedisStore};
use kvtier_storage::remote::{Contents, ObjectGroup, ObjectKey, ObjectName};
use kvtier_transfer::memory::MemoryRegion;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().ok_or("give the server's address: redis://HOST:PORT")?;
    let bytes: usize = arguments.next().map_or(Ok(1 << 20), |bytes| bytes.parse())?;
    let count: usize = arguments.next().map_or(Ok(256), |count| count.parse())?;
    let store = RedisStore::new(RedisSettings {
        url,
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
            opened += usize::from(key.open(names[position], &object, &block).is_ok());
            stood[3] += began.elapsed();
        })?;
        stood[2] = began.elapsed().saturating_sub(stood[3]);
        if opened != count {
            return Err(format!("{opened} of {count} objects opened: does the server evict?").into());
        }
        for (step, took) in ["seal", "put", "fetch", "open"].iter().zip(stood) {
            say(&format!("{what}: {step}"), took);
        }
    }
    let erased = store.erase_namespace(&group.namespace, until)?;
    println!("erased {}, left {}", erased.deleted, erased.left);
    Ok(())
}
