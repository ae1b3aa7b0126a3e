"""Responses to one prompt in one row: ``[prompt][response 1][response 2]...``, so that the prompt, and its pictures, go
through the trunk once.

A response sees the prompt and itself, never another response, and its positions go on from the prompt's: what the trunk
says of its tokens is what it would say had each response a row of its own. Two sides of a pair, or the samples of a
group, then cost P + 2R or P + GR tokens in place of 2(P + R) or G(P + R).

Rows are told to share a prompt by who made them (``Sequences.prompt_of``), never by comparing ids: two prompts of equal
ids may hold different pictures.

Shape letters: B sequences, of which several share a prompt, N prompts, L the longest packed row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from perl_vlm.data.sequences import per_token, take
from perl_vlm.errors import PerlVlmError
from perl_vlm.models.backbone import Backbone, accepts
from perl_vlm.models.block_attention import with_blocks
from perl_vlm.types import Sequences


@dataclass(frozen=True)
class Packed:
    """Prompts with all their responses, one or several to a row; rows are padded at their ends."""

    prompts: Sequences
    """The N prompts alone (R = 0), left-padded, in the order in which they stand in the rows."""
    input_ids: Tensor
    """[M, L] in M rows."""
    owners: Tensor
    """[M, L] which of the N prompts each token belongs to, -1 on padding."""
    segments: Tensor
    """[M, L] 0 on prompts, 1 and up on the responses of each, -1 on padding."""
    positions: Tensor
    """[M, L] the place of each token in its own sequence, from 0; 0 on padding."""
    where: Tensor
    """[B, R + 1] which of the M * L columns hold each sequence's last prompt token and its response. Padding points to
    the last prompt token."""

    holds_several: bool
    """Whether any row holds two prompts or two responses, which must not see each other."""
    ends: bool = False
    """Whether of each sequence its last token alone is read; ``where`` then points there everywhere."""

    @property
    def read(self) -> Tensor:
        """[n] which of the M * L columns are read, each once."""
        return self.where.unique()

    def at_ends(self, sequences: Sequences) -> Packed:
        """The same rows, of which the sequences' last tokens alone are read."""
        last = sequences.response_mask.sum(dim=1, keepdim=True)
        return replace(self, where=self.where.gather(1, last).expand_as(self.where), ends=True)

    @property
    def length(self) -> int:
        """L."""
        return self.input_ids.shape[1]

    def unpack(self, hidden: Tensor) -> Tensor:
        """[M, L, H] -> [B, R + 1, H], as the trunk gives it for ``Sequences``, from the last prompt token on."""
        return hidden.flatten(0, 1)[self.where]


def pack(sequences: Sequences, pad_id: int) -> Packed:
    """Put sequences that share a prompt behind one copy of it, and short groups of them into one row, up to the length
    of the longest.

    Args:
        sequences: B rows. Where ``prompt_of`` is not known, no two share a prompt.
        pad_id: fills the rows' ends.
    """
    width, columns = sequences.prompt_width, sequences.input_ids.shape[1]
    lengths, prompt_lengths, members, totals, bins = _layout(sequences)
    longest = max(totals)
    source, owners, segments = (torch.full((len(bins), longest), -1) for _ in range(3))
    positions = torch.zeros(len(bins), longest, dtype=torch.long)
    where = torch.empty(len(sequences), sequences.response_mask.shape[1] + 1, dtype=torch.long)
    order: list[int] = []
    for line, held in enumerate(bins):
        at = 0
        for group in held:
            rows, count = members[group], prompt_lengths[members[group][0]]
            own = slice(at, at + totals[group])
            owners[line, own] = len(order)
            order.append(rows[0])
            source[line, at : at + count] = torch.arange(count) + (rows[0] * columns + width - count)
            segments[line, at : at + count] = 0
            positions[line, at : at + count] = torch.arange(count)
            last, at = line * longest + at + count - 1, at + count
            for number, row in enumerate(rows, start=1):
                length = lengths[row]
                source[line, at : at + length] = torch.arange(length) + (row * columns + width)
                segments[line, at : at + length] = number
                positions[line, at : at + length] = torch.arange(count, count + length)
                where[row] = last
                where[row, 1 : length + 1] = torch.arange(length) + (line * longest + at)
                at += length
    device = sequences.input_ids.device
    source = source.to(device)
    ids = sequences.input_ids.flatten()[source.clamp(min=0)].masked_fill(source < 0, pad_id)
    owners, segments, positions, where = (tensor.to(device) for tensor in (owners, segments, positions, where))
    several = len(bins) < len(members) or any(len(rows) > 1 for rows in members)
    return Packed(prompts_alone(take(sequences, order)), ids, owners, segments, positions, where, several)


