"""What is planned for: known GPUs with the figures of their makers' data sheets, or a size of memory.

Meant are the figures of NVIDIA's data sheets and architecture white papers (products) and of AMD's data sheet of the
MI300X; few of them could be looked up again when this was written (the A40's peaks, the A10's bandwidth). TFLOP/s are
those of dense matrices, bfloat16 with float32 sums, and plain float32 without tensor cores' TF32, which PyTorch leaves
off by default. Bandwidth is that of the GPU's memory.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from perl_vlm.cli_settings import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A device to plan for."""

    name: str
    gib: float
    """Memory, as it is sold."""
    bf16: float | None
    """TFLOP/s; None where it has no bfloat16."""
    fp32: float
    """TFLOP/s."""
    bandwidth: float
    """GB/s."""
    link: float = 25.0
    """GB/s to another such GPU, one direction: NVLink where it has it, else PCIe."""
    speeds_of: str | None = None
    """Where only a size was given: whose speeds are taken."""

    def tflops(self, dtype: str) -> float:
        """The peak in a base's type; float32's where it has no bfloat16."""
        return self.bf16 if dtype == "bfloat16" and self.bf16 is not None else self.fp32


KNOWN = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 16, None, 8.1, 320, link=12),
        Gpu("RTX4080", 16, 97.5, 48.7, 717),
        Gpu("L4", 24, 121, 30.3, 300),
        Gpu("A10", 24, 125, 31.2, 600),
        Gpu("A10G", 24, 70, 35.0, 600),
        Gpu("A30", 24, 165, 10.3, 933, link=100),
        Gpu("RTX3090", 24, 71, 35.6, 936),
        Gpu("RTX4090", 24, 165.2, 82.6, 1008),
        Gpu("RTX5090", 32, 209.5, 104.8, 1792, link=50),
        Gpu("A100-40GB", 40, 312, 19.5, 1555, link=300),
        Gpu("A40", 48, 149.7, 37.4, 696),
        Gpu("RTXA6000", 48, 154.8, 38.7, 768),
        Gpu("RTX6000Ada", 48, 364.2, 91.1, 960),
        Gpu("L40S", 48, 362.0, 91.6, 864),
        Gpu("A100", 80, 312, 19.5, 2039, link=300),
        Gpu("H100-PCIe", 80, 756, 51.0, 2000, link=50),
        Gpu("H100", 80, 989, 67.0, 3350, link=450),
        Gpu("H200", 141, 989, 67.0, 4800, link=450),
        Gpu("B200", 180, 2250, 80.0, 8000, link=900),
        Gpu("MI300X", 192, 1307, 163.4, 5300, link=448),
    )
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GIB|GB|G|MIB|MB|M)", re.IGNORECASE)


def find_gpu(text: str) -> Gpu:
    """A GPU by name, in any spelling of case, hyphens and spaces, or by its memory such as ``24GB``.

    Raises UsageError for anything else, with the nearest names.
    """
    plain = _plain(text)
    for name, gpu in KNOWN.items():
        if _plain(name) == plain:
            return gpu
    size = _SIZE.fullmatch(text.strip())
    if size:
        gib = float(size[1]) / (1024 if size[2].upper().startswith("M") else 1)
        if gib <= 0:
            raise UsageError(f"--gpu is {text!r}: a GPU has more than no memory; give a size such as 24GB")
        return _of_size(gib)
    spelled = {_plain(name): name for name in KNOWN}
    near = [spelled[found] for found in difflib.get_close_matches(plain, spelled, n=3, cutoff=0.5)]
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"--gpu {text!r} is neither a size such as 24GB nor a GPU known by name. {meant}Known: {', '.join(KNOWN)}"
    )


def _of_size(gib: float) -> Gpu:
    """A GPU of that much memory with the speeds of the slowest known one that has at least as much."""
    enough = [gpu for gpu in KNOWN.values() if gpu.gib >= gib and gpu.bf16 is not None] or [KNOWN["MI300X"]]
    smallest = min(gpu.gib for gpu in enough)
    slowest = min((gpu for gpu in enough if gpu.gib == smallest), key=lambda gpu: gpu.bandwidth)
    return replace(slowest, name=f"{gib:g} GB", gib=gib, speeds_of=slowest.name)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
