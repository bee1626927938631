//! How fast blocks of two-byte numbers are compressed and decompressed, and how small they become. The numbers are drawn: normal, with
//! a scale that differs from channel to channel.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use kvtier_storage::compression::{Compressor, Decompressor, Element};

const BLOCK_BYTES: usize = 2 << 20;

fn block(to_bits: impl Fn(f32) -> u16) -> Vec<u8> {
    let mut state = 7u64;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let scales: Vec<f64> = (0..128).map(|_| (1.5 * uniform() - 0.75).exp()).collect();
    (0..BLOCK_BYTES / 2)
        .flat_map(|index| {
            let normal = (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
            to_bits((scales[index % scales.len()] * normal) as f32).to_le_bytes()
        })
        .collect()
}

fn bf16(number: f32) -> u16 {
    (number.to_bits() >> 16) as u16
}

fn fp16(number: f32) -> u16 {
    let bits = number.to_bits();
    let exponent = ((bits >> 23) & 0xff) as i32 - 127 + 15;
    let sign = ((bits >> 16) & 0x8000) as u16;
    if exponent <= 0 {
        sign
    } else {
        sign | ((exponent as u16) << 10) | ((bits >> 13) & 0x3ff) as u16
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("compression");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    for (name, element, block) in [
        ("bf16", Element::Bf16, block(bf16)),
        ("fp16", Element::Fp16, block(fp16)),
    ] {
        let mut compressor = Compressor::new().expect("memory");
        let mut decompressor = Decompressor::new().expect("memory");
        let mut frame = Vec::new();
        compressor.compress(element, &block, &mut frame).expect("a block");
        println!("{name}: ratio {:.3}", block.len() as f64 / frame.len() as f64);
        let mut target = vec![0; BLOCK_BYTES];
        group.bench_function(format!("compress_{name}"), |bencher| {
            bencher.iter(|| {
                let mut frame = Vec::with_capacity(BLOCK_BYTES + 4096);
                compressor
                    .compress(element, black_box(&block), &mut frame)
                    .expect("a block");
                black_box(frame.len())
            });
        });
        group.bench_function(format!("decompress_{name}"), |bencher| {
            bencher.iter(|| {
                decompressor
                    .decompress(black_box(&frame), black_box(&mut target))
                    .expect("a frame")
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
