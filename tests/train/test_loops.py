"""The loops: they learn, they accumulate right, they resume to the bit, they say what they did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perl_vlm.config import EvalConfig, LoraConfig, PpoConfig, RmConfig, RunConfig, SftConfig
from perl_vlm.errors import PerlVlmError
from perl_vlm.train.experience import Experience, agreement, make_experience
from perl_vlm.train.log import read_log
from perl_vlm.train.optimize import Optimizer, RoleRates
from perl_vlm.train.parallel import Parallel
from perl_vlm.train.pipeline import open_session, run_verb
from perl_vlm.train.ppo import add_roles
from perl_vlm.train.reward import _anchor_scores, feedback_loss, forward, normalise_reward
from perl_vlm.train.reward_report import without_sight
from perl_vlm.train.rewards import Rewards
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.scoring import score_feedback
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import DataOrder, Stage
from perl_vlm.train.update import accumulate
from perl_vlm_vqa import VQA

pytestmark = pytest.mark.slow

SMALL = RunConfig(
    lora=LoraConfig(language_rank=4, vision_rank=4),
    sft=SftConfig(steps=3, batch_size=8, save_every=1, lr=1e-3),
    rm=RmConfig(steps=4, batch_size=8, save_every=1, lr=1e-3, eval_pairs=32),
    ppo=PpoConfig(
        steps=3, batch_size=16, save_every=1, max_new_tokens=4, lr=1e-3, epochs=2, minibatches=2, kl_coef=0.05
    ),
    eval=EvalConfig(limit=32, batch_size=16, bootstrap=200),
    task=VQA.Config(train_size=256, validation_size=64, test_size=64),
)


def stage_of(name: str, tmp_path: Path, config: RunConfig = SMALL) -> Stage:
    task = VQA(config.task)
    session = open_session(task, config, StopOnSignal())
    return session.stage(name, RunDir.create(tmp_path / name, {}, resume=False))


def grads(stage: Stage, *names: str) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        for key, parameter in stage.roles.parameters(name).items():
            if parameter.grad is not None:
                found[f"{name}:{key}"] = parameter.grad.clone()
                parameter.grad = None
    return found


def test_accumulated_reward_gradients_equal_one_batch(tmp_path: Path) -> None:
    stage = stage_of("rm", tmp_path)
    stage.roles.add("reward", head="reward")
    stage.roles.train_only("reward")
    records = list(stage.task.preferences("train")[:8])
    results = []
    for parts in (1, 4):
        for start in range(0, 8, 8 // parts):
            part = records[start : start + 8 // parts]
            feedback_loss(stage, forward(stage, "reward", part, training=True), 1.0, len(records)).backward()
        results.append(grads(stage, "reward"))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=1e-6, rtol=1e-4)


def ready(tmp_path: Path, examples: int, **ppo: object) -> tuple[Stage, Experience]:
    """A ppo stage with its roles, and one round of experience."""
    settings = {"reward_model": "verify", "batch_size": examples, "minibatches": 1, **ppo}
    stage = stage_of("ppo", tmp_path, replace(SMALL, ppo=replace(SMALL.ppo, **settings)))  # type: ignore[arg-type]
    rewards = Rewards(stage)
    stage.roles.train_only(*add_roles(stage, rewards))
    prompts = list(stage.task.examples("train")[: examples // stage.config.ppo.group_size])
    return stage, make_experience(stage, prompts, rewards, 0, stage.config.ppo.kl_coef)


@pytest.mark.parametrize("settings", [{}, {"value": "policy_head", "kl": "js", "kl_in": "loss"}], ids=["gae", "loss"])
def test_accumulated_ppo_gradients_equal_one_batch(settings: dict[str, str], tmp_path: Path) -> None:
    """Micro-batches have different numbers of tokens; the sum must still be the minibatch's mean."""
    # Hot sampling: the bundled model's answers are all of one length otherwise.
    stage, experience = ready(tmp_path, 12, temperature=2.0, **settings)
    lengths = experience.mask.sum(dim=1)
    assert lengths.min() != lengths.max(), "the test needs responses of different lengths"
    results = []
    for parts in (1, 3):
        cut = replace(stage, config=replace(stage.config, ppo=replace(stage.config.ppo, accumulate=parts)))
        diagnostics = accumulate(cut, experience, range(12), 0, 0.05)
        results.append(grads(stage, "policy", "value"))
    assert diagnostics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], atol=2e-6, rtol=1e-3)