class _Layout(NamedTuple):
    """How sequences lie in packed rows. A group is a prompt with its responses."""

    lengths: list[int]
    """Of the B responses."""
    prompts: list[int]
    """Lengths of the B prompts."""
    members: list[list[int]]
    """The sequences of each group."""
    totals: list[int]
    """Tokens of each group."""
    bins: list[list[int]]
    """The groups of each row."""


def _layout(sequences: Sequences) -> _Layout:
    lengths = sequences.response_mask.sum(dim=1).tolist()
    prompts = sequences.attention_mask[:, : sequences.prompt_width].sum(dim=1).tolist()
    members = _members(sequences)
    totals = [prompts[rows[0]] + sum(lengths[row] for row in rows) for rows in members]
    return _Layout(lengths, prompts, members, totals, _bins(totals))


def _members(sequences: Sequences) -> list[list[int]]:
    """The rows of each prompt."""
    if sequences.prompt_of is None:
        return [[row] for row in range(len(sequences))]
    found: dict[int, list[int]] = {}
    for row, prompt in enumerate(sequences.prompt_of):
        found.setdefault(prompt, []).append(row)
    return list(found.values())


def _bins(totals: list[int]) -> list[list[int]]:
    """Groups put together in bins of the largest one's size: first fit, the largest first."""
    size, bins, room = max(totals), list[list[int]](), list[int]()
    for group in sorted(range(len(totals)), key=lambda at: -totals[at]):
        place = next((at for at, left in enumerate(room) if left >= totals[group]), None)
        if place is None:
            bins.append([])
            room.append(size)
            place = len(bins) - 1
        bins[place].append(group)
        room[place] -= totals[group]
    return bins


def prompts_alone(sequences: Sequences) -> Sequences:
    """The same prompts without responses."""
    width = sequences.prompt_width
    return replace(
        sequences,
        input_ids=sequences.input_ids[:, :width],
        attention_mask=sequences.attention_mask[:, :width],
        response_mask=sequences.response_mask[:, :0],
    )


def visible(packed: Packed, window: int | None = None, blocks: Tensor | None = None) -> Tensor:
    """[M, 1, L, L] bool: which keys each query sees. Padding sees itself, so that no row is empty.

    Args:
        window: of sliding attention: how many positions back a query sees, its own included.
        blocks: [M, L] the number of the block in which tokens see each other, later ones included; 0 for none. Only
            prompts have such blocks.
    """
    segments, positions, owners = packed.segments, packed.positions, packed.owners
    length = segments.shape[1]
    mine, theirs = segments[:, :, None], segments[:, None, :]
    seen = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = seen & (owners[:, :, None] == owners[:, None, :]) & (theirs >= 0) & ((theirs == 0) | (theirs == mine))
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    if blocks is not None:
        seen |= (blocks[:, :, None] == blocks[:, None, :]) & (blocks > 0)[:, :, None]
    seen |= torch.eye(length, dtype=torch.bool, device=segments.device)
    return seen[:, None]


def as_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask that eager attention takes: 0 where seen, the type's lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def attention_masks(model: Any, packed: Packed) -> Tensor | dict[str, Tensor]:
    """What a transformers model takes as its 4D mask: one tensor, or one for each kind of layer."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    eager = config._attn_implementation == "eager"
    blocks = seeing_each_other(model, packed)

    dtype = multiplies_in(next(model.parameters()))

    def made(window: int | None) -> Tensor:
        seen = visible(packed, window, blocks)
        if eager:
            return as_bias(seen, dtype)
        return with_blocks(seen, dtype) if seen.device.type == "cpu" else seen

    if not kinds:
        return made(_window(config))
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange:
        raise PerlVlmError(f"it has layers of kind {', '.join(strange)}, which cannot be told to see a part of a row")
    if kinds == {"full_attention"}:
        return made(None)
    return {kind: made(config.sliding_window if kind == "sliding_attention" else None) for kind in kinds}


def _window(config: Any) -> int | None:
    """The window of a model whose layers are all alike."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def seeing_each_other(model: Any, packed: Packed) -> Tensor | None:
    """[M, L] blocks of prompt tokens that see each other: the whole prompts of PaliGemma, each picture of Gemma 3."""
    kind, prompt = model.config.model_type, packed.segments == 0
    if kind == "paligemma":
        return (packed.owners + 1) * prompt
    types = packed.prompts.extras.get("token_type_ids")
    if kind != "gemma3" or types is None:
        return None
    picture = _laid_out(packed, types, 0) == 1
    begins = picture & ~torch.nn.functional.pad(picture, (1, 0))[:, :-1]
    return begins.cumsum(dim=1) * picture


