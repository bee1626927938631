//! A server's network, when it is bad.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Passes bytes on between whoever connects and a server on this machine.
pub(super) struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

struct Faults {
    latency_us: AtomicU64,
    bytes_per_second: AtomicU64,
    /// Of what the server sends on one connection.
    break_after: AtomicU64,
    corrupt: AtomicBool,
}

impl Proxy {
    pub(super) fn start(server: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let faults = Arc::new(Faults {
            latency_us: AtomicU64::new(0),
            bytes_per_second: AtomicU64::new(u64::MAX),
            break_after: AtomicU64::new(u64::MAX),
            corrupt: AtomicBool::new(false),
        });
        let shared = Arc::clone(&faults);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else {
                    continue;
                };
                let (to_server, to_client) = (
                    (client.try_clone().expect("a copy"), server.try_clone().expect("a copy")),
                    (server, client),
                );
                let faults = Arc::clone(&shared);
                std::thread::spawn(move || pass(to_server.0, to_server.1, None));
                std::thread::spawn(move || pass(to_client.0, to_client.1, Some(&faults)));
            }
        });
        Proxy { port, faults }
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// What the server sends comes later, and at this rate.
    pub(super) fn slow(&self, latency: Duration, bytes_per_second: u64) {
        let latency = u64::try_from(latency.as_micros()).expect("short");
        self.faults.latency_us.store(latency, Ordering::Release);
        self.faults.bytes_per_second.store(bytes_per_second, Ordering::Release);
    }

    /// A connection ends once the server has sent so much on it.
    pub(super) fn break_after(&self, bytes: u64) {
        self.faults.break_after.store(bytes, Ordering::Release);
    }

    /// Flips a bit of every large piece that the server sends.
    pub(super) fn corrupt(&self, corrupt: bool) {
        self.faults.corrupt.store(corrupt, Ordering::Release);
    }
}

fn pass(mut source: TcpStream, mut target: TcpStream, faults: Option<&Faults>) {
    let mut buffer = vec![0; 16 << 10];
    let mut passed = 0;
    while let Ok(count @ 1..) = source.read(&mut buffer) {
        let piece = &mut buffer[..count];
        passed += count as u64;
        if let Some(faults) = faults {
            let rate = faults.bytes_per_second.load(Ordering::Acquire);
            let micros = faults.latency_us.load(Ordering::Acquire) + (count as u64).saturating_mul(1_000_000) / rate;
            std::thread::sleep(Duration::from_micros(micros));
            if passed > faults.break_after.load(Ordering::Acquire) {
                break;
            }
            if count > 4096 && faults.corrupt.load(Ordering::Acquire) {
                piece[count / 2] ^= 1;
            }
        }
        if target.write_all(piece).is_err() {
            break;
        }
    }
    let _ = source.shutdown(Shutdown::Both);
    let _ = target.shutdown(Shutdown::Both);
}
