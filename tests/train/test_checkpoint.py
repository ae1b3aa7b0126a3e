"""Checkpoints: exact round trips, crashes at any moment, every way to damage a file, nothing unpickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perl_vlm.errors import PerlVlmError
from perl_vlm.train import checkpoint
from perl_vlm.train.checkpoint import load_latest, save_checkpoint, verify

FILES = ["weights.safetensors", "optimizer.safetensors", "position.json", "manifest.json"]


def content(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    tensors = {"weights": {"w": torch.full((40, 5), float(step))}, "optimizer": {"step": torch.tensor(float(step))}}
    return tensors, {"position": {"step": step, "seen": list(range(step))}}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, *content(step), keep=keep)


def load(folder: Path) -> tuple[checkpoint.Checkpoint, list[str]]:
    warnings: list[str] = []
    found = load_latest(folder, warn=warnings.append)
    assert found is not None
    assert torch.equal(found.tensors["weights"]["w"], content(found.step)[0]["weights"]["w"])
    assert found.records["position"]["step"] == found.step
    return found, warnings


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    group = {
        "f32": base,
        "bf16": base.bfloat16(),
        "f64": base.double() / 3,
        "bool": base > 0,
        "u8": torch.arange(255, dtype=torch.uint8),
        "i64": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "empty_too": torch.zeros(0, 3),
        "transposed": base.T,
        "shared": base[1:3],
        "same": base,
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "trained": torch.nn.Parameter(base),
    }
    records = {
        "r": {"float": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf, "big": 2**130, "list": [None, True, "ü\ud800"]}
    }
    save_checkpoint(tmp_path, 3, {"all": group, "nothing": {}}, records)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert found.tensors["nothing"] == {}
    assert set(found.tensors["all"]) == set(group)
    for name, tensor in group.items():
        back = found.tensors["all"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        assert raw(back) == raw(tensor), name
    record = found.records["r"]
    assert math.isnan(record.pop("nan"))
    assert record == {key: value for key, value in records["r"].items() if key != "nan"}


def test_a_loaded_tensor_does_not_see_the_file_change(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    found, _ = load(tmp_path)
    target = path / "weights.safetensors"
    with target.open("r+b") as file:
        file.write(b"\xff" * target.stat().st_size)
    assert torch.equal(found.tensors["weights"]["w"], content(1)[0]["weights"]["w"])


def test_only_the_newest_are_kept_and_temporaries_go(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000001-77").mkdir()
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]
    save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "position.json").unlink()
    save(tmp_path, 15)
    assert "step-00000005" in names(tmp_path)
    save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]


def test_saving_an_early_step_leaves_later_ones_alone_and_itself_in_place(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000010" / "position.json").unlink()
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007", "step-00000010"]
    assert load(tmp_path)[0].step == 7


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"other": {"x": torch.ones(1)}}, {})
    found = load_latest(tmp_path)
    assert found is not None
    assert list(found.tensors) == ["other"]
    assert names(tmp_path) == ["step-00000005"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / ".tmp-step-00000001-5").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_latest(tmp_path) is None


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)


def flip_first(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[0] ^= 0x80
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def link_away(path: Path) -> None:
    shutil.move(path, path.parent.parent / f"moved-{path.name}")
    path.symlink_to(path.parent.parent / f"moved-{path.name}")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def older_version(path: Path) -> None:
    path.write_bytes((path.parent.parent / "step-00000005" / path.name).read_bytes())


DAMAGE = [flip, flip_first, truncate, empty, lengthen, Path.unlink, become_a_folder, older_version]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_detected_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert verify(newest) == []
    damage(newest / name)
    assert [problem.split(":")[0] for problem in verify(newest)] == [name]
    found, warnings = load(tmp_path)
    assert found.step == 5
    assert len(warnings) == 1
    assert name in warnings[0]
    assert "step-00000010" in warnings[0]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    link_away(path / "weights.safetensors")
    assert verify(path) == ["weights.safetensors: not a plain file"]


def test_every_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, {}, {"position": {}}) / "manifest.json"
    raw_bytes = path.read_bytes()
    for position in range(0, len(raw_bytes), 5):
        for bit in range(8):
            changed = bytearray(raw_bytes)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            assert verify(path.parent), (position, bit)


def test_swapped_files_and_swapped_folders(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    one, two = newest / "weights.safetensors", newest / "optimizer.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert [problem.split(":")[0] for problem in verify(newest)] == ["optimizer.safetensors", "weights.safetensors"]
    assert load(tmp_path)[0].step == 5

    save(tmp_path, 10)
    (tmp_path / "step-00000005").rename(tmp_path / "away")
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000005")
    (tmp_path / "away").rename(tmp_path / "step-00000010")
    assert "belongs to step 5" in verify(tmp_path / "step-00000010")[0]
    assert "belongs to step 10" in verify(tmp_path / "step-00000005")[0]


def test_an_added_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "extra.json").write_text("{}")
    assert verify(path) == ["extra.json: not in the manifest"]


def test_none_good_is_an_error_that_names_them_all_and_touches_nothing(tmp_path: Path) -> None:
    for step in (5, 10):
        flip(save(tmp_path, step) / "weights.safetensors")
    before = names(tmp_path)
    with pytest.raises(PerlVlmError) as caught:
        load_latest(tmp_path, warn=lambda text: None)
    for part in ("step-00000005", "step-00000010", "weights.safetensors", "--out"):
        assert part in str(caught.value)
    assert names(tmp_path) == before


def test_without_warn_the_report_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 5)
    flip(save(tmp_path, 10) / "position.json")
    assert load_latest(tmp_path) is not None
    captured = capsys.readouterr()
    assert "position.json" in captured.err
    assert captured.out == ""


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT)


def test_the_bomb_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", ["plain", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_under_any_name_executes_nothing(tmp_path: Path, name: str, how: str) -> None:
    folder, mark = tmp_path / "checkpoints", tmp_path / "mark"
    save(folder, 5)
    newest = save(folder, 10)
    if how == "plain":
        (newest / name).write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(Bomb(mark), newest / name)
    assert load(folder)[0].step == 5
    if name != "manifest.json":
        # Even with a manifest forged to fit, the file is parsed as what its name says, and refused.
        files = json.loads((newest / "manifest.json").read_text())["files"]
        files[name] = {"size": (newest / name).stat().st_size, "sha256": checkpoint._sha256(newest / name)}
        (newest / "manifest.json").write_bytes(checkpoint._manifest_bytes(10, files))
        assert verify(newest) == []
        found, warnings = load(folder)
        assert found.step == 5
        assert name in warnings[0]
    assert not mark.exists()


def test_a_forged_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 5)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    files = json.loads((path / "manifest.json").read_text())["files"]
    files["../../secret.json"] = {"size": 2, "sha256": checkpoint._sha256(secret)}
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(5, files))
    assert "../../secret.json" in verify(path)[0]


@pytest.mark.parametrize("record", [{1: 2}, {"a": [{"b": object()}]}, {"a": torch.ones(1)}, {"a": {1, 2}}])
def test_a_record_that_json_would_change_is_refused_before_anything_is_written(tmp_path: Path, record: object) -> None:
    with pytest.raises(PerlVlmError, match="record odd"):
        save_checkpoint(tmp_path / "new", 1, {}, {"odd": record})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a\n", "manifest"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a part"):
        save_checkpoint(tmp_path, 1, {}, {name: {}})


class Crash(BaseException):
    """The power goes: no handler of Exception runs."""


def test_a_crash_between_any_two_disk_operations_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save step 5, 10 and 10 again; crash at the n-th sync, rename or deletion, for every n."""
    operations = [(os, "fsync"), (os, "rename"), (shutil, "rmtree"), (Path, "mkdir")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in operations]
    crashes = 0
    while True:
        folder = tmp_path / f"crash-{crashes}"
        save(folder, 5, keep=1)
        left = crashes
        finished = []

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def operation(*args: object, **keywords: object) -> object:
                nonlocal left
                if left == 0:
                    if original is originals[2][2]:  # a deletion that gets as far as one file
                        next(iter(Path(str(args[0])).iterdir())).unlink()
                    raise Crash
                left -= 1
                return original(*args, **keywords)

            return operation

        try:
            for owner, name, original in originals:
                monkeypatch.setattr(owner, name, counted(original))
            for step in (10, 10, 15):
                save(folder, step, keep=1)
                finished.append(step)
        except Crash:
            pass
        finally:
            for owner, name, original in originals:
                monkeypatch.setattr(owner, name, original)
        found, warnings = load(folder)
        assert found.step >= max([5, *finished])
        assert warnings == []
        assert [verify(path) for path in folder.glob("step-*") if verify(path)] == []
        if len(finished) == 3:
            break
        save(folder, 20, keep=1)
        assert names(folder) == ["step-00000020"]
        crashes += 1
    assert crashes > 25


