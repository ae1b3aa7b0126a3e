"""Gradients, statistics and what is logged of them while roles train, on one process and on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from perl_vlm.cli import main
from perl_vlm.config import LoraConfig, RmConfig
from perl_vlm.formulas import clamped_k1, exact_kl, k1, masked_whiten
from perl_vlm.train import ppo as ppo_module
from perl_vlm.train import update as update_module
from perl_vlm.train.checkpoint import load_latest
from perl_vlm.train.log import read_log
from perl_vlm.train.parallel import Parallel
from perl_vlm.train.ppo import describe, train_ppo
from perl_vlm.train.reward import feedback_loss, forward
from perl_vlm.train.stage import Stage
from perl_vlm.train.update import accumulate

Play = Callable[..., Any]
StageOf = Callable[..., Stage]


def test_max_grad_norm_clips_each_role_and_the_norm_before_is_logged(stage_of: StageOf) -> None:
    """The mistake: ``max_grad_norm`` is accepted and ignored."""
    limit, norms = 1e-4, []

    def look(optimizer: Any, *_: Any) -> None:
        # Groups are the roles in order, policy and value.
        grads = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms.append([torch.cat([grad.flatten() for grad in own]).norm().item() for own in grads])

    stage = stage_of("ppo", steps=2, value="zero", value_lr=2e-3, max_grad_norm=limit)
    handle = register_optimizer_step_pre_hook(look)
    try:
        train_ppo(stage)
    finally:
        handle.remove()
    lines = read_log(stage.run.metrics)
    assert len(norms) == len(lines) == 2
    for (policy, value), line in zip(norms, lines, strict=True):
        assert line["grad_norm/policy"] > limit
        assert line["grad_norm/value"] > limit
        assert policy == pytest.approx(limit, rel=1e-2)
        assert value == pytest.approx(limit, rel=1e-2)


SETTINGS = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--lora.language_rank", "2",
            "--lora.vision_rank", "2", "--ppo.steps", "2", "--ppo.batch_size", "8", "--ppo.epochs", "1",
            "--ppo.minibatches", "2", "--ppo.max_new_tokens", "3", "--ppo.lr", "1e-3", "--ppo.warmup", "0",
            "--ppo.save_every", "1", "--ppo.reward_model", "verify", "--task.train_size", "16",
            "--task.validation_size", "4", "--task.test_size", "4"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_two_processes_train_save_and_agree_with_one(tuning: str, tmp_path: Path) -> None:
    """The mistake: only one process is ever tried, and two of them crash in the update or at the checkpoint."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    known = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    known |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    command = ["vqa", "ppo", *SETTINGS, "--tuning", tuning, "--out"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "perl_vlm.cli", *command, str(tmp_path / "two")],
            env={**known, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank,
                 "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        spoken = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n----\n".join(text[-3000:] for text in spoken)
    assert main([*command, str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["stage"] == "ppo"
    checkpoint = load_latest(tmp_path / "two" / "checkpoints", warn=pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 2
    for folder in ("adapter", "value"):
        files = sorted((tmp_path / "one" / folder).glob("*.safetensors"))
        assert files
        for file in files:
            one, two = load_file(file), load_file(tmp_path / "two" / folder / file.name)
            apart = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
            # Adam turns a gradient of mere rounding into a step of the learning rate; few weights have such a one.
            assert (apart > 1e-5).float().mean() < 2e-2, f"{folder}/{file.name}"
            assert apart.max() < 5e-3


@dataclass(frozen=True)
class Half(Parallel):
    """One of two processes, played one after the other: ``others`` holds what each gathered in an earlier pass."""

    heard: list[Tensor] = field(default_factory=list)
    others: Sequence[Sequence[Tensor]] = ()

    def gather_rows(self, rows: Tensor) -> Tensor:
        self.heard.append(rows)
        if not self.others:
            return torch.cat([rows, rows])  # nobody knows the other half yet
        parts = [other[len(self.heard) - 1] for other in self.others]
        parts[self.rank] = rows
        if rows.dim() == 2:
            width = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)


def test_advantages_are_whitened_over_all_processes(play: Play) -> None:
    """The mistake: every rank whitens its own share, so that a rank with bad answers only finds half of them good."""
    played = play(value="zero", kl="none", advantage="gae", whiten_advantages=True, whiten_rewards=True)
    whole = played.experience
    first = [Half(rank, 2) for rank in range(2)]
    for half in first:
        played.again(replace(played.stage, parallel=half))
    for rank in range(2):
        both = Half(rank, 2, others=[half.heard for half in first])
        found = played.again(replace(played.stage, parallel=both))
        assert list(found.rows) == list(range(8 * rank, 8 * rank + 8))
        for name in ("advantages", "returns", "scores"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-5, rtol=1e-4)
    own = whole.advantages[:8][whole.mask[:8]]
    assert own.mean().abs() > 1e-3, "the halves are alike, and the test says nothing"


def test_clamped_k1_is_not_taken_for_the_kl(play: Play) -> None:
    """The mistake: ``max(log pi - log pi_ref, 0)`` is logged and steered by as if it were the KL."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1, 1, 50, generator=generator).unbind()
    logp, logq = p.log_softmax(dim=-1)[0], q.log_softmax(dim=-1)[0]
    exact = exact_kl(p, q).item()
    assert (logp.exp() * k1(logp, logq)).sum().item() == pytest.approx(exact, rel=1e-5)
    assert (logp.exp() * clamped_k1(logp, logq)).sum().item() > 1.1 * exact
    # Where it is asked for as the penalty it is one, under its own name; the logged KL stays the KL.
    experience = play(value="zero", kl="clamped_k1", scale=0.2).experience
    measured, mask = experience.measured, experience.mask
    away = (measured.logprobs - measured.reference_logprobs) * mask
    assert (away[mask] < -1e-3).any()
    torch.testing.assert_close(measured.divergence * mask, away.clamp(min=0))
    assert describe(experience)["objective/kl"] == pytest.approx(away.sum(dim=1).mean().item(), abs=1e-5)


def test_a_diverging_critic_is_logged_and_warned_about(stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: the critic diverges while every metric of the policy looks fine."""
    monkeypatch.setattr(ppo_module, "CRITIC_GRACE", 1)
    for value_lr, diverges in ((1e-3, False), (50.0, True)):
        stage = stage_of("ppo", steps=3, value="zero", value_lr=value_lr)
        train_ppo(stage)
        lines = read_log(stage.run.metrics)
        assert all("grad_norm/value" in line for line in lines)
        assert (min(line["val/explained_variance"] for line in lines[1:]) < -1) == diverges
        assert sum("explained variance" in note for note in stage.notes) == diverges


def test_dropout_is_off_in_rollout_scoring_and_update(play: Play) -> None:
    """The mistake: dropout stays on while answers are sampled, scored or learned from, and ratios are noise."""
    lora = LoraConfig(language_rank=4, dropout=0.5)
    played = play(lora=lora, reward_model="learned", scale=0.2)
    stage, one = played.stage, played.experience
    model, sequences = stage.roles.backbone.model, one.rollout.sequences
    # The test means something: there is dropout, in the adapters and in the base, and training uses the adapters'.
    noisy = [stage.roles.raw_scores("reward", sequences, training=True) for _ in range(2)]
    assert not torch.equal(*noisy)
    model.train()
    two = played.again()
    for name in ("sampled_logprobs", "logprobs", "reference_logprobs", "values", "rewards"):
        torch.testing.assert_close(getattr(one.measured, name), getattr(two.measured, name))
    model.train()
    diagnostics = accumulate(stage, two, range(len(two)), 0, 0.0)
    assert diagnostics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert diagnostics["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-8)


def gradients(stage: Stage, *names: str) -> dict[str, Tensor]:
    found = {}
    for name in names:
        for key, parameter in stage.roles.parameters(name).items():
            if parameter.grad is not None:
                found[f"{name}:{key}"], parameter.grad = parameter.grad, None
    return found


def test_one_batch_of_32_equals_four_of_8(play: Play, stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake: accumulation runs the same rows again, or averages means of micro-batches of different lengths."""
    seen: list[list[int]] = []
    learn = update_module.learn

    def counted(stage: Stage, experience: Any, rows: Sequence[int], *rest: Any, **named: Any) -> Any:
        seen.append(list(rows))
        return learn(stage, experience, rows, *rest, **named)

    monkeypatch.setattr(update_module, "learn", counted)
    played = play(batch_size=32, value="zero", entropy_coef=0.1, kl="k2", kl_in="loss", scale=0.1, temperature=1.5)
    stage, experience = played.stage, played.experience
    assert len(set(experience.mask.sum(dim=1).tolist())) > 2
    found = []
    for parts in (1, 4):
        config = replace(stage.config, ppo=replace(stage.config.ppo, accumulate=parts))
        accumulate(replace(stage, config=config), experience, range(32), 0, 0.1)
        found.append(gradients(stage, "policy", "value"))
    assert [len(rows) for rows in seen] == [32, 8, 8, 8, 8]
    assert sorted(row for rows in seen[1:] for row in rows) == list(range(32))
    same(*found)
    # The reward model's pairs.
    stage = stage_of("rm", rm=RmConfig(batch_size=32, centering_coef=0.1))
    stage.roles.add("reward", head="reward")
    stage.roles.train_only("reward")
    pairs, found = list(stage.preferences("train")), []
    assert len(pairs) == 32
    for parts in (1, 4):
        for start in range(0, 32, 32 // parts):
            part = pairs[start : start + 32 // parts]
            feedback_loss(stage, forward(stage, "reward", part, training=True), 1.0, len(pairs)).backward()
        found.append(gradients(stage, "reward"))
    same(*found)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert max(value.abs().max() for value in one.values()) > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], atol=2e-6, rtol=1e-3)


def test_whitened_advantages_have_mean_zero_and_variance_one(play: Play) -> None:
    """The mistake: whitening adds the mean back, and an all-positive reward pushes every token up."""
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(6, 7, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 7, 2])[:, None]
    for white, real in ((masked_whiten(x, mask), mask), *whitened_round(play)):
        assert white[real].mean().item() == pytest.approx(0.0, abs=1e-5)
        assert white[real].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
        assert (white[~real] == 0).all()


def whitened_round(play: Play) -> list[tuple[Tensor, Tensor]]:
    experience = play(value="zero", advantage="gae").experience
    assert experience.scores.min() >= 4
    return [(experience.advantages, experience.mask)]
