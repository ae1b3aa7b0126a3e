"""The figures of PE-RLHF (2403.10704, v2) that stand beside ours: other models, machines and data."""

MAIN: dict[str, dict[str, float]] = {
    "RM accuracy, full": {"Harmless": 76.56, "SHP": 83.2, "TL;DR": 78.7, "UI": 93.12},
    "RM accuracy, LoRA": {"Harmless": 78.71, "SHP": 82.2, "TL;DR": 79.7, "UI": 91.8},
    "RM memory, LoRA / full": {"Harmless": 43.1, "SHP": 48, "TL;DR": 50, "UI": 56, "VQA": 74},
    "RM speed, LoRA / full": {"Harmless": 1.6, "SHP": 1.5, "TL;DR": 1.7, "UI": 1.9, "VQA": 1.15},
    "RL, full": {"Harmless": 96.6, "SHP": 63.0, "TL;DR": 87, "BOLT": 73.2, "UI": 81.6},
    "RL, LoRA": {"Harmless": 98.2, "SHP": 61.3, "TL;DR": 86.5, "BOLT": 75.5, "UI": 86.4},
    "RL memory, LoRA / full": {"Harmless": 80, "SHP": 75, "TL;DR": 75, "BOLT": 80, "UI": 74, "VQA": 74},
    "RL speed, LoRA / full": {"Harmless": 1.3, "SHP": 1.15, "TL;DR": 1.15, "BOLT": 1.05, "UI": 1.2, "VQA": 1.24},
}
"""Table 1, PaLM 2 S (VQA: Gemini Pro). Percent, or how many times as fast."""
MAIN_COLUMNS = ("Harmless", "SHP", "TL;DR", "BOLT", "UI", "VQA")

REWARD_RANKS: dict[str, dict[str, float]] = {
    "Harmless, S": {"full": 76.6, "16": 75.0, "8": 79.1, "4": 78.7, "1": 76.0},
    "SHP, S": {"full": 83.2, "16": 81.3, "8": 81.6, "4": 82.2, "1": 80.9},
    "TL;DR, S": {"full": 78.7, "16": 77.0, "8": 77.3, "4": 79.7, "1": 77.2},
    "UI, S": {"full": 93.1, "16": 92.2, "8": 92.0, "4": 91.2, "1": 90.8},
    "Harmless, XS": {"full": 77.0, "8": 76.8},
    "SHP, XS": {"full": 82.0, "8": 82.6, "4": 81.8},
    "TL;DR, XS": {"full": 78.1, "4": 76.8},
    "UI, XS": {"full": 88.6, "8": 89.2, "4": 89.7},
    "Harmless, XXS": {"full": 73.4, "8": 72.5},
    "SHP, XXS": {"full": 80.2, "8": 79.3, "4": 77.8},
    "TL;DR, XXS": {"full": 75.4, "4": 73.2},
    "UI, XXS": {"full": 84.4, "8": 87.1, "4": 85.8},
}
"""Table 2: reward model accuracy in percent, by rank, of three sizes of PaLM 2. Of VQA the paper gives differences
from full tuning alone: ranks 32 to 1 lie 0.6 to 1.2 points below."""

POLICY_RANKS: dict[str, dict[str, float]] = {
    "Harmless": {"full": 96.6, "16": 96.4, "8": 97.7, "4": 96.7, "1": 98.2, "anchor": 75.5},
    "SHP": {"full": 63.0, "16": 61.3, "8": 58.3, "4": 60.1, "1": 57.9, "anchor": 50},
    "TL;DR": {"full": 87, "16": 86.5, "8": 85.7, "4": 84.2, "1": 85, "anchor": 50},
    "BOLT": {"full": 73.2, "16": 75.5, "8": 73.4, "4": 73.9, "1": 73.1, "anchor": 50},
    "UI": {"full": 81.6, "16": 86.4, "8": 85.4, "4": 84.5, "1": 77.7, "anchor": 77.7},
}
"""Table 3, size S: what RL reaches by the judge, in percent, by rank. Of VQA the paper gives differences from the
anchor alone: full +5.5, ranks 32 to 1 +2.5 to +3.9."""
