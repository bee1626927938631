"""Makes a torch wheel that was built for CUDA importable where CUDA's libraries are not installed.

Usage: stubs.py SITE_PACKAGES. torch's libraries name CUDA's as needed and import symbols from them. For each that is
missing, a library of that name is compiled in which every symbol is a function that answers 100, "no CUDA device": torch then
finds no device and computes on the CPU. Needs gcc, nm and readelf. For tests only.
"""

import pathlib
import re
import subprocess
import sys

# Libraries that a system has by itself.
SYSTEM = re.compile(
    r"^(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libgomp|libnuma|libutil|libmpi|libz|ld-linux)\b"
)
# Versions of symbols of such libraries.
SYSTEM_VERSION = re.compile(r"^(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP|QUADMATH)")
# Symbols without a version that are CUDA's, by their prefix.
CUDA = re.compile(r"^(cu[A-Z]|cuda|cudnn|cublas|cufft|curand|cufile|cuFile|cupti|cusolver|cusparse|nccl|nvrtc|nvJit|nvml|nvshmem|nvtx|__cuda)")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def symbols(library):
    """Defined names, and undefined ones as (name, version)."""
    defined, undefined = set(), set()
    for line in output("nm", "-D", str(library)).splitlines():
        match = re.match(r"^[0-9a-f ]{16} ([A-Za-z]) (\S+)$", line)
        if match is None:
            continue
        name, _, version = match[2].partition("@")
        if match[1] in "Uwv":
            undefined.add((name, version.lstrip("@")))
        else:
            defined.add(name)
    return defined, undefined


def main(site):
    directory = site / "torch" / "lib"
    libraries = sorted(directory.glob("*.so*"))
    present = {library.name for library in libraries}
    needed, defined, undefined = [], set(), set()
    for library in libraries:
        for name in re.findall(r"NEEDED.*\[(.*?)\]", output("readelf", "-dW", str(library))):
            if name not in present and not SYSTEM.match(name) and name not in needed:
                needed.append(name)
        ours, theirs = symbols(library)
        defined |= ours
        undefined |= theirs
    versions, plain = {}, set()
    for name, version in undefined:
        if name in defined:
            continue
        if not version:
            if CUDA.match(name):
                plain.add(name)
        elif not SYSTEM_VERSION.match(version):
            versions.setdefault(version, set()).add(name)
    work = site / "kvtier-stubs"
    work.mkdir(exist_ok=True)
    for number, library in enumerate(needed):
        own = {library: versions[library]} if library in versions else {}
        loose = set()
        # What belongs to no library by its version is in the first: the loader looks everywhere.
        if number == 0:
            own |= {version: names for version, names in versions.items() if version not in needed}
            loose = plain
        compile_stub(work, directory / library, own, loose)
    print(f"{len(needed)} stub libraries, {sum(map(len, versions.values())) + len(plain)} symbols")


def compile_stub(work, target, versions, loose):
    names = sorted(loose.union(*versions.values()) if versions else loose)
    source = work / f"{target.name}.c"
    body = "\n".join(f"int {name}(void) {{ return 100; }}" for name in names)
    source.write_text(body or "int kvtier_stub;\n")
    command = ["gcc", "-shared", "-fPIC", "-w", "-O0", "-fno-builtin", f"-Wl,-soname,{target.name}"]
    if versions:
        script = work / f"{target.name}.map"
        script.write_text(
            "\n".join(f"{version} {{ global: {' '.join(name + ';' for name in sorted(names))} }};" for version, names in versions.items())
        )
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, "-o", str(target), str(source)], check=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
