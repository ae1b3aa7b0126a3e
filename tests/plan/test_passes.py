"""What a dry run finds a layer to keep, against a sum worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perl_vlm.errors import PerlVlmError
from perl_vlm.models.inspection import Skeleton
from perl_vlm.plan.dryrun import fused_attention, stand_ins
from perl_vlm.plan.live import LiveBytes
from perl_vlm.plan.memory import _StageMemory, memory_of
from perl_vlm.plan.passes import Rehearsal
from perl_vlm.plan.random_models import skeleton_of
from perl_vlm.plan.settings import Job
from perl_vlm.plan.shapes import shapes_of


def kept_of_a_layer(rows: int, length: int, size: int, rank: int = 8) -> int:
    """Bytes that autograd keeps of a Llama layer under LoRA on q, k, v and o, attention fused and masked.

    T tokens, H wide, I in between, A D = H: two norms keep their input and a float32 number for each row, the three
    projections share their input, attention keeps q, k and v (repeated for all heads), its output, a float32 sum for
    each query and head and the mask as numbers; the MLP keeps gate and up; each of four adapters r columns. The output
    projection's input is attention's output.
    """
    tokens, hidden, between, heads = rows * length, 128, 384, 4
    norms = 2 * tokens * (size * hidden + 4)
    attention = 4 * size * tokens * hidden + 4 * heads * tokens + size * rows * length**2
    adapters = size * tokens * hidden + 4 * size * tokens * rank
    return norms + attention + adapters + 2 * size * tokens * between


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_keeps_what_the_sum_says(dtype: str, make_job: Callable[..., Job]) -> None:
    job = make_job("sft", dtype=dtype, device="cuda")
    batch = job.batch(2)
    kept = []
    for layers in (2, 3):
        skeleton = skeleton_of("llama", num_hidden_layers=layers)
        rehearsal = Rehearsal(skeleton, shapes_of(skeleton), job)
        rehearsal.add("sft")
        rehearsal.adapters.train_only(["sft"])
        masks = rehearsal._masks(batch)
        with rehearsal._counting() as live, stand_ins(), rehearsal.acting("sft") as model:
            before = live.now
            hidden = rehearsal._hidden(model, batch, masks)
            kept.append(live.now - before)
            del hidden
    size = 2 if dtype == "bfloat16" else 4
    assert kept[1] - kept[0] == pytest.approx(kept_of_a_layer(batch.rows, batch.length, size), rel=0.02)


def test_no_number_is_made(make_job: Callable[..., Job]) -> None:
    skeleton = skeleton_of("qwen3")
    rehearsal = Rehearsal(skeleton, shapes_of(skeleton), make_job("rm"))
    role = rehearsal.add("reward")
    assert all(value.is_meta for value in (*rehearsal.base.parameters(), *role.own))
    assert not any("lora" in name for name, _ in skeleton.model.named_parameters()), "the skeleton is left alone"


def update_peak(job: Job, family: str = "qwen3", **sizes: Any) -> int:
    skeleton = skeleton_of(family, **sizes)
    phases = {phase.name: phase for phase in memory_of(skeleton, shapes_of(skeleton), job).phases}
    return phases["update" if job.stage == "ppo" else "micro-batch"].items["activations"]


def test_activations_grow_with_rows_and_layers(make_job: Callable[..., Job]) -> None:
    one, two, four = (update_peak(make_job("rm", rm={"batch_size": size})) for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    deep = update_peak(make_job("rm"), num_hidden_layers=6)
    assert 1.7 * two < deep < 2.0 * two


@pytest.mark.parametrize("stage", ["rm", "ppo"])
@pytest.mark.parametrize("rank", [0, 4])
def test_few_layers_tell_of_all(
    stage: str, rank: int, make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(stage, image_tokens=16, device="cuda", dtype="bfloat16", lora={"vision_rank": rank})
    skeleton = skeleton_of("smolvlm", {"num_hidden_layers": 6}, num_hidden_layers=7, vocab_size=30_000)
    reckoned_is_whole(skeleton, job, monkeypatch)


def test_few_layers_tell_of_all_beside_a_large_head(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few layers the LM head's chunk is the most, of all of them both graphs are."""
    skeleton = skeleton_of("llama", num_hidden_layers=14, vocab_size=5000)
    reckoned_is_whole(skeleton, make_job("ppo", device="cuda", dtype="bfloat16"), monkeypatch)


