"""The accounting against operations that PyTorch counts, and against figures worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from perl_vlm.config import PpoConfig
from perl_vlm.plan.flops import (
    Trains,
    attention,
    decode,
    head,
    scoring_passes,
    trained,
    trunk_forward,
    trunk_training,
    update_graphs,
)
from perl_vlm.plan.passes import Rehearsal
from perl_vlm.plan.random_models import skeleton_of
from perl_vlm.plan.settings import Batch, Job
from perl_vlm.plan.shapes import shapes_of
from perl_vlm.plan.skeletons import adapter_counts


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_training_is_what_pytorch_counts(family: str, tuning: str, make_job: Callable[..., Job]) -> None:
    job = make_job("rm", tuning=tuning, dtype="float32", device="cuda")
    skeleton = skeleton_of(family)
    shapes = shapes_of(skeleton)
    rehearsal = Rehearsal(skeleton, shapes, job)
    rehearsal.add("reward")
    trains = Trains(tuning == "full", 0 if tuning == "full" else adapter_counts(skeleton, job.config.lora)["language"])
    batch = job.batch(2)
    rehearsal._head_cost()  # measured once, and not what is counted here
    with FlopCounterMode(display=False) as counter:
        rehearsal.training_peaks(batch, [("reward", "scores")], with_gradients=False)
    expected = trunk_training(shapes, batch, trains) - 3 * attention(shapes, batch.seen_pairs)
    # Of the last layer queries, attention's output and MLP are made at the last token of each response alone.
    left_out, own = batch.tokens - batch.sequences, 6 if tuning == "full" else 4
    expected -= own * left_out * (2 * 128 * 128 + 3 * 128 * 384)
    if tuning == "lora":
        layers, rank, width, outs = 3, 8, 128, 128 + 64 + 64 + 128
        # Nothing before the first layer trains, so its q, k and v need no gradient of their input.
        expected -= 2 * batch.tokens * (width * (128 + 64 + 64) + 3 * rank * width)
        # The counter overlooks products that are added in place: an adapter's last one, forwards and backwards.
        expected -= 2 * batch.tokens * rank * (layers * outs + (4 * layers - 3) * width)
        expected -= left_out * 2 * (6 * rank * 2 * width - 2 * rank * 2 * width)  # the adapters of q and o
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_a_forward_pass_by_hand(make_job: Callable[..., Job]) -> None:
    shapes = shapes_of(skeleton_of("qwen3"))
    batch = Batch(prompts=1, group=1, prompt=10, response=0)
    weights = 3 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384)
    assert shapes.matmul["language"] == weights
    assert trunk_forward(shapes, batch) == 2 * 10 * weights + 4 * (10 * 10 / 2) * 128 * 3
    assert head(shapes, 7) == 2 * 7 * 128 * 800
    assert head(shapes, 7, training=True) == 2 * head(shapes, 7), "forwards, and the gradient"


def test_lora_takes_two_thirds_of_full_tuning(make_job: Callable[..., Job]) -> None:
    shapes = shapes_of(skeleton_of("qwen3"))
    batch = Batch(prompts=4, group=1, prompt=16, response=8)
    without = 3 * attention(shapes, batch.seen_pairs)
    lora = trunk_training(shapes, batch, Trains()) - without
    full = trunk_training(shapes, batch, Trains(full=True)) - without
    assert lora == pytest.approx(full * 2 / 3)
    again = trunk_training(shapes, batch, Trains(checkpointing=True)) - without
    assert again - lora == trunk_forward(shapes, batch)


def test_a_shared_prompt_is_read_once() -> None:
    pair = Batch(prompts=1, group=2, prompt=384, response=48)
    assert pair.shared
    assert pair.tokens == 384 + 2 * 48
    assert Batch(1, 8, 100, 10).tokens == 180
    alone = replace(pair, at_most=0.1)
    assert alone.tokens == 2 * (384 + 48)
    responses = 2 * (384 * 48 + 48**2 / 2)
    assert pair.seen_pairs == 384**2 / 2 + responses
    assert alone.seen_pairs == 2 * (384**2 / 2) + responses


def test_decoding_takes_two_a_weight_and_token() -> None:
    shapes = shapes_of(skeleton_of("qwen3"))
    found = decode(shapes, rows=4, prompt=100, response=10, trains=Trains(language=50))
    pairs = 4 * (100 * 10 + 10**2 / 2)
    each = shapes.matmul["language"] + 50 + shapes.head
    assert found == 2 * 4 * 10 * each + attention(shapes, pairs)


def test_scoring_passes_of_ppo() -> None:
    names = [name for name, _ in scoring_passes(PpoConfig(), rewards=1)]
    assert names == ["reward-0", "policy", "reference", "value"]
    once = PpoConfig(epochs=1, minibatches=1)
    assert [name for name, _ in scoring_passes(once, rewards=2)] == ["reward-0", "reward-1", "reference", "value"]
    on_trunk = PpoConfig(epochs=1, minibatches=1, value="policy_head")
    assert ("policy", "logprobs+values") in scoring_passes(on_trunk, rewards=0), "its values are wanted before"
    assert update_graphs(on_trunk) == [("policy", "logprobs+values")]
    assert update_graphs(PpoConfig()) == [("policy", "logprobs"), ("value", "values")]


def test_the_reference_workload(make_job: Callable[..., Job]) -> None:
    """A pair of 384 + 48 tokens on Qwen3 of 30 million parameters takes 0.05 TFLOP, attention left out."""
    shapes = shapes_of(
        skeleton_of(
            "qwen3", hidden_size=512, num_hidden_layers=8, vocab_size=8000, intermediate_size=1536,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        )
    )  # fmt: skip
    batch = Batch(prompts=1, group=2, prompt=384, response=48)
    found = trained(shapes, batch, "scores", Trains()) - 3 * attention(shapes, batch.seen_pairs)
    assert found == pytest.approx(4 * 25.2e6 * 480, rel=0.01)
