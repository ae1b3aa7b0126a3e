"""What the reward stage says of its model: intervals, areas, and what judges reach that know lengths alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from perl_vlm.config import EvalConfig, LoraConfig, RmConfig, RunConfig
from perl_vlm.data.images import ImageBytes, to_png_bytes
from perl_vlm.errors import Absent
from perl_vlm.stats import bootstrap_mean, paired_bootstrap
from perl_vlm.task import Task
from perl_vlm.train import reward
from perl_vlm.train.figures import Figures, group_of
from perl_vlm.train.pipeline import open_session, run_verb
from perl_vlm.train.reward_report import brief, evaluate_reward_model, without_sight
from perl_vlm.train.rundir import RunDir
from perl_vlm.train.scoring import score_feedback
from perl_vlm.train.signals import StopOnSignal
from perl_vlm.train.stage import Stage, spaced
from perl_vlm.types import Comparison, Example, ImageSlot, Message, Rating, RewardHead, Sequences, Split

WORDS = ["<pad>", "<eos>", "<unk>", "good", "bad", "er", "User", ":", "Assistant", *(f"w{n}" for n in range(40))]


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(40)}" for _ in range(count))


class Taste(Task):
    """Feedback given as lists, by split."""

    name, modality, primary_metric = "taste", "text", "right"

    def __init__(self, given: dict[Split, Sequence[Comparison | Rating]], head: RewardHead) -> None:
        super().__init__()
        self.given, self.head = given, head

    def examples(self, split: Split) -> Sequence[Example]:
        return []

    def preferences(self, split: Split) -> Any:
        return self.given.get(split, [])

    def reward_head(self) -> RewardHead:
        return self.head


def pair(place: int, prompt: str, lengths: tuple[int, int], objective: str = "") -> Comparison:
    rng = random.Random(place)
    chosen, rejected = (words(rng, length) for length in lengths)
    return Comparison(f"p{place}", (Message("user", (prompt,)),), chosen, rejected, objective=objective)


def rating(place: int, prompt: str, length: int, label: bool, objective: str = "") -> Rating:
    response = words(random.Random(place), length)
    return Rating(f"r{place}", (Message("user", (prompt,)),), response, label, objective=objective)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config_of(model: str, **rm: Any) -> RunConfig:
    settings = {"steps": 2, "batch_size": 4, "normalise": "none", **rm}
    return RunConfig(
        model=model, device="cpu", dtype="float32", lora=LoraConfig(language_rank=2), rm=RmConfig(**settings),
        eval=EvalConfig(bootstrap=200), seed=3,
    )  # fmt: skip


@pytest.fixture
def stage_of(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """A reward stage whose model scores responses by ``raw(rows of word ids) -> [rows, outputs]``."""

    def make(
        given: Sequence[Comparison | Rating],
        head: RewardHead,
        raw: Callable[[list[list[int]]], torch.Tensor],
        train: Sequence[Comparison | Rating] | None = None,
        **rm: Any,
    ) -> Stage:
        held_out: dict[Split, Sequence[Any]] = {"validation": list(given), "test": list(given)}
        task = Taste({"train": list(given if train is None else train), **held_out}, head)
        session = open_session(task, config_of(model, **rm), StopOnSignal())
        stage = session.stage("rm", RunDir.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", {}, resume=False))
        stage.roles.add("reward", head="reward", outputs=len(head.objectives))

        def scores(name: str, sequences: Sequences, **_: Any) -> torch.Tensor:
            answers = sequences.input_ids[:, sequences.prompt_width :]
            return raw([row[mask].tolist() for row, mask in zip(answers, sequences.response_mask, strict=True)])

        monkeypatch.setattr(stage.roles, "raw_scores", scores)
        return stage

    return make


def by_length(liking: float) -> Callable[[list[list[int]]], torch.Tensor]:
    return lambda rows: torch.tensor([[liking * len(row)] for row in rows])


PAIRS = RewardHead("pairs")
LABELS = RewardHead("labels")


def test_accuracy_and_its_baseline_of_lengths_with_intervals(stage_of: Callable[..., Stage]) -> None:
    # Three of four chosen ones are shorter, one pair in eight is of one length.
    shapes = [(2, 5), (3, 6), (1, 4), (7, 2), (2, 9), (1, 2), (8, 3), (4, 4)]
    given = [pair(place, f"w{place}", shapes[place % 8]) for place in range(16)]
    found = evaluate_reward_model(stage_of(given, PAIRS, by_length(1.0)), ["reward"])
    assert found["reward_model/pair_accuracy"] == (4 + 1) / 16  # it likes long ones: two in eight and half a tie
    assert found["reward_model/length_accuracy"] == (10 + 1) / 16  # the training pairs say that short is good
    assert found["reward_model/gain_over_length"] == pytest.approx(-6 / 16)
    hits = [{True: 1.0, False: 0.0}[a > b] if a != b else 0.5 for a, b in (shapes[place % 8] for place in range(16))]
    alone = [1.0 - hit for hit in hits]
    settings = {"resamples": 200, "seed": 3}
    assert found.ci95["reward_model/pair_accuracy"] == bootstrap_mean(hits, **settings)[1]
    assert found.ci95["reward_model/length_accuracy"] == bootstrap_mean(alone, **settings)[1]
    assert found.ci95["reward_model/gain_over_length"] == paired_bootstrap(alone, hits, **settings)[1]


def test_which_length_is_liked_is_learned_from_training_preferences_alone(stage_of: Callable[..., Stage]) -> None:
    """The mistake: a baseline that has seen the held-out set looks better than it is, and hides what was learned."""
    held_out = [pair(place, f"w{place}", (2, 5)) for place in range(8)]
    train = [pair(place, f"w{place}", (6, 3)) for place in range(8, 40)]
    found = evaluate_reward_model(stage_of(held_out, PAIRS, by_length(-1.0), train), ["reward"])
    assert found["reward_model/length_accuracy"] == 0.0
    assert found["reward_model/pair_accuracy"] == 1.0


def test_pairs_of_one_prompt_are_drawn_together(stage_of: Callable[..., Stage]) -> None:
    """Five copies of a pair say no more than one."""
    shapes = [(5, 2), (2, 5), (4, 1), (6, 3), (1, 3), (9, 2)]
    alone = [pair(place, f"w{place}", shape) for place, shape in enumerate(shapes)]
    copied = [pair(place, f"w{place // 5}", shapes[place // 5]) for place in range(30)]
    apart = [pair(place, f"w{place}", shapes[place // 5]) for place in range(30)]
    ends = [
        evaluate_reward_model(stage_of(given, PAIRS, by_length(1.0)), ["reward"]).ci95["reward_model/pair_accuracy"]
        for given in (alone, copied, apart)
    ]
    assert ends[1] == pytest.approx(ends[0])
    assert ends[2][1] - ends[2][0] < 0.7 * (ends[0][1] - ends[0][0])


def rated(count: int = 60, seed: int = 0, objective: str = "") -> list[Rating]:
    """Good ones are a third, and rather longer."""
    rng = random.Random(seed)
    labels = [rng.random() < 1 / 3 for _ in range(count)]
    return [
        rating(place, f"w{place}", rng.randint(1, 8) + 2 * label, label, objective)
        for place, label in enumerate(labels)
    ]


def noisy(rows: list[list[int]]) -> torch.Tensor:
    """Knows lengths, and takes the first word for half as good as it is high."""
    return torch.tensor([[len(row) - 8.0 + (row[0] % 7) / 2] for row in rows])


def test_labels_have_an_area_and_baselines(stage_of: Callable[..., Stage]) -> None:
    from sklearn.metrics import roc_auc_score

    given = rated()
    stage = stage_of(given, LABELS, noisy)
    found = evaluate_reward_model(stage, ["reward"])
    labels = [one.label for one in given]
    logits = score_feedback(stage, ["reward"], given).logits.tolist()
    assert found["reward_model/auc"] == pytest.approx(roc_auc_score(labels, logits))
    low, high = found.ci95["reward_model/auc"]
    assert low < found["reward_model/auc"] < high
    assert found["reward_model/label_accuracy"] == sum((x > 0) == y for x, y in zip(logits, labels, strict=True)) / 60
    assert found["reward_model/base_rate"] == sum(labels) / 60
    assert found["reward_model/majority_rate"] == pytest.approx(1 - sum(labels) / 60)
    right, constant = ([float(hit) for hit in hits] for hits in (
        [(x > 0) == y for x, y in zip(logits, labels, strict=True)], [not label for label in labels]
    ))  # fmt: skip
    gain, interval = paired_bootstrap(constant, right, resamples=200, seed=3)
    assert found["reward_model/gain_over_majority"] == pytest.approx(gain)
    assert found.ci95["reward_model/gain_over_majority"] == pytest.approx(interval)
    lengths = [len(one.response.split()) for one in given]
    assert found["reward_model/length_auc"] == pytest.approx(roc_auc_score(labels, lengths))


def test_short_ones_may_be_the_good_ones(stage_of: Callable[..., Stage]) -> None:
    given = [rating(place, f"w{place}", 2 if place % 2 else 6, bool(place % 2)) for place in range(12)]
    found = evaluate_reward_model(stage_of(given, LABELS, noisy), ["reward"])
    assert found["reward_model/length_auc"] == 1.0


def test_labels_that_are_all_alike_have_no_area_and_that_is_said(stage_of: Callable[..., Stage]) -> None:
    given = [rating(place, f"w{place}", 3, True) for place in range(6)]
    stage = stage_of(given, LABELS, noisy)
    found = evaluate_reward_model(stage, ["reward"])
    assert not {"reward_model/auc", "reward_model/length_auc"} & found.keys()
    assert found["reward_model/majority_rate"] == 1.0
    assert stage.notes == ["all 6 held-out labels are alike: there is no AUC"]


def test_objectives_have_areas_of_their_own(stage_of: Callable[..., Stage]) -> None:
    """The mistake: one area over logits of two scales, which tells the objectives apart instead of good from bad."""
    kind, safe = rated(40, 1, "kind"), rated(40, 2, "safe")
    head = RewardHead("labels", {"kind": 1.0, "safe": 2.0})

    def raw(rows: list[list[int]]) -> torch.Tensor:
        return torch.cat([noisy(rows), 100 - noisy(rows)], dim=1)

    found = evaluate_reward_model(stage_of([*kind, *safe], head, raw), ["reward"])
    alone = evaluate_reward_model(stage_of([*rated(40, 2)], LABELS, noisy), ["reward"])
    assert "reward_model/auc" not in found
    assert found["reward_model/auc/safe"] == pytest.approx(1 - alone["reward_model/auc"])
    assert {"reward_model/auc/kind", "reward_model/auc/safe", "reward_model/label_accuracy/kind"} <= found.ci95.keys()
    shares = [sum(one.label for one in part) / 40 for part in (kind, safe)]
    assert found["reward_model/base_rate/safe"] == shares[1]
    assert found["reward_model/majority_rate"] == pytest.approx(1 - sum(shares) / 2)
    assert "AUC of kind" in brief(found, found.ci95)


def test_a_pairs_objectives_are_measured_and_leaned_on_apart(stage_of: Callable[..., Stage]) -> None:
    head = RewardHead("pairs", {"long": 1.0, "short": 1.0})
    given = [pair(place, f"w{place}", (5, 2), "long") for place in range(4)]
    given += [pair(place, f"w{place}", (2, 5), "short") for place in range(4, 10)]
    stage = stage_of(given, head, lambda rows: torch.tensor([[float(len(row))] * 2 for row in rows]))
    found = evaluate_reward_model(stage, ["reward"])
    assert found["reward_model/pair_accuracy/long"] == 1.0
    assert found["reward_model/pair_accuracy/short"] == 0.0
    assert found["reward_model/length_accuracy"] == 1.0
    assert found.ci95["reward_model/pair_accuracy/long"] == (1.0, 1.0)


def test_no_more_than_eval_pairs_are_measured_and_of_every_objective(stage_of: Callable[..., Stage]) -> None:
    """The mistake: the first few of two sets that stand one after the other are all of one."""
    head = RewardHead("pairs", {"long": 1.0, "short": 1.0})
    given = [pair(place, f"w{place}", (5, 2), "long") for place in range(30)]
    given += [pair(place, f"w{place}", (2, 5), "short") for place in range(30, 40)]
    stage = stage_of(given, head, lambda rows: torch.tensor([[float(len(row))] * 2 for row in rows]), eval_pairs=8)
    found = evaluate_reward_model(stage, ["reward"])
    assert found["reward_model/held_out"] == 8.0
    assert found["reward_model/pair_accuracy"] == 0.75
    assert found["reward_model/pair_accuracy/short"] == 0.0
    # So it is where the best weights are chosen, and where the reward is normalised.
    chosen = reward.measure(stage, SimpleNamespace(offer=lambda *_: None), ["reward"], 1.0, 1)  # type: ignore[arg-type]
    assert chosen["eval/accuracy"] == 0.75


def test_rewards_are_normalised_on_every_part_of_a_set(
    stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [pair(place, f"w{place}", (2, 2) if place < 20 else (6, 6)) for place in range(40)]
    stage = stage_of(given, PAIRS, by_length(1.0), normalise="responses")
    monkeypatch.setattr(reward, "ANCHOR_SAMPLES", 10)
    reward.normalise_reward(stage, ["reward"])
    end = 1.0
    assert stage.roles.head("reward").mean.item() == pytest.approx(4.0 + end)


class Counting(Sequence[int]):
    """Numbers that are made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size, self.made = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.size:
            raise IndexError
        self.made += 1
        return place


