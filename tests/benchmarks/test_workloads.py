"""The benchmarks' workloads are what they say: lengths, parameters, what a step needs. Rows are kept and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import their neighbours; afterwards nothing of them stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in {"measuring", "workloads", "stages", "rm_vs_trl", "ppo_vs_trl", "scaling"} & (
        set(sys.modules) - before
    ):
        del sys.modules[name]


def test_the_accounting_of_the_reference_workloads() -> None:
    from workloads import EPISODES, PAIRS, SHAPE, pairs_flop, ppo_flop

    n = 25_165_824  # 8 layers of q, k, v, o (1.5 squares of 512 twice) and three matrices of 512 x 1536
    assert SHAPE.matmul_parameters == n
    assert pairs_flop(SHAPE, PAIRS) == 4 * n * 8 * (384 + 2 * 48)
    assert pairs_flop(SHAPE, PAIRS, shared=False) == 4 * n * 8 * 2 * (384 + 48)
    assert pairs_flop(SHAPE, PAIRS, tuning="full", models=3) == 18 * n * 8 * 480
    tokens = 16 * (128 + 48)
    # Decoding; old log-probs, reference, value and reward; four epochs of policy and value.
    assert ppo_flop(SHAPE, EPISODES, value="adapter") == (2 + 4 * 2 + 4 * 4 * 2) * n * tokens
    assert ppo_flop(SHAPE, EPISODES, value="policy_head") == (2 + 3 * 2 + 4 * 4) * n * tokens
    assert ppo_flop(SHAPE, EPISODES, value="adapter") == pytest.approx(3.0e12, rel=0.02)
    assert ppo_flop(SHAPE, EPISODES, value="policy_head") == pytest.approx(1.7e12, rel=0.02)


def test_a_group_reads_its_prompt_once_and_one_epoch_needs_no_old_logprobs() -> None:
    from workloads import SHAPE, Load, ppo_flop

    n = SHAPE.matmul_parameters
    load = Load(128, 48, 16, group=4)
    assert ppo_flop(SHAPE, load, value="none", rewards=0) == (2 + 2 + 4) * n * (4 * 128 + 16 * 48)


def test_the_counted_weights_are_the_models_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from workloads import Shape, make_model

    shape = Shape(hidden=128, layers=3, vocabulary=64)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, shape, "float32"))
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    assert shape.matmul_parameters == matrices


@pytest.mark.parametrize("vision", [False, True], ids=["text", "vlm"])
def test_lengths_are_exact(vision: bool, tmp_path: Path) -> None:
    from stages import Synthetic
    from workloads import SMOKE_PAIRS, SMOKE_SHAPE, SMOKE_VLM, make_model

    from perl_vlm.data.render import Renderer
    from perl_vlm.models.backbone import load_backbone

    shape, load = SMOKE_VLM if vision else SMOKE_SHAPE, replace(SMOKE_PAIRS, prompt=21)
    backbone = load_backbone(make_model(tmp_path, shape, "float32"), device="cpu", dtype="float32")
    spec = {"shape": asdict(shape), "load": asdict(load)}
    task = Synthetic(spec)
    sequences, _ = task.collator(Renderer(backbone)).comparisons(task.preferences("test"))
    assert sequences.input_ids.shape == (4, load.prompt + load.response)
    assert sequences.attention_mask.all()
    assert sequences.response_mask.all()
    assert sequences.prompt_of == (0, 1, 0, 1)
    assert bool((sequences.input_ids != backbone.tokenizer.unk_token_id).all())
    assert bool((sequences.input_ids[:, -1] == backbone.tokenizer.eos_token_id).all())
    alone, _ = Synthetic({**spec, "shared": False}).collator(Renderer(backbone)).comparisons(task.preferences("test"))
    assert alone.prompt_of is None


def arm(name: str, flop: float = 2e9) -> Any:
    from measuring import Arm

    return Arm(name, {"arm": name, "dtype": "float32", "items": 8, "folder": "away"}, flop)


def test_a_row_is_the_median_of_processes_and_names_no_folder() -> None:
    from measuring import summarise

    found = [{"seconds": seconds, "peak_bytes": peak} for seconds, peak in (([1, 2, 9], 5), ([4, 4], 9), ([3], 6))]
    row = summarise(arm("a"), found, {"float32": 1e9})
    assert (row["seconds_a_step"], row["peak_bytes"]) == (3, 6)
    assert row["items_a_second"] == pytest.approx(8 / 3, abs=1e-4)
    assert row["share_of_matmul_peak"] == pytest.approx(2 / 3, abs=1e-4)
    assert "folder" not in row["settings"]


def test_rows_that_are_not_measured_again_stay_and_their_ratio_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import measuring

    order: list[str] = []

    def child(script: Path, spec: dict[str, Any], python: str = "") -> Any:
        order.append(spec["arm"])
        return {"float32": 1e9} if spec["arm"] == measuring.PEAK else {"seconds": [2.0], "peak_bytes": 10}

    monkeypatch.setattr(measuring, "run_child", child)
    times = iter(["first", "second"])
    monkeypatch.setattr(measuring.time, "strftime", lambda *_: next(times))
    out = tmp_path / "a.json"
    for arms in ([arm("a"), arm("b")], [arm("b")]):
        study = measuring.Study(Path("a.py"), "a test", "pairs", out)
        rows = study.compare(arms, 2, smoke=True)
        study.finish({})
    assert order[:6] == [measuring.PEAK, "a", "b"] * 2, "arms take turns"
    assert {name: row["run"] for name, row in json.loads(out.read_text())["rows"].items()} == {
        "a, float32": "first", "b, float32": "second",
    }  # fmt: skip
    assert measuring.ratio(rows, "a, float32", "b, float32", "peak_bytes") == {"value": 1.0, "of_two_runs": True}
    assert measuring.ratio(rows, "b, float32", "b, float32", "peak_bytes") == 1.0
    assert measuring.ratio(rows, "b, float32", "c, float32", "peak_bytes") is None


def test_a_command_names_no_path_of_the_machine() -> None:
    from measuring import command_of

    given = ["--arms", "ppo value head", "--trl112", "/some/where/bin/python", "--out", "/else/where.json"]
    assert command_of(Path("/a/b.py"), given) == (
        "python benchmarks/b.py --arms 'ppo value head' --trl112 PYTHON --out where.json"
    )


def test_a_peak_is_that_of_the_steps_beyond_the_bare_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import measuring

    monkeypatch.setattr(measuring, "MODULES", ())
    readings = iter([(100, 100), (300, 900), (300, 500), (300, 700)])
    monkeypatch.setattr(measuring, "memory", lambda: next(readings))
    monkeypatch.setattr(measuring.Meter, "_forget_peak", lambda self: None)
    meter = measuring.Meter()
    for _ in range(3):
        meter.lap()
    found = meter.result(1)
    assert (found["peak_bytes"], found["loading_peak_bytes"], found["bare_bytes"]) == (600, 800, 100)
    assert len(found["seconds"]) == 1
    with pytest.raises(RuntimeError, match="2 steps were seen"):
        meter.result(2)


def test_scaling_changes_one_size_at_a_time() -> None:
    from scaling import AXES, varied
    from workloads import PAIRS, SHAPE

    for axis in AXES:
        shape, load, models = varied(SHAPE, PAIRS, axis, 6)
        changed = [key for key, value in asdict(SHAPE).items() if asdict(shape)[key] != value]
        changed += [key for key, value in asdict(PAIRS).items() if asdict(load)[key] != value]
        changed += ["models"] if models != 1 else []
        assert changed == [axis]


def test_an_unclipped_gradient_is_told() -> None:
    import torch
    from ppo_vs_trl import MAX_GRAD_NORM, clipping, watch_norms

    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    norms = watch_norms(SimpleNamespace(optimizer=optimizer))

    class Unclipped:
        def train(self) -> None:
            pass

    class Clipped:
        def train(self) -> None:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)

    weight.grad = torch.full((4,), 3.0)
    optimizer.step()
    weight.grad = torch.full((4,), 5.0)
    optimizer.step()
    assert norms == [6.0], "the first step's, and no other's"
    assert clipping(Unclipped, norms)["clips_gradients"] is False
    assert clipping(Unclipped, norms)["loop_calls_clip_grad_norm"] is False
    assert clipping(Clipped, [MAX_GRAD_NORM])["clips_gradients"] is True
    assert clipping(Clipped, norms)["loop_calls_clip_grad_norm"] is True
