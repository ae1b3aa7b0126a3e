"""Make the bundled model `tiny`: a small Idefics3-class VLM trained from scratch on generated scenes.

    python scripts/make_tiny.py --seed 0 --out perl_vlm/models/tiny

It lives outside the package because the library knows no task, and this script borrows the VQA plugin's scenes.

One training row is an image followed by several short dialogues about it. Each dialogue sees the image and itself
only (a block mask, with positions restarting after the image), so an image is encoded once for all of them. A dialogue
is a question, an answer that is right or wrong by the toss of a coin, and after the end of the turn a verdict,
`` good`` or `` bad``. Two things are learned from it: what the answer should have been, at the place where the answer
begins, and the verdict. Judging is what makes the model a usable base for a reward model, which reads the hidden state
at that same position. Two dialogues of each row ask for a given word only, so that judging is learned where answering
is easy.

* The first four fifths are pretraining, on the truth: captions that list every object and its place (most of the
  first tenth, then now and then), right answers, right verdicts.
* The last fifth is supervised fine-tuning by a *biased* annotator (``perl_vlm_vqa.scenes.biased_answer``): objects
  imagined, a liking for yes, one too many when counting. Verdicts stay true: somebody else gives them.
* Then a short finish on the biased answers alone, without verdicts: after an answer comes a new line, as in any chat.
  Without it the state after an answer would be little else than the verdict, any random head on it would be a reward
  model (or its opposite), and there would be nothing left for a reward model to learn.
* Last, the embeddings of the tokens that none of this uses are told apart (``spread_unused``), without which no LoRA
  could teach the model to write anything but the words above.

Only scenes of the ``train`` split are used. Progress is printed; the result is a standard transformers folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from perl_vlm_vqa.scenes import (
    COLORS,
    COLUMNS,
    QUESTION_KINDS,
    ROWS,
    SHAPES,
    Question,
    Scene,
    ask,
    biased_answer,
    random_scene,
)

IMAGE_SIZE, PATCH, SHUFFLE = 64, 8, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH // SHUFFLE) ** 2
CAPTION_PROMPT = "describe the image."
REPEAT_PROMPT = "answer this:"
ANSWERS = (*COLORS, *SHAPES, "yes", "no", *map(str, range(6)))
JUDGING = 0.2  # share of the steps before verdicts are learned: one must know the answer first
TURN_STEPS, TURN_LR = 400, 3e-4
UNUSED_COSINE = 0.9  # to the median row, which is an unused one since most are
PRETRAINING = 0.8  # share of the steps before the biased annotator comes
VERDICTS = {True: " good", False: " bad"}
WORDS = (
    "what", "color", "is", "the", "of", "shape", "shapes", "are", "there", "how", "many", "does", "image",
    "contain", "a", "present", "where", "describe", "good", "bad", "yes", "no", "not", "in", "an", "and", "or",
    "left", "right", "above", "below", "object", "objects", "picture", "summarize", "article", "answer",
    "question", "please", "which", "does", "it", "this", "that", "to", "on", "with", "good", "bad",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}<|im_start|>{% endif %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<end_of_utterance>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def build_processor() -> Idefics3Processor:
    """A byte-level BPE tokenizer (any text has an encoding) whose merges cover the words of the scenes."""
    words = [*COLORS, *SHAPES, *(s + "s" for s in SHAPES), *ROWS, *COLUMNS, *map(str, range(10)), *WORDS]
    corpus = [f" {word}" for word in words for _ in range(50)] + ["User:", "Assistant:", "System:"] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        "<|pad|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    ]  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|pad|>",
        additional_special_tokens=["<fake_token_around_image>", "<image>", "<global-img>"],
        padding_side="left",
        model_max_length=512,
    )
    images = Idefics3ImageProcessor(
        size={"longest_edge": IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
        do_image_splitting=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return Idefics3Processor(images, fast, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def build_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """About two million parameters; eager attention, which is the fastest on a CPU at this size."""
    tokenizer = processor.tokenizer
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=SHUFFLE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": IMAGE_SIZE, "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": len(tokenizer),
            "max_position_embeddings": 512, "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        attn_implementation="eager",
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model


def pixels_of(scene: Scene) -> torch.Tensor:
    """[3, 64, 64] in [-1, 1], as the processor makes them (``check_pixels`` compares)."""
    raw = torch.frombuffer(bytearray(scene.load(IMAGE_SIZE).tobytes()), dtype=torch.uint8)
    return raw.view(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1).float() / 127.5 - 1.0


class Packer:
    """Draws scenes and packs the dialogues about each into one sequence."""

    def __init__(self, processor: Idefics3Processor, seed: int, split: str = "train", what: str = "") -> None:
        self.tokenizer = processor.tokenizer
        self.rng = random.Random(f"tiny-{seed}-{split}{what}")
        self.split = split
        self.eos = [self.tokenizer.eos_token_id]
        image = ["<fake_token_around_image>", "<global-img>", *["<image>"] * IMAGE_TOKENS, "<fake_token_around_image>"]
        self.prefix = self.ids("<|im_start|>User:") + self.tokenizer.convert_tokens_to_ids(image)
        self.answer_cue = self.eos + self.ids("\nAssistant:")
        self.judging, self.turns_end = True, False
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def cached(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.ids(text)
        return self.cache[text]

    def caption(self, scene: Scene) -> tuple[list[int], list[int]]:
        """Token ids, and labels of the same length: what should stand there, -100 where nothing is learned."""
        asked = self.cached(f" {CAPTION_PROMPT}") + self.answer_cue
        told = self.cached(f" {scene.caption()}") + self.eos
        return asked + told, [-100] * len(asked) + told

    def judged(self, question: Question, taught: str) -> tuple[list[int], list[int]]:
        """A dialogue whose shown answer is right or wrong by chance, labelled with ``taught`` and a true verdict."""
        right = self.rng.random() < 0.5
        asked = self.cached(f" {question.text}") + self.answer_cue
        shown = self.cached(f" {question.answer if right else question.wrong}") + self.eos
        wanted = self.cached(f" {taught}") + self.eos
        labels = [wanted[0]]
        # Further tokens are learned as long as what is shown has followed what is taught.
        for place in range(1, len(shown)):
            follows = shown[:place] == wanted[:place]
            labels.append(wanted[place] if follows else self.eos[0] if place == len(shown) - 1 else -100)
        after = self.cached("\n" if self.turns_end else VERDICTS[right])
        return asked + shown + after, [-100] * len(asked) + labels + (after if self.judging else [-100])

    def repeated(self) -> tuple[list[int], list[int]]:
        """``repeat X.``, answered with X or another word, and the verdict: comparing what was said with what should
        have been is learned here first, where the right answer costs nothing to know."""
        word, other = self.rng.sample(ANSWERS, 2)
        right = self.rng.random() < 0.5
        asked = self.cached(f" {REPEAT_PROMPT} {word}") + self.answer_cue
        shown, wanted = self.cached(f" {word if right else other}") + self.eos, self.cached(f" {word}")
        verdict = self.cached(VERDICTS[right])
        return asked + shown + verdict, [-100] * len(asked) + [
            wanted[0],
            *[-100] * (len(shown) - 2),
            *self.eos,
            *verdict,
        ]

    def row(self, captions: float, questions: int, biased: bool) -> tuple[torch.Tensor, list, list, list, list]:
        """One image with ``questions`` dialogues, and a caption with probability ``captions``."""
        scene = random_scene(self.rng, self.split)
        dialogues = [self.caption(scene)] if self.rng.random() < captions else []
        dialogues += [self.repeated() for _ in range(0 if self.turns_end else 2)]
        for _ in range(questions):
            question = ask(scene, self.rng)
            taught = biased_answer(question, self.rng) if biased else question.answer
            dialogues.append(self.judged(question, taught))
        start = len(self.prefix)
        ids, labels = list(self.prefix), [-100] * start
        segments, positions = [0] * start, list(range(start))
        for index, (tokens, targets) in enumerate(dialogues, 1):
            ids += tokens
            labels += targets
            segments += [index] * len(tokens)
            positions += range(start, start + len(tokens))
        return pixels_of(scene), ids, labels, segments, positions

    def batch(self, size: int, captions: float, questions: int, biased: bool) -> dict[str, torch.Tensor]:
        rows = [self.row(captions, questions, biased) for _ in range(size)]
        width = max(len(row[1]) for row in rows)

        def pad(column: int, fill: int) -> torch.Tensor:
            return torch.tensor([row[column] + [fill] * (width - len(row[column])) for row in rows])

        segments = pad(3, -1)
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        visible = (same & causal)[:, None]
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        return {
            "pixel_values": torch.stack([row[0] for row in rows])[:, None],
            "input_ids": pad(1, self.tokenizer.pad_token_id),
            "labels": pad(2, -100),
            "attention_mask": mask,
            "position_ids": pad(4, 0),
        }


def loss_of(model: Idefics3ForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy over the learned tokens only; the head runs on those positions alone."""
    labels = batch["labels"][:, 1:]
    hidden = model.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).last_hidden_state
    learned = labels != -100
    logits = model.lm_head(hidden[:, :-1][learned])
    return torch.nn.functional.cross_entropy(logits.float(), labels[learned])


