"""What `perl-vlm plan` predicts against what a step takes.

    python benchmarks/planner.py            # every shape; minutes
    python benchmarks/planner.py --smoke    # tiny ones; seconds

Each case is planned and then run in a process of its own: models with random weights go through the stages' own passes
(rollout, scoring, update; or a micro-batch of pairs), and the bytes of all live tensors are counted, which is exact
whatever else the machine does. Beside it stands the growth of the process's resident memory from before the model was
made, of the second step; it holds what kernels allocate inside themselves and what the allocator keeps. On a GPU the
peak is that of torch's allocator. Writes `benchmarks/results/planner.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "planner.json"
TOLERANCE = 0.15
QWEN3_30M = {
    "hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 8000, "intermediate_size": 1536,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
LLAMA_100M = {
    "hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 32000, "intermediate_size": 2048,
    "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
}  # fmt: skip
SMOLVLM_30M = {
    "hidden_size": 384, "num_hidden_layers": 10, "vocab_size": 8000, "intermediate_size": 1024,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
TOWER = {
    "hidden_size": 384, "intermediate_size": 1536, "patch_size": 16, "num_hidden_layers": 6, "num_attention_heads": 6,
    "image_size": 256,
}  # fmt: skip
SEEN = 64
"""Tokens of that tower's picture."""


@dataclass(frozen=True)
class Case:
    """One model at one stage."""

    family: str
    stage: str
    sizes: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, Any] | None = None
    image_tokens: int = 0
    note: str = ""


def cases(smoke: bool) -> dict[str, Case]:
    """By name; ``smoke`` for tiny ones of the same kinds."""
    pairs: dict[str, Any] = {"max_prompt_tokens": 384, "max_response_tokens": 48, "rm": {"batch_size": 8}}
    rounds: dict[str, Any] = {
        "max_prompt_tokens": 128, "ppo": {"batch_size": 16, "minibatches": 1, "epochs": 4, "max_new_tokens": 48},
    }  # fmt: skip
    grouped = {**rounds["ppo"], "epochs": 1, "advantage": "rloo", "group_size": 4}
    seen: dict[str, Any] = {"tower": TOWER, "image_tokens": SEEN}
    if smoke:
        tiny = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 500, "intermediate_size": 192,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
        pairs |= {"max_prompt_tokens": 48, "max_response_tokens": 12, "rm": {"batch_size": 2}}
        rounds = {"max_prompt_tokens": 32, "ppo": {**rounds["ppo"], "batch_size": 4, "max_new_tokens": 8}}
        return {
            "qwen3 rm": Case("qwen3", "rm", tiny, pairs),
            "llama ppo": Case("llama", "ppo", tiny, rounds),
            "smolvlm rm": Case(
                "smolvlm", "rm", tiny, pairs, {"hidden_size": 96, "num_attention_heads": 3, "image_size": 128}, 16
            ),
        }
    full = {**pairs, "tuning": "full", "rm": {"batch_size": 4}}
    return {
        "qwen3-30m rm": Case("qwen3", "rm", QWEN3_30M, pairs),
        "qwen3-30m rm, full tuning": Case("qwen3", "rm", QWEN3_30M, full),
        "qwen3-30m ppo, value adapter": Case("qwen3", "ppo", QWEN3_30M, rounds),
        "qwen3-30m ppo, head on the trunk": Case(
            "qwen3", "ppo", QWEN3_30M, {**rounds, "ppo": {**rounds["ppo"], "value": "policy_head"}}
        ),
        "qwen3-30m rloo": Case("qwen3", "ppo", QWEN3_30M, {**rounds, "ppo": grouped}),
        "llama-100m rm": Case("llama", "rm", LLAMA_100M, pairs),
        "llama-100m ppo": Case("llama", "ppo", LLAMA_100M, rounds),
        "smolvlm-like rm, vision adapted": Case("smolvlm", "rm", SMOLVLM_30M, pairs, **seen),
        "smolvlm-like rm, vision frozen": Case(
            "smolvlm", "rm", SMOLVLM_30M, {**pairs, "lora": {"vision_rank": 0}}, **seen
        ),
        "smolvlm-like ppo": Case("smolvlm", "ppo", SMOLVLM_30M, rounds, **seen),
    }


def job_of(case: Case, dtype: str, device: str) -> Any:
    """The case as the planner's job."""
    from perl_vlm.config import LoraConfig, PpoConfig, RmConfig, RunConfig, SftConfig
    from perl_vlm.plan.gpus import find_gpu
    from perl_vlm.plan.settings import Job, PlanSettings

    sections = {"rm": RmConfig, "sft": SftConfig, "ppo": PpoConfig, "lora": LoraConfig}
    settings = {key: sections[key](**value) if key in sections else value for key, value in case.settings.items()}
    config = RunConfig(model="random", dtype=dtype, device=device, **settings)  # type: ignore[arg-type]
    return Job(config, PlanSettings(stage=case.stage), find_gpu("24GB"), case.image_tokens)  # type: ignore[arg-type]


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory now and at its most (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024


def one(name: str, dtype: str, smoke: bool) -> dict[str, Any]:
    """Plan and run one case in this process."""
    import torch

    from perl_vlm.plan.measure import measure
    from perl_vlm.plan.memory import memory_of
    from perl_vlm.plan.random_models import random_model, skeleton_of
    from perl_vlm.plan.shapes import shapes_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = cases(smoke)[name]
    job = job_of(case, dtype, device)
    skeleton = skeleton_of(case.family, case.tower, **case.sizes)
    shapes = shapes_of(skeleton)
    began = time.perf_counter()
    memory = memory_of(skeleton, shapes, job)
    took = time.perf_counter() - began
    torch.manual_seed(0)
    bare, _ = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most it was begins anew
    real = measure(random_model(case.family, case.tower, **case.sizes).to(device), job)
    grown = resident_bytes()[1] - bare
    planned = {phase.name: phase.peak for phase in memory.phases}
    return {
        "case": name, "dtype": dtype, "device": device, "parameters": shapes.total, "seconds_to_plan": round(took, 2),
        "phases": {phase: {"planned": planned[phase], "measured": size} for phase, size in real.phases.items()},
        "planned": memory.peak.peak, "measured": real.peak, "ratio": round(memory.peak.peak / real.peak, 3),
        "within_tolerance": abs(memory.peak.peak / real.peak - 1) <= TOLERANCE,
        "resident_growth": grown if device == "cpu" else None,
        "allocated": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; nothing is written")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--child", nargs=2, metavar=("CASE", "DTYPE"), help="one case in this process, as JSON")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(one(*args.child, args.smoke)))
        return
    found = []
    for name in cases(args.smoke):
        for dtype in args.dtypes:
            command = [sys.executable, __file__, "--child", name, dtype, *(["--smoke"] if args.smoke else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}, {dtype}: {done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            show(found[-1])
    if args.smoke:
        return
    import torch
    import transformers

    result = {
        "what": "peak bytes of live tensors in a step, planned from shapes and measured",
        "command": "python benchmarks/planner.py",
        "hardware": f"{platform.machine()}, {found[0]['device']}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tolerance": TOLERANCE,
        "all_within_tolerance": all(each["within_tolerance"] for each in found),
        "cases": found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(found: dict[str, Any]) -> None:
    """One line of the table."""
    mib = 2**20
    beside = found["resident_growth"] or found["allocated"]
    print(
        f"{found['case']:<36} {found['dtype']:<9} planned {found['planned'] / mib:8.1f} MiB  measured "
        f"{found['measured'] / mib:8.1f} MiB  ratio {found['ratio']:.3f}  process {beside / mib:8.1f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
