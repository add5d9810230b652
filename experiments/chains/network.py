"""The model on rows of one length with cached vision features, and its losses.

No step waits for the device, so that a whole training step can be recorded as one CUDA graph. Symbols in shapes: N lines
of R rows each, T tokens, S latent steps, D hidden size, L merged patches.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration
from modeling_vreflection.regions_vreflection import add_positions
from training.losses import attention_distillation_loss, bcm_alignment_loss, feature_distillation_loss

from .arms import Phase
from .rows import IGNORED, Rows, Scenes, Tokens


ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "hub_card" / "vreflection_tiny"
BASE = Path(__file__).parent / "base"
MAX_LENGTH = 240


def starting_model(seed: int, patch_positions: str, device: torch.device) -> VReflectionForConditionalGeneration:
    """The embedded vision encoder, the language model of `base/`, BCM and DAC as `seed` draws them; float32."""
    config = VReflectionConfig.from_pretrained(EMBEDDED, patch_positions=patch_positions)
    model = VReflectionForConditionalGeneration.from_pretrained(EMBEDDED, config=config, dtype=torch.float32)
    model.model.language_model.load_state_dict(
        Qwen2_5_VLTextModel.from_pretrained(BASE, dtype=torch.float32).state_dict()
    )
    torch.manual_seed(seed)
    for name in ("bcm", "dac"):
        part = getattr(model.model, name)
        for parameter in part.parameters():
            parameter._is_hf_initialized = False
        for module in part.modules():
            nn.init.ones_(module.weight) if isinstance(module, nn.LayerNorm) else model._init_weights(module)
    model.model.visual.requires_grad_(False)
    return model.to(device)


@dataclass
class Batch:
    """Lines of a step, see [`Rows`], with what their scenes hold."""

    ids: torch.Tensor
    labels: torch.Tensor
    place: torch.Tensor
    row: torch.Tensor
    slot: torch.Tensor
    reflects: torch.Tensor
    features: torch.Tensor  # (N, L, D)
    inside: torch.Tensor  # (N, R * S, L): the patches of each step's box

    @classmethod
    def pick(cls, rows: Rows, scenes: Scenes, index: torch.Tensor) -> "Batch":
        """The lines of these numbers."""
        scene = rows.scene[index]
        return cls(
            **{name: getattr(rows, name)[index] for name in ("ids", "labels", "place", "row", "slot", "reflects")},
            features=scenes.features[scene],
            inside=scenes.patches[scene[:, None], rows.path[index]],
        )


class Network:
    """A model, and what all rows share: where the picture stands, and every token's position."""

    def __init__(self, model: VReflectionForConditionalGeneration, tokens: Tokens):
        self.model, self.core = model, model.model
        self.image_start, self.grid = tokens.image_start, tokens.grid
        self.positions = tokens.positions(MAX_LENGTH).to(model.device)  # (3, length of a row)
        self.steps = torch.arange(model.config.num_latent_tokens, device=model.device)
        self.width = model.config.text_config.hidden_size
        if model.device.type == "cuda":
            for layer in self.core.language_model.layers:
                layer.compile(dynamic=False)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Embeddings (B, T, D), the picture's features in their places."""
        embeds = self.core.get_input_embeddings()(batch.ids)
        end = self.image_start + batch.features.shape[1]
        return torch.cat([embeds[:, : self.image_start], batch.features, embeds[:, end:]], 1)

    def states(self, batch: Batch, embeds: torch.Tensor) -> torch.Tensor:
        """The final norm's output (N, T, D): a token sees the shared beginning and its own row, up to itself."""
        earlier = torch.ones(2 * [embeds.shape[1]], dtype=torch.bool, device=embeds.device).tril()
        keys = batch.row[:, None]
        mask = (((keys == -1) | (keys == batch.row[:, :, None])) & earlier)[:, None]
        return self.core.language_model(
            inputs_embeds=embeds,
            position_ids=self.positions[:, batch.place],
            attention_mask={"full_attention": mask},
            use_cache=False,
        ).last_hidden_state

    def looked_at(self, features: torch.Tensor) -> torch.Tensor:
        """What BCM and DAC read, (N, L, D) or (N, L, 3D)."""
        if self.model.config.patch_positions == "none":
            return features
        return torch.vmap(lambda image: add_positions(image, self.grid))(features)

    def fill(self, embeds: torch.Tensor, batch: Batch, latents: torch.Tensor) -> torch.Tensor:
        """Embeddings with latents (N, R * S, D) in the slots of the rows that have any."""
        filled = embeds.scatter(1, self.columns(batch.slot), latents)
        # Rows without slots write elsewhere, several of a line in the same columns, where no gradient may come from.
        in_slot = (batch.ids == self.model.config.latent_token_id)[..., None]
        return torch.where(in_slot, filled, embeds)

    def at(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The states (N, R * S, D) that predict the slots."""
        return states.gather(1, self.columns(batch.slot - 1))

    def columns(self, first: torch.Tensor) -> torch.Tensor:
        """S columns from each of `first` (N, R) on, for every channel: (N, R * S, D)."""
        return (first[..., None] + self.steps).flatten(1)[..., None].expand(-1, -1, self.width)

    def shown(self, batch: Batch) -> torch.Tensor:
        """Whether each step is one of a row that reflects: (N, R * S, 1)."""
        return batch.reflects.repeat_interleave(len(self.steps), 1)[..., None]

    def by_segment(self, values: torch.Tensor) -> torch.Tensor:
        """(N, R * S, ...) as (N * R, S, ...)."""
        return values.unflatten(1, (-1, len(self.steps))).flatten(0, 1)

    def teach(self, looked: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """BCM's latents (N, R * S, D) and attention (N, R * S, L): its queries over each step's box."""
        bcm = self.core.bcm
        queries = bcm.queries.repeat(batch.slot.shape[1], 1).expand(len(looked), -1, -1)
        return bcm.attend(queries, *bcm.keys_and_values(looked), batch.inside)

    def look(self, states: torch.Tensor, looked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """DAC's latents (N, ..., D) and attention (N, ..., L) of states (N, ..., D)."""
        everything = torch.ones(looked.shape[:2], dtype=torch.bool, device=looked.device)
        return self.core.dac(states, looked, everything)

    def losses(self, batch: Batch, phase: Phase, states_learn: torch.Tensor) -> dict[str, torch.Tensor]:
        """All losses of a phase that have a weight, and `loss`, their weighted sum.

        Args:
            batch (`Batch`): The rows.
            phase (`Phase`): What fills the slots, and the weights.
            states_learn (`torch.FloatTensor` of shape `()`): The draw of Eq. 2, 0 or 1.
        """
        embeds, terms = self.embed(batch), {}
        if phase.slots is None:
            states = self.states(batch, embeds)
        else:
            looked = self.looked_at(batch.features)
            teacher, attention = self.teach(looked, batch)
            held = teacher if phase.slots == "bcm" else teacher.detach()
            states = self.states(batch, self.fill(embeds, batch, held))
            before, shown = self.at(states, batch), self.shown(batch)
            shared = {"num_segments": batch.reflects.sum().clamp(min=1)}
            if phase.lambda_bcm:
                both = self.by_segment(before * shown), self.by_segment(teacher * shown)
                sides = [bcm_alignment_loss(*both, states_learn=side, **shared) for side in (True, False)]
                terms["L_BCM"] = states_learn * sides[0] + (1 - states_learn) * sides[1]
            if phase.lambda_attn:
                student, looks = self.look(before, looked)
                inside = batch.inside.float()
                target = attention if phase.attention_target == "teacher" else inside / inside.sum(-1, keepdim=True)
                latents = self.by_segment(student * shown), self.by_segment(teacher * shown)
                maps = self.by_segment(looks), self.by_segment(target * shown)
                terms["L_feat"] = feature_distillation_loss(*latents, **shared)
                terms["L_attn"] = attention_distillation_loss(*maps, **shared)
            if phase.slots == "dac":
                states = self.states(batch, self.fill(embeds, batch, student))
        logits = self.model.lm_head(states[:, :-1])
        terms["CE"] = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        weights = {"L_BCM": phase.lambda_bcm, "L_feat": phase.lambda_feat, "L_attn": phase.lambda_attn, "CE": 1.0}
        terms["loss"] = sum(weights[name] * value for name, value in terms.items())
        return terms