def test_rewards_land_on_the_last_response_token(tmp_path: Path) -> None:
    _, experience = ready(tmp_path, 16, kl_coef=0.0, whiten_advantages=False, lam=1.0)
    # gamma = lambda = 1, no penalty, a value of zero: every response token's return is the response's reward.
    expected = experience.scores[:, None].expand_as(experience.returns) * experience.mask
    torch.testing.assert_close(experience.returns, expected)
    assert set(experience.scores.tolist()) <= {0.0, 1.0}
    assert agreement(experience.measured) < 1.001
    # The policy is still the reference: no divergence.
    torch.testing.assert_close(experience.measured.logprobs, experience.measured.reference_logprobs)


def test_reward_is_normalised_on_validation_responses(tmp_path: Path) -> None:
    stage = stage_of("rm", tmp_path, replace(SMALL, rm=replace(SMALL.rm, normalise="responses")))
    stage.roles.add("reward", head="reward")
    normalise_reward(stage, ["reward"])
    found = score_feedback(stage, ["reward"], list(stage.task.preferences("validation")[:64]))
    assert found.scores.shape == found.lengths.shape == (64, 2)
    assert found.correct.shape == (64,)
    assert abs(found.scores.mean().item()) < 1e-4
    assert found.scores.std().item() == pytest.approx(1.0, abs=1e-4)


def test_reward_is_normalised_on_what_the_anchor_says(tmp_path: Path) -> None:
    stage = stage_of("rm", tmp_path)
    stage.roles.add("reward", head="reward")
    raw = _anchor_scores(stage, ["reward"], list(stage.preferences("validation")))[:, 0]
    normalise_reward(stage, ["reward"])
    head = stage.roles.head("reward")
    torch.testing.assert_close(head.mean.cpu(), raw.mean(dim=0))
    torch.testing.assert_close(head.std.cpu(), raw.std(dim=0))
    # The constants travel with the saved head.
    stage.roles.save("reward", tmp_path / "saved")
    stage.roles.load("reward-1", tmp_path / "saved", head="reward")
    assert torch.equal(stage.roles.head("reward-1").mean, head.mean)


