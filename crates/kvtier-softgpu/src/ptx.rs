//! Runs the few instructions of PTX that simple kernels consist of, one thread after another.
//!
//! What a kernel says is carried out, so that a mistake in it, in its parameters or in what it may reach is found; how a
//! device would run it (its own code, threads at once, a bus between it and the host) is not. A kernel with an instruction that is not
//! known here is refused when it is loaded. Source: the PTX ISA reference, version 7.1.

use std::collections::HashMap;

use crate::device::Device;

/// A kernel that may be launched.
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) parameter_bytes: usize,
    registers: usize,
    instructions: Vec<Instruction>,
}

/// How many blocks, and threads of each.
#[derive(Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
}

struct Instruction {
    /// The register that must hold this for it to be carried out.
    guard: Option<(usize, bool)>,
    operation: Operation,
}

#[derive(Clone, Copy)]
enum Width {
    Bits8,
    Bits32,
    Bits64,
}

impl Width {
    fn bytes(self) -> u64 {
        match self {
            Width::Bits8 => 1,
            Width::Bits32 => 4,
            Width::Bits64 => 8,
        }
    }

    fn cut(self, value: u64) -> u64 {
        match self {
            Width::Bits8 => value & 0xFF,
            Width::Bits32 => value & 0xFFFF_FFFF,
            Width::Bits64 => value,
        }
    }
}

#[derive(Clone, Copy)]
enum Arithmetic {
    Add,
    Multiply,
    And,
    Or,
    ShiftLeft,
    ShiftRight,
}

#[derive(Clone, Copy)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

enum Operation {
    Move(Width, usize, Operand),
    Negate(Width, usize, Operand),
    Arithmetic(Arithmetic, Width, usize, Operand, Operand),
    Compare(Comparison, Width, usize, Operand, Operand),
    LoadParameter(Width, usize, Address),
    /// So many registers from one place on.
    Load(Width, Vec<usize>, Address),
    Store(Width, Vec<usize>, Address),
    Branch(usize),
    Return,
}

#[derive(Clone, Copy)]
enum Operand {
    Register(usize),
    Number(u64),
    Thread,
    Threads,
    Block,
    Blocks,
}

struct Address {
    base: Operand,
    offset: u64,
}

/// The kernels of a text.
pub(crate) fn read(text: &str) -> Option<Vec<Kernel>> {
    let target = text.lines().find(|line| line.starts_with(".target "))?;
    if !target.starts_with(".target sm_") {
        return None;
    }
    let kernels = text.split(".visible .entry ").skip(1);
    let kernels: Option<Vec<Kernel>> = kernels.map(kernel).collect();
    kernels.filter(|kernels| !kernels.is_empty())
}

fn kernel(text: &str) -> Option<Kernel> {
    let (name, rest) = text.split_once('(')?;
    let (parameters, rest) = rest.split_once(')')?;
    let body = rest.split_once('{')?.1;
    // Braces within are those of vectors.
    let body = body.rsplit_once('}')?.0;
    let parameter = format!("{name}_param_0");
    let bytes = parameters.split_once(&format!("{parameter}["))?.1;
    let parameter_bytes = bytes.split_once(']')?.0.parse().ok()?;

    let lines = body
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default().trim());
    let mut labels = HashMap::new();
    let mut statements = Vec::new();
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with(".reg")) {
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, statements.len());
        } else {
            statements.push(line.strip_suffix(';')?);
        }
    }
    let mut reader = Reader {
        parameter: &parameter,
        labels: &labels,
        registers: HashMap::new(),
    };
    let instructions: Option<Vec<Instruction>> = statements.iter().map(|line| reader.instruction(line)).collect();
    Some(Kernel {
        name: name.to_owned(),
        parameter_bytes,
        instructions: instructions?,
        registers: reader.registers.len(),
    })
}

struct Reader<'a> {
    parameter: &'a str,
    labels: &'a HashMap<&'a str, usize>,
    registers: HashMap<String, usize>,
}

