"""Where the reflection segments of a batch lie, which images each of them looks at, and what the layers add to these.

Symbols in shapes: B rows, T tokens, G segments.
"""

import torch


def find_segments(input_ids: torch.LongTensor, config) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Finds the reflection segments in ids (B, T): their rows (G,) and the columns of their first slots (G,)."""
    in_slot = input_ids == config.latent_token_id
    begins = in_slot.clone()
    begins[:, 1:] &= ~in_slot[:, :-1]
    rows, first = begins.nonzero(as_tuple=True)
    lengths = in_slot.flatten().cumsum(0).view_as(in_slot)
    ends = in_slot.clone()
    ends[:, :-1] &= ~in_slot[:, 1:]
    lengths = lengths[ends] - lengths[begins] + 1
    opened = input_ids[rows, first - 1] == config.latent_start_token_id
    wrong = ((lengths != config.num_latent_tokens) | ~opened | (first == 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"A segment is a start token and {config.num_latent_tokens} slots; segments {wrong} in rows "
            f"{rows[wrong].tolist()} have {lengths[wrong].tolist()} slots, or no start token before them."
        )
    return rows, first


def is_packed(position_ids: torch.LongTensor | None) -> bool:
    """Whether positions are (4, B, T): transformers' form of rows that hold several samples."""
    return position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4


def images_before(
    input_ids: torch.LongTensor,
    position_ids: torch.LongTensor | None,
    segments: tuple[torch.LongTensor, torch.LongTensor],
    image_tokens: list[int],
    image_token_id: int,
) -> list[range]:
    """For each segment, which images of the batch its sample shows before it: what the segment looks at.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): The tokens.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): Of packed rows, each token's position in its sample.
        segments (`tuple`): See [`find_segments`].
        image_tokens (`list[int]`): The tokens of each image of the batch.
        image_token_id (`int`): Id of these tokens.
    """
    rows, first = segments
    is_image = input_ids == image_token_id
    seen = is_image.flatten().cumsum(0).view_as(is_image) - is_image.long()  # image tokens before each token
    starts = torch.zeros_like(first) if position_ids is None else first - position_ids[rows, first]
    ends = torch.tensor(image_tokens).cumsum(0)
    # How many images end at or before so many image tokens.
    begin, end = (torch.searchsorted(ends, seen[rows, at].cpu(), right=True).tolist() for at in (starts, first))
    return [range(*images) for images in zip(begin, end)]


def deepstack_of_columns(kwargs: dict, begin: int, end: int) -> dict:
    """The language model's arguments for columns `begin` to `end` alone: DeepStack's features of the images there."""
    mask = kwargs.get("visual_pos_masks")
    if mask is None:
        return kwargs
    columns = torch.arange(mask.shape[1], device=mask.device)
    here = ((columns >= begin) & (columns < end)).expand_as(mask)[mask]  # of each image token
    levels = [level[here.to(level.device)] for level in kwargs["deepstack_visual_embeds"]]
    return {**kwargs, "visual_pos_masks": mask[:, begin:end], "deepstack_visual_embeds": levels}


def features_of(encoded) -> list[torch.Tensor]:
    """F_global of each image, (L_i, D), from the vision encoder's output; none where there are no images."""
    return [] if encoded is None else list(encoded.pooler_output)