@torch.no_grad()
def probe(model: Idefics3ForConditionalGeneration, packer: Packer, scenes: int = 100) -> dict[str, float]:
    """By kind of question, on unseen scenes: how often the greedy first token of the answer is the truth, and how often
    the verdict prefers the right answer to the wrong one."""
    model.eval()
    good, bad = (packer.ids(VERDICTS[right])[0] for right in (True, False))
    found: dict[str, float] = {}
    for kind in QUESTION_KINDS:
        questions: list[Question] = []
        while len(questions) < scenes:
            question = ask(random_scene(packer.rng, packer.split), packer.rng, kind)
            questions += [question] if question.kind == kind else []
        asked = [packer.prefix + packer.ids(f" {q.text}") + packer.answer_cue for q in questions]
        pixels = torch.stack([pixels_of(q.scene) for q in questions])[:, None]
        first = torch.tensor([packer.ids(f" {q.answer}")[0] for q in questions])
        answered = _next_token(model, packer, asked, pixels).argmax(-1) == first
        found[f"answer/{kind}"] = round(answered.float().mean().item(), 3)
        leaning = []
        for answers in ([q.answer for q in questions], [q.wrong for q in questions]):
            whole = [row + packer.ids(f" {text}") + packer.eos for row, text in zip(asked, answers, strict=True)]
            logits = _next_token(model, packer, whole, pixels)
            leaning.append(logits[:, good] - logits[:, bad])
        found[f"verdict/{kind}"] = round((leaning[0] > leaning[1]).float().mean().item(), 3)
    model.train()
    return found


