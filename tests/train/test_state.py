"""The state of optimizers and random generators: exact to the bit, strict about what does not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.checkpoint import load_latest, save_checkpoint
from perl_vlm.train.state import optimizer_state, restore_optimizer, restore_rng, rng_state


class Training:
    """A tiny model with dropout, two parameter groups, a parameter that never gets a gradient, and numpy noise."""

    def __init__(self, seed: int, **settings: object) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Tanh(), nn.Linear(7, 1))
        self.model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        groups = [
            {"params": [self.model[0].weight, self.model[0].bias], "lr": 0.01, "peak": 0.01},
            {"params": [self.model[3].weight, self.model[3].bias, self.model.unused], "lr": 0.1, "peak": 0.1},
        ]
        self.optimizer = torch.optim.AdamW(groups, **{"weight_decay": 0.1, "betas": (0.8, 0.95), **settings})

    def run(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] / (1 + step)
            noise = torch.tensor(np.random.randn(6, 5), dtype=torch.float32)
            loss = (self.model(torch.randn(6, 5) + noise) - random.random()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def save(self, folder: Path, step: int) -> None:
        optimizer, record = optimizer_state(self.optimizer, self.named())
        generators, rng_record = rng_state()
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer, "rng": generators}
        save_checkpoint(folder, step, tensors, {"optimizer": record, "rng": rng_record})

    def load(self, folder: Path) -> int:
        found = load_latest(folder)
        assert found is not None
        self.model.load_state_dict(found.tensors["model"])
        restore_optimizer(self.optimizer, self.named(), found.tensors["optimizer"], found.records["optimizer"])
        restore_rng(found.tensors["rng"], found.records["rng"])
        return found.step


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_k_steps_a_fresh_start_and_the_rest_equal_all_steps_to_the_bit(
    tmp_path: Path, k: int, settings: dict[str, object]
) -> None:
    whole = Training(3, **settings)
    losses = whole.run(range(12))

    first = Training(3, **settings)
    before = first.run(range(k))
    first.save(tmp_path, k)
    first.run(range(k, k + 2))  # going on must not reach into what was saved

    second = Training(99, **settings)
    second.run(range(2))  # and nothing of an earlier life may remain
    step = second.load(tmp_path)
    assert before + second.run(range(step, 12)) == losses
    for (name, one), (_, two) in zip(whole.named(), second.named(), strict=True):
        assert torch.equal(one, two), name
    tensors, record = optimizer_state(whole.optimizer, whole.named())
    other, other_record = optimizer_state(second.optimizer, second.named())
    assert record == other_record
    assert all(torch.equal(tensors[name], other[name]) for name in tensors)


def test_the_state_is_a_copy_named_by_parameter_and_plain_json() -> None:
    training = Training(0)
    training.run(range(2))
    tensors, record = optimizer_state(training.optimizer, training.named())
    assert record == json.loads(json.dumps(record))
    assert {"exp_avg/0.weight", "exp_avg_sq/0.weight", "step/0.weight"} <= set(tensors)
    assert not any(name.endswith("unused") for name in tensors)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    training.run(range(2))
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)
    restore_optimizer(training.optimizer, training.named(), tensors, record)
    training.run(range(2))
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)
    assert isinstance(training.optimizer.param_groups[0]["betas"], tuple)


def rename(training: Training, tensors: dict[str, Tensor], record: dict) -> object:
    return [(name.replace("3.", "4."), parameter) for name, parameter in training.named()]


def drop_tensor(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    del tensors["exp_avg/0.weight"]


def add_tensor(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    tensors["exp_avg/unused"] = torch.zeros(3)


def change_shape(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    tensors["exp_avg/0.weight"] = torch.zeros(5, 7)


def change_dtype(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    tensors["exp_avg/0.weight"] = tensors["exp_avg/0.weight"].double()


def change_parameter(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    training.model[0].weight.data = torch.zeros(7, 6)


def other_order(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    training.optimizer.param_groups[0]["params"].reverse()


def one_group(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    training.optimizer.param_groups.pop()


def other_setting(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    training.optimizer.param_groups[0]["momentum"] = 0.9


def other_class(training: Training, tensors: dict[str, Tensor], record: dict) -> None:
    record["optimizer"] = "SGD"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rename, r"only in the checkpoint: 3\.weight.*only here: 4\.weight"),
        (drop_tensor, "exp_avg/0.weight"),
        (add_tensor, "exp_avg/unused"),
        (change_shape, r"exp_avg/0\.weight is float32 \[7, 5\] in it and float32 \[5, 7\]"),
        (change_dtype, "float64"),
        (change_parameter, r"0\.weight float32 \[7, 6\]"),
        (other_order, "another order"),
        (one_group, "number of parameter groups is 2 in it and 1 here"),
        (other_setting, "only here: momentum"),
        (other_class, "SGD"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: Callable[..., object], named: str) -> None:
    training = Training(0)
    training.run(range(2))
    tensors, record = optimizer_state(training.optimizer, training.named())
    training.run(range(1))
    before = {id(key): {name: tensor.clone() for name, tensor in value.items()}
              for key, value in training.optimizer.state.items()}  # fmt: skip
    given = change(training, tensors, record) or training.named()
    with pytest.raises(PerlVlmError, match=named):
        restore_optimizer(training.optimizer, given, tensors, record)
    for parameter, state in training.optimizer.state.items():
        assert all(torch.equal(state[key], before[id(parameter)][key]) for key in state)


def test_a_parameter_without_a_name_or_with_a_shared_one_is_refused() -> None:
    training = Training(0)
    with pytest.raises(PerlVlmError, match="1 parameters of the optimizer have no name"):
        optimizer_state(training.optimizer, training.named()[1:])
    with pytest.raises(PerlVlmError, match="share a name: same"):
        optimizer_state(training.optimizer, [("same", parameter) for _, parameter in training.named()])


def test_a_tensor_among_the_hyperparameters_is_refused() -> None:
    training = Training(0)
    training.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(PerlVlmError, match="setting lr of the optimizer is a Tensor"):
        optimizer_state(training.optimizer, training.named())


def draw(own: random.Random, generator: torch.Generator) -> list[object]:
    """A bit of everything, the cached second half of a Gaussian pair included."""
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(),
        torch.randn(17).tolist(), own.gauss(0, 1), own.randrange(10**9), torch.randn(3, generator=generator).tolist(),
    ]  # fmt: skip


def objects() -> tuple[random.Random, torch.Generator]:
    return random.Random(1), torch.Generator().manual_seed(2)


@pytest.mark.parametrize("through_disk", [False, True])
def test_every_generator_goes_on_to_the_bit(tmp_path: Path, through_disk: bool) -> None:
    own, generator = objects()
    draw(own, generator)  # leaves one Gaussian of a pair cached in python and in numpy
    tensors, record = rng_state({"own": own, "torch": generator})
    expected = [draw(own, generator) for _ in range(3)]
    if through_disk:
        save_checkpoint(tmp_path, 1, {"rng": tensors}, {"rng": record})
        found = load_latest(tmp_path)
        assert found is not None
        tensors, record = found.tensors["rng"], found.records["rng"]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    fresh_own, fresh_generator = random.Random(), torch.Generator()
    restore_rng(tensors, record, {"own": fresh_own, "torch": fresh_generator})
    assert [draw(fresh_own, fresh_generator) for _ in range(3)] == expected


@pytest.mark.parametrize("part", ["python", "numpy", "torch_cpu", "object/own", "object/torch"])
@pytest.mark.parametrize("how", ["missing", "flipped", "short", "other dtype"])
def test_a_missing_or_altered_part_is_an_error_and_no_generator_moves(part: str, how: str) -> None:
    own, generator = objects()
    given = {"own": own, "torch": generator}
    tensors, record = rng_state(given)
    if how == "missing":
        del tensors[part]
    elif how == "short":
        tensors[part] = tensors[part][:-1]
    elif how == "other dtype":
        tensors[part] = tensors[part].to(torch.int32)
    else:
        tensors[part] = tensors[part].clone()
        tensors[part][5] ^= 1
    before = rng_state(given)[1]
    with pytest.raises(PerlVlmError, match=part):
        restore_rng(tensors, record, given)
    assert rng_state(given)[1] == before


@pytest.mark.parametrize("change", ["gauss", "nothing left", "part"])
def test_an_altered_record_is_an_error(change: str) -> None:
    tensors, record = rng_state()
    if change == "gauss":
        record["details"]["python"]["gauss"] = 0.5
    elif change == "part":
        del record["parts"]["numpy"]
    else:
        record.clear()
    with pytest.raises(PerlVlmError, match="record of the random state is missing or was altered"):
        restore_rng(tensors, record)


def test_named_generators_must_be_the_same_ones() -> None:
    own, generator = objects()
    tensors, record = rng_state({"own": own})
    with pytest.raises(PerlVlmError, match="only in the checkpoint: object/own"):
        restore_rng(tensors, record)
    with pytest.raises(PerlVlmError, match="only here: object/more"):
        restore_rng(tensors, record, {"own": own, "more": generator})
    with pytest.raises(PerlVlmError, match="kind of the generator own is python in it and torch on cpu here"):
        restore_rng(tensors, record, {"own": generator})
    with pytest.raises(TypeError, match="own is a Generator"):
        rng_state({"own": np.random.default_rng(0)})


def test_another_number_of_cuda_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {0: torch.arange(16, dtype=torch.uint8), 1: torch.arange(16, 32, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda index: stored[index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: stored.__setitem__(index, state))
    tensors, record = rng_state()
    stored[1] = torch.zeros(16, dtype=torch.uint8)
    restore_rng(tensors, record)
    assert stored[1].tolist() == list(range(16, 32))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PerlVlmError, match="only in the checkpoint: torch_cuda_1"):
        restore_rng(tensors, record)
