"""CUDA C++ of this folder as machine code, by NVRTC, which comes with PyTorch; kept on disk for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import site
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

ARCHITECTURE = "sm_90a"
_HERE = Path(__file__).parent


@cache
def library() -> ctypes.CDLL:
    """NVRTC, of the CUDA version that PyTorch was built for if it was. Raises RuntimeError where there is none."""
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["13", "12"]
    names = [f"libnvrtc.so.{major}" for major in majors]
    folders = [Path(p) / "nvidia" for p in (*site.getsitepackages(), site.getusersitepackages())]
    inside = ("cu13/lib", "cuda_nvrtc/lib")
    for place in [*names, *(str(f / i / name) for f in folders for i in inside for name in names)]:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise RuntimeError(
        f"expected NVRTC, as {' or '.join(names)}, on the library path or in a folder nvidia/ of "
        f"{site.getsitepackages()}, found none: it comes with PyTorch for CUDA, or by `pip install nvidia-cuda-nvrtc`"
    )


def available() -> bool:
    """Whether kernels of this folder can be compiled."""
    try:
        return library() is not None
    except RuntimeError:
        return False


def source(name: str, macros: Mapping[str, int], fragments: Mapping[str, str]) -> str:
    """The text of kernel `name`: macros, what all kernels share, and its own, each @KEY@ replaced by a fragment."""
    text = "".join(f"#define {key} {int(value)}\n" for key, value in macros.items())
    text += "".join((_HERE / file).read_text(encoding="utf-8") for file in ("hopper.cuh", f"{name}.cu"))
    for key, fragment in fragments.items():
        text = text.replace(f"@{key}@", fragment)
    return text


def compiled(name: str, text: str) -> bytes:
    """Machine code of a source text, from the disk where this version of NVRTC compiled it before.

    Raises RuntimeError with the compiler's words where it does not compile.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "asking for NVRTC's version")
    key = f"{ARCHITECTURE} {major.value}.{minor.value}\n{text}"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(base) / "cortexflow" / "kernels" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        if (made := kept.read_bytes()).startswith(b"\x7fELF"):  # not what a crash left of it
            return made
    except OSError:  # not there, or not to be read: compiled anew
        pass
    made = _compile(name, text)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=kept.parent, suffix=".tmp", delete=False) as f:
            f.write(made)
        os.replace(f.name, kept)
    except OSError:  # a cache that cannot be written costs the next process the time, a fraction of a second
        pass
    return made


def _compile(name: str, text: str) -> bytes:
    rtc, program = library(), ctypes.c_void_p()
    made = rtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    _check(made, f"reading kernel {name}")
    try:
        options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
        status = rtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            log = _bytes(rtc.nvrtcGetProgramLogSize, rtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
            raise RuntimeError(f"kernel {name} does not compile for {ARCHITECTURE}:\n{log}")
        return _bytes(rtc.nvrtcGetCUBINSize, rtc.nvrtcGetCUBIN, program)
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    length = ctypes.c_size_t()
    _check(size(program, ctypes.byref(length)), "asking for what was compiled")
    room = ctypes.create_string_buffer(length.value)
    _check(get(program, room), "asking for what was compiled")
    return room.raw


def _check(status: int, what: str) -> None:
    if status:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"{what}: NVRTC says {library().nvrtcGetErrorString(status).decode()}")


def multiply(n: int, dtype: torch.dtype, registers: bool = False) -> str:
    """The warpgroup instruction d [64, n] = a [64, 16] @ b [16, n] (+ d with `add`), as a statement over d, a, b, add.

    Factors in shared memory, rows of k; with `registers` a is in registers and b in shared memory as it is.
    """
    count, operands = n // 2, 4 if registers else 1
    results = ", ".join(f"%{i}" for i in range(count))
    a = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}" if registers else f"%{count}"
    given = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    kind = "f16" if dtype == torch.float16 else "bf16"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + operands + 1}, 0;\\n'
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
        f'{{{results}}}, {a}, %{count + operands}, p, 1, 1, {"1" if registers else "0, 0"};\\n}}"'
        f' : {outputs} : {given}, "l"(b), "r"(add));'
    )