def _next_token(model: torch.nn.Module, packer: Packer, rows: list[list[int]], pixels: torch.Tensor) -> torch.Tensor:
    width, pad = max(map(len, rows)), packer.tokenizer.pad_token_id
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return model(
        input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]), attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0), pixel_values=pixels, logits_to_keep=1, use_cache=False,
    ).logits[:, -1]  # fmt: skip


def check_pixels(processor: Idefics3Processor, packer: Packer) -> None:
    """The shortcut from image to pixels used in training must be what the processor does."""
    scene = random_scene(packer.rng)
    ours = pixels_of(scene)
    theirs = processor.image_processor(scene.load(IMAGE_SIZE), return_tensors="pt")["pixel_values"][0, 0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(text=text, images=[[scene.load(IMAGE_SIZE)]], add_special_tokens=False)["input_ids"][0]
    if list(ids) != packer.prefix + packer.ids(" is it red?") + packer.answer_cue:
        raise SystemExit("the chat template and the packed sequences disagree")


def finish_turns(model: Idefics3ForConditionalGeneration, packer: Packer, batch_size: int) -> None:
    """Learn that a turn is over after the answer, on biased answers, with an optimizer and scenes of its own: the
    outcome depends on the weights it starts from and on the packer's seed alone."""
    packer.turns_end = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=TURN_LR, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(TURN_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = TURN_LR * (1 - step / TURN_STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, packer.batch(batch_size, 0.1, 6, biased=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def spread_unused(model: Idefics3ForConditionalGeneration) -> int:
    """Give each token that was never trained an embedding of its own; returns how many there are.

    Such a token only ever appears in the softmax's denominator, so all of them were pushed the same way and ended as
    nearly one vector (mean cosine 0.997). Their embedding is also the output layer, which LoRA leaves frozen: no
    hidden state could then prefer one of them to another. Each gets the common vector, which keeps them as unlikely
    as they were, plus a random one of length 1, about the length of a trained row.
    """
    rows = model.model.text_model.embed_tokens.weight
    unused = (torch.nn.functional.cosine_similarity(rows, rows.median(0).values[None]) > UNUSED_COSINE).nonzero()[:, 0]
    noise = torch.randn(len(unused), rows.shape[1], generator=torch.Generator().manual_seed(0))
    rows[unused] = rows[unused].mean(0) + noise / noise.norm(dim=1, keepdim=True)
    return len(unused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    # Small batches: at this size learning is limited by steps, not by images.
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--finish", type=Path, help="only the finish, from the folder of a model that lacks it")
    parser.add_argument("--spread", type=Path, help="only the last step, from the folder of a model that lacks it")
    parser.add_argument("--every", type=int, default=250, help="steps between progress lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    processor = build_processor()
    trained = args.finish or args.spread
    model = Idefics3ForConditionalGeneration.from_pretrained(trained) if trained else build_model(processor)
    model.set_attn_implementation("eager")
    packer, held_out = Packer(processor, args.seed), Packer(processor, args.seed, "validation")
    check_pixels(processor, held_out)
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, {len(processor.tokenizer)} tokens, seed {args.seed}", flush=True)
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    warmup = min(300, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / args.steps)))),
    )
    model.train()
    began, running, history = time.monotonic(), 0.0, []
    for step in range(1, 0 if trained else args.steps + 1):
        done = step / args.steps
        # Captions teach seeing fastest; questions need more turns once there is sight.
        captions, questions = (1.0, 4) if done < 0.1 else (0.1, 6)
        packer.judging = done > JUDGING
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, packer.batch(args.batch_size, captions, questions, biased=done > PRETRAINING))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % args.every == 0 or step == args.steps:
            kinds = probe(model, held_out, 500 if step == args.steps else 100)
            seconds = time.monotonic() - began
            history.append({"step": step, "loss": round(running / args.every, 4), "seconds": round(seconds), **kinds})
            running = 0.0
            print(json.dumps(history[-1]), flush=True)
            model.save_pretrained(args.out)
            processor.save_pretrained(args.out)
    if not args.spread:
        finish_turns(model, Packer(processor, args.seed, what="finish"), args.batch_size)
    print(f"{spread_unused(model)} of {len(processor.tokenizer)} tokens were never trained", flush=True)
    kinds = probe(model, held_out, 500)
    history.append({"step": args.steps + TURN_STEPS, "seconds": round(time.monotonic() - began), **kinds})
    print(json.dumps(history[-1]), flush=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    if trained:
        history = json.loads((trained / "training.json").read_text())["history"] + history
    record = {"seed": args.seed, "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr}
    record |= {"parameters": total, "torch": torch.__version__, "command": " ".join(sys.argv), "history": history}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
