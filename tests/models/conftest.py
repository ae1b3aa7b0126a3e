"""What tests of models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

KeptBytes = Callable[[], AbstractContextManager[dict[int, int]]]


@pytest.fixture
def kept_bytes() -> KeptBytes:
    """Within ``kept_bytes() as kept``, the bytes that autograd keeps for backward, by storage."""

    @contextmanager
    def counted() -> Iterator[dict[int, int]]:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield kept

    return counted