def reckoned_is_whole(skeleton: Skeleton, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    reckoned = memory_of(skeleton, shapes_of(skeleton), job)
    monkeypatch.setattr(_StageMemory, "_rehearse", lambda self, whole: [(1.0, self._prepared(whole))])
    whole = memory_of(skeleton, shapes_of(skeleton), job)
    for ours, theirs in zip(reckoned.phases, whole.phases, strict=True):
        assert ours.peak == pytest.approx(theirs.peak, rel=1e-3), ours.name


def test_layers_of_two_kinds_come_in_their_period(make_job: Callable[..., Job]) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 3
    skeleton = skeleton_of("qwen3", num_hidden_layers=9, layer_types=kinds, sliding_window=64, use_sliding_window=True)
    shapes = shapes_of(skeleton)
    assert shapes.period == 3
    assert shapes.cache_bytes(100, 2) == 2 * 2 * 2 * 32 * (6 * 64 + 3 * 100)
    assert memory_of(skeleton, shapes, make_job("rm", device="cuda")).peak.peak > 0


@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"device": "cuda"}, {"device": "cuda", "tuning": "full", "dtype": "bfloat16"}]
)
def test_checkpointing_keeps_little(settings: dict[str, Any], make_job: Callable[..., Job]) -> None:
    plain = update_peak(make_job("sft", **settings), num_hidden_layers=8)
    light = update_peak(make_job("sft", checkpointing=True, **settings), num_hidden_layers=8)
    assert light < 0.4 * plain


def test_the_vocabulary_costs_a_chunk_at_most(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perl_vlm.models.chunks.CHUNK_BYTES", 2**20)
    small, large = (update_peak(make_job("sft"), vocab_size=size) for size in (50_000, 200_000))
    assert large == pytest.approx(small, rel=0.3)
    monkeypatch.setattr("perl_vlm.models.chunks.CHUNK_BYTES", 2**40)
    assert update_peak(make_job("sft"), vocab_size=200_000) > 3 * large


def test_a_critic_of_its_own_keeps_no_second_graph(make_job: Callable[..., Job]) -> None:
    own = update_peak(make_job("ppo", ppo={"value": "zero"}))
    on_trunk = update_peak(make_job("ppo", ppo={"value": "policy_head"}))
    assert 0.95 * on_trunk < own < 1.1 * on_trunk


def test_an_adapted_vision_tower_keeps_its_activations(make_job: Callable[..., Job]) -> None:
    frozen = update_peak(make_job("rm", image_tokens=16), "smolvlm")
    trained = update_peak(make_job("rm", image_tokens=16, lora={"vision_rank": 4}), "smolvlm")
    patches = 2 * 64
    layer = 4 * patches * (2 * 96 + 4 * 96 + 96 + 2 * 384)  # norms, attention and the output's input, the MLP
    assert trained - frozen == pytest.approx(3 * layer, rel=0.25)


def test_fused_attention_keeps_no_scores() -> None:
    query = torch.empty(2, 4, 64, 32, device="meta", requires_grad=True)
    with LiveBytes([query]) as live:
        before = live.now
        out = fused_attention(query, query, query, torch.ones(2, 1, 64, 64, dtype=torch.bool, device="meta"))
        numbers = 4 * 2 * 64 * 64  # the mask; as it was given it is let go of
        assert live.now - before == 4 * out.numel() + 4 * 2 * 4 * 64 + numbers
        assert out.shape == query.shape


def test_a_model_that_cannot_be_rehearsed_is_named(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of("qwen3")
    job = make_job("rm")
    rehearsal = Rehearsal(skeleton, shapes_of(skeleton), job)
    rehearsal.add("reward")

    def fails(**_: Any) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(rehearsal.base.get_decoder(), "forward", fails)
    with pytest.raises(PerlVlmError, match=r"Qwen3ForCausalLM cannot be run without its weights.*data-dependent"):
        rehearsal.training_peaks(job.batch(1), [("reward", "scores")], with_gradients=False)
