"""Result files of the two benchmarks as Markdown tables."""

from ..markdown_tables import markdown


PHASES = {
    "prefill": "prefill",
    "text_step": "text step",
    "latent_step": "latent step (stock: the text step in its place)",
}
ON_A_CPU = (
    "On a CPU, unlike on a GPU, trl projects every position onto the vocabulary, not the labelled ones alone: "
    "`stage: sft` is the stricter measure there. "
)


def decoding_tables(result: dict) -> str:
    """The figures of `measure_decoding`, with what they were measured on."""
    parts = [_decoding_lines(result), _variant_lines(result), _batch_lines(result), _decoding_caption(result)]
    return "\n\n".join(part for part in parts if part)


def looks(result: dict) -> bool:
    """Whether our class fed DAC's latents; older results don't say, and didn't."""
    return result["decoding"].get("latent_feedback") == "dac"


def _decoding_lines(result: dict) -> str:
    title, main = next(iter(result["variants"].items()))
    rows = []
    for phase, what in PHASES.items():
        ratio = main["ratios"][phase]
        times = [milliseconds(main[name][phase]) for name in ("stock", "ours")]
        rows.append([f"{what}, ms", *times, with_interval(ratio)])
    memory, left_out = result["memory"], "BCM" if looks(result) else "BCM and DAC"
    for name, suffix in (("ours", ""), ("inference_only", f", without {left_out}")):
        for kind, what in (("all", "peak memory with the weights"), ("peak", "peak memory beyond the weights")):
            ratio = memory[name][f"{kind}_bytes"] / memory["stock"][f"{kind}_bytes"]
            sizes = [f"{memory[one][f'{kind}_bytes'] / 2**20:,.1f} MiB" for one in ("stock", name)]
            rows.append([what + suffix, *sizes, f"{ratio:.4f}"])
    counts = result["parameters"]
    sizes = [f"{counts[name]:,}" for name in ("stock", "all")]
    rows.append(["parameters", *sizes, f"{1 + counts['overhead_share']:.4f}"])
    return markdown(f"{title}, batch 1 | stock | ours | ratio", rows)


def _variant_lines(result: dict) -> str:
    if len(result["variants"]) == 1:
        return ""
    rows = [
        [
            title,
            *(
                cell
                for phase in PHASES
                for cell in (milliseconds(one["ours"][phase]), with_interval(one["ratios"][phase]))
            ),
        ]
        for title, one in result["variants"].items()
    ]
    return markdown(
        "batch 1 | prefill, ms | stock = 1 | text step, ms | stock = 1 | latent step, ms | stock = 1", rows
    )


def _batch_lines(result: dict) -> str:
    rows = [
        [
            size,
            *(f"{one[name]['median']:.3g}" for name in ("stock", "ours")),
            with_interval(one["ratio"]),
            with_interval(one["against_batch_1"]),
        ]
        for size, one in result["batches"].items()
    ]
    return markdown("batch | answers/s, stock | answers/s, ours | stock = 1 | ours, batch 1 = 1", rows)


def _decoding_caption(result: dict) -> str:
    decoding, model, counts, loading = (result[name] for name in ("decoding", "model", "parameters", "loading"))
    subject = f"{model['shape']['note']}, random weights" if "shape" in model else f"the checkpoint {model['name']}"
    coverage = next(iter(result["variants"].values()))["ratios"]["prefill"]["coverage"]
    weights, held = (loading[name] / 1e6 for name in ("weights_bytes", "peak_resident_bytes"))
    return (
        f"BCM and DAC add {counts['overhead']:,} parameters ({100 * counts['overhead_share']:.2f} %, "
        f"{2 * counts['overhead'] / 1e6:,.1f} MB in bf16), {'of which ours runs DAC' if looks(result) else 'which neither class runs'} "
        f"here. Loading {weights:,.0f} MB of "
        f"weights onto the CPU and reading them took {held:,.0f} MB of memory.\n\n"
        f"Measured by `{result['command']}` on {result['date'][:10]}: {subject}; {decoding['dtype']}, a prompt of "
        f"{decoding['prompt_tokens']} tokens, {decoding['image_tokens']} of them the picture's, a reflection of "
        f"{decoding['latent_steps']} steps, {decoding['text_steps']} text steps; both classes write as many tokens, so that "
        f"where ours reflects the stock one writes {decoding['latent_steps'] + 2} tokens of text; {_rounds(result, coverage)} "
        "Times are medians (quartiles)."
    )


