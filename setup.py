"""Builds the native CPU kernels where there is a C++ compiler; without one the installation goes on
without them.

They are one plain shared library, without Python's or torch's headers, compiled once for each
instruction set. It chooses among them when it runs, so a wheel serves every machine of its platform
and every Python. CXX names the compiler, and CXXFLAGS adds flags. A wheel without the kernels
serves every platform, and is tagged so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("src/cumulant/kernels/native/src")
KERNELS = "cumulant.kernels.native._kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTIONS = {
    "baseline": [],
    **(
        {"avx2": AVX2, "avx512": [*AVX2, *(f"-mavx512{x}" for x in ("f", "vl", "bw", "dq"))]}
        if X86
        else {}
    ),
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=fast", "-Wall", "-Wextra"]


def compiler():
    if (
        sys.platform == "win32"
    ):  # GCC's 32-byte vectors on its stack are misaligned there, and MSVC takes other flags
        raise CompileError(
            "the native CPU kernels are not built on Windows: PyTorch's operators take their place"
        )
    wanted = os.environ.get("CXX")
    for name in shlex.split(wanted)[:1] if wanted else ("c++", "g++", "clang++"):
        if shutil.which(name):
            return shlex.split(wanted) if wanted else [name]
    raise CompileError(
        f"no C++ compiler found ({wanted or 'c++, g++, clang++'}): the native CPU kernels are"
        " left out"
    )


class BuildKernels(build_ext):
    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext):
        output, objects = Path(self.get_ext_fullpath(ext.name)), []
        temporary = Path(self.build_temp)
        for folder in (output.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        flags = [
            *FLAGS,
            *(["-DCUMULANT_X86"] if X86 else []),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        units = [
            (f"kernels-{isa}", "kernel_table.cpp", [f"-DCUMULANT_ISA={isa}", *f])
            for isa, f in INSTRUCTIONS.items()
        ]
        units += [
            (path.stem, path.name, [])
            for path in sorted(SOURCES.glob("*.cpp"))
            if path.stem != "kernel_table"
        ]
        commands = []
        for name, source, extra in units:
            objects.append(temporary / f"{name}.o")
            commands.append(
                [*compiler(), *flags, *extra, "-c", SOURCES / source, "-o", objects[-1]]
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each command is a process
            list(pool.map(self.execute, commands))
        self.execute([*compiler(), *flags, "-shared", *objects, "-o", output])

    def execute(self, command):
        command = [str(part) for part in command]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.stderr:
            self.warn(result.stderr)
        if result.returncode:
            raise CompileError(f"{shlex.join(command)}: exit status {result.returncode}")


class Wheel(bdist_wheel):
    def get_tag(self):
        built = Path(self.get_finalized_command("build_ext").get_ext_fullpath(KERNELS))
        return "py3", "none", super().get_tag()[2] if built.exists() else "any"


setup(
    ext_modules=[
        Extension(
            KERNELS,
            [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.hpp"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
