"""A result file as Markdown tables."""

from .bench import ARMS, PLAIN


ON_A_CPU = (
    "On a CPU, unlike on a GPU, trl projects every position onto the vocabulary, not the labelled ones alone: "
    "`stage: sft` is the stricter measure there. "
)


def render(result: dict) -> str:
    """The figures as Markdown tables, with what they were measured on.

    Args:
        result (`dict`): What `measure` returned, or its file.

    Raises:
        ValueError: A result without all figures.
    """
    try:
        return "\n".join([*_arms_table(result), "", *_packing_lines(result), "", _caption(result)])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The result lacks figures ({error!r}): run `vreflection-train cost` to the end.") from error


def _arms_table(result: dict) -> list[str]:
    lines = [
        "| training | step, s | speed, trl = 1 | speed, our `sft` = 1 | peak memory beyond the weights | widest in the vocabulary |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        arm = result["arms"][name]
        tensor = arm["largest_vocabulary_tensor"]
        trl, plain = (arm["against"].get(other) for other in PLAIN)
        against_trl = with_interval(trl["speed"]) if trl else "1"
        if alike := arm["against"].get("trl_sft_no_checkpointing"):
            against_trl += f"; of trl without checkpointing {with_interval(alike['speed'])}"
        cells = [
            arm["title"],
            f"{arm['step_seconds']['median']:.3g}",
            against_trl,
            with_interval(plain["speed"]) if plain else "1" if name == "sft" else "",
            f"{arm['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{tensor['rows']} of {tensor['positions']} positions",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _packing_lines(result: dict) -> list[str]:
    packing = result["packing"]
    lines = [
        "| stage 1, lengths mixed as assumed for Visual CoT | useful tokens/s (quartiles) | padding | ratio |",
        "|---|---|---|---|",
    ]
    for name, title in (("padded", "padded batches of 4 samples"), ("packed", "packs of at most 4 samples")):
        arm = packing[name]
        rate = arm["tokens_per_second"]
        ratio = with_interval(packing["speed"]) if name == "packed" else "1"
        lines.append(
            f"| {title} | {rate['median']:,.0f} ({rate['quartile_1']:,.0f} to {rate['quartile_3']:,.0f}) | "
            f"{100 * arm['padding']:.1f} % | {ratio} |"
        )
    return lines


def _caption(result: dict) -> str:
    machine, versions, training = result["machine"], result["versions"], result["training"]
    coverage = result["arms"]["stage1"]["against"]["trl_sft"]["speed"]["coverage"]
    place = machine.get("gpu", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used")
    packing = result["packing"]
    return (
        f"Measured by `{result['command']}` on {result['date'][:10]}: {result['shape']['note']}; {training['dtype']}, "
        f"{training['optimiser']}, gradient checkpointing unless said otherwise, {training['batch_size']} samples a batch, "
        f"{result['repeats']} rounds in which the arms take turns, {training['clock']}. Ratios are medians of the rounds' own ratios, with a "
        f"{100 * coverage:.0f} % interval; speed is the ratio of step times for the same samples, while tokens/s counts each "
        f"arm's own tokens, ten more a sample with a reflection. Mix of lengths: {packing['distribution']}; areas and the "
        f"paper's limits divided by {packing['divisor']}. {ON_A_CPU if training['device'] == 'cpu' else ''}{place}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, trl {versions['trl']}."
    )


def with_interval(ratio: dict) -> str:
    """A ratio and its interval."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