def test_a_reward_model_learns(tmp_path: Path) -> None:
    config = replace(SMALL, rm=replace(SMALL.rm, steps=25, batch_size=16, lr=3e-3, save_every=25))
    config = replace(config, task=replace(SMALL.task, kinds=("exists",), train_size=400))
    assert run_verb("rm", VQA(config.task), replace(config, out=str(tmp_path / "rm"))) == 0
    lines = read_log(tmp_path / "rm" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 26))
    first, last = (sum(line["loss"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < first
    assert all(line["grad_norm"] > 0 for line in lines)


def test_gradients_are_clipped_and_the_norm_before_is_logged(tmp_path: Path) -> None:
    stage = stage_of("rm", tmp_path)
    stage.roles.add("reward", head="reward")
    optimizer = Optimizer(
        stage.roles, [RoleRates("reward", 1e-3)], replace(SMALL.rm, warmup=1, max_grad_norm=0.5), steps=1,
        parallel=Parallel(),
    )  # fmt: skip
    for parameter in stage.roles.parameters("reward").values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in stage.roles.parameters("reward").values())
    seen: dict[str, float] = {}

    def spy(*_: object, **__: object) -> None:
        norms = [p.grad.norm() for p in stage.roles.parameters("reward").values() if p.grad is not None]
        seen["after"] = torch.stack(norms).norm().item()

    optimizer.torch.register_step_pre_hook(spy)
    metrics = optimizer.step()
    assert metrics["grad_norm"] == pytest.approx(count**0.5, rel=1e-4)
    assert metrics["grad_norm/reward"] == pytest.approx(count**0.5, rel=1e-4)
    assert seen["after"] == pytest.approx(0.5, rel=1e-3)


def test_a_nan_gradient_touches_no_weight(tmp_path: Path) -> None:
    stage = stage_of("rm", tmp_path)
    stage.roles.add("reward", head="reward")
    optimizer = Optimizer(
        stage.roles, [RoleRates("reward", 1e-3)], replace(SMALL.rm, warmup=1), steps=1, parallel=Parallel()
    )
    before = stage.roles.state("reward")
    for parameter in stage.roles.parameters("reward").values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(PerlVlmError, match="optimizer step 1; no weight was touched"):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in stage.roles.state("reward").items())


def test_data_order_drops_and_doubles_nothing() -> None:
    order = DataOrder(10, 4, "x")
    epoch = [index for step in range(5) for index in order.batch(step)]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert epoch[:10] != epoch[10:]
    assert DataOrder(10, 4, "x").batch(3) == order.batch(3)
    assert DataOrder(10, 4, "y").batch(3) != order.batch(3)
    small = DataOrder(3, 7, "z")
    assert sorted(small.batch(0)[:6]) == [0, 0, 1, 1, 2, 2]
    assert sorted(small.batch(0)[6:] + small.batch(1)[:2]) == [0, 1, 2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found |= {f"{path.relative_to(folder)}:{key}": value for key, value in load_file(path).items()}
    return found


def same_run(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert len(first) > 20
    assert all(torch.equal(first[key], second[key]) for key in first), "weights differ"
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, two)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    for stage in ("rm", "ppo"):
        logs = [read_log(path / stage / "metrics.jsonl") for path in (one, two)]
        for line in logs[0] + logs[1]:
            line.pop("time")
        assert logs[0] == logs[1]


def test_run_leaves_what_is_promised_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run_verb("run", VQA(SMALL.task), replace(SMALL, out=str(whole))) == 0
    for name in ("config.yaml", "summary.json", "report.html", "README.md"):
        assert (whole / name).is_file(), name
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (whole / "ppo" / "adapter" / name).is_file(), name
    assert (whole / "rm" / "adapter" / "head.safetensors").is_file()
    assert (whole / "ppo" / "samples.jsonl").read_text().count("\n") == 3 * 4
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["stage"] == "run"
    assert {"anchor/accuracy", "policy/accuracy", "gain/accuracy", "reward_model/pair_accuracy", "policy/kl"} <= set(
        summary["metrics"]
    )
    assert summary["ci95"]["gain/accuracy"][0] <= summary["metrics"]["gain/accuracy"]
    assert summary["parameters"]["trainable"]["policy"]["vision"] > 0
    lines = read_log(whole / "ppo" / "metrics.jsonl")
    assert all(line["rollout/logprob_agreement"] < 1.001 for line in lines)
    # Killed, as far as the disk can tell, in the middle of each stage.
    torn = tmp_path / "torn"
    short = replace(SMALL, out=str(torn))
    # In the middle of a stage, after its last step but before its summary, and between stages.
    for kill_after in (
        "rm/checkpoints/step-00000002",
        "rm/checkpoints/step-00000004",
        "ppo/checkpoints/step-00000001",
        "ppo/checkpoints/step-00000003",
        "ppo/summary.json",
    ):
        kill_when(short, torn / kill_after)
    assert run_verb("run", VQA(SMALL.task), replace(short, resume=True)) == 0
    same_run(whole, torn)
    # A finished run is left alone.
    stamp = (torn / "summary.json").stat().st_mtime_ns
    assert run_verb("run", VQA(SMALL.task), replace(short, resume=True)) == 0
    assert (torn / "summary.json").stat().st_mtime_ns == stamp
    with pytest.raises(PerlVlmError, match="already holds a run"):
        run_verb("run", VQA(SMALL.task), short)
    # An adapter that was altered behind the run's back is named, not used.
    (torn / "summary.json").unlink()
    (torn / "eval" / "summary.json").unlink()
    adapter = torn / "rm" / "adapter" / "adapter_model.safetensors"
    flipped = bytearray(adapter.read_bytes())
    flipped[-1] ^= 1
    adapter.write_bytes(flipped)
    with pytest.raises(PerlVlmError, match=r"rm/adapter/adapter_model\.safetensors is not what stage rm wrote"):
        run_verb("run", VQA(SMALL.task), replace(short, resume=True))


def kill_when(config: RunConfig, appears: Path) -> None:
    """Run in another process with --resume and SIGKILL it as soon as a path exists."""
    here = Path(__file__).resolve()
    code = (
        "import runpy, sys, dataclasses, torch\n"
        "torch.set_num_threads(1)\n"
        f"small = runpy.run_path({str(here)!r})['SMALL']\n"
        "from perl_vlm.train.pipeline import run_verb\n"
        "from perl_vlm_vqa import VQA\n"
        f"run_verb('run', VQA(small.task), dataclasses.replace(small, out={config.out!r}, resume=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not appears.exists():
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else "ended early"
        assert time.monotonic() < deadline, f"{appears} never appeared"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_sft_runs_and_stacks_under_the_others(tmp_path: Path) -> None:
    config = replace(
        SMALL, sft=replace(SMALL.sft, enabled=True), rm=replace(SMALL.rm, steps=2), out=str(tmp_path / "r")
    )
    config = replace(config, ppo=replace(config.ppo, steps=1))
    assert run_verb("run", VQA(config.task), config) == 0
    assert (tmp_path / "r" / "sft" / "adapter" / "adapter_model.safetensors").is_file()
    alone = replace(SMALL, sft=replace(SMALL.sft, adapter=str(tmp_path / "r" / "sft")), rm=replace(SMALL.rm, steps=2))
    assert run_verb("rm", VQA(alone.task), replace(alone, out=str(tmp_path / "rm"))) == 0
    one, two = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "r" / "rm", tmp_path / "rm")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_ppo_alone_needs_a_reward_model_and_says_so(tmp_path: Path) -> None:
    stage = stage_of("ppo", tmp_path)
    with pytest.raises(PerlVlmError, match=r"--ppo\.reward_model verify"):
        Rewards(stage)


def test_ppo_alone_takes_a_saved_reward_model(tmp_path: Path) -> None:
    config = replace(SMALL, rm=replace(SMALL.rm, steps=1))
    assert run_verb("rm", VQA(config.task), replace(config, out=str(tmp_path / "rm"))) == 0
    wanted = replace(SMALL.ppo, reward_model=str(tmp_path / "rm"), steps=1)
    assert run_verb("ppo", VQA(config.task), replace(config, ppo=wanted, out=str(tmp_path / "ppo"))) == 0
    evaluated = replace(config, eval=replace(config.eval, policy=str(tmp_path / "ppo")), out=str(tmp_path / "eval"))
    assert run_verb("eval", VQA(config.task), evaluated) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert "gain/accuracy" in summary["metrics"]


@pytest.mark.parametrize("reward_model", ["untrained", "verify"])
def test_other_rewards_and_full_tuning_run(reward_model: str, tmp_path: Path) -> None:
    config = replace(SMALL, ppo=replace(SMALL.ppo, reward_model=reward_model, steps=1), out=str(tmp_path / "r"))
    config = replace(config, tuning="full" if reward_model == "untrained" else "lora")
    assert run_verb("run", VQA(config.task), config) == 0
    assert not (tmp_path / "r" / "rm").exists()
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    trained = sum(summary["parameters"]["trainable"]["policy"].values())
    assert (trained == summary["parameters"]["total"]) == (config.tuning == "full")
    # Continued after its last stage but one, it reports the same: the reward that scored is brought back too.
    report = tmp_path / "r" / "report.html"
    scored = report.read_text().count("Learned reward")
    assert (scored > 0) == (reward_model == "untrained")
    (tmp_path / "r" / "summary.json").unlink()
    (tmp_path / "r" / "eval" / "summary.json").unlink()
    assert run_verb("run", VQA(config.task), replace(config, resume=True)) == 0
    assert report.read_text().count("Learned reward") == scored


def test_a_command_that_cannot_start_leaves_its_folder_free(tmp_path: Path) -> None:
    wrong = replace(SMALL, model=str(tmp_path / "nothing"), out=str(tmp_path / "r"))
    with pytest.raises(PerlVlmError, match="no such folder"):
        run_verb("rm", VQA(wrong.task), wrong)
    assert not (tmp_path / "r").exists()


def test_swapped_pictures_are_other_pictures(tmp_path: Path) -> None:
    """Data sets list many questions about one picture in a row: the neighbour's picture is often the same."""
    stage = stage_of("rm", tmp_path)
    records = list(stage.task.preferences("validation")[:4])
    crowded = [replace(records[place // 5], id=str(place)) for place in range(20)]
    changed = without_sight(crowded, "swapped")
    assert len(changed) == 20
    assert all(one.images != two.images for one, two in zip(crowded, changed, strict=True))
    assert without_sight([crowded[0], crowded[1]], "swapped") == []


def test_labels_are_learned_and_judged_by_the_sign_of_the_score(tmp_path: Path) -> None:
    from perl_vlm.types import Rating, RewardHead

    class Labelled(VQA):
        def preferences(self, split):  # type: ignore[no-untyped-def]
            pairs = super().preferences(split)
            return [
                Rating(f"{pair.id}-{good}", pair.messages, pair.chosen if good else pair.rejected, good, pair.images)
                for pair in (pairs[place] for place in range(40))
                for good in (True, False)
            ]

        def reward_head(self) -> RewardHead:
            return RewardHead("labels")

    # Not normalised, which would move the sign.
    config = replace(SMALL, rm=replace(SMALL.rm, steps=2, eval_pairs=80, normalise="none"), out=str(tmp_path / "rm"))
    assert run_verb("rm", Labelled(config.task), config) == 0
    metrics = json.loads((tmp_path / "rm" / "summary.json").read_text())["metrics"]
    assert 0.0 <= metrics["reward_model/label_accuracy"] <= 1.0
    assert "reward_model/label_accuracy_blank_images" in metrics
    samples = read_log(tmp_path / "rm" / "samples.jsonl")
    judged = [(line["score"] > 0) == line["label"] for line in samples]
    assert judged == [bool(line["right"]) for line in samples]
