"""Reinforcement learning: perl-vlm against TRL, LoRA on the same model, the same number and length of episodes.

    python benchmarks/ppo_vs_trl.py --trl112 PYTHON

PPO, 4 epochs: perl-vlm with a value adapter, and with a value head on the policy's trunk, against TRL 1.12's PPOTrainer
(the last one) with LoRA on policy and value model. RLOO, one epoch, a reward function in Python: perl-vlm against TRL's
newest RLOOTrainer, on the text model and on a small VLM. README.md beside this file says how to make the environment of
``--trl112``; without it that arm is left out. The arm also reports whether TRL clips gradients.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from pathlib import Path
from typing import Any

from measuring import Arm, Meter, Study, ratio, start
from workloads import (
    EPISODES,
    LORA_TARGETS,
    ONE_EPOCH,
    RANK,
    SHAPE,
    SMOKE_EPISODES,
    SMOKE_ONE_EPOCH,
    SMOKE_SHAPE,
    SMOKE_VLM,
    VLM,
    picture,
    ppo_flop,
    prompt_text,
    spec_of,
)

PPO_ARMS = ("ppo value adapter", "ppo value head", "ppo trl-1.12")
RLOO_ARMS = ("rloo", "rloo trl", "rloo vlm", "rloo vlm trl")
RECORDS = 32
MAX_GRAD_NORM = 1e-3
"""Given to TRL's PPOTrainer, so small that a clipped gradient could not be mistaken."""


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["arm"] == "ppo trl-1.12":
        return measure_trl_ppo(spec)
    if spec["arm"].endswith("trl"):
        return measure_trl_rloo(spec)
    from stages import run

    return run(spec)


def lora(task: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type=task, r=RANK, lora_alpha=2 * RANK, target_modules=LORA_TARGETS)


def laps(meter: Meter) -> Any:
    """A callback of transformers' Trainer that tells the meter when a step is over."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

    return Laps()


def common(spec: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Settings of both of TRL's trainers: theirs, but for what the workload says, and no gradient checkpointing."""
    import torch

    return {
        "output_dir": scratch, "per_device_train_batch_size": spec["load"]["batch"], "learning_rate": 1e-4,
        "gradient_checkpointing": False, "bf16": spec["dtype"] == "bfloat16", "temperature": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "warmup_steps": 0,
    }  # fmt: skip


