"""Trains arms side by side and evaluates them: `python -m experiments.chains.train --arms path sft --seeds 0 1 2`.

Needs torch and transformers. A result file is written for each arm and seed; a call goes on where an earlier one was stopped.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor, __version__
from training.losses import states_learn

from .arms import ARMS, Arm
from .evaluate import Evaluation
from .network import EMBEDDED, Batch, Network, starting_model
from .rows import Rows, Tokens, draw_scenes, test_scene, training_scene


RESULTS = Path(__file__).parent / "results"
LOGGED = ("loss", "CE", "L_BCM", "L_feat", "L_attn")
WARM_UP = 100
CLIP = 1.0
GRID = (6, 6)  # merged patches of a scene
OPTIMISER = {"betas": (0.9, 0.95), "weight_decay": 0.05}


def learning_rates(steps: int, peak: float) -> torch.Tensor:
    """Warm-up, then a cosine down to 5 %, by step."""
    return torch.tensor(
        [
            peak * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for step in range(steps)
        ]
    )


def row_order(count: int, steps: int, batch: int, seed: int) -> torch.Tensor:
    """Which rows each step has, (steps, batch): every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    needed = steps * batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(epochs)[:needed].view(steps, batch)


class Run:
    """One arm and seed: everything that a step reads lies on the device, and the step itself is one CUDA graph there.

    `scenes` by the jitter of their boxes; `rows` by the share of them that reflects.
    """

    def __init__(
        self,
        name: str,
        arm: Arm,
        seed: int,
        options: argparse.Namespace,
        scenes: dict,
        tokens: Tokens,
        rows: dict[float, Rows],
    ):
        self.name, self.arm, self.seed, self.options = name, arm, seed, options
        self.folder = options.checkpoints / f"{name}_seed{seed}"
        self.device = torch.device(options.device)
        model = starting_model(seed, arm.patch_positions, self.device)
        self.scenes, self.rows = scenes[arm.jitter], rows
        self.network = Network(model, tokens)
        any_rows = rows[arm.phases[0].reflecting_rows]
        self.rows_a_line = any_rows.slot.shape[1]
        kept = int((any_rows.scene < arm.share_of_scenes * options.scenes).sum())
        self.order = row_order(kept, options.steps, options.batch, seed).to(self.device)
        self.rates = learning_rates(options.steps, options.learning_rate).to(self.device)
        draws = [float(states_learn(seed, step, 0.5)) for step in range(options.steps)]
        self.draws = torch.tensor(draws, device=self.device)
        self.log = torch.zeros(options.steps, len(LOGGED), device=self.device)
        self.step = torch.zeros(1, dtype=torch.long, device=self.device)
        self.parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        on_gpu = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(),
            lr=torch.tensor(0.0, device=self.device),
            fused=True,
            capturable=on_gpu,
            **OPTIMISER,
        )
        self._make_moments()
        self.stream = torch.cuda.Stream() if on_gpu else None
        self.phase, self.graph, self.done, self.seconds = None, None, 0, 0.0

    def train_step(self) -> None:
        """One optimiser step, from the step's number on the device to its losses in the log there."""
        index = self.order.index_select(0, self.step)[0]
        batch = Batch.pick(self.rows[self.phase.reflecting_rows], self.scenes, index)
        terms = self.network.losses(batch, self.phase, self.draws.index_select(0, self.step)[0])
        self.optimiser.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"].copy_(self.rates.index_select(0, self.step)[0])
        self.optimiser.step()
        missing = torch.zeros((), device=self.device)
        line = torch.stack([terms.get(name, missing).detach() for name in LOGGED])
        self.log.index_copy_(0, self.step, line[None])
        self.step += 1

    def advance(self) -> None:
        """Does the next step."""
        phase = self.phase_at(self.done)
        if phase is not self.phase:
            self.enter(phase)
        if self.graph is None:
            self.train_step()
        else:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        self.done += 1

    def phase_at(self, step: int) -> object:
        """The phase of a step."""
        end = 0.0
        for phase in self.arm.phases:
            end += phase.share
            if step < end * self.options.steps:
                return phase
        return self.arm.phases[-1]

    def enter(self, phase) -> None:
        """Begins a phase: chooses what trains, and records the step where there is a GPU."""
        self.phase = phase
        self.network.core.bcm.requires_grad_(phase.slots == "bcm")
        self.network.core.dac.requires_grad_(phase.lambda_attn > 0)
        if self.stream is None:
            return
        # Recording needs a few steps that really run; what they change is put back.
        torch.cuda.synchronize()
        saved = {name: value.clone() for name, value in self.state().items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.train_step()
        self.stream.synchronize()
        self.optimiser.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.train_step()
        self.restore(saved)
        torch.cuda.synchronize()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a step changes."""
        state = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            for key, moment in self.optimiser.state[value].items():
                state[f"optimiser.{key}.{name}"] = moment
        return {**state, "log": self.log, "step": self.step}

    def _make_moments(self) -> None:
        """Makes the optimiser's state, all zeros, by a step that changes nothing: its learning rate and gradients are 0."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimiser.step()
        self.optimiser.zero_grad()
        for state in self.optimiser.state.values():
            state["step"].zero_()

    @torch.no_grad()
    def restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Puts a state back, in place."""
        for name, value in self.state().items():
            value.copy_(saved[name])

    def save(self) -> None:
        """Writes what resuming needs, and the seconds so far."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.safetensors"
        tensors = {name: value.contiguous().cpu() for name, value in self.state().items()}
        save_file(
            tensors,
            path.with_suffix(".new"),
            {"options": fingerprint(self.arm, self.options), "seconds": str(self.seconds)},
        )
        path.with_suffix(".new").replace(path)

    def save_weights(self) -> None:
        """Writes the trained weights, float32, by their names in the model."""
        weights = {name: value.detach().contiguous().cpu() for name, value in self.parameters.items()}
        save_file(weights, self.folder / "weights.safetensors")

    def resume(self) -> None:
        """Goes on from the last saved state, if there is one.

        Raises:
            ValueError: A state of other options.
        """
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as saved:
            if saved.metadata()["options"] != fingerprint(self.arm, self.options):
                raise ValueError(
                    f"{path} is of other options ({saved.metadata()['options']}): name another --checkpoints folder, or "
                    "delete it."
                )
            self.seconds = float(saved.metadata()["seconds"])
            self.restore({name: saved.get_tensor(name).to(self.device) for name in saved.keys()})
        self.done = int(self.step)

    def result(self) -> dict:
        """What is known of the run so far, ready for JSON."""
        every = range(0, self.done, max(1, self.options.steps // 200))
        log = self.log.cpu()
        return {
            "arm": self.name,
            "seed": self.seed,
            "options": json.loads(fingerprint(self.arm, self.options)),
            "rows": (int(self.order.max()) + 1) * self.rows_a_line,
            "steps_done": self.done,
            "seconds_beside_other_arms": round(self.seconds, 1),
            "made_with": versions(self.device),
            "losses": {
                "step": [step + 1 for step in every],
                **{name: [round(float(log[step, place]), 5) for step in every] for place, name in enumerate(LOGGED)},
            },
        }


def fingerprint(arm: Arm, options: argparse.Namespace) -> str:
    """What a resumed run, and a finished result, must agree in."""
    names = ("steps", "batch", "learning_rate", "scenes")
    return json.dumps({"arm": asdict(arm), **{name: getattr(options, name) for name in names}})


def versions(device: torch.device) -> dict[str, str]:
    """Versions and machine, for result files."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vreflection": __version__,
        "python": platform.python_version(),
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
    }


def train_side_by_side(runs: list[Run], save_every: float = 60.0) -> None:
    """Trains runs to the end of the schedule, or to `--stop_at`, one step of each in turn; saves all of them from time to time.

    Raises:
        FloatingPointError: A loss that isn't finite; nothing of that run is saved from then on.
    """
    steps = runs[0].options.stop_at or runs[0].options.steps
    begun = saved = time.monotonic()
    before = [run.seconds for run in runs]
    with tqdm(total=steps * len(runs), initial=sum(run.done for run in runs), unit="step") as progress:
        while any(run.done < steps for run in runs):
            for _ in range(100):
                for run in runs:
                    if run.done < steps:
                        run.advance()
                        progress.update()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # every run has its own stream
            losses = {f"{run.name} {run.seed}": float(run.log[run.done - 1, 0]) for run in runs}
            progress.set_postfix_str(", ".join(f"{value:.3f}" for value in losses.values()))
            broken = [name for name, value in losses.items() if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(f"The loss of {', '.join(broken)} isn't finite by step {runs[0].done}.")
            now = time.monotonic()
            for run, earlier in zip(runs, before):
                run.seconds = earlier + now - begun
            if now - saved > save_every or all(run.done == steps for run in runs):
                for run in runs:
                    run.save()
                    write_result(run, {})
                saved = time.monotonic()


def write_result(run: Run, results: dict) -> None:
    """Writes the result file of an arm and seed."""
    run.options.output.mkdir(parents=True, exist_ok=True)
    path = result_path(run.options, run.name, run.seed)
    path.with_suffix(".new").write_text(json.dumps({**run.result(), **results}) + "\n")
    path.with_suffix(".new").replace(path)


def result_path(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Where the result of an arm and seed lies."""
    return options.output / f"{arm}_seed{seed}.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["path"], metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=18_000)
    parser.add_argument("--stop_at", type=int, help="stop after this many steps of the schedule, and ask nothing yet")
    parser.add_argument("--batch", type=int, default=16, help="scenes a step, with seven rows each")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=24_000, help="for training")
    parser.add_argument("--test_scenes", type=int, default=3_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("outputs/chains"), help="folder of states and weights"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    wanted = [(arm, seed) for arm in options.arms for seed in options.seeds]
    wanted = [pair for pair in wanted if not is_finished(options, *pair)]
    if not wanted:
        print(f"All results are in {options.output} already; name another --output to repeat them.")
        return
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    encoder = starting_model(0, "none", device)
    tokens = Tokens(processor, encoder.config, GRID)
    jitters = {ARMS[arm].jitter for arm, _ in wanted}
    scenes, examples = draw_scenes(training_scene, options.scenes, encoder, processor, tokens, jitters)
    test_scenes, test = draw_scenes(test_scene, options.test_scenes, encoder, processor, tokens)

    rows, runs = {}, []
    for name, seed in wanted:
        arm = ARMS[name]
        by_share = {}
        for share in {phase.reflecting_rows for phase in arm.phases}:
            key = (arm.answer, arm.whole_path, share, seed if share < 1 else 0)
            if key not in rows:
                rows[key] = tokens.rows(examples, arm, device, share, seed)
            by_share[share] = rows[key]
        runs.append(Run(name, arm, seed, options, scenes, tokens, by_share))
        runs[-1].resume()
    # A GPU has room for many arms at once; on a CPU they would only take turns.
    for together in [runs] if device.type == "cuda" else [[run] for run in runs]:
        train_side_by_side(together)
        for run in together:
            run.save_weights()
            if run.done < options.steps:
                print(
                    f"{run.name}, seed {run.seed}, was stopped at step {run.done}: call again without --stop_at to go on."
                )
                continue
            evaluation = Evaluation(run.network, tokens, test_scenes[0.0], test)
            write_result(run, {"scenes": len(test_scenes[0.0].features), "results": evaluation.run(run.arm)})


def is_finished(options: argparse.Namespace, arm: str, seed: int) -> bool:
    """Whether the result file of an arm and seed holds its results.

    Raises:
        ValueError: Results of other options.
    """
    path = result_path(options, arm, seed)
    result = json.loads(path.read_text()) if path.exists() else {}
    if "results" in result and result["options"] != json.loads(fingerprint(ARMS[arm], options)):
        raise ValueError(
            f"{path} holds results of other options ({result['options']}): name another --output folder, or delete it."
        )
    return "results" in result


if __name__ == "__main__":
    main()
