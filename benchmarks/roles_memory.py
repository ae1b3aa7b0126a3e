"""What four roles cost: one frozen base with adapters against four separate copies.

    python benchmarks/roles_memory.py

Builds a model of SmolVLM-256M's shape with random weights in bfloat16, then holds reference, policy, value and reward
model, once as roles of one base (LoRA) and once as four copies in the same type, each in a process of its own,
alternating and repeated. (``--tuning full`` itself keeps its trained copies in float32, which is more still.) Reports
bytes of parameters and the growth of the process's resident memory over the bare process (libraries loaded, no model),
and writes both, with ratios, to ``benchmarks/results/roles_memory.json``. Optimizer states are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "roles_memory.json"
SHAPES = {
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "pad_token_id": 2,
    },
}  # fmt: skip


def resident_bytes() -> int:
    """This process's resident memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    import resource

    return pages * resource.getpagesize()


def measure(arm: str) -> dict[str, int]:
    """Hold the four roles in this process and count."""
    import torch
    from transformers import GenerationConfig, Idefics3Config, Idefics3ForConditionalGeneration

    from perl_vlm.config import LoraConfig
    from perl_vlm.models.backbone import Backbone, load_backbone
    from perl_vlm.models.roles import Roles

    processor = load_backbone("tiny", device="cpu").processor
    bare = resident_bytes()
    torch.set_default_dtype(torch.bfloat16)
    model = Idefics3ForConditionalGeneration(Idefics3Config(scale_factor=4, image_token_id=49190, **SHAPES))
    torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    backbone = Backbone(
        "random", None, model, processor, processor.tokenizer, (2,), True, GenerationConfig(eos_token_id=2)
    )
    base = resident_bytes() - bare
    count = backbone.parameter_count
    if arm == "adapters":
        roles = Roles(backbone, LoraConfig())
        roles.add("policy")
        roles.add("value", head="value")
        roles.add("reward", head="reward")
        held = [p for name in roles.names[1:] for p in roles.parameters(name).values()]
    else:
        copies = [copy.deepcopy(model) for _ in range(3)]
        held = [p for other in copies for p in other.parameters()]
    parameters = {id(p): p.numel() * p.element_size() for p in [*model.parameters(), *held]}
    return {
        "base_parameters": count,
        "base_resident_bytes": base,
        "all_roles_parameter_bytes": sum(parameters.values()),
        "all_roles_resident_bytes": resident_bytes() - bare,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=("adapters", "copies"), help="measure one arm in this process and print it")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm)))
        return
    runs: dict[str, list[dict[str, int]]] = {"adapters": [], "copies": []}
    for _ in range(args.repeats):
        for arm, found in runs.items():
            command = [sys.executable, __file__, "--arm", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    median = {
        arm: {key: int(statistics.median(run[key] for run in found)) for key in found[0]} for arm, found in runs.items()
    }
    import torch
    import transformers

    result = {
        "what": "reference, policy, value and reward model of a SmolVLM-256M-shaped random model, bfloat16 base",
        "command": "python benchmarks/roles_memory.py",
        "hardware": f"{platform.machine()}, CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": args.repeats,
        "one_base_with_adapters": median["adapters"],
        "four_copies": median["copies"],
        "ratio_parameter_bytes": round(
            median["adapters"]["all_roles_parameter_bytes"] / median["copies"]["all_roles_parameter_bytes"], 3
        ),
        "ratio_resident_bytes": round(
            median["adapters"]["all_roles_resident_bytes"] / median["copies"]["all_roles_resident_bytes"], 3
        ),
        "adapters_over_base_parameter_bytes": round(
            median["adapters"]["all_roles_parameter_bytes"] / (median["copies"]["all_roles_parameter_bytes"] / 4), 3
        ),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
