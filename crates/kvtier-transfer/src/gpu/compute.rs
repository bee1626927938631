//! Work for a device, to measure what copies take from it.

use std::fmt;
use std::sync::Arc;

use super::device::Gpu;
use super::driver::{GpuError, Opaque};
use super::kernel::Kernel;
use super::memory::DeviceRegion;
use super::stream::{Event, RawStream};

/// Compiled from `kernel/compute.cu`.
const TEXT: &str = concat!(include_str!("kernel/compute.ptx"), "\0");
/// Rows and columns of a matrix; the kernel wants a multiple of 32.
const EDGE: u32 = 2048;
const TILE: u32 = 32;

/// Multiplications of matrices in a stream of their own, as an engine computes while others copy.
pub struct Multiplications {
    gpu: Arc<Gpu>,
    kernel: Kernel,
    stream: Arc<RawStream>,
    matrices: [Arc<DeviceRegion>; 3],
}

impl fmt::Debug for Multiplications {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Multiplications")
            .field("gpu", &self.gpu.name())
            .finish_non_exhaustive()
    }
}

impl Multiplications {
    /// Bytes of the matrices of one.
    pub const BYTES: usize = 3 * EDGE as usize * EDGE as usize * size_of::<f32>();

    /// Of matrices of zeroes.
    ///
    /// # Errors
    /// What the driver says: it runs no kernel, or has no memory.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Multiplications, GpuError> {
        let kernel = Kernel::load(gpu, TEXT, c"kvtier_multiply")?;
        let matrix = || gpu.allocate(Multiplications::BYTES / 3);
        let made = || -> Result<_, GpuError> {
            let (matrices, stream) = ([matrix()?, matrix()?, matrix()?], RawStream::new(gpu)?);
            Ok((matrices, stream))
        };
        let (matrices, stream) = match made() {
            Ok(made) => made,
            Err(error) => {
                if let Ok(driver) = gpu.current() {
                    kernel.unload(&driver);
                }
                return Err(error);
            }
        };
        let made = Multiplications {
            gpu: Arc::clone(gpu),
            kernel,
            stream,
            matrices,
        };
        let zeroes = made.gpu.stream()?;
        for matrix in &made.matrices {
            let zeroed = zeroes
                .zero(&matrix.slice(0, matrix.bytes()).expect("all of it"))?
                .wait();
            zeroed.map_err(|error| GpuError {
                call: "cuMemsetD8Async",
                code: 0,
                words: error.to_string(),
            })?;
        }
        Ok(made)
    }

    /// So many, one after another, and waits.
    ///
    /// # Errors
    /// What the driver says.
    pub fn run(&self, times: u32) -> Result<(), GpuError> {
        let event = Event::new(&self.gpu)?;
        {
            let driver = self.gpu.current()?;
            let mut addresses = self.matrices.each_ref().map(|matrix| matrix.address());
            let mut edge = EDGE;
            let [left, right, result] = addresses.each_mut().map(|address| std::ptr::from_mut(address).cast());
            let mut parameters: [Opaque; 4] = [left, right, result, (&raw mut edge).cast()];
            let grid = ((EDGE / TILE) * (EDGE / TILE), TILE * TILE);
            for _ in 0..times {
                // SAFETY: three addresses of matrices of EDGE rows and columns of the device's, and EDGE: what the kernel takes. `self` has
                // the matrices until its stream is at rest.
                let launched = unsafe {
                    self.kernel
                        .launch(&self.gpu, &driver, self.stream.raw(), grid, &mut parameters)
                };
                launched?;
            }
        }
        event.record(&self.stream)?;
        event.wait()
    }
}

impl Drop for Multiplications {
    fn drop(&mut self) {
        // A run that failed may have left some under way.
        let at_rest = Event::new(&self.gpu).and_then(|event| {
            event.record(&self.stream)?;
            event.wait()
        });
        if let (Ok(()), Ok(driver)) = (at_rest, self.gpu.current()) {
            self.kernel.unload(&driver);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_kernel_was_compiled_from_the_source_beside_it() {
        let source = blake3::hash(include_bytes!("kernel/compute.cu"));
        let said = format!("// BLAKE3 of the source: {source}\n");
        assert!(super::TEXT.contains(&said), "compile it again: {said}");
    }
}
