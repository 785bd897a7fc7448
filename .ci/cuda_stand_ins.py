"""Stand-ins for the CUDA libraries of a torch, with which it loads on a machine that has neither them nor a GPU.

On such a machine only libcudart is called, to find that there is no device; the other libraries, some 3 GB, must merely
be there under the right names with the right symbols. A stand-in has these, and a call to any ends the process and says
which it was. What is tested with them is the CPU, and that the op library loads beside that torch.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

REAL = ("cuda-runtime", "cuda-cupti")  # small, and called on import
# Symbols of libraries that give theirs no version.
UNVERSIONED = re.compile(r"(nccl|cublas|cudnn|cufft|cuFile|curand|cusolver|cusparse|nvrtc|nvshmem)\w+")
LIBRARY = re.compile(
    r"lib(cublas|cublasLt|cudnn|cufft|cufile|curand|cusolver|cusparse|cusparseLt|nccl|nvrtc|nvshmem_host)\.so\.\d+"
)


def requirements_without_cuda(metadata: str) -> list[str]:
    """What a package's METADATA requires beside torch, of CUDA only the runtime and its profiling interface."""
    kept = []
    for requirement in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
        name = re.match(r"[\w.-]+", requirement)
        if name is None or "extra ==" in requirement:
            continue
        if name[0] == "cuda-toolkit":
            kept.append(re.sub(r"\[.*?\]", "[cudart,cupti]", requirement))
        elif not re.match(r"nvidia-|cuda-|triton|torch$", name[0]) or any(part in name[0] for part in REAL):
            kept.append(requirement)
    return kept


def wanted(torch_lib: Path) -> dict[str, dict[str, set[str]]]:
    """Library -> version ("" for none) -> names of the symbols that torch's own libraries want of it."""
    symbols: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    loose = set()
    for library in sorted(torch_lib.glob("*.so")):
        listing = subprocess.run(
            ["readelf", "-W", "-d", "-V", str(library)], capture_output=True, text=True, check=True
        ).stdout
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listing):
            if LIBRARY.fullmatch(name):
                symbols[name][""].update()
        owner, owners = "", {}
        for file, version in re.findall(r"File: (\S+)|Name: (\S+)", listing):
            owner = file or owner
            if version:
                owners[version] = owner
        undefined = subprocess.run(
            ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in undefined.splitlines():
            name, _, version = line.split()[-1].partition("@")
            if LIBRARY.fullmatch(owners.get(version, "")):
                symbols[owners[version]][version].add(name)
            elif not version and UNVERSIONED.fullmatch(name):
                loose.add(name)
    if symbols:
        symbols[min(symbols)][""] |= loose  # the loader looks for them in all libraries
    return symbols


def build(torch_lib: Path, folder: Path) -> list[str]:
    """Compiles the stand-ins that a torch needs into `folder`; none for one without CUDA. Returns their names."""
    folder.mkdir()
    libraries = wanted(torch_lib)
    for library, versions in libraries.items():
        source = ["#include <stdio.h>", "#include <stdlib.h>"]
        script = []
        for version, names in versions.items():
            for name in sorted(names):
                said = f"{library} is a stand-in, and {name} was called"
                source.append(f'void {name}(void) {{ fputs("{said}\\n", stderr); abort(); }}')
            if version:
                script.append(f"{version} {{ global: {' '.join(f'{name};' for name in sorted(names))} }};")
        (folder / "stand_in.c").write_text("\n".join(source) + "\n")
        (folder / "versions.map").write_text("\n".join(script) + "\n")
        command = ["cc", "-shared", "-fPIC", "-w", "-O0", f"-Wl,-soname,{library}", "stand_in.c", "-o", library]
        if script:
            command.append("-Wl,--version-script=versions.map")
        subprocess.run(command, cwd=folder, check=True)
    return sorted(libraries)
