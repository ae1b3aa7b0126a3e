"""Operations on padded batches that keep the one padding convention of ``perl_vlm.types.Sequences``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
    )


def take(sequences: Sequences, rows: Sequence[int]) -> Sequences:
    """The given rows, repeats allowed, with their share of pixels; padding columns that no row needs are dropped."""
    index = torch.as_tensor(list(rows), dtype=torch.long, device=sequences.input_ids.device)
    width = sequences.prompt_width
    mask = sequences.attention_mask[index]
    response_mask = sequences.response_mask[index]
    used = mask[:, :width].any(dim=0)
    first = int(used.to(torch.long).argmax()) if bool(used.any()) else width
    last = width + (int(response_mask.any(dim=0).sum()) if response_mask.shape[1] else 0)
    extras = _take_extras(sequences, list(rows))
    trimmed = {key: value[:, first:] if _per_token(key) else value for key, value in extras.items()}
    return Sequences(
        input_ids=sequences.input_ids[index][:, first:last],
        attention_mask=mask[:, first:last],
        response_mask=response_mask[:, : last - width],
        extras=trimmed,
        image_counts=tuple(sequences.image_counts[row] for row in rows),
    )


def prompts_of(sequences: Sequences) -> Sequences:
    """The prompts alone, R = 0."""
    width = sequences.prompt_width
    return Sequences(
        input_ids=sequences.input_ids[:, :width],
        attention_mask=sequences.attention_mask[:, :width],
        response_mask=sequences.response_mask[:, :0],
        extras=sequences.extras,
        image_counts=sequences.image_counts,
    )


def to_device(sequences: Sequences, device: torch.device) -> Sequences:
    """Move every tensor."""
    return Sequences(
        input_ids=sequences.input_ids.to(device),
        attention_mask=sequences.attention_mask.to(device),
        response_mask=sequences.response_mask.to(device),
        extras={key: value.to(device) for key, value in sequences.extras.items()},
        image_counts=sequences.image_counts,
    )


def _per_token(key: str) -> bool:
    return key.endswith("token_type_ids")


def token_extras(sequences: Sequences) -> dict[str, Tensor]:
    """The extras as the model wants them: token types extended with zeros (text) over the response."""
    extras = dict(sequences.extras)
    response_width = sequences.response_mask.shape[1]
    for key, value in extras.items():
        if _per_token(key) and response_width:
            extras[key] = torch.cat([value, value.new_zeros(value.shape[0], response_width)], dim=1)
    return extras


def _take_extras(sequences: Sequences, rows: list[int]) -> dict[str, Tensor]:
    """Rows of what the image processor made. Families lay pixels out in three ways: a row a sequence (Idefics3), a row
    an image (LLaVA), or the patches of all images flat, their number given by an image grid (Qwen-VL)."""
    extras: Mapping[str, Tensor] = sequences.extras
    batch, counts = len(sequences), sequences.image_counts
    starts = [sum(counts[:row]) for row in range(batch)]
    images = [start + n for row in rows for start in [starts[row]] for n in range(counts[row])]
    grid = extras.get("image_grid_thw")
    taken: dict[str, Tensor] = {}
    for key, value in extras.items():
        if _per_token(key):
            taken[key] = value[torch.as_tensor(rows, device=value.device)]
        elif grid is not None and key == "pixel_values":
            sizes = grid.prod(dim=1).tolist()
            patches = list(value.split(sizes))
            taken[key] = torch.cat([patches[image] for image in images]) if images else value[:0]
        elif grid is None and key.startswith("pixel_") and _row_per_sequence(key, extras, batch, counts):
            taken[key] = value[torch.as_tensor(rows, device=value.device)]
        elif value.shape[0] == sum(counts):
            taken[key] = value[torch.as_tensor(images, dtype=torch.long, device=value.device)]
        else:
            raise ValueError(f"cannot take rows of {key} {tuple(value.shape)} for {batch} rows with {counts} images")
    return taken


def _row_per_sequence(key: str, extras: Mapping[str, Tensor], batch: int, counts: tuple[int, ...]) -> bool:
    """Whether row b of ``extras[key]`` belongs to sequence b, rather than to the b-th image of all."""
    value = extras[key]
    if value.shape[0] != batch:
        return False
    if sum(counts) != batch or all(count == 1 for count in counts):
        return True
    # As many images as sequences, unevenly spread. Idefics3 lays out [sequence, tile, ...]; LLaVA-NeXT has as many
    # dimensions but a row an image, and says the images' sizes.
    return value.dim() == (4 if key == "pixel_attention_mask" else 5) and "image_sizes" not in extras
