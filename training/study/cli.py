"""`vreflection-train study`: runs, resumes and extends the study, and renders its summary."""

import argparse
import sys
from pathlib import Path

import transformers
from datasets import disable_progress_bars

from vreflection_hub_card.evaluation.report import fill_block

from .plots import draw_all
from .run import PartFailed, StudyRun
from .summary import main_tables, read_findings, read_results, summarise
from .table import read_study


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `vreflection-train study`."""
    study = read_study()
    parser = argparse.ArgumentParser(
        prog="vreflection-train study",
        description="Trains the tiny model in all the ways that the paper compares, and tests whether its latents matter. "
        "Called again, goes on with what is missing.",
    )
    parser.add_argument("--form", choices=study.forms, default="quick", help="how large (default: quick)")
    parser.add_argument("--hours", type=float, metavar="H", help="after so many hours begin nothing new")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="checkpoints (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("hub_card/study"), help="result files and summary (default: %(default)s)"
    )
    parser.add_argument("--render", action="store_true", help="train nothing; render the result files that there are")
    parser.add_argument(
        "--document", type=Path, help="a Markdown file that gets the main tables between its markers <!-- study -->"
    )
    options = parser.parse_args(arguments)
    form = study.forms[options.form]
    output = options.output / form.name
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    try:
        run = StudyRun(study, form, options.work / form.name, output, options.hours)
        left = run.missing() if options.render else run()
        results = read_results(study, output)
        if not results:
            raise ValueError(f"{output}: no results yet")
        (output / "summary.md").write_text(summarise(study, form, results, left, read_findings(output)))
        pictures = draw_all(study, results, output)
        (output / "tables.md").write_text((tables := main_tables(study, results)) + "\n")
        if options.document is not None:
            options.document.write_text(fill_block(options.document.read_text(), "study", tables))
    except PartFailed as error:
        print(f"vreflection-train study: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"vreflection-train study: {error}", file=sys.stderr)
        return 2
    print(f"{output / 'summary.md'}, {', '.join(map(str, pictures))}; {len(left)} runs left out")
    return 0
