"""What `vreflection train` loads and saves, besides the trainer's configuration."""

import json
from dataclasses import dataclass, field
from typing import Literal

from .data.sources import GLYPHSEARCH
from .rewards import REWARDS


@dataclass
class VReflectionScriptArguments:
    """What `vreflection train` loads and saves, besides the fields of [`~trl.ModelConfig`].

    Args:
        from_scratch (`str`, *optional*): Train the untrained tiny model of this backbone instead of a checkpoint:
            `"qwen2_5_vl"` or `"qwen3_vl"`.
        dataset_name (`str`, *optional*): `"glyphsearch"`, `"glyphsearch_curriculum"`, or a `datasets` id, local folder or
            file with rows in the project's message format.
        dataset_options (`dict`, *optional*): Further options of that source, see [`load_rows`](data/sources.py).
        datasets (`list[dict]`, *optional*): Several sources instead of one, see [`load_rows`](data/sources.py).
        eval_datasets (`list[dict]`, *optional*): The sources of the rows that `eval_strategy` evaluates on, likewise.
        streaming (`bool`, *optional*, defaults to `False`): Whether rows are read as they are needed; `max_steps` must be
            given then.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Rows of a stream among which the next one is drawn, unless
            `train_sampling_strategy` is `"sequential"`.
        min_pixels (`int`, *optional*): Fewest pixels that a picture is scaled to; written into the processor. The
            checkpoint's, if left out.
        max_pixels (`int`, *optional*): Most pixels that a picture is scaled to, likewise.
        save_dtype (`str`, *optional*): Dtype of the final checkpoint, if another one than in training.
        model_options (`dict`, *optional*): Fields of `VReflectionConfig` and arguments of `from_pretrained`.
    """

    from_scratch: Literal["qwen2_5_vl", "qwen3_vl"] | None = field(
        default=None, metadata={"help": "Start from the untrained tiny model of this backbone."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "glyphsearch, or a datasets id, folder or file."})
    dataset_options: dict | str | None = field(default=None, metadata={"help": "Further options of the data set."})
    datasets: list | str | None = field(default=None, metadata={"help": "Several sources, as a list of mappings."})
    eval_datasets: list | str | None = field(default=None, metadata={"help": "Sources of the evaluation, likewise."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream among which the next is drawn."})
    min_pixels: int | None = field(default=None, metadata={"help": "Fewest pixels a picture is scaled to."})
    max_pixels: int | None = field(default=None, metadata={"help": "Most pixels a picture is scaled to."})
    save_dtype: str | None = field(default=None, metadata={"help": "Dtype of the final checkpoint."})
    model_options: dict | str | None = field(default=None, metadata={"help": "Fields of VReflectionConfig."})

    def __post_init__(self):
        if (self.dataset_name is None) == (self.datasets is None):
            raise ValueError("Set either `dataset_name` or `datasets`.")
        if self.datasets is not None and self.dataset_options is not None:
            raise ValueError(
                "`dataset_options` are those of `dataset_name`: write them into the entries of `datasets`."
            )
        for name in ("dataset_options", "datasets", "eval_datasets", "model_options"):
            if isinstance(value := getattr(self, name), str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"`{name}` must be JSON on the command line, got {value!r} ({error}).") from error
            kind, what = (list, "a list of mappings") if name.endswith("datasets") else (dict, "a mapping")
            if not isinstance(value := getattr(self, name), (kind, type(None))):
                raise ValueError(f"`{name}` must be {what}, got {value!r}.")

    @property
    def sources(self) -> list[dict]:
        """The sources of the data, one or several."""
        if self.datasets is not None:
            return self.datasets
        named = "format" if self.dataset_name in GLYPHSEARCH else "path"
        return [{named: self.dataset_name, **(self.dataset_options or {})}]


@dataclass
class VReflectionGRPOScriptArguments(VReflectionScriptArguments):
    """The same, and the rewards of stage `"grpo"`.

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["exact_answer"]`): Names of functions in [`rewards`](rewards.py);
            `reward_weights` weighs them.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["exact_answer"], metadata={"help": f"Rewards, of {', '.join(REWARDS)}."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.reward_funcs or not set(self.reward_funcs) <= set(REWARDS):
            raise ValueError(f"`reward_funcs` must be some of {', '.join(REWARDS)}, got {self.reward_funcs!r}.")