def test_records_are_taken_from_all_over_a_set_and_no_others_are_made() -> None:
    records = Counting(10_000)
    found = spaced(records, 100)
    assert records.made == 100
    assert found == sorted(set(found)) == spaced(Counting(10_000), 100)
    assert all(place * 100 <= record < (place + 1) * 100 for place, record in enumerate(found))
    assert 30 < sum(record % 2 for record in found) < 70, "kinds that take turns are both met"
    assert spaced(Counting(7), 100) == list(range(7))
    assert spaced([], 3) == []


def test_a_held_out_split_that_is_absent_is_as_good_as_empty(
    stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of([pair(0, "w1", (1, 2))], PAIRS, by_length(1.0))

    def absent(split: Split) -> Any:
        raise Absent(f"no {split} here")

    monkeypatch.setattr(stage.task, "preferences", absent)
    monkeypatch.setattr(stage.task, "examples", absent)
    assert stage.preferences("validation") == []
    assert stage.demonstrations("validation", needed=False) == []
    with pytest.raises(Absent, match="no train here"):
        stage.preferences("train")
    with pytest.raises(Absent, match="no test here"):
        stage.examples("test")


def test_a_picture_is_not_swapped_for_itself_though_it_is_stored_twice() -> None:
    def shown(place: int, shade: int) -> Comparison:
        stored = ImageBytes(to_png_bytes(Image.new("RGB", (4, 4), (shade, 0, 0))), f"row {place}")
        return Comparison(f"p{place}", (Message("user", (ImageSlot(),)),), "a", "b", (stored,))

    alike = [shown(place, 7) for place in range(4)]
    assert without_sight(alike, "swapped") == []
    mixed = [*alike, shown(4, 9)]
    swapped = without_sight(mixed, "swapped")
    assert [record.images for record in swapped[:4]] == [mixed[4].images] * 4
    assert swapped[4].images[0].load().getpixel((0, 0)) == (7, 0, 0)
    assert len({group_of(record) for record in mixed}) == 2


def test_one_group_alone_has_no_interval_and_that_is_said(stage_of: Callable[..., Stage]) -> None:
    given = [pair(place, "w1", (5, 2)) for place in range(6)]
    stage = stage_of(given, PAIRS, by_length(1.0))
    found = evaluate_reward_model(stage, ["reward"])
    assert found["reward_model/pair_accuracy"] == 1.0
    assert found.ci95 == {}
    assert "an interval needs two" in stage.notes[0]


def test_nothing_held_out_is_said(stage_of: Callable[..., Stage]) -> None:
    stage = stage_of([], PAIRS, by_length(1.0), [pair(0, "w1", (1, 2))])
    assert evaluate_reward_model(stage, ["reward"]) == {}
    assert "no test preferences" in stage.notes[0]


def test_intervals_outlive_a_union() -> None:
    found = Figures(RunConfig())
    found.mean("x", [0.0, 1.0, 1.0], [0, 1, 2])
    joined = found | {"y": 2.0}
    assert joined == {"x": found["x"], "y": 2.0}
    assert joined.ci95 == found.ci95 != {}


def test_the_line_on_the_terminal() -> None:
    metrics = {
        "reward_model/label_accuracy": 0.9, "reward_model/auc": 0.8123, "reward_model/majority_rate": 0.88,
        "reward_model/length_auc": 0.5, "reward_model/label_accuracy_blank_images": 0.7, "reward_model/held_out": 10.0,
    }  # fmt: skip
    assert brief(metrics, {"reward_model/auc": [0.75, 0.87], "reward_model/length_auc": [0.4, 0.6]}) == (
        "AUC 0.812 [0.75, 0.87], label accuracy 90.0%, majority class 88.0%, AUC of length alone 0.5, "
        "without pictures 70.0%"
    )
    assert brief({}, {}) == ""


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_the_stage_leaves_its_intervals_in_the_summary_and_the_report(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [pair(place, f"w{place}", (2 + place % 5, 4)) for place in range(24)]
    given: Sequence[Any] = pairs if kind == "pairs" else rated(24)
    task = Taste({"train": list(given[:16]), "test": list(given[16:])}, RewardHead(kind))  # type: ignore[arg-type]
    config = config_of(model)
    assert run_verb("rm", task, RunConfig(**{**vars(config), "out": str(tmp_path / "rm")})) == 0
    summary = json.loads((tmp_path / "rm" / "summary.json").read_text())
    main = "reward_model/pair_accuracy" if kind == "pairs" else "reward_model/auc"
    low, high = summary["ci95"][main]
    assert low <= summary["metrics"][main] <= high
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rm: "))
    assert ("pair accuracy" if kind == "pairs" else "AUC 0") in line
    assert "[" in line
    page = (tmp_path / "rm" / "report.html").read_text()
    assert f'<th scope="row">{main.removeprefix("reward_model/")}</th>' in page
    assert f"{low:.3f} to {high:.3f}" in page
