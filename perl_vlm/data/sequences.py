"""Operations on padded batches that keep the one padding convention of ``perl_vlm.types.Sequences``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        if _per_token(key) and width:
            types = value.new_full((value.shape[0], width), fill if key == "token_type_ids" else 0)
            extras[key] = torch.cat([value, types], dim=1)
    return extras


def _take_extras(sequences: Sequences, rows: list[int]) -> dict[str, Tensor]:
    """Rows of what the image processor made. Families lay pixels out in three ways: a row a sequence (Idefics3), a row
    an image (LLaVA), or the patches of all images flat, their number given by an image grid (Qwen-VL).

    A fourth way, the tiles of all images flat (InternVL, Gemma 3's pan and scan), says nowhere which tile is whose:
    PerlVlmError, unless every image is one tile.
    """
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
        elif _row_per_sequence(key, extras, batch, counts):
            taken[key] = value[torch.as_tensor(rows, device=value.device)]
        elif value.shape[0] == sum(counts):
            taken[key] = value[torch.as_tensor(images, dtype=torch.long, device=value.device)]
        else:
            raise PerlVlmError(
                f"the processor made {key} of shape {tuple(value.shape)} for {batch} prompts with {sum(counts)} "
                "images: this model family's pixel layout is not supported yet. Where its processor cuts images into "
                "tiles, switch that off (crop_to_patches or do_pan_and_scan in its processor_config.json), or choose a "
                "model such as SmolVLM, Qwen-VL or LLaVA"
            )
    return taken


def _row_per_sequence(key: str, extras: Mapping[str, Tensor], batch: int, counts: tuple[int, ...]) -> bool:
    """Whether row b of ``extras[key]`` belongs to sequence b, rather than to the b-th image of all."""
    value = extras[key]
    if value.shape[0] != batch:
        return False
    if all(count == 1 for count in counts) or key == "batch_num_images":
        return True
    # Rows may be images or tiles that happen to be as many as the sequences. Idefics3 lays out [sequence, tile, ...];
    # LLaVA-NeXT has as many dimensions but a row an image, and says the images' sizes.
    dimensions = {"pixel_values": 5, "pixel_attention_mask": 4}
    return value.dim() == dimensions.get(key) and "image_sizes" not in extras
