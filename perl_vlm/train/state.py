"""The exact state of optimizers and random number generators, as tensors and JSON.

Both directions are exact to the bit and strict: what does not fit is refused, with nothing changed. Learning-rate
schedules need no state: the rate is a function of the step.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from perl_vlm.errors import PerlVlmError

Tensors: TypeAlias = dict[str, Tensor]
Record: TypeAlias = dict[str, Any]
RandomObject: TypeAlias = torch.Generator | random.Random


def optimizer_state(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> tuple[Tensors, Record]:
    """Copies (on the CPU) of what the optimizer remembers, and a JSON record of the rest.

    Args:
        optimizer: AdamW or another whose state of each parameter is tensors and plain values.
        named: names and parameters, as of ``model.named_parameters()``; it may hold more than the optimizer's.

    Returns:
        Tensors keyed ``exp_avg/<parameter>``, ``exp_avg_sq/<parameter>``, ``step/<parameter>``, and a record of the
        groups with their hyperparameters and of every shape and dtype.

    Raises:
        PerlVlmError: a parameter of the optimizer has no name or shares one, or a value is neither tensor nor plain.
    """
    names = _names_of(optimizer, named)
    tensors: Tensors = {}
    groups, states = [], {}
    for group in optimizer.param_groups:
        settings = {key: _plain(value, f"setting {key}") for key, value in group.items() if key != "params"}
        groups.append({"parameters": [f"{names[p]} {_form(p)}" for p in group["params"]], "settings": settings})
        for parameter in group["params"]:
            name = names[parameter]
            state = optimizer.state.get(parameter, {})
            forms = {key: _form(value) for key, value in state.items() if isinstance(value, Tensor)}
            for key in forms:
                tensors[f"{key}/{name}"] = state[key].detach().to("cpu", copy=True)
            values = {key: _plain(value, f"{key} of {name}") for key, value in state.items() if key not in forms}
            states[name] = {"tensors": forms, "values": values}
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "state": states}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> None:
    """Bring a freshly made optimizer to the state that ``optimizer_state`` took, hyperparameters included.

    Raises:
        PerlVlmError: class, groups, names, shapes, dtypes or hyperparameter keys differ, or tensors are missing or
            too many. The optimizer is then unchanged.
    """
    names = _names_of(optimizer, named)
    _require_equal("optimizer class", record.get("optimizer"), type(optimizer).__name__)
    _require_equal("number of parameter groups", len(record["groups"]), len(optimizer.param_groups))
    for index, (saved, group) in enumerate(zip(record["groups"], optimizer.param_groups, strict=True)):
        here = [f"{names[parameter]} {_form(parameter)}" for parameter in group["params"]]
        _require_equal_lists(f"parameters of group {index}", saved["parameters"], here)
        _require_equal_lists(f"settings of group {index}", sorted(saved["settings"]), sorted(set(group) - {"params"}))
    wanted = {
        f"{key}/{name}": form for name, state in record["state"].items() for key, form in state["tensors"].items()
    }
    _require_equal_lists("optimizer tensors", sorted(wanted), sorted(tensors))
    for key, form in wanted.items():
        _require_equal(f"optimizer tensor {key}", form, _form(tensors[key]))

    optimizer.state.clear()
    for saved, group in zip(record["groups"], optimizer.param_groups, strict=True):
        for key, value in saved["settings"].items():
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
        for parameter in group["params"]:
            state = record["state"][names[parameter]]
            restored: dict[str, Any] = dict(state["values"])
            for key in state["tensors"]:
                # torch keeps the step counter on the CPU unless the kernel itself counts.
                on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
                device = torch.device("cpu") if on_cpu else parameter.device
                restored[key] = tensors[f"{key}/{names[parameter]}"].to(device, copy=True)
            if restored:
                optimizer.state[parameter] = restored


def rng_state(objects: Mapping[str, RandomObject] | None = None) -> tuple[Tensors, Record]:
    """The state of ``random``, numpy's global generator, torch on the CPU and on every CUDA device, and of the given
    ``torch.Generator`` and ``random.Random`` objects by name: tensors, and a JSON record that seals them by hash."""
    for name, value in (objects or {}).items():
        if not isinstance(value, torch.Generator | random.Random):
            raise TypeError(f"{name} is a {type(value).__name__}; a torch.Generator or random.Random is wanted")
    tensors: Tensors = {}
    details: Record = {}
    tensors["python"], details["python"] = _take_python(random.getstate())
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(words).astype(np.int64))
    details["numpy"] = {"kind": str(kind), "numbers": [int(position), int(has_gauss), float(gauss)]}
    tensors["torch_cpu"] = torch.get_rng_state()
    for index in range(_cuda_devices()):
        tensors[f"torch_cuda_{index}"] = torch.cuda.get_rng_state(index)
    for name, value in (objects or {}).items():
        key = f"object/{name}"
        if isinstance(value, torch.Generator):
            tensors[key], details[key] = value.get_state(), {"kind": _kind(value)}
        else:
            tensors[key], details[key] = _take_python(value.getstate())
    record = {"parts": {name: _seal(tensor) for name, tensor in tensors.items()}, "details": details}
    return tensors, {**record, "sha256": _seal_record(record)}


def restore_rng(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], objects: Mapping[str, RandomObject] | None = None
) -> None:
    """Set every generator back to what ``rng_state`` took; the same names of ``objects`` must be given.

    Raises:
        PerlVlmError: a part is missing, unexpected or altered, or cannot be set. A run that went on with other random
            numbers would not be the same run, so there is no way round it.
    """
    objects = objects or {}
    body = {key: record.get(key) for key in ("parts", "details")}
    if record.get("sha256") != _seal_record(body):
        raise PerlVlmError("the record of the random state is missing or was altered; the run cannot go on exactly.")
    here = ["python", "numpy", "torch_cpu", *(f"torch_cuda_{index}" for index in range(_cuda_devices()))]
    here += [f"object/{name}" for name in objects]
    _require_equal_lists("parts of the random state", sorted(record["parts"]), sorted(here))
    _require_equal_lists("tensors of the random state", sorted(record["parts"]), sorted(tensors))
    for name, seal in record["parts"].items():
        if _seal(tensors[name]) != seal:
            raise PerlVlmError(f"the random state of {name} was altered after it was taken; it cannot be restored.")
    for name, value in objects.items():
        _require_equal(f"kind of the generator {name}", record["details"][f"object/{name}"]["kind"], _kind(value))
    for part in here:
        try:
            _set(part, tensors[part].cpu(), record["details"].get(part, {}), objects)
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise PerlVlmError(f"the random state of {part} cannot be restored: {error}") from error


def _set(part: str, tensor: Tensor, details: Mapping[str, Any], objects: Mapping[str, RandomObject]) -> None:
    """Put one part of the random state back."""
    if part == "python":
        random.setstate(_python_state(tensor, details))
    elif part == "numpy":
        np.random.set_state((details["kind"], tensor.numpy().astype(np.uint32), *details["numbers"]))
    elif part == "torch_cpu":
        torch.set_rng_state(tensor)
    elif part.startswith("torch_cuda_"):
        torch.cuda.set_rng_state(tensor, int(part.removeprefix("torch_cuda_")))
    else:
        target = objects[part.removeprefix("object/")]
        if isinstance(target, torch.Generator):
            target.set_state(tensor)
        else:
            target.setstate(_python_state(tensor, details))


def _kind(generator: RandomObject) -> str:
    return f"torch on {generator.device.type}" if isinstance(generator, torch.Generator) else "python"


def _take_python(state: tuple[Any, ...]) -> tuple[Tensor, Record]:
    version, words, gauss = state
    return torch.tensor(words, dtype=torch.int64), {"kind": "python", "version": version, "gauss": gauss}


def _python_state(tensor: Tensor, details: Mapping[str, Any]) -> tuple[Any, ...]:
    return details["version"], tuple(tensor.tolist()), details["gauss"]


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _seal(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{_form(tensor)} ".encode() + plain.numpy().tobytes()).hexdigest()


def _seal_record(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _names_of(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Names by parameter (tensors hash by identity), for exactly the optimizer's parameters."""
    given: dict[Tensor, str] = {}
    for name, parameter in named:
        given.setdefault(parameter, name)
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nameless = [tuple(parameter.shape) for parameter in ours if parameter not in given]
    if nameless:
        raise PerlVlmError(
            f"{len(nameless)} parameters of the optimizer have no name, the first of shape {nameless[0]}."
        )
    names = {parameter: given[parameter] for parameter in ours}
    if len(set(names.values())) != len(names):
        twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
        raise PerlVlmError(f"several parameters of the optimizer share a name: {', '.join(twice)}.")
    return names


def _form(tensor: Tensor) -> str:
    """dtype and shape: ``float32 [2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise PerlVlmError(f"{what} of the optimizer is a {type(value).__name__}; only plain values can be saved exactly.")


def _require_equal(what: str, saved: Any, here: Any) -> None:
    if saved != here:
        raise PerlVlmError(f"the checkpoint does not fit: {what} is {saved} in it and {here} here.")


def _require_equal_lists(what: str, saved: list[Any], here: list[Any]) -> None:
    """Raise PerlVlmError that names what only one side has."""
    if saved == here:
        return
    gone = [str(item) for item in saved if item not in here]
    new = [str(item) for item in here if item not in saved]
    parts = [
        f"only in the checkpoint: {', '.join(gone[:5])}" * bool(gone),
        f"only here: {', '.join(new[:5])}" * bool(new),
    ]
    difference = "; ".join(part for part in parts if part) or "the same ones in another order"
    raise PerlVlmError(
        f"the checkpoint does not fit: its {what} ({len(saved)}) differ from the ones here ({len(here)}); "
        f"{difference}. Resume with the model, settings and devices that the run began with."
    )