impl Reader<'_> {
    fn instruction(&mut self, line: &str) -> Option<Instruction> {
        let (guard, line) = match line.strip_prefix('@') {
            None => (None, line),
            Some(guarded) => {
                let (register, line) = guarded.split_once(' ')?;
                let (register, holds) = match register.strip_prefix('!') {
                    Some(register) => (register, false),
                    None => (register, true),
                };
                (Some((self.register(register)?, holds)), line.trim())
            }
        };
        let (name, operands) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        let operands = operands.trim();
        let parts: Vec<&str> = name.split('.').collect();
        let width = match *parts.last()? {
            "u8" | "b8" => Width::Bits8,
            "u32" | "s32" | "b32" => Width::Bits32,
            _ => Width::Bits64,
        };
        let operation = match parts[0] {
            "ret" => Operation::Return,
            "bra" => Operation::Branch(*self.labels.get(operands)?),
            "ld" | "st" => self.transfer(&parts, width, operands)?,
            _ => self.computation(&parts, width, operands)?,
        };
        Some(Instruction { guard, operation })
    }

    fn transfer(&mut self, parts: &[&str], width: Width, operands: &str) -> Option<Operation> {
        let is_load = parts[0] == "ld";
        let (address, registers) = match is_load {
            true => operands
                .rsplit_once(", [")
                .map(|(registers, address)| (address, registers))?,
            false => operands.strip_prefix('[')?.split_once("], ")?,
        };
        let registers = registers.trim_matches(['{', '}']);
        let registers: Option<Vec<usize>> = registers.split(", ").map(|name| self.register(name)).collect();
        let (registers, address) = (registers?, self.address(address.trim_end_matches(']'))?);
        match (parts[1], parts[2]) {
            ("param", _) if is_load => Some(Operation::LoadParameter(width, *registers.first()?, address)),
            ("global", "v4") if registers.len() != 4 => None,
            ("global", _) if is_load => Some(Operation::Load(width, registers, address)),
            ("global", _) => Some(Operation::Store(width, registers, address)),
            _ => None,
        }
    }

    fn computation(&mut self, parts: &[&str], width: Width, operands: &str) -> Option<Operation> {
        let mut operands = operands.split(',').map(str::trim);
        let target = self.register(operands.next()?)?;
        let first = self.operand(operands.next()?)?;
        let second = match operands.next() {
            None => None,
            Some(name) => Some(self.operand(name)?),
        };
        let arithmetic = |what| Some(Operation::Arithmetic(what, width, target, first, second?));
        match (parts[0], *parts.get(1)?) {
            ("mov", _) => Some(Operation::Move(width, target, first)),
            // From 32 bits without a sign to 64: registers hold no more than their width.
            ("cvt", "u64") => Some(Operation::Move(Width::Bits64, target, first)),
            ("cvta", "to") => Some(Operation::Move(Width::Bits64, target, first)),
            ("neg", _) => Some(Operation::Negate(width, target, first)),
            ("add", _) => arithmetic(Arithmetic::Add),
            ("mul", "lo") => arithmetic(Arithmetic::Multiply),
            ("mul", "wide") => Some(Operation::Arithmetic(
                Arithmetic::Multiply,
                Width::Bits64,
                target,
                first,
                second?,
            )),
            ("and", _) => arithmetic(Arithmetic::And),
            ("or", _) => arithmetic(Arithmetic::Or),
            ("shl", _) => arithmetic(Arithmetic::ShiftLeft),
            ("shr", "u64" | "u32") => arithmetic(Arithmetic::ShiftRight),
            ("setp", how) => {
                let is_signed = parts[2].starts_with('s');
                let comparison = match how {
                    "eq" => Comparison::Equal,
                    "ne" => Comparison::NotEqual,
                    // Nothing is known here of numbers below zero.
                    _ if is_signed => return None,
                    "lt" => Comparison::Less,
                    "le" => Comparison::LessOrEqual,
                    "gt" => Comparison::Greater,
                    "ge" => Comparison::GreaterOrEqual,
                    _ => return None,
                };
                Some(Operation::Compare(comparison, width, target, first, second?))
            }
            _ => None,
        }
    }

    fn register(&mut self, name: &str) -> Option<usize> {
        let name = name.strip_prefix('%')?;
        if name.contains('.') {
            return None;
        }
        let next = self.registers.len();
        Some(*self.registers.entry(name.to_owned()).or_insert(next))
    }

    fn operand(&mut self, name: &str) -> Option<Operand> {
        match name {
            "%tid.x" => Some(Operand::Thread),
            "%ntid.x" => Some(Operand::Threads),
            "%ctaid.x" => Some(Operand::Block),
            "%nctaid.x" => Some(Operand::Blocks),
            // Where the parameters begin.
            _ if name == self.parameter => Some(Operand::Number(0)),
            _ if name.starts_with('%') => self.register(name).map(Operand::Register),
            _ => name.parse::<i64>().ok().map(|number| Operand::Number(number as u64)),
        }
    }

    fn address(&mut self, text: &str) -> Option<Address> {
        let (base, offset) = text.split_once('+').unwrap_or((text, "0"));
        Some(Address {
            base: self.operand(base)?,
            offset: offset.parse::<i64>().ok()? as u64,
        })
    }
}

