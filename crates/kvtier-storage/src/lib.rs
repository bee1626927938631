//! Keeps bytes: host memory segments and NVMe segment files.
