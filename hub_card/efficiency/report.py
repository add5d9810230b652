"""A result file as Markdown tables."""

from .measure import FIGURES


def render(result: dict) -> str:
    """The figures of [`measure`] as Markdown tables, with what they were measured on."""
    lines = [
        "| decoding, batch size 1 | prefill, ms | ratio | text step, ms | ratio | latent step, ms | ratio to a text step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, steps in result["steps"].items():
        cells = [name]
        for figure in FIGURES:
            cells += [f"{1000 * steps[figure]['ours']['median']:.3g}", with_interval(steps[figure]["ratio"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| batch size | answers/s | stock class | ratio | answers as alone |", "|---|---|---|---|---|"]
    for size, told in result["answers"].items():
        rates = [f"{told[name]['median']:.3g}" for name in ("ours", "stock")]
        same = f"{told['same_as_alone']} of {told['count']}"
        lines.append(f"| {size} | {' | '.join(rates)} | {with_interval(told['ratio'])} | {same} |")
    parameters, memory = result["parameters"], result["peak_memory"]
    loading = ""
    if result["loading"] is not None:
        sizes = [f"{result['loading'][name] / 1e6:,.0f} MB" for name in ("anonymous_bytes", "weights_bytes")]
        loading = f" Loading allocates {sizes[0]} beside the mapped files, for {sizes[1]} of weights."
    lines += [
        "",
        f"BCM and DAC: {parameters['added']:,} parameters, {100 * parameters['share']:.2f} % more, "
        f"{parameters['bf16_megabytes']:.1f} MB in bfloat16. Peak memory of an answer, the stock class = 1: "
        f"{memory['ratio']:.3f} without the two modules, {memory['ratio_with_modules']:.3f} with them.{loading}",
        "",
        "| goal | measured | bound | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {told['goal'].replace('_', ' ')} | {told['value']:.3f} | {told['bound']} | {'met' if told['met'] else 'not met'} |"
        for told in result["goals"]
    ]
    return "\n".join([*lines, "", caption(result)])


def with_interval(ratio: dict) -> str:
    """A median ratio with its interval."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def caption(result: dict) -> str:
    """What was measured, and with what."""
    machine, versions, prompt = result["machine"], result["versions"], result["prompt"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used"
    left_out = f" Not run here: {'; '.join(result['not_run'])}." if result["not_run"] else ""
    return (
        f"Measured by `{result['command']}` on {result['date'][:10]}: {result['source']}, {result['dtype']}, a vocabulary of "
        f"{result['vocabulary']:,}; prompts of {prompt['words']} words and {prompt['picture_tokens']} picture tokens; "
        f"answers of {result['latent_steps']} latent steps, their two border tokens and {result['words']} words, the stock "
        f"class's of as many words; {result['clock']}; {result['rounds']} rounds in which both models take turns. Ratios are "
        f"medians of the rounds' own, the stock class = 1, with an interval of "
        f"{100 * result['steps']['sdpa, dynamic cache']['prefill']['ratio']['coverage']:.0f} %.{left_out} {where}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )
