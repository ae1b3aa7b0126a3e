"""What ``--gpu`` takes."""

from __future__ import annotations

import pytest

from perl_vlm.cli_settings import UsageError
from perl_vlm.plan.gpus import KNOWN, find_gpu


@pytest.mark.parametrize("text", ["RTX4090", "rtx 4090", "NVIDIA GeForce RTX 4090", "RTX-4090"])
def test_a_name_in_any_spelling(text: str) -> None:
    assert find_gpu(text) is KNOWN["RTX4090"]


@pytest.mark.parametrize(("text", "gib"), [("24GB", 24), ("24 gb", 24), ("24GiB", 24), ("8g", 8), ("512MB", 0.5)])
def test_a_size(text: str, gib: float) -> None:
    found = find_gpu(text)
    assert found.gib == gib
    assert found.speeds_of in KNOWN
    assert KNOWN[found.speeds_of].gib >= gib


def test_a_size_takes_the_slowest_speeds() -> None:
    assert find_gpu("24GB").speeds_of == "L4"
    assert find_gpu("1000GB").speeds_of == "MI300X"


def test_a_gpu_without_bfloat16_computes_in_float32() -> None:
    assert KNOWN["T4"].tflops("bfloat16") == KNOWN["T4"].fp32
    assert KNOWN["H100"].tflops("bfloat16") == 989


@pytest.mark.parametrize("text", ["24XB", "GB", "-3GB", "", "0GB"])
def test_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="24GB"):
        find_gpu(text)


def test_an_unknown_gpu_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"neither a size such as 24GB nor a GPU .*\. Did you mean .*RTX4090"):
        find_gpu("RTX4091")
