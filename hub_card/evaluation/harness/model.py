"""V-Reflection as a model of lmms-eval."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ...embedded import EMBEDDED_NAME
from ...errors import InputError
from ...inference.attention_maps import GREEDY
from ...inference.checkpoints import checkpoint_folder, find_device, load_checkpoint, set_pixel_limits
from ...inference.encoding import answer_texts, encode_prompts
from ..provenance import describe_model
from ..scorers import tagged
from .answers import AnswerLog
from .task import PREFIX


# Stock tasks allow 16 tokens and less, which a reflection's latents alone would use up.
MIN_NEW_TOKENS = 512
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams")


class VReflection(lmms):
    """A V-Reflection checkpoint that answers lmms-eval's requests.

    Our own tasks get all that was written, special tokens too, and score it themselves; all others get the bare answer,
    since their extractors know no `<answer>` tags. Stop strings are ignored: the harness puts them into tasks that never asked for one.

    Args:
        pretrained (`str`, *optional*, defaults to `"vreflection_tiny"`): See [`checkpoint_folder`].
        revision (`str`, *optional*): A Hub id's branch, tag or commit.
        latent_steps (`int`, *optional*): Latent steps of a reflection; 0 is the plain backbone, at the same number of
            pixels. Defaults to the checkpoint's.
        latent_feedback (`str`, *optional*): What a latent step feeds back. Defaults to the checkpoint's.
        reflect (`bool`, *optional*): Whether each answer begins with a reflection; without it the model decides.
        min_pixels (`int`, *optional*): Smaller pictures are enlarged to so many pixels. Defaults to the checkpoint's.
        max_pixels (`int`, *optional*): Larger pictures are reduced to so many pixels. Defaults to the checkpoint's.
        batch_size (`int`, *optional*, defaults to 1): Questions answered at a time, padded on the left.
        dtype (`str`, *optional*): Such as `"bfloat16"`. Defaults to that of the weights, float32 on a CPU.
        attn_implementation (`str`, *optional*): Such as `"flash_attention_2"`. Defaults to transformers' choice.
        device (`str`, *optional*): Defaults to the process's GPU, else the CPU.
        answers (`str` or `Path`, *optional*): A folder for raw outputs, which are taken from there if they are known
            already; see `AnswerLog`.

    Raises:
        InputError: A checkpoint that can't be loaded, or options that it can't follow.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = EMBEDDED_NAME,
        revision: str | None = None,
        latent_steps: int | None = None,
        latent_feedback: str | None = None,
        reflect: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        batch_size: int = 1,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        device: str | None = None,
        answers: str | Path | None = None,
    ):
        super().__init__()
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {batch_size}")
        chosen = find_device(device)
        self.accelerator = Accelerator(cpu=chosen.type == "cpu")
        if device is not None and chosen.type != "cpu" and self.accelerator.num_processes > 1:
            raise InputError(f"device {device!r}: several processes take a GPU each, so leave the device out")
        self.device = self.accelerator.device if device is None else chosen
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        folder = checkpoint_folder(pretrained, revision)
        self.model, self.processor = load_checkpoint(
            folder, self.device, dtype=dtype, attn_implementation=attn_implementation
        )
        try:
            options = self.model.reflection_options(latent_steps, latent_feedback, reflect)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.reflection = asdict(options)
        set_pixel_limits(self.processor.image_processor, min_pixels, max_pixels)
        pixels = self.processor.image_processor.size
        self.description = describe_model(self.model, folder, pretrained) | {"revision": revision}
        self.options = self.reflection | {
            "min_pixels": pixels["shortest_edge"],
            "max_pixels": pixels["longest_edge"],
            "batch_size": self.batch_size,
            "dtype": self.description["dtype"],
            "attn_implementation": self.model.config._attn_implementation,
        }
        self.log = None
        if answers is not None:
            settings = {"model": self.description["name"], "sha256": self.description["sha256"]}
            settings |= {name: value for name, value in self.options.items() if name != "batch_size"}
            self.log = AnswerLog(Path(answers), settings, self.rank)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests, those of an earlier run from its log."""
        answers: list[dict | None] = []
        pending: dict[str, list[tuple]] = {}  # by the settings that they are decoded with
        asked = Counter()
        for position, request in enumerate(requests):
            question, _, settings, index, task, _ = request.args
            if request.metadata.get("__padding_only__"):  # evens out the processes; its answer isn't read
                answers.append({"task": task, "raw": "", "text": "", "tokens": 0, "latent_tokens": 0})
                continue
            repeat = asked[task, index]
            asked[task, index] += 1
            answers.append(self.log and self.log.get(task, index, repeat, question))
            if answers[-1] is None:
                key = json.dumps(decoding(settings), sort_keys=True)
                pending.setdefault(key, []).append((position, request, repeat))

        done = len(requests) - sum(map(len, pending.values()))
        with tqdm(total=len(requests), initial=done, disable=self.rank != 0, unit="item") as bar:
            for group in pending.values():
                for first in range(0, len(group), self.batch_size):
                    positions, batch, repeats = zip(*group[first : first + self.batch_size])
                    given = [answer | {"repeat": repeat} for answer, repeat in zip(self._answer(batch), repeats)]
                    if self.log is not None:
                        self.log.add(given)
                    for position, answer in zip(positions, given):
                        answers[position] = answer
                    bar.update(len(batch))
        return [
            GenerationResult(
                answer["raw"] if answer["task"].startswith(PREFIX) else tagged(answer["text"]),
                TokenCounts(output_tokens=answer["tokens"], reasoning_tokens=answer["latent_tokens"]),
            )
            for answer in answers
        ]

    def _answer(self, batch: Sequence[Instance]) -> list[dict]:
        """Answers a batch of requests that are decoded with the same settings."""
        started = time.perf_counter()
        conversations = []
        for request in batch:
            _, doc_to_messages, settings, index, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][index])
            conversations.append(ChatMessages(messages=messages).to_hf_messages())
        inputs = encode_prompts(self.processor, conversations, self.device)
        sequences = self.model.generate(**inputs, **decoding(settings), **self.reflection)
        tokens = sequences[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = round((time.perf_counter() - started) / len(batch), 3)
        end_tokens = torch.tensor(self.model.generation_config.eos_token_id)
        config, answers = self.model.config, []
        for request, row in zip(batch, tokens):
            ends = torch.isin(row, end_tokens).nonzero().flatten().tolist()
            row = row[: ends[0] + 1] if ends else row  # the rest is padding
            question, _, _, index, task, _ = request.args
            answer = {
                "task": task,
                "index": index,
                "question": question,
                "raw": self.processor.decode(row, skip_special_tokens=False),
                "text": answer_texts(self.processor, row[None])[0],
                "reflected": bool((row == config.latent_start_token_id).any()),
                "tokens": len(row),
                "latent_tokens": int((row == config.latent_token_id).sum()),
                "seconds": seconds,
            }
            answers.append(answer)
        return answers

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("V-Reflection answers one question at a time; tasks of several rounds can't be run.")

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "The probability of an answer skips the reflection before it; use a generating task."
        )


def decoding(settings: dict) -> dict:
    """Arguments of `generate` from a task's generation settings: greedy unless it asks for sampling, never short."""
    limit = {"max_new_tokens": max(MIN_NEW_TOKENS, settings.get("max_new_tokens") or 0)}
    given = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    if not given.get("do_sample", given.get("temperature", 0) > 0) or given.get("temperature") == 0:
        return GREEDY | limit | {"num_beams": given.get("num_beams", 1)}
    return {"num_beams": 1} | given | limit | {"do_sample": True}