def measure_trl_ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL 1.12's PPOTrainer: the policy and the value model each a base with LoRA, the reward model another base."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import __version__
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    meter = Meter()
    load, steps = spec["load"], spec["warmup"] + spec["steps"]
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    texts = [prompt_text(spec["shape"], load, number) for number in range(max(RECORDS, load["batch"]))]
    rows = [{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    if any(len(row["input_ids"]) != load["prompt"] for row in rows):
        raise RuntimeError(f"the prompts do not have {load['prompt']} tokens")
    dtype = getattr(torch, spec["dtype"])
    policy = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype)
    base = sum(parameter.numel() for parameter in policy.parameters())
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(spec["folder"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    reward.requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as scratch:
        trainer = PPOTrainer(
            args=PPOConfig(
                **common(spec, scratch), total_episodes=steps * load["batch"], num_ppo_epochs=load["epochs"],
                num_mini_batches=1, response_length=load["response"], num_sample_generations=0,
                max_grad_norm=MAX_GRAD_NORM,
            ),
            processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
            value_model=get_peft_model(value, lora("SEQ_CLS")), train_dataset=Dataset.from_list(rows),
            peft_config=lora("CAUSAL_LM"), callbacks=[laps(meter)],
        )  # fmt: skip
        norms = watch_norms(trainer)
        trainer.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return meter.result(
        spec["warmup"],
        trl=__version__,
        trainable=sum(parameter.numel() for parameter in trained),
        trainable_share_of_base=round(sum(parameter.numel() for parameter in trained) / base, 5),
        **clipping(PPOTrainer, norms),
    )


def watch_norms(trainer: Any) -> list[float]:
    """The norm of the gradient that the optimizer's first step takes; the hook is gone afterwards."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    norms: list[float] = []

    def look(one: Any, args: Any, kwargs: Any) -> None:
        handle.remove()
        gradients = [p.grad for group in one.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(gradient.float().square().sum().item() for gradient in gradients)))

    handle = optimizer.register_step_pre_hook(look)
    return norms


def clipping(trainer: Any, norms: list[float]) -> dict[str, Any]:
    """Whether TRL clips: what its loop says in its source, and the norm of what reached the optimizer."""
    return {
        "max_grad_norm_given": MAX_GRAD_NORM,
        "grad_norm_at_the_optimizer": norms[0],
        "loop_calls_clip_grad_norm": "clip_grad_norm" in inspect.getsource(trainer.train),
        "clips_gradients": norms[0] <= 1.01 * MAX_GRAD_NORM,
    }


def measure_trl_rloo(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's newest RLOOTrainer, with the Python reward that perl-vlm's arm has."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer, __version__

    meter = Meter()
    load, shape = spec["load"], spec["shape"]
    auto, reader = AutoModelForCausalLM, AutoTokenizer
    if shape["vision"]:
        auto, reader = AutoModelForImageTextToText, AutoProcessor
    model = auto.from_pretrained(spec["folder"], dtype=getattr(torch, spec["dtype"]))
    base = sum(parameter.numel() for parameter in model.parameters())

    def row(number: int) -> dict[str, Any]:
        text = prompt_text(shape, load, number)
        if not shape["vision"]:
            return {"prompt": text}
        return {"prompt": [{"role": "user", "content": text}], "image": picture(shape, number)}

    lengths: list[int] = []

    def reward(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        return [sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in text.split()) / 48 for text in texts]

    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as scratch:
        trainer = RLOOTrainer(
            model=model, reward_funcs=reward, processing_class=reader.from_pretrained(spec["folder"]),
            train_dataset=Dataset.from_list([row(number) for number in range(RECORDS)]),
            args=RLOOConfig(
                **common(spec, scratch), max_steps=spec["warmup"] + spec["steps"], num_generations=load["group"],
                num_iterations=load["epochs"], max_completion_length=load["response"],
                generation_kwargs={"min_new_tokens": load["response"]},
            ),
            peft_config=lora("CAUSAL_LM"), callbacks=[laps(meter)],
        )  # fmt: skip
        trainer.train()
    if set(lengths) != {load["response"]}:
        raise RuntimeError(f"responses have {set(lengths)} tokens, {load['response']} wanted")
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return meter.result(
        spec["warmup"], trl=__version__, trainable=trainable, trainable_share_of_base=round(trainable / base, 5)
    )


def arms_of(args: Any, folder: Path) -> list[Arm]:
    text, vlm = (SMOKE_SHAPE, SMOKE_VLM) if args.smoke else (SHAPE, VLM)
    four, one = (SMOKE_EPISODES, SMOKE_ONE_EPOCH) if args.smoke else (EPISODES, ONE_EPOCH)
    made = []
    for dtype in args.dtypes:
        for name in args.arms:
            shape, load = vlm if "vlm" in name else text, four if name.startswith("ppo") else one
            if name == "ppo trl-1.12" and args.trl112 is None:
                print(f"{name} is left out: --trl112 names no python")
                continue
            value = "none" if load is one else "policy_head" if name == "ppo value head" else "adapter"
            # A reward function costs nothing that the accounting counts.
            flop = ppo_flop(shape, load, value=value, rewards=int(load is four))
            spec = spec_of(name, folder, shape, load, dtype, args, value=value)
            made.append(Arm(name, spec, flop, **({"python": args.trl112} if name == "ppo trl-1.12" else {})))
    return made


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    pairs = (
        ("ppo value adapter", "ppo trl-1.12"), ("ppo value head", "ppo trl-1.12"), ("rloo", "rloo trl"),
        ("rloo vlm", "rloo vlm trl"),
    )  # fmt: skip
    found = {}
    for dtype in ("float32", "bfloat16"):
        for ours, theirs in pairs:
            for key in ("seconds_a_step", "peak_bytes"):
                value = ratio(rows, f"{ours}, {dtype}", f"{theirs}, {dtype}", key)
                if value is not None:
                    found[f"{ours} / {theirs}, {dtype}, {key}"] = value
    return found


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--trl112", metavar="PYTHON", help="the python of an environment with TRL 1.12")

    args = start(__file__, __doc__ or "", measure, (*PPO_ARMS, *RLOO_ARMS), extend)
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as folder:
        study = Study(
            Path(__file__).resolve(), "PPO and RLOO, LoRA r = 8, against TRL's trainers", "episodes", args.out
        )
        rows = study.compare(arms_of(args, Path(folder)), args.repeats, args.smoke)
    study.finish(ratios(rows))


if __name__ == "__main__":
    main()
