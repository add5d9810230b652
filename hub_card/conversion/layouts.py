"""What the weights of other layouts are called here: names alone, no tensors.

The authors' names are those of `src/model/lvr_heads.py` and `qwen_lvr_model.py` in their released code. Projections of features
of another width (`vision_proj`, `kv_proj`, `q_proj`), which Qwen2.5-VL never needs, have no place here.
"""

import re

from modeling_vreflection import VReflectionForConditionalGeneration


# Our module, the authors', and the field of their config.json that announces it.
MODULES = {
    "bcm": ("box_feature_resampler", "use_box_feature_resampler"),
    "dac": ("student_resampler", "use_stage2_distillation"),
}
# torch's `MultiheadAttention` stores the projections of queries, keys and values as one, in this order.
PACKED = ("q_proj", "k_proj", "v_proj")
LEAVES = {
    "queries": ("queries",),
    "cross_attn.in_proj_weight": tuple(f"{name}.weight" for name in PACKED),
    "cross_attn.in_proj_bias": tuple(f"{name}.bias" for name in PACKED),
    "cross_attn.out_proj.weight": ("o_proj.weight",),
    "cross_attn.out_proj.bias": ("o_proj.bias",),
    "output_norm.weight": ("norm.weight",),
    "output_norm.bias": ("norm.bias",),
}


def our_names(name: str) -> tuple[str, ...]:
    """Our names for what one stored weight holds: three for a packed projection, none for an unknown part of a module."""
    module, _, leaf = name.partition(".")
    for ours, (theirs, _) in MODULES.items():
        if module == theirs:
            return tuple(f"model.{ours}.{part}" for part in LEAVES.get(leaf, ()))
    for pattern, replacement in VReflectionForConditionalGeneration.stock_key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return (name,)


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a stored weight that holds weights of ours of this shape: packed, or with queries for a batch of one."""
    count = len(our_names(name))
    if count > 1:
        return (count * shape[0], *shape[1:])
    return (1, *shape) if name == "box_feature_resampler.queries" else shape


def holds_module(name: str, ours: str) -> bool:
    """Whether a stored weight belongs to a module, `"bcm"` or `"dac"`, under the authors' name or under ours."""
    return name.startswith((f"model.{ours}.", f"{MODULES[ours][0]}."))
