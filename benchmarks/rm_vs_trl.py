"""Reward models: perl-vlm against TRL's RewardTrainer, LoRA on the same model and the same pairs.

    python benchmarks/rm_vs_trl.py

Arms: perl-vlm as it is (a pair is one row: the prompt, then both responses); the same with every response in a row of
its own; TRL's RewardTrainer with peft, without gradient checkpointing; and on a small VLM, perl-vlm's two ways again.
See README.md beside this file for what is measured and how.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from measuring import Arm, Meter, Study, ratio, start
from workloads import (
    LORA_TARGETS,
    PAIRS,
    RANK,
    SHAPE,
    SMOKE_PAIRS,
    SMOKE_SHAPE,
    SMOKE_VLM,
    VLM,
    pairs_flop,
    prompt_text,
    response_text,
    spec_of,
)

ARMS = ("perl-vlm", "perl-vlm separate", "trl", "vlm", "vlm separate")
RECORDS = 32


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["arm"] == "trl":
        return measure_trl(spec)
    from stages import run

    return run(spec)


def measure_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's newest RewardTrainer on token ids."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    meter = Meter()

    class Laps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.lap()

    shape, load, narrow = spec["shape"], spec["load"], spec["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])

    def ids(number: int, side: str) -> list[int]:
        text = prompt_text(shape, load, number) + " " + response_text(shape, load, number, side)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    rows = [{f"{side}_ids": ids(number, side) for side in ("chosen", "rejected")} for number in range(RECORDS)]
    lengths = {len(row[key]) for row in rows for key in row}
    if lengths != {load["prompt"] + load["response"]}:
        raise RuntimeError(f"sequences have {lengths} tokens, {load['prompt'] + load['response']} wanted")
    model = AutoModelForSequenceClassification.from_pretrained(
        spec["folder"], num_labels=1, dtype=getattr(torch, spec["dtype"])
    )
    base = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as scratch:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=scratch, per_device_train_batch_size=load["batch"],
                max_steps=spec["warmup"] + spec["steps"], max_length=None, gradient_checkpointing=False, bf16=narrow,
                use_cpu=not torch.cuda.is_available(),
                learning_rate=1e-4, warmup_steps=0, save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=LORA_TARGETS,
                modules_to_save=["score"],
            ),
            callbacks=[Laps()],
        )  # fmt: skip
        trainer.train()
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return meter.result(spec["warmup"], trainable=trainable, trainable_share_of_base=round(trainable / base, 5))


def arms_of(args: Any, folder: Path) -> list[Arm]:
    load = SMOKE_PAIRS if args.smoke else PAIRS
    made = []
    for dtype in args.dtypes:
        for name in args.arms:
            text, vlm = (SMOKE_SHAPE, SMOKE_VLM) if args.smoke else (SHAPE, VLM)
            shape = vlm if name.startswith("vlm") else text
            spec = spec_of(name, folder, shape, load, dtype, args, shared=not name.endswith("separate"))
            # What the task needs, whatever an arm makes of it: prompts that are read twice are no useful work.
            made.append(Arm(name, spec, pairs_flop(shape, load)))
    return made


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for dtype in ("float32", "bfloat16"):
        for ours, theirs in (("perl-vlm", "trl"), ("perl-vlm", "perl-vlm separate"), ("vlm", "vlm separate")):
            for key in ("items_a_second", "peak_bytes"):
                value = ratio(rows, f"{ours}, {dtype}", f"{theirs}, {dtype}", key)
                if value is not None:
                    found[f"{ours} / {theirs}, {dtype}, {key}"] = value
    return found


def main() -> None:
    args = start(__file__, __doc__ or "", measure, ARMS)
    with tempfile.TemporaryDirectory(prefix="perl-vlm-bench-") as folder:
        study = Study(
            Path(__file__).resolve(), "reward models, LoRA r = 8, against TRL's RewardTrainer", "pairs", args.out
        )
        rows = study.compare(arms_of(args, Path(folder)), args.repeats, args.smoke)
    study.finish(ratios(rows))


if __name__ == "__main__":
    main()
