"""Renders a result file as Markdown.

`python -m vreflection_hub_card.efficiency.report RESULT.json DOCUMENT.md` puts the tables between the document's markers
`<!-- efficiency NAME -->`, where NAME is the checkpoint's or the shape's.
"""

import json
import sys
from pathlib import Path

from ..evaluation.report import fill_block
from ..evaluation.statistics import median_interval
from .contenders import PHASES
from .measure import COMPILED, DEFAULT, TITLES


def render(result: dict) -> str:
    """The figures as Markdown tables, with what they were measured on.

    Args:
        result (`dict`): What `measure` returned, with its `command`, or its file.

    Raises:
        ValueError: A result without all figures.
    """
    try:
        parts = (_main_lines, _variant_lines, _batch_lines, _notes)
        return "\n\n".join("\n".join(part(result)) for part in parts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The result lacks figures ({error!r}): run `vreflection efficiency` to the end.") from error


def _main_lines(result: dict) -> list[str]:
    main, memory = result["variants"][DEFAULT.title], result["memory"]
    lines = [f"| {DEFAULT.title}, batch 1 | stock | ours | ratio |", "|---|---|---|---|"]
    for phase in PHASES:
        stock, ours = (milliseconds(main[name][phase]) for name in ("stock", "ours"))
        title = TITLES[phase] + (" (stock: the text step in its place)" if phase == "latent_step" else "")
        lines.append(f"| {title}, ms | {stock} | {ours} | {with_interval(main['ratios'][phase])} |")
    for name, title in (("ours", ""), ("inference_only", ", inference-only")):
        for kind, what in (("all", "peak memory with the weights"), ("peak", "peak memory beyond the weights")):
            stock, ours = (mebibytes(memory[one][f"{kind}_bytes"]) for one in ("stock", name))
            lines.append(f"| {what}{title} | {stock} | {ours} | {memory[name][f'{kind}_ratio']:.4f} |")
    parameters = result["parameters"]
    lines.append(
        f"| parameters | {parameters['stock']:,} | {parameters['all']:,} | {1 + parameters['overhead_share']:.4f} |"
    )
    goals = ["| goal | measured | |", "|---|---|---|"]
    goals += [
        f"| {goal['goal']}: {goal['bound']} | {goal['value']:.3f} | {'met' if goal['met'] else '**not met**'} |"
        for goal in result["goals"]
    ]
    return [*lines, "", *goals]


def _variant_lines(result: dict) -> list[str]:
    lines = [
        "| batch 1 | " + " | ".join(f"{TITLES[phase]}, ms | stock = 1" for phase in PHASES) + " |",
        "|---|" + "---|---|" * len(PHASES),
    ]
    for title, variant in result["variants"].items():
        cells = [
            f"{milliseconds(variant['ours'][phase])} | {with_interval(variant['ratios'][phase])}" for phase in PHASES
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _batch_lines(result: dict) -> list[str]:
    lines = [
        "| batch | answers/s, stock | answers/s, ours | stock = 1 | ours, batch 1 = 1 | ours, answers as at batch 1 |",
        "|---|---|---|---|---|---|",
    ]
    for size, one in result["batches"].items():
        lines.append(
            f"| {size} | {one['stock']['median']:.3g} | {one['ours']['median']:.3g} | {with_interval(one['ratio'])} | "
            f"{with_interval(one['against_batch_1'])} | {one['same_answers']} of {one['questions']} |"
        )
    return lines


def _notes(result: dict) -> list[str]:
    machine, versions, decoding, model = (result[name] for name in ("machine", "versions", "decoding", "model"))
    parameters, loading = result["parameters"], result["loading"]
    shape = f"{model['shape']['note']}, random weights" if "shape" in model else f"the checkpoint {model['name']}"
    place = machine.get("gpu", f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used")
    first = next(iter(result["variants"].values()))["ratios"]["prefill"]["coverage"]
    sentences = [
        f"BCM and DAC add {parameters['overhead']:,} parameters ({100 * parameters['overhead_share']:.2f} %, "
        f"{parameters['overhead_megabytes_bf16']:,.1f} MB in bf16), which sleep at inference.",
        *_not_run_sentences(result["not_run"]),
        *_compiled_sentences(result),
        *_headroom_sentences(result),
    ]
    if loading is not None:
        written, held, weights = (
            loading[name] / 1e6 for name in ("peak_anonymous_bytes", "peak_resident_bytes", "weights_bytes")
        )
        sentences.append(
            f"Loading {weights:,.0f} MB of weights onto the CPU and reading them took {held:,.0f} MB, of which the process "
            f"wrote {written:,.0f} MB; the rest is the mapped file."
        )
    return [
        " ".join(sentences),
        "",
        f"Measured by `{result['command']}` on {result['date'][:10]}: {shape}; {decoding['dtype']}, a prompt of "
        f"{decoding['prompt_tokens']} tokens, {decoding['image_tokens']} of them the picture's, a reflection of "
        f"{decoding['latent_steps']} steps, {decoding['text_steps']} text steps, nobody stops early; both classes write as many "
        f"tokens, so that where ours reflects the stock one writes {decoding['latent_steps'] + 2} tokens of text; {result['repeats']} "
        f"rounds in which both classes take turns, {decoding['clock']}. Times are medians (quartiles), ratios medians of the "
        f"rounds' own ratios with a {100 * first:.0f} % interval. {place}; torch {versions['torch']}, transformers "
        f"{versions['transformers']}.",
    ]


def _not_run_sentences(not_run: dict[str, str]) -> list[str]:
    titles = {reason: [title for title, why in not_run.items() if why == reason] for reason in not_run.values()}
    return [f"Not run, {reason}: {'; '.join(which)}." for reason, which in titles.items()]


def _compiled_sentences(result: dict) -> list[str]:
    sentences = []
    for title, variant in result["variants"].items():
        if variant["compiled"]:
            plain = result["variants"][title.removesuffix(", compiled")]
            for phase in ("text_step", "latent_step"):
                ratio = variant["ours"][phase]["median"] / plain["ours"][phase]["median"]
                verdict = "faster" if ratio < 1 else "not faster"
                sentences.append(
                    f"{title}: a {TITLES[phase]} is {verdict} than without compiling ({ratio:.2f} of its time)."
                )
    return sentences


def _headroom_sentences(result: dict) -> list[str]:
    headroom = result["headroom"]
    halves = ", ".join(f"{with_interval(time)} at batch {size}" for size, time in headroom["half_of_the_rows"].items())
    latent, text = (100 * headroom["forward_share"][kind]["median"] for kind in ("latent_step", "text_step"))
    return [
        *([f"Projecting half of the rows onto the vocabulary, all of them = 1: {halves}."] if halves else []),
        f"The forward pass is {latent:.0f} % of a latent step and {text:.0f} % of a text step.",
        f"A latent step of ours takes {with_interval(_latent_by_text(result))} of its own text step.",
        *([_one_graph_sentence(result)] if "one_graph" in headroom else []),
    ]


def _latent_by_text(result: dict) -> dict:
    ours = result["variants"][DEFAULT.title]["ours"]
    return median_interval(
        [
            latent / text
            for latent, text in zip(ours["latent_step"]["values"], ours["text_step"]["values"], strict=True)
        ]
    )


def _one_graph_sentence(result: dict) -> str:
    graph, decoding = result["headroom"]["one_graph"], result["decoding"]
    times = {phase: one["median"] for phase, one in result["variants"][COMPILED.title]["ours"].items()}
    latent, text = decoding["latent_steps"], decoding["text_steps"] + 1  # the start token's step is like one of text
    answer = times["prefill"] + latent * times["latent_step"] + text * times["text_step"]
    within = latent * (graph["singly"]["median"] - graph["one_graph"]["median"])
    without = latent * (times["latent_step"] - graph["one_graph"]["median"])
    single, whole = (graph["first_call_seconds"][name] for name in ("singly", "one_graph"))
    return (
        f"All {latent} latent steps compiled as one graph take {with_interval(graph['ratio'])} of the time of {latent} compiled "
        f"ones, both without `generate` around them; this would save {100 * within / answer:.1f} % of an answer "
        f"({COMPILED.title}), or {100 * without / answer:.1f} % if they left `generate`'s loop, too. Compiling takes "
        f"{whole:.0f} s instead of {single:.0f} s."
    )


def milliseconds(values: dict) -> str:
    """A median of seconds and its quartiles, in milliseconds."""
    median, low, high = (three_figures(1000 * values[name]) for name in ("median", "quartile_1", "quartile_3"))
    return f"{median} ({low} to {high})"


def three_figures(value: float) -> str:
    """A number rounded to three figures, without an exponent where it is below a million."""
    return f"{float(f'{value:.3g}'):,g}"


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"


def with_interval(ratio: dict) -> str:
    """A ratio and its interval."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def insert_tables(document: str, result: dict) -> str:
    """The document with the result's tables between the markers of its name.

    Raises:
        ValueError: A document without the markers; a result without all figures.
    """
    return fill_block(document, f"efficiency {result['model']['name']}", render(result))


if __name__ == "__main__":
    result_file, document_file = map(Path, sys.argv[1:])
    document_file.write_text(insert_tables(document_file.read_text(), json.loads(result_file.read_text())))