CAMPAIGN = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from perl_vlm.train.checkpoint import load_latest, save_checkpoint

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(5)

def save(step):
    weights = {f"w{i}": torch.full((500, 40), float(step)) for i in range(4)}
    save_checkpoint(folder, step, {"weights": weights, "more": weights}, {"position": {"step": step}})

def child(acknowledge):
    step = load_latest(folder).step
    os.write(acknowledge, b".")
    while True:
        step += 1
        for _ in range(2):  # every step is saved twice, so that replacing is hit too
            save(step)
            os.write(acknowledge, b" %d" % step)

save(0)
rounds = []
for _ in range(kills):
    start = load_latest(folder).step
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(writing)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    time.sleep(chance.uniform(0, 0.06))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reading, "rb") as text:
        acknowledged = max(map(int, text.read().split()), default=start)
    torn = any(path.name.startswith(".tmp-") for path in folder.iterdir())
    warnings = []
    found = load_latest(folder, warn=warnings.append)
    tensors = [tensor for group in found.tensors.values() for tensor in group.values()]
    good = len(tensors) == 8 and all(bool((tensor == found.step).all()) for tensor in tensors)
    rounds.append({"killed": os.WIFSIGNALED(status), "acknowledged": acknowledged, "latest": found.step,
                   "torn": torn, "good": good and found.records["position"]["step"] == found.step,
                   "warnings": warnings})
print(json.dumps(rounds))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_sigkill_at_random_moments_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", CAMPAIGN, str(tmp_path / "checkpoints"), "15"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr
    rounds = json.loads(result.stdout)
    assert len(rounds) == 15
    for one in rounds:
        assert one["killed"], one
        assert one["good"], one
        assert one["warnings"] == []
        assert one["acknowledged"] <= one["latest"] <= one["acknowledged"] + 1
    assert rounds[-1]["latest"] > 0
    assert sum(one["torn"] for one in rounds) >= 3, "the kills are meant to fall inside saves"
