"""`vreflection ask`: a question about a picture, and where the model looked."""

import argparse
import json
import random
import sys
from pathlib import Path

from vreflection_hub_card.embedded import EMBEDDED_NAME, is_embedded
from vreflection_hub_card.errors import InputError

from .arguments import (
    ATTENTION_SOURCES,
    LATENT_FEEDBACK,
    check_writable,
    natural,
    positive,
    quiet_transformers,
    writing,
)


DEMO_PICTURE, DEMO_HEATMAP = Path("scene.png"), Path("heatmap.png")


def add_parser(commands) -> None:
    """Adds `vreflection ask`."""
    parser = commands.add_parser(
        "ask",
        help="ask a question about a picture and see where the model looked",
        description="Answers a question about a picture. Without any argument: draws a GlyphSearch scene, asks for the "
        f"end of a chain of three shapes, and writes {DEMO_PICTURE} and {DEMO_HEATMAP} into the current folder.",
    )
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="a picture file")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="the question about it")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        help="a folder, a Hub id, or the embedded checkpoint, %(default)s (the default)",
    )
    parser.add_argument("--heatmap", type=Path, metavar="FILE", help="draw the looks on the picture into this file")
    parser.add_argument("--per-step", action="store_true", help="a heatmap of each latent step instead of the looks")
    parser.add_argument(
        "--source",
        choices=ATTENTION_SOURCES,
        help="where it looked by DAC's attention, or by the LLM's own (default: DAC's if there is one)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--latent-steps", type=natural, metavar="S", help="latent steps of a reflection; 0: none")
    parser.add_argument("--latent-feedback", choices=LATENT_FEEDBACK, help="what a latent step feeds back")
    parser.add_argument(
        "--reflect",
        action=argparse.BooleanOptionalAction,
        help="begin with a reflection, or allow none (default: the model decides)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--seed", type=natural, help="without a picture: the scene to draw (default: a random one)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection ask`."""
    from vreflection_hub_card.glyphsearch import SPLIT_SIZE, draw_chain
    from vreflection_hub_card.glyphsearch.likeness import unlike_note

    demo = options.picture is None
    if demo:
        seed = random.randrange(10**6) if options.seed is None else options.seed
        if seed >= SPLIT_SIZE:
            raise InputError(f"--seed must be less than {SPLIT_SIZE}")
        heatmap = options.heatmap or DEMO_HEATMAP
        scene, asked = draw_chain("test", seed)
        picture, question, path = scene.image, asked.text, [item.box for item in asked.path]
        check_writable(DEMO_PICTURE)
    else:
        if options.seed is not None:
            raise InputError("--seed draws a scene; with a picture there is nothing to draw")
        if options.question is None or not options.question.strip():
            raise InputError('a question is missing: vreflection ask PICTURE "QUESTION"')
        if options.heatmap is None and options.per_step:
            raise InputError("--per-step says what a heatmap shows: add --heatmap FILE")
        heatmap, question, path = options.heatmap, options.question, []
    if heatmap is not None:
        check_suffix(heatmap)
        check_writable(heatmap)

    quiet_transformers()
    if not demo:
        picture = read_picture(options.picture)
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint

    folder = checkpoint_folder(options.model)
    source = choose_source(options.source, folder)
    model, processor = load_checkpoint(folder, options.device)
    if demo:
        with writing(DEMO_PICTURE):
            picture.save(DEMO_PICTURE)
        if not options.json:
            print(f"Scene {seed}, written to {DEMO_PICTURE}; --seed {seed} draws it again.\n{question}")
    note = unlike_note(picture) if is_embedded(folder) else None
    seen = ask_model(model, processor, picture, question, source, options)
    if options.json:
        print(json.dumps(as_json(seen, question, source, model.reflection_options(**decoding(options)), note)))
    else:
        verdict = ""
        if demo:
            verdict = "   (right)" if seen.answer == asked.answer else f"   (wrong, it is {asked.answer})"
        print((seen.answer or "An empty answer" if demo else seen.answer) + verdict)
        if note:
            print(note)
        if seen.reflections:
            print("\n".join(look_lines(seen.looks, source, picture.size)))

    if not seen.reflections:
        missing = f"; {heatmap} is not written, try --reflect" if heatmap is not None else ""
        print(f"The model answered without a reflection{missing}.", file=sys.stderr)
    elif heatmap is not None:
        from vreflection_hub_card.inference.drawing import draw_heatmap, save_figure

        figure = draw_heatmap([picture], seen.reflections, question, seen.answer, path, options.per_step)
        with writing(heatmap):
            save_figure(figure, heatmap)
        outlined = ", with the shapes of the chain outlined" if demo else ""
        shown = demo and not options.json
        print(f"Where it looked: {heatmap}{outlined}.", file=sys.stdout if shown else sys.stderr)


def decoding(options: argparse.Namespace) -> dict:
    """The options that `generate` resolves."""
    names = ("latent_steps", "latent_feedback", "reflect")
    return {name: getattr(options, name) for name in names}


def look_lines(looks: list, source: str, size: tuple[int, int]) -> list[str]:
    """A table of looks: number, steps, the box in pixels of the picture, and the shares inside and outside."""
    whose = {"dac": "DAC's attention", "llm": "the LLM's attention on the picture"}[source]
    lines = [
        f"Where it looked, by {whose}; boxes in pixels of {size[0]} x {size[1]}:",
        f"{'look':>4}  {'steps':>5}  {'x0, y0, x1, y1':<22}  inside  outside",
    ]
    for number, look in enumerate(looks, 1):
        steps = str(look.steps[0]) if len(look.steps) == 1 else f"{look.steps[0]}-{look.steps[-1]}"
        corners = ", ".join(str(round(corner * size[index % 2])) for index, corner in enumerate(look.box))
        inside = round(look.inside * 100)
        lines.append(f"{number:>4}  {steps:>5}  {corners:<22}  {inside:>4} %  {100 - inside:>5} %")
    return lines


def as_json(seen, question: str, source: str, resolved, note: str | None) -> dict:
    """The answer and its looks for programs; boxes are fractions of the picture's sides."""
    looks = []
    for number, reflection in enumerate(seen.reflections, 1):
        for look in reflection.looks:
            looks.append({"look": len(looks) + 1, "reflection": number, **look.to_dict()})
    return {
        "question": question,
        "answer": seen.answer,
        "note": note,
        "latent_steps": resolved.latent_steps,
        "latent_feedback": resolved.latent_feedback,
        "source": source,
        "looks": looks,
    }


def read_picture(path: str):
    """Opens the picture; raises an `InputError` that says why it can't be."""
    from modeling_vreflection.pictures_vreflection import PictureError, open_picture

    try:
        return open_picture(path)
    except PictureError as error:
        raise InputError(str(error)) from error


def ask_model(model, processor, picture, question: str, source: str, options: argparse.Namespace):
    """`look` with the command's options; those that contradict each other or the checkpoint raise an `InputError`."""
    from vreflection_hub_card.inference.encoding import user_turn
    from vreflection_hub_card.inference.look import look

    try:
        return look(
            model,
            processor,
            user_turn([picture], question),
            (source,),
            **decoding(options),
            max_new_tokens=options.max_new_tokens,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def choose_source(source: str | None, folder: Path) -> str:
    """The attention to read looks from: the one demanded, else the first that the checkpoint has."""
    from vreflection_hub_card.inference.attention_maps import offered_sources
    from vreflection_hub_card.inference.checkpoints import checkpoint_config

    offered = offered_sources(checkpoint_config(folder))
    if source is not None and source not in offered:
        raise InputError(f"{folder}: the checkpoint has no DAC, whose attention is asked for; --source llm needs none")
    return source or offered[0]


def check_suffix(path: Path) -> None:
    """Checks that the name of a figure ends in a format that can be written."""
    from vreflection_hub_card.inference.drawing import FIGURE_FORMATS

    if path.suffix.lower() not in FIGURE_FORMATS:
        raise InputError(f"{path}: the name of a heatmap must end in one of {', '.join(FIGURE_FORMATS)}")
