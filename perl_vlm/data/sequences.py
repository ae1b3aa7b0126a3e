"""Operations on padded batches that keep the one padding convention of ``perl_vlm.types.Sequences``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perl_vlm.errors import PerlVlmError
from perl_vlm.types import Sequences


def with_responses(prompts: Sequences, responses: Sequence[Sequence[int]], pad_id: int) -> Sequences:
    """Append one response to each prompt, padded on the right.

    Args:
        prompts: B rows with R = 0.
        responses: B lists of token ids, none empty.
        pad_id: fills the padding; the mask alone says what is padding.
    """
    if len(responses) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    if prompts.response_mask.shape[1]:
        raise ValueError("these sequences have responses already")
    if not all(len(response) for response in responses):
        raise ValueError(f"response {[len(r) for r in responses].index(0)} has no tokens; an empty answer is one EOS")
    width = max(map(len, responses))
    ids = torch.full((len(responses), width), pad_id, dtype=prompts.input_ids.dtype)
    mask = torch.zeros((len(responses), width), dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response, dtype=ids.dtype)
        mask[row, : len(response)] = True
    ids, mask = ids.to(prompts.input_ids.device), mask.to(prompts.input_ids.device)
    return Sequences(
        input_ids=torch.cat([prompts.input_ids, ids], dim=1),
        attention_mask=torch.cat([prompts.attention_mask, mask.to(prompts.attention_mask.dtype)], dim=1),
        response_mask=mask,
        extras=prompts.extras,
        image_counts=prompts.image_counts,
        extra_rows=prompts.extra_rows,
        prompt_of=prompts.prompt_of,
    )


def join_prompts(prompts: Sequence[Sequences], pad_id: int) -> Sequences:
    """One batch of several with R = 0, whose widths, images and extras may differ.

    Types of tokens that only some have are 0 for the others (plain text). Where tiles differ in number or in size from
    one batch to the next, they are padded with zeros, as the families' own processors do.
    """
    if any(part.response_mask.shape[1] for part in prompts):
        raise ValueError("only prompts without responses can be joined")
    width = max(part.prompt_width for part in prompts)
    names = dict.fromkeys(key for part in prompts for key in part.extras)
    extras, extra_rows = {}, {}
    for key in names:
        found = [part.extras.get(key) for part in prompts]
        if per_token(key):
            types = [
                part.input_ids.new_zeros(part.input_ids.shape) if t is None else t
                for part, t in zip(prompts, found, strict=True)
            ]
            extras[key] = torch.cat([_left(value, width, 0) for value in types])
        else:
            extras[key] = _stack([value for value in found if value is not None])
            extra_rows[key] = tuple(
                count
                for part in prompts
                for count in (part.extra_rows[key] if key in part.extras else (0,) * len(part))
            )
    return Sequences(
        input_ids=torch.cat([_left(part.input_ids, width, pad_id) for part in prompts]),
        attention_mask=torch.cat([_left(part.attention_mask, width, 0) for part in prompts]),
        response_mask=torch.cat([part.response_mask for part in prompts]),
        extras=extras,
        image_counts=tuple(count for part in prompts for count in part.image_counts),
        extra_rows=extra_rows,
    )


def _left(rows: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(rows, (width - rows.shape[1], 0), value=fill)


def _stack(values: Sequence[Tensor]) -> Tensor:
    """Concatenated along the first dimension, the others padded at their ends with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        # torch.nn.functional.pad counts dimensions from the last.
        lacking = [
            end for size, wanted in zip(value.shape[:0:-1], shape[::-1], strict=True) for end in (0, wanted - size)
        ]
        padded.append(nn.functional.pad(value, lacking) if any(lacking) else value)
    return torch.cat(padded)