def packed_inputs(model: Any, backbone: Backbone, packed: Packed, *, fill: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward pass over packed rows.

    Args:
        fill: the ``token_type_ids`` of responses; see ``token_extras``.
    """
    inputs: dict[str, Any] = {"input_ids": packed.input_ids, "attention_mask": attention_masks(model, packed)}
    for key, value in packed.prompts.extras.items():
        inputs[key] = _laid_out(packed, value, fill if key == "token_type_ids" else 0) if per_token(key) else value
    if accepts(backbone.model, "position_ids"):
        turned = rotary_positions(model, packed)
        inputs["position_ids"] = packed.positions if turned is None else turned
    return inputs


def _laid_out(packed: Packed, left_padded: Tensor, fill: int) -> Tensor:
    """[N, P] values of left-padded prompt tokens -> [M, L] where those tokens stand in packed rows."""
    out = torch.full_like(packed.input_ids, fill, dtype=left_padded.dtype)
    real = packed.prompts.attention_mask.bool()
    out[packed.segments == 0] = left_padded[real]  # prompts stand in the same order in both
    return out


def rotary_positions(model: Any, packed: Packed) -> Tensor | None:
    """[3, N, L] positions of a model with multimodal rotary ones: responses go on after the largest position of their
    prompt, not after its number of tokens. None for other models."""
    compute = getattr(model.base_model, "get_rope_index", None)
    if compute is None:
        return None
    prompts = packed.prompts
    known = {key: value for key, value in prompts.extras.items() if accepts_argument(compute, key)}
    if any(key.endswith("grid_thw") for key in known):
        own, _ = compute(prompts.input_ids, attention_mask=prompts.attention_mask, **known)
    else:
        own = (prompts.attention_mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
    real = prompts.attention_mask.bool()
    out = packed.positions.expand(3, -1, -1).clone()
    out[:, packed.segments == 0] = own[:, real].to(out)
    counts = real.sum(dim=1)
    behind = own.masked_fill(~real, -1).amax(dim=(0, 2)) + 1 - counts
    return out + torch.where(packed.segments > 0, behind[packed.owners.clamp(min=0)], 0)


def accepts_argument(function: Any, name: str) -> bool:
    """Whether a function names an argument."""
    return name in inspect.signature(function).parameters


# -- whether a model can do it -------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far packed rows may be from separate ones, as a root mean square relative to the states' own. A mask or position
that is wrong shows as several tenths; what is left is the order of additions."""


@dataclass
class Verdict:
    """What is known of a model and one kind of batch."""

    length: int = 0
    """Packed rows of up to so many tokens gave the states of separate ones."""
    refused: str = ""
    """Why the model gets no packed rows, whatever the batch."""


_verdicts: WeakKeyDictionary[Any, dict[tuple[str, ...], Verdict]] = WeakKeyDictionary()
_EVERY = ("every kind",)


def pays(sequences: Sequences, at_most: float = 0.9) -> bool:
    """Whether packed rows have at most this share of the cells of separate ones."""
    layout = _layout(sequences)
    return max(layout.totals) * len(layout.bins) <= at_most * sequences.input_ids.numel()


def verdict(model: Any, sequences: Sequences, packed: Packed) -> Verdict:
    """What ``judge`` found of a model and batches of a kind: with what these bring besides ids (pictures, token types),
    and with or without rows that hold several responses, for those without prove nothing about those with."""
    found = _verdicts.setdefault(model, {})
    rows = "several" if packed.holds_several else "single"
    kind = (*sorted(sequences.extras), rows, *(["ends"] if packed.ends else []))
    return found.get(_EVERY) or found.setdefault(kind, Verdict())


def judge(model: Any, sequences: Sequences, packed: Packed, states: Tensor, expected: Tensor) -> str:
    """Compare the states of one batch, packed and separate, and remember whether the model gives the same.

    Args:
        model: the base.
        sequences, packed: the batch.
        states, expected: [n, H] packed and separate, where they count.

    Returns:
        Nothing where they agree, else why they do not.
    """
    away, limit = differ(states, expected), tolerance(expected)
    if not away <= limit:  # nor is what is no number
        return refuse(model, f"its states differ by {away:.2g} of their size, {limit:g} is allowed")
    verdict(model, sequences, packed).length = packed.length
    return ""


def differ(states: Tensor, expected: Tensor) -> float:
    """How far states are from others, as a root mean square relative to these."""
    theirs = expected.double()
    return ((states.double() - theirs).square().mean() / theirs.square().mean()).sqrt().item()


def tolerance(states: Tensor) -> float:
    """How far they may be."""
    return TOLERANCE[multiplies_in(states)]


def multiplies_in(tensor: Tensor) -> torch.dtype:
    """The type of matrix products: a full copy holds float32 weights and may multiply in bfloat16."""
    device = tensor.device.type
    narrows = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if narrows else tensor.dtype


def refuse(model: Any, why: str) -> str:
    """Remember, and return, why packed rows are not for this model."""
    _verdicts.setdefault(model, {})[_EVERY] = Verdict(refused=why)
    return why
