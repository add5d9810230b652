"""A shape so small that whole benchmarks run in seconds."""

from vreflection_hub_card.efficiency.shapes import TEXT, VISION, Shape


TINY = Shape(
    note="a tiny one",
    text={
        **TEXT,
        "vocab_size": 1031,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]},
    },
    vision={
        **VISION,
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    },
    tied=False,
    dtype="float32",
    side=4,
    mix_divisor=32,
)