def take(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    """The given rows, repeats allowed, with their share of pixels; padding columns that no row needs are dropped."""
    index = torch.as_tensor(list(rows), dtype=torch.long, device=sequences.input_ids.device)
    width = sequences.prompt_width
    mask = sequences.attention_mask[index]
    response_mask = sequences.response_mask[index]
    used = mask[:, :width].any(dim=0)
    first = int(used.to(torch.long).argmax()) if bool(used.any()) else width
    last = width + (int(response_mask.any(dim=0).sum()) if response_mask.shape[1] else 0)
    extras = {}
    for key, value in sequences.extras.items():
        if per_token(key):
            extras[key] = value[index][:, first:]
        elif len(wanted := _rows_of(sequences, key, rows)):
            # Left out where none of these sequences has any: models take no pixels, but not no rows of pixels.
            extras[key] = value[wanted]
    return Sequences(
        input_ids=sequences.input_ids[index][:, first:last],
        attention_mask=mask[:, first:last],
        response_mask=response_mask[:, : last - width],
        extras=extras,
        image_counts=tuple(sequences.image_counts[row] for row in rows),
        extra_rows={
            key: tuple(counts[row] for row in rows) for key, counts in sequences.extra_rows.items() if key in extras
        },
        prompt_of=None if sequences.prompt_of is None else tuple(sequences.prompt_of[row] for row in rows),
    )


def by_length(lengths: Sequence[int], fixed: int = 256) -> list[list[int]]:
    """Rows in parts of like length, each padded to its own longest, so that little padding is computed.

    Args:
        lengths: of B rows, in tokens.
        fixed: what a part costs besides its tokens, as a number of tokens.

    Returns:
        The rows of each part, in their order; short parts first. The sum over the parts of ``rows * longest + fixed``
        is the least possible.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # Rows of one length are never better off apart, so that parts may end where the length changes, and nowhere else.
    ends = [place for place in range(1, len(order)) if lengths[order[place]] > lengths[order[place - 1]]]
    ends = [0, *ends, len(order)]
    cost, cut = [0], [0]
    for place, end in enumerate(ends[1:], start=1):
        longest = lengths[order[end - 1]]
        options = [cost[at] + (end - ends[at]) * longest + fixed for at in range(place)]
        cost.append(min(options))
        cut.append(options.index(cost[-1]))
    parts: list[list[int]] = []
    place = len(ends) - 1
    while place:
        parts.insert(0, sorted(order[ends[cut[place]] : ends[place]]))
        place = cut[place]
    return parts


def _rows_of(sequences: Sequences, key: str, rows: Sequence[int]) -> Tensor:
    """Which rows of an extra belong to the given sequences, in their order."""
    value, counts = sequences.extras[key], sequences.extra_rows.get(key)
    if counts is None or len(counts) != len(sequences) or sum(counts) != value.shape[0]:
        raise PerlVlmError(
            f"{key} of shape {tuple(value.shape)} cannot be divided among {len(sequences)} prompts: extra_rows tells "
            f"{'nothing of it' if counts is None else f'of {sum(counts)} rows for {len(counts)} prompts'}. Sequences "
            "made by a Renderer carry these numbers"
        )
    starts = [0, *itertools.accumulate(counts)]
    wanted = [place for row in rows for place in range(starts[row], starts[row + 1])]
    return torch.as_tensor(wanted, dtype=torch.long, device=value.device)


def to_device(sequences: Sequences, device: torch.device) -> Sequences:
    """Move every tensor."""
    return Sequences(
        input_ids=sequences.input_ids.to(device),
        attention_mask=sequences.attention_mask.to(device),
        response_mask=sequences.response_mask.to(device),
        extras={key: value.to(device) for key, value in sequences.extras.items()},
        image_counts=sequences.image_counts,
        extra_rows=sequences.extra_rows,
        prompt_of=sequences.prompt_of,
    )


def per_token(key: str) -> bool:
    """Whether an extra has one entry for each token, [B, P], and is padded as the ids are."""
    return key.endswith("token_type_ids")


# Rows of these are pictures, tiles, patches or frames, even where there happen to be as many as tokens.
_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features")
_MEDIA_BY_TOKEN = ("image_attention_mask",)


def unknown_per_token(prompts: Sequences) -> list[str]:
    """Extras with an entry for each prompt token that are no token types, such as the cross-attention mask of Mllama.

    Filled up with zeros like pixels they would be wrong, and nothing says what they are over a response.
    """
    shape = prompts.input_ids.shape
    return [
        key
        for key, value in prompts.extras.items()
        if value.shape[:2] == shape and not per_token(key) and (key in _MEDIA_BY_TOKEN or not key.startswith(_MEDIA))
    ]


def token_extras(sequences: Sequences, *, fill: int = 0) -> dict[str, Tensor]:
    """The extras as the model wants them: token types extended over the response.

    Args:
        sequences: B rows.
        fill: the ``token_type_ids`` of a response. 0 means plain text (Gemma 3 marks image tokens by 1); PaliGemma
            needs 1, for its type 0 is the prefix whose tokens see each other, later ones included, and a response of
            that type would read its own next token. Other per-token types (``mm_token_type_ids``) are 0 for text.
    """
    extras = dict(sequences.extras)
    width = sequences.response_mask.shape[1]
    for key, value in extras.items():
        if per_token(key) and width:
            types = value.new_full((value.shape[0], width), fill if key == "token_type_ids" else 0)
            extras[key] = torch.cat([value, types], dim=1)
    return extras
