"""A V-Reflection model and the stock Qwen2.5-VL over the same weights, and how one call of `generate` is timed."""

from dataclasses import dataclass
from statistics import median

import torch
from accelerate import init_empty_weights
from transformers import LogitsProcessor, Qwen2_5_VLForConditionalGeneration, set_seed

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration

from .instruments import Clock
from .shapes import Shape, stock_config


@dataclass(frozen=True)
class Timing:
    """One call of `generate`.

    Args:
        prefill (`float`): Seconds until the prompt's logits: vision encoder and prompt.
        text_step (`float`): Median seconds of a step that makes a word.
        latent_step (`float` or `None`): Median seconds of a step that fills a slot.
        total (`float`): Seconds of the whole call.
        sequences (`torch.LongTensor` of shape `(B, T)`): Prompt and answer.
    """

    prefill: float
    text_step: float
    latent_step: float | None
    total: float
    sequences: torch.LongTensor


class StepTimes(LogitsProcessor):
    """Notes when each step's logits are there, and changes nothing."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, input_ids, scores):
        self.times.append(self.clock.now())
        return scores


class Pair:
    """Two models that share one set of weights, and their prompts.

    Args:
        model (`VReflectionForConditionalGeneration`): Ours.
        words (`int`): Words of the prompt around the picture.
        side (`int`): Side of the square picture, in merged patches.
        seed (`int`): Of the prompts.
    """

    def __init__(self, model: VReflectionForConditionalGeneration, words: int = 32, side: int = 12, seed: int = 0):
        self.ours = model.eval()
        self.words, self.side, self.seed = words, side, seed
        weights = model.state_dict()
        with init_empty_weights(include_buffers=False):
            stock = Qwen2_5_VLForConditionalGeneration._from_config(stock_config(model.config))
        stock.load_state_dict({name: weights[name] for name in stock.state_dict()}, assign=True)
        stock.tie_weights()
        self.stock = stock.to(model.device).eval()
        self.clock = Clock(model.device)

    def set_attention(self, implementation: str):
        """Sets both models' attention."""
        for model in (self.ours, self.stock):
            model.set_attn_implementation(implementation)

    def prompts(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Prompts of one length, each of random words around a picture of noise; the first ones are always the same."""
        config, patches = self.ours.config, self.side**2
        special = [getattr(config, name) for name in vars(config) if name.endswith("token_id")]
        vocabulary = config.get_text_config().vocab_size
        ids, pixels = [], []
        for row in range(batch_size):
            generator = torch.Generator().manual_seed(self.seed * 1000 + row)
            words = torch.randint(vocabulary, (self.words,), generator=generator)
            words[torch.isin(words, torch.tensor([id for id in special if isinstance(id, int)]))] = 0
            image = [config.vision_start_token_id, *[config.image_token_id] * patches, config.vision_end_token_id]
            ids.append(torch.cat([words[:4], torch.tensor(image), words[4:]]))
            vision = config.vision_config
            area = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels.append(torch.randn(patches * vision.spatial_merge_size**2, area, generator=generator))
        input_ids = torch.stack(ids)
        grid = [1, *[self.side * config.vision_config.spatial_merge_size] * 2]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == config.image_token_id).int(),
            "pixel_values": torch.cat(pixels).to(self.ours.dtype),
            "image_grid_thw": torch.tensor([grid] * batch_size),
        }
        return {name: tensor.to(self.ours.device) for name, tensor in inputs.items()}

    def time(self, ours: bool, inputs: dict[str, torch.Tensor], latent_steps: int, words: int, **options) -> Timing:
        """Times one greedy answer of `latent_steps + 2 + words` tokens, the stock model's all words.

        A step lasts from one step's logits to the next one's: the tokens' choice, preparing the inputs, the forward pass.
        Both models end with the same number of steps, and nothing ends them before.
        """
        times = StepTimes(self.clock)
        options |= {"reflect": True, "latent_steps": latent_steps} if ours else {}
        count = latent_steps + 2 + words
        began = self.clock.now()
        sequences = (self.ours if ours else self.stock).generate(
            **inputs,
            **options,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[self.ours.config.latent_start_token_id],  # no second reflection among the words
            logits_processor=[times],
        )
        total = self.clock.now() - began
        steps = [after - before for before, after in zip(times.times, times.times[1:])]
        # Step 0 reads the start token; then S slots; the next one reads the end token.
        latent = steps[1 : 1 + latent_steps] if ours else []
        return Timing(
            prefill=times.times[0] - began,
            text_step=median(steps[latent_steps + 1 :]),
            latent_step=median(latent) if latent else None,
            total=total,
            sequences=sequences,
        )


def random_model(shape: Shape, seed: int, device: torch.device) -> VReflectionForConditionalGeneration:
    """A model of a shape with random weights; its special tokens are the last ones of the vocabulary."""
    last = shape.text["vocab_size"] - 1
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    names += ("latent_start_token_id", "latent_token_id", "latent_end_token_id")
    config = VReflectionConfig(
        text_config=shape.text,
        vision_config=shape.vision,
        tie_word_embeddings=shape.tied,
        **{name: last - number for number, name in enumerate(names)},
    )
    set_seed(seed)
    with device:
        return VReflectionForConditionalGeneration._from_config(config, dtype=getattr(torch, shape.dtype))
