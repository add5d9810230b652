"""`vreflection-train RECIPE.yaml`: runs a stage from a recipe; the command line overrides the file."""

import sys
from pathlib import Path

import torch
from transformers import set_seed
from trl import TrlParser

from .configs import VReflectionScriptArguments, VReflectionSFTConfig


RECIPES = Path(__file__).parent / "recipes"
USAGE = "usage: vreflection-train RECIPE.yaml [--option value ...]\n\nRecipes that come with the package: {}"


def find_recipe(name: str) -> Path:
    """A recipe's file: a path, or the name of one that comes with the package."""
    for path in (Path(name), RECIPES / f"{name}.yaml", RECIPES / Path(name).name):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"No recipe {name!r}. Recipes that come with the package: {shipped}.")


def parse(arguments: list[str]) -> tuple[VReflectionScriptArguments, VReflectionSFTConfig]:
    """Reads a recipe and the options after it."""
    parser = TrlParser((VReflectionScriptArguments, VReflectionSFTConfig))
    return parser.parse_args_and_config(["--config", str(find_recipe(arguments[0])), *arguments[1:]])


def build_trainer(script: VReflectionScriptArguments, args: VReflectionSFTConfig):
    """Loads what a recipe names and puts its trainer together."""
    from .loading import build_tiny, load_model_and_processor, load_rows
    from .trainer import VReflectionSFTTrainer

    set_seed(args.seed)
    options = {"dtype": getattr(torch, script.dtype), **(script.model_options or {})}
    if script.from_scratch:
        model, processor = build_tiny(args.seed, **options)
    else:
        model, processor = load_model_and_processor(script.model_name_or_path, **options)
    if script.latent_feedback is not None:
        model.generation_config.latent_feedback = script.latent_feedback
    rows = load_rows(script.dataset_name, script.dataset_options)
    return VReflectionSFTTrainer(model, args, processing_class=processor, train_dataset=rows)


def train(trainer, script: VReflectionScriptArguments):
    """Runs one stage and saves the checkpoint in the trainer's `output_dir`."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if script.save_dtype is not None:
        trainer.model.to(getattr(torch, script.save_dtype))
    trainer.save_model(args.output_dir)
    # A finished checkpoint holds no pickle.
    (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `vreflection-train`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))))
        return 0
    try:
        script, args = parse(arguments)
        trainer = build_trainer(script, args)
    except (ValueError, OSError) as error:  # a recipe, a model or a data set that won't do; nothing has run yet
        print(f"vreflection-train: {error}", file=sys.stderr)
        return 2
    train(trainer, script)
    return 0
