"""What the configurations of all trainers check."""

import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.integrations.integration_utils import is_trackio_available
from transformers.utils import is_torch_bf16_gpu_available


KEYWORDS = (
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
    "model_init_kwargs",
)
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# Names of fields, what must hold of their values, and how it is said.
RULES = (
    (("dataloader_num_workers",), lambda x: x >= 0, "not be negative"),
    (("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), lambda x: x >= 0, "not be negative"),
    (("adam_beta1", "adam_beta2"), lambda x: 0 <= x < 1, "lie in [0, 1)"),
    (COUNTS, lambda x: x >= 1, "be at least 1"),
    (("save_steps",), lambda x: x > 0, "be above 0"),
)

# Metrics of which less is better; transformers knows those that end with "loss".
LESS_IS_BETTER = re.compile(r"(^|_)(loss(_(ce|bcm|feat|attn))?|latent_distance|entropy)$")

Rule = tuple[tuple[str, ...], Callable[[Any], bool], str]


class RunConfigMixin:
    """Stands before one of trl's configurations among the bases of a configuration of V-Reflection."""

    def check_values(self, rules: tuple[Rule, ...], unsupported: dict[str, tuple]) -> None:
        """Fills `bf16`, `report_to` and `greater_is_better`, and checks values, before transformers reads them.

        Args:
            rules (`tuple`): Names of fields, what must hold of their values, and how it is said, besides `RULES`.
            unsupported (`dict`): Arguments that would be ignored, and the values that ask for nothing.

        Raises:
            ValueError: The field, its value, and what to do.
        """
        if self.bf16 is None:  # trl's default would refuse to run without such a GPU
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        elif self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise ValueError(
                "`bf16` is on, and no GPU here has bfloat16: leave `bf16` out, and it is on where a GPU has it; "
                "`use_cpu` trains with it on the CPU."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            # An endless `max_grad_norm` measures gradients and clips none.
            if isinstance(value, float) and not (
                math.isfinite(value) or (field.name, value) == ("max_grad_norm", math.inf)
            ):
                raise ValueError(f"`{field.name}` must be a finite number, got {value}.")
        for names, holds, rule in (*RULES, *rules):
            for name in names:
                if (value := getattr(self, name)) is not None and not holds(value):
                    raise ValueError(f"`{name}` must {rule}, got {value}.")
        if self.report_to is None:
            self.report_to = "trackio" if is_trackio_available() else "none"
        for name, allowed in unsupported.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"V-Reflection doesn't support `{name}={getattr(self, name)!r}`: leave it out.")
        if self.greater_is_better is None and LESS_IS_BETTER.search(self.metric_for_best_model or ""):
            self.greater_is_better = False
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: ids, messages and images of rows are read.")

    def check_parsed(self) -> None:
        """Checks what transformers has parsed, and reads `resume_from_checkpoint` as the command line has it.

        Raises:
            ValueError: Keywords that aren't a mapping; a token of the Hub, which would be published.
        """
        for name in KEYWORDS:
            if not isinstance(value := getattr(self, name), (dict, type(None))):
                raise ValueError(f"`{name}` must be a mapping, got {value!r}.")
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` would be written into training_args.bin, which is pushed: leave it out and run `hf auth login`, "
                "or set HF_TOKEN."
            )
        if self.resume_from_checkpoint in ("true", "false", "True", "False"):  # of the command line
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower() == "true"
