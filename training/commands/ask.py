"""`vreflection ask`: a question about a picture, and where the model looked."""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
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
        description="Answers a question about a picture, or about a clip's frames. Without any argument: draws a "
        f"GlyphSearch scene, asks for the end of a chain of three shapes, and writes {DEMO_PICTURE} and {DEMO_HEATMAP} into the current folder.",
    )
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="a picture file")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="the question about it")
    parser.add_argument(
        "--frames", type=Path, metavar="CLIP", help="instead of a picture: a clip, whose frames are asked about"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="with --frames: frames to take a second (default: 1)")
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

    if options.frames is not None:
        check_frames(options)
    elif options.fps is not None:
        raise InputError("--fps says how many frames of a clip to take: add --frames CLIP")
    demo = options.picture is None and options.frames is None
    if demo:
        seed = random.randrange(10**6) if options.seed is None else options.seed
        if seed >= SPLIT_SIZE:
            raise InputError(f"--seed must be less than {SPLIT_SIZE}")
        heatmap = options.heatmap or DEMO_HEATMAP
        scene, asked = draw_chain("test", seed)
        pictures, question, path = [scene.image], asked.text, [item.box for item in asked.path]
        check_writable(DEMO_PICTURE)
    else:
        if options.seed is not None:
            raise InputError("--seed draws a scene; with a picture there is nothing to draw")
        if options.question is None or not options.question.strip():
            given = "PICTURE" if options.frames is None else "--frames CLIP"
            raise InputError(f'a question is missing: vreflection ask {given} "QUESTION"')
        if options.heatmap is None and options.per_step:
            raise InputError("--per-step says what a heatmap shows: add --heatmap FILE")
        heatmap, question, path = options.heatmap, options.question, []
    if heatmap is not None:
        check_suffix(heatmap)
        check_writable(heatmap)

    quiet_transformers()
    seconds = None
    if options.frames is not None:
        from vreflection_hub_card.inference.clip_frames import read_frames

        seconds, pictures = zip(*read_frames(options.frames, 1.0 if options.fps is None else options.fps))
    elif not demo:
        pictures = [read_picture(options.picture)]
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint

    folder = checkpoint_folder(options.model)
    source = choose_source(options.source, folder)
    model, processor = load_checkpoint(folder, options.device)
    if demo:
        with writing(DEMO_PICTURE):
            scene.image.save(DEMO_PICTURE)
        if not options.json:
            print(f"Scene {seed}, written to {DEMO_PICTURE}; --seed {seed} draws it again.\n{question}")
    note = next(filter(None, map(unlike_note, pictures)), None) if is_embedded(folder) else None
    seen = ask_model(model, processor, pictures, question, source, options)
    if options.json:
        resolved = model.reflection_options(**decoding(options))
        print(json.dumps(as_json(seen, question, source, resolved, note, seconds)))
    else:
        verdict = ""
        if demo:
            verdict = "   (right)" if seen.answer == asked.answer else f"   (wrong, it is {asked.answer})"
        print((seen.answer or "An empty answer" if demo else seen.answer) + verdict)
        if note:
            print(note)
        if seen.reflections:
            print("\n".join(look_lines(seen.looks, source, pictures[0].size, seconds)))

    if not seen.reflections:
        missing = f"; {heatmap} is not written, try --reflect" if heatmap is not None else ""
        print(f"The model answered without a reflection{missing}.", file=sys.stderr)
    elif heatmap is not None:
        from vreflection_hub_card.inference.drawing import draw_heatmap, save_figure

        frames = [f"frame {number}, {second:.2f} s" for number, second in enumerate(seconds or (), 1)]
        figure = draw_heatmap(pictures, seen.reflections, question, seen.answer, path, options.per_step, frames)
        with writing(heatmap):
            save_figure(figure, heatmap)
        outlined = ", with the shapes of the chain outlined" if demo else ""
        shown = demo and not options.json
        print(f"Where it looked: {heatmap}{outlined}.", file=sys.stdout if shown else sys.stderr)


def decoding(options: argparse.Namespace) -> dict:
    """The options that `generate` resolves."""
    names = ("latent_steps", "latent_feedback", "reflect")
    return {name: getattr(options, name) for name in names}


def check_frames(options: argparse.Namespace) -> None:
    """Checks that a clip comes without pictures, and puts the only text that was given where the question belongs."""
    if options.question is not None or (options.picture is not None and os.path.exists(options.picture)):
        raise InputError(f"{options.picture}: a picture and --frames exclude each other, leave one of them out")
    options.picture, options.question = None, options.picture


def look_lines(looks: list, source: str, size: tuple[int, int], seconds: Sequence[float] | None = None) -> list[str]:
    """A table of looks: number, steps, the frame of a clip, the box in pixels, and the shares inside and outside."""
    whose = {"dac": "DAC's attention", "llm": "the LLM's attention on the picture"}[source]
    frame = "" if seconds is None else f"{'frame':>5}  {'second':>6}  "
    lines = [
        f"Where it looked, by {whose}; boxes in pixels of {size[0]} x {size[1]}:",
        f"{'look':>4}  {'steps':>5}  {frame}{'x0, y0, x1, y1':<22}  inside  outside",
    ]
    for number, look in enumerate(looks, 1):
        steps = str(look.steps[0]) if len(look.steps) == 1 else f"{look.steps[0]}-{look.steps[-1]}"
        corners = ", ".join(str(round(corner * size[index % 2])) for index, corner in enumerate(look.box))
        inside = round(look.inside * 100)
        if seconds is not None:
            frame = f"{look.image_index + 1:>5}  {seconds[look.image_index]:>6.2f}  "
        lines.append(f"{number:>4}  {steps:>5}  {frame}{corners:<22}  {inside:>4} %  {100 - inside:>5} %")
    return lines


def as_json(
    seen, question: str, source: str, resolved, note: str | None, seconds: Sequence[float] | None = None
) -> dict:
    """The answer and its looks for programs; boxes are fractions of the picture's sides, `frame_seconds` a clip's frames."""
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
        "frame_seconds": seconds,
        "looks": looks,
    }


def read_picture(path: str):
    """Opens the picture; raises an `InputError` that says why it can't be."""
    from modeling_vreflection.pictures_vreflection import PictureError, open_picture

    try:
        return open_picture(path)
    except PictureError as error:
        raise InputError(str(error)) from error


def ask_model(model, processor, pictures, question: str, source: str, options: argparse.Namespace):
    """`look` with the command's options; those that contradict each other or the checkpoint raise an `InputError`."""
    from vreflection_hub_card.inference.encoding import user_turn
    from vreflection_hub_card.inference.look import look

    try:
        return look(
            model,
            processor,
            user_turn(list(pictures), question),
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
