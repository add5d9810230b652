"""The two cross-attention modules, BCM (Eq. 1) and DAC (Eq. 3).

Symbols in shapes: G segments of a batch, S latent steps, D hidden size, N features of a segment's boxes, L merged patches
of the images before it.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence


QUERY_STD = 0.02


class LatentCrossAttention(nn.Module):
    """One multi-head cross-attention and a LayerNorm: all that BCM and DAC are made of (App. A.1).

    Args:
        hidden_size (`int`): D.
        num_heads (`int`): Attention heads.
    """

    # Whether keys see where features lie, if that is known.
    looks_for_places = True

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def keys_and_values(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """All that later looks at features (G, N, D) need: keys and values, (G, heads, N, D / heads) each, and `None`.

        Of features with places, (G, N, 3D), see `add_positions`, DAC's keys see where they lie, values and BCM's keys don't,
        and the places (G, N, D) come third.
        """
        content, located, places = features, features, None
        if features.shape[-1] != self.k_proj.in_features:
            content, located, places = features.chunk(3, -1)
        read = located if self.looks_for_places else content
        return self._split(self.k_proj(read)), self._split(self.v_proj(content)), places

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor | None,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends from queries (G, S, D) to N keys and values where mask, bool, is true: (G, N), or by step (G, S, N).

        With places, a latent says where it looked: their mean under the attention is added behind the LayerNorm.

        Returns:
            `tuple`: The latents (G, S, D), in the dtype of the weights, and the attention (G, S, N), float32, the mean
            of the heads' softmaxes.
        """
        mask = mask[:, None] if mask.ndim == 2 else mask
        q = self._split(self.q_proj(queries)) * keys.shape[-1] ** -0.5
        scores = (q @ keys.transpose(-1, -2)).float()
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)  # (G, heads, S, N)
        mixed = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(-2)  # (G, S, D)
        latents, attention = self.norm(self.o_proj(mixed)), weights.mean(1)
        if places is not None:
            latents = latents + (attention @ places.float()).to(latents.dtype)
        return latents, attention

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Splits (G, N, D) into heads: (G, heads, N, D / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @property
    def is_trained(self) -> bool:
        """Whether an optimiser ever stepped: the LayerNorm's bias is exactly zero only before the first step."""
        return bool(self.norm.bias.detach().any())


class BoxGuidedCompression(LatentCrossAttention):
    """BCM, the teacher: S learned queries compress the features of a box into latents (Eq. 1)."""

    # It is told where to look: a box.
    looks_for_places = False

    def __init__(self, hidden_size: int, num_heads: int, num_latent_tokens: int):
        super().__init__(hidden_size, num_heads)
        self.queries = nn.Parameter(torch.empty(num_latent_tokens, hidden_size))

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compresses F_local (G, N, D) into Z_T (G, S, D); returns it with A_T (G, S, N), float32.

        Of a path's boxes, all features stand side by side, and the mask (G, S, N) gives each step those of its own.
        """
        return self.attend(self.queries.expand(len(features), -1, -1), *self.keys_and_values(features), mask)


class DynamicAutoregressiveCompression(LatentCrossAttention):
    """DAC, the student: the model's own states query the whole image (Eq. 3). Its query projection is the paper's φ.

    Args:
        queries (`str`): `"states"`, or one of the ablations of Tab. 3 (d): `"static"` learned queries, or fresh
            `"random"` Gaussian ones at every call.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_latent_tokens: int, queries: str = "states"):
        super().__init__(hidden_size, num_heads)
        self.source = queries
        if queries == "static":
            self.queries = nn.Parameter(torch.empty(num_latent_tokens, hidden_size))

    def forward(
        self, states: torch.Tensor, features: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Interrogates F_global (G, L, D) with the states H (G, S, D).

        Returns:
            `tuple`: Z_S (G, S, D) and A_S (G, S, L), float32.
        """
        if self.source == "static":
            if states.shape[1] != len(self.queries):
                raise ValueError(
                    f"DAC has {len(self.queries)} static queries and was asked for {states.shape[1]} steps."
                )
            states = self.queries.expand(len(states), -1, -1)
        elif self.source == "random":
            states = torch.randn_like(states)
        return self.attend(states, *self.keys_and_values(features), mask)


def pad_features(features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads tensors (N_i, D) to (G, N, D); returns them with their mask (G, N), bool."""
    lengths = torch.tensor([len(feature) for feature in features], device=features[0].device)
    padded = pad_sequence(features, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def initialise_queries(module: nn.Module) -> None:
    """Draws learned queries from N(0, 0.02²), once the stock class has initialised the rest."""
    queries = getattr(module, "queries", None)
    if isinstance(queries, nn.Parameter) and not getattr(queries, "_is_hf_initialized", False):
        nn.init.normal_(queries, std=QUERY_STD)
