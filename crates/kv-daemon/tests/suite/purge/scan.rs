use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a piece, at least: a window of eight lies at a multiple of eight inside of it wherever it is found.
const PIECE_BYTES_MIN: usize = 16;
const CHUNK_BYTES: usize = 1 << 20;
/// Of the chunk before, so that a piece across a border is seen. A multiple of eight.
const OVERLAP_BYTES: usize = 64;
/// Files of others in `/dev/shm` beyond this are not ours.
const SHARED_FILE_BYTES_MAX: u64 = 64 << 20;

/// Pieces of bytes that are looked for, each under a name.
#[derive(Default)]
pub(super) struct Needles {
    pieces: Vec<(String, Vec<u8>)>,
    windows: HashMap<u64, Vec<(usize, usize)>>,
    /// By the low 16 bits of a window.
    maybe: Vec<bool>,
}

/// Names of pieces, and where each was found first.
pub(super) type Sightings = BTreeMap<String, String>;

impl Needles {
    /// Start, middle and end of some bytes.
    pub(super) fn of_block(&mut self, name: &str, bytes: &[u8]) {
        let middle = bytes.len() / 2;
        self.add(&format!("{name} start"), &bytes[..24]);
        self.add(&format!("{name} middle"), &bytes[middle..middle + 24]);
        self.add(&format!("{name} end"), &bytes[bytes.len() - 24..]);
    }

    pub(super) fn add(&mut self, name: &str, piece: &[u8]) {
        assert!((PIECE_BYTES_MIN..=OVERLAP_BYTES).contains(&piece.len()));
        self.maybe.resize(1 << 16, false);
        for (shift, window) in piece.windows(8).take(8).enumerate() {
            let window = u64::from_le_bytes(window.try_into().unwrap());
            self.windows.entry(window).or_default().push((self.pieces.len(), shift));
            self.maybe[(window & 0xffff) as usize] = true;
        }
        self.pieces.push((name.to_string(), piece.to_vec()));
    }

    fn search(&self, bytes: &[u8], place: &str, found: &mut Sightings) {
        for (index, window) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let window = u64::from_le_bytes(*window);
            if !self.maybe[(window & 0xffff) as usize] {
                continue;
            }
            for &(piece, shift) in self.windows.get(&window).into_iter().flatten() {
                let (name, piece) = &self.pieces[piece];
                let start = (index * 8).checked_sub(shift);
                if start.is_some_and(|start| bytes[start..].starts_with(piece)) && !found.contains_key(name) {
                    found.insert(name.clone(), place.to_string());
                }
            }
        }
    }

    /// In a part of what can be read by offset. What cannot be read is left out, page by page.
    fn search_in(&self, file: &File, from: u64, until: u64, place: &str, found: &mut Sightings) {
        let mut bytes = vec![0; OVERLAP_BYTES + CHUNK_BYTES];
        let mut offset = from;
        while offset < until {
            let wanted = CHUNK_BYTES.min(usize::try_from(until - offset).unwrap());
            let target = &mut bytes[OVERLAP_BYTES..OVERLAP_BYTES + wanted];
            match file.read_at(target, offset) {
                Ok(0) => return,
                Ok(read) => {
                    self.search(&bytes[..OVERLAP_BYTES + read], place, found);
                    bytes.copy_within(read..OVERLAP_BYTES + read, 0);
                    offset += read as u64;
                }
                Err(_) => {
                    bytes[..OVERLAP_BYTES].fill(0);
                    offset = (offset / 4096 + 1) * 4096;
                }
            }
        }
    }

    /// In every file below a directory.
    pub(super) fn in_files(&self, directory: &Path) -> Sightings {
        let mut found = Sightings::new();
        self.walk(directory, u64::MAX, &mut found);
        found
    }

    /// In `/dev/shm`.
    pub(super) fn in_shared_memory(&self) -> Sightings {
        let mut found = Sightings::new();
        self.walk(Path::new("/dev/shm"), SHARED_FILE_BYTES_MAX, &mut found);
        found
    }

    fn walk(&self, directory: &Path, bytes_max: u64, found: &mut Sightings) {
        // Others may remove what they put there while this looks.
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(metadata) = path.symlink_metadata() else {
                continue;
            };
            if metadata.is_dir() {
                self.walk(&path, bytes_max, found);
            } else if metadata.is_file()
                && metadata.len() <= bytes_max
                && let Ok(file) = File::open(&path)
            {
                self.search_in(&file, 0, metadata.len(), &path.display().to_string(), found);
            }
        }
    }

    /// In all that a process has mapped and can be read, and in memory files that it only has open.
    pub(super) fn in_memory_of(&self, process: u32) -> Sightings {
        let mut found = Sightings::new();
        let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("its maps");
        let memory = File::open(format!("/proc/{process}/mem")).expect("its memory");
        let mut bytes = 0;
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (range, access) = (words.next().unwrap(), words.next().unwrap());
            let (start, end) = range.split_once('-').unwrap();
            let [start, end] = [start, end].map(|digits| u64::from_str_radix(digits, 16).unwrap());
            let is_kernels = line.ends_with("[vvar]") || line.ends_with("[vsyscall]");
            if !access.starts_with('r') || is_kernels {
                continue;
            }
            bytes += end - start;
            self.search_in(&memory, start, end, line, &mut found);
        }
        assert!(bytes > 16 << 20, "host memory is among what is read: {maps}");
        for entry in std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let name = target.to_string_lossy().into_owned();
            if name.starts_with("/memfd:")
                && let Ok(file) = File::open(entry.path())
            {
                let length = file.metadata().map_or(0, |metadata| metadata.len());
                self.search_in(&file, 0, length, &name, &mut found);
            }
        }
        found
    }
}

#[test]
fn a_piece_is_found_wherever_it_lies() {
    let piece: Vec<u8> = (1..=24).collect();
    let mut needles = Needles::default();
    needles.add("it", &piece);
    let directory = tempfile::tempdir().unwrap();
    for place in (0..17).chain(CHUNK_BYTES - 30..CHUNK_BYTES + 10) {
        let mut bytes = vec![0xee; CHUNK_BYTES + 200];
        bytes[place..place + piece.len()].copy_from_slice(&piece);
        std::fs::write(directory.path().join("file"), &bytes).unwrap();
        assert_eq!(needles.in_files(directory.path()).len(), 1, "at {place}");
        bytes[place + 23] ^= 1;
        std::fs::write(directory.path().join("file"), &bytes).unwrap();
        assert_eq!(needles.in_files(directory.path()).len(), 0, "at {place}");
    }
    let kept = std::hint::black_box(piece);
    assert_eq!(needles.in_memory_of(std::process::id()).len(), 1);
    drop(kept);
}