impl Kernel {
    /// Runs every thread to its end, the last block first: nobody may count on an order.
    pub(crate) fn run(&self, device: &Device, grid: Grid, parameters: &[u8]) {
        let blocks = grid.blocks - u32::from(device.forgets_blocks());
        for block in (0..blocks).rev() {
            for thread in 0..grid.threads {
                let mut run = Run {
                    device,
                    grid,
                    parameters,
                    block,
                    thread,
                    registers: vec![0; self.registers],
                };
                let mut at = 0;
                while let Some(instruction) = self.instructions.get(at) {
                    at = run.step(instruction, at);
                }
            }
        }
    }
}

/// One thread.
struct Run<'a> {
    device: &'a Device,
    grid: Grid,
    parameters: &'a [u8],
    block: u32,
    thread: u32,
    registers: Vec<u64>,
}

impl Run<'_> {
    /// The next instruction.
    fn step(&mut self, instruction: &Instruction, at: usize) -> usize {
        if let Some((register, holds)) = instruction.guard
            && (self.registers[register] != 0) != holds
        {
            return at + 1;
        }
        match &instruction.operation {
            Operation::Return => return usize::MAX,
            Operation::Branch(target) => return *target,
            Operation::Move(width, target, source) => self.registers[*target] = width.cut(self.value(*source)),
            Operation::Negate(width, target, source) => {
                self.registers[*target] = width.cut(self.value(*source).wrapping_neg());
            }
            Operation::Arithmetic(what, width, target, first, second) => {
                let (first, second) = (self.value(*first), self.value(*second));
                let result = match what {
                    Arithmetic::Add => first.wrapping_add(second),
                    Arithmetic::Multiply => first.wrapping_mul(second),
                    Arithmetic::And => first & second,
                    Arithmetic::Or => first | second,
                    Arithmetic::ShiftLeft => first.wrapping_shl(second as u32),
                    Arithmetic::ShiftRight => first.wrapping_shr(second as u32),
                };
                self.registers[*target] = width.cut(result);
            }
            Operation::Compare(how, width, target, first, second) => {
                let (first, second) = (width.cut(self.value(*first)), width.cut(self.value(*second)));
                let holds = match how {
                    Comparison::Equal => first == second,
                    Comparison::NotEqual => first != second,
                    Comparison::Less => first < second,
                    Comparison::LessOrEqual => first <= second,
                    Comparison::Greater => first > second,
                    Comparison::GreaterOrEqual => first >= second,
                };
                self.registers[*target] = u64::from(holds);
            }
            Operation::LoadParameter(width, target, address) => {
                let from = self.place(address) as usize;
                let mut bytes = [0; 8];
                let length = width.bytes() as usize;
                let Some(source) = self.parameters.get(from..from + length) else {
                    self.device.damage("a kernel reads past its parameters");
                };
                bytes[..length].copy_from_slice(source);
                self.registers[*target] = u64::from_le_bytes(bytes);
            }
            Operation::Load(width, targets, address) => {
                let from = self.reach(*width, targets.len(), address);
                for (number, target) in targets.iter().enumerate() {
                    let place = (from + number as u64 * width.bytes()) as *const u8;
                    let mut bytes = [0; 8];
                    // SAFETY: within what is allocated or registered, as was checked; eight bytes are the most there are.
                    unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), width.bytes() as usize) };
                    self.registers[*target] = u64::from_le_bytes(bytes);
                }
            }
            Operation::Store(width, sources, address) => {
                let to = self.reach(*width, sources.len(), address);
                for (number, source) in sources.iter().enumerate() {
                    let place = (to + number as u64 * width.bytes()) as *mut u8;
                    let bytes = self.registers[*source].to_le_bytes();
                    // SAFETY: as for a load.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, width.bytes() as usize) };
                }
            }
        }
        at + 1
    }

    fn value(&self, operand: Operand) -> u64 {
        match operand {
            Operand::Register(register) => self.registers[register],
            Operand::Number(number) => number,
            Operand::Thread => u64::from(self.thread),
            Operand::Threads => u64::from(self.grid.threads),
            Operand::Block => u64::from(self.block),
            Operand::Blocks => u64::from(self.grid.blocks),
        }
    }

    fn place(&self, address: &Address) -> u64 {
        self.value(address.base).wrapping_add(address.offset)
    }

    /// Where a load or store goes, if a device may go there.
    fn reach(&self, width: Width, count: usize, address: &Address) -> u64 {
        let place = self.place(address);
        let bytes = width.bytes() * count as u64;
        if !place.is_multiple_of(bytes) {
            self.device.damage("a kernel goes to an address that is not aligned");
        }
        if !self.device.reaches(place, bytes as usize) {
            self.device
                .damage("a kernel goes where nothing is allocated, and nothing registered");
        }
        place
    }
}