def training_tables(result: dict) -> str:
    """The figures of `measure_training`, with what they were measured on."""
    return "\n\n".join([_training_lines(result), _packing_lines(result), _training_caption(result)])


def _training_lines(result: dict) -> str:
    rows = []
    for name, arm in result["arms"].items():
        if name in ("padded", "packed"):
            continue
        against = arm["against"]
        speeds = {other: with_interval(one["speed"], 2) for other, one in against.items()}
        trl = speeds.get("trl_sft", "1")
        if "trl_sft_no_checkpointing" in speeds:
            trl += f"; of trl without checkpointing {speeds['trl_sft_no_checkpointing']}"
        rows.append(
            [
                arm["title"],
                f"{arm['step_seconds']['median']:.3g}",
                trl,
                speeds.get("sft", "1" if name == "sft" else ""),
                f"{arm['peak_memory_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    header = "training | step, s | speed, trl = 1 | speed, our `sft` = 1 | peak memory beyond the weights"
    return markdown(header, rows)


def _packing_lines(result: dict) -> str:
    # Files from before the two arms were rounds like the others hold them apart.
    arms = result.get("packing", result["arms"])
    speed = arms["speed"] if "speed" in arms else arms["packed"]["against"]["padded"]["tokens_per_second"]
    rows = []
    for name, title in (("padded", "padded batches of 4 samples"), ("packed", "packs of at most 4 samples")):
        rate = arms[name]["tokens_per_second"]
        tokens = f"{rate['median']:,.0f} ({rate['quartile_1']:,.0f} to {rate['quartile_3']:,.0f})"
        ratio = with_interval(speed, 2) if name == "packed" else "1"
        rows.append([title, tokens, f"{100 * arms[name]['padding']:.1f} %", ratio])
    return markdown("stage 1, lengths as in Visual CoT | useful tokens/s (quartiles) | padding | ratio", rows)


def _training_caption(result: dict) -> str:
    training, shape = result["training"], result["shape"]
    coverage = result["arms"]["stage1"]["against"]["trl_sft"]["speed"]["coverage"]
    adapters = f"LoRA of rank {training['lora']}, " if training.get("lora") else ""
    mix = training["mix"] if "mix" in training else result["packing"]["distribution"]
    return (
        f"Measured by `{result['command']}` on {result['date'][:10]}: {shape['note']}; {adapters}{training['dtype']}, "
        f"{training['optimiser']}, gradient checkpointing unless said otherwise, {training['batch_size']} samples a batch, "
        f"{_rounds(result, coverage)} Speed is the ratio of step times for the same samples. Mix of lengths: {mix}; areas and "
        f"the paper's limits divided by {shape['mix_divisor']}. {ON_A_CPU if training['device'] == 'cpu' else ''}"
        f"trl {result['versions']['trl']}."
    )


def _rounds(result: dict, coverage: float) -> str:
    machine, versions = result["machine"], result["versions"]
    place = machine.get("gpu", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used")
    clock = result["clock"] if "clock" in result else result.get("decoding", result.get("training"))["clock"]
    return (
        f"{result['repeats']} rounds in which all arms take turns, {clock}; {place}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Ratios are medians of the rounds' own ratios, with a {100 * coverage:.0f} % interval."
    )


def milliseconds(values: dict) -> str:
    """A median of seconds and its quartiles, in milliseconds of three figures."""
    median, low, high = (
        f"{float(f'{1000 * values[name]:.3g}'):,g}" for name in ("median", "quartile_1", "quartile_3")
    )
    return f"{median} ({low} to {high})"


def with_interval(ratio: dict, decimals: int = 3) -> str:
    """A ratio and its interval."""
    median, low, high = (f"{ratio[name]:.{decimals}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"
