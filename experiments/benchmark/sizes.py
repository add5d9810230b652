"""What BCM and DAC add to each published size, counted on the meta device: `python -m experiments.benchmark.sizes`."""

import json
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from ..markdown_tables import markdown
from .backbones import BACKBONES, PUBLISHED, count, meta_model


RESULT = Path(__file__).parent / "results" / "sizes.json"


def count_sizes() -> dict:
    """Parameters of each size and of its parts, with the versions that they were counted with."""
    sizes = {}
    for name in PUBLISHED:
        model = meta_model(BACKBONES[name])
        parts = {part: count(getattr(model.model, part)) for part in ("visual", "bcm", "dac")}
        parameters = {"stock": count(model) - parts["bcm"] - parts["dac"], **parts}
        sizes[name] = {"source": BACKBONES[name].source, "note": BACKBONES[name].note, "parameters": parameters}
    return {
        "command": "python -m experiments.benchmark.sizes",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sizes": sizes,
    }


def sizes_table(result: dict) -> str:
    """The counts as a Markdown table."""
    rows = []
    for size in result["sizes"].values():
        counts = size["parameters"]
        millions = [f"{counts[part] / 1e6:,.1f}" for part in ("stock", "visual", "bcm", "dac")]
        rows.append([size["note"], *millions, f"{100 * (counts['bcm'] + counts['dac']) / counts['stock']:.2f} %"])
    header = "millions of parameters | the stock model | of them its vision encoder | BCM | DAC | BCM and DAC add"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{markdown(header, rows)}\n\nCounted by `{result['command']}` on {result['date'][:10]}; {versions}."


if __name__ == "__main__":
    RESULT.write_text(json.dumps(count_sizes(), indent=1) + "\n")
