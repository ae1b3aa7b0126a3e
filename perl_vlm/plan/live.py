"""Count the bytes of all tensors that are alive, to the byte and on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within, every storage that an operation makes is counted until it is let go of.

    What a kernel allocates inside itself is not seen, nor what the allocator keeps back: this is the peak of tensors,
    and the same on a busy machine as on a quiet one.

    Args:
        held: tensors that are there already and count too.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The most that were."""
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def since(self) -> None:
        """Forget the peak: what is alive now is the new one."""
        self.peak = self.now


def held_by(*modules: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers of some modules, those that several share once."""
    every = (value for module in modules for value in (*module.parameters(), *module.buffers()))
    return list({id(value): value for value in every}.values())
