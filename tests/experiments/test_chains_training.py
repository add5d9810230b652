"""Runs of the chains' trainer: stopped and gone on with, side by side, and as a command."""

import json
from dataclasses import replace

import pytest
import torch

from experiments.chains.arms import ARMS
from experiments.chains.train import LOGGED, Run, learning_rates, main, row_order, train_side_by_side


@pytest.fixture(autouse=True)
def precision():
    """The command sets it for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def finish(run: Run) -> Run:
    while run.done < run.options.steps:
        run.advance()
    return run


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states agree in every bit."""
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 5])  # in the first phase and in the second
def test_a_resumed_run_is_the_uninterrupted_one(make_run, stop):
    arm = ARMS["two_stages"]
    whole = finish(make_run(arm, 8))
    first = make_run(arm, 8)
    for _ in range(stop):
        first.advance()
    first.seconds = 12.5
    first.save()
    second = make_run(arm, 8)
    second.resume()
    assert second.done == stop and second.seconds == 12.5
    finish(second)
    assert same(second.state(), whole.state())
    assert not same(second.state(), finish(make_run(arm, 8, seed=1)).state())


def test_nothing_saved_is_a_fresh_run(make_run):
    run = make_run(ARMS["path"], 8)
    before = {name: value.clone() for name, value in run.state().items()}
    run.resume()
    assert run.done == 0 and same(run.state(), before)


@pytest.mark.parametrize(
    "arm, options",
    [
        (ARMS["path"], {"learning_rate": 1e-4}),
        (ARMS["path"], {"steps": 9}),
        (ARMS["path"], {"batch": 2}),
        (ARMS["path"], {"scenes": 8}),
        (ARMS["one_box"], {}),
    ],
    ids=["learning_rate", "steps", "batch", "scenes", "arm"],
)
def test_other_options_are_not_gone_on_with(make_run, arm, options):
    make_run(ARMS["path"], 8).save()
    with pytest.raises(ValueError, match="state.safetensors is of other options .*--checkpoints"):
        make_run(arm, **{"steps": 8, **options}).resume()


def part(run: Run, name: str) -> dict[str, torch.Tensor]:
    """The weights of a part of a run's model, as they are now."""
    return {key: value.clone() for key, value in getattr(run.network.core, name).state_dict().items()}


def test_each_phase_trains_its_own_parts(make_run):
    run = make_run(ARMS["two_stages"], 6)
    names = ("visual", "language_model", "bcm", "dac")
    before = {name: part(run, name) for name in names}
    for _ in range(3):
        run.advance()
    half = {name: part(run, name) for name in names}
    finish(run)
    after = {name: part(run, name) for name in names}
    moved = [
        [name for name in names if not same(old[name], new[name])] for old, new in ((before, half), (half, after))
    ]
    assert moved == [["language_model", "bcm"], ["language_model", "dac"]]


@pytest.mark.parametrize(
    "arm, moving",
    [("path", ["language_model", "bcm", "dac"]), ("sft", ["language_model"]), ("filler", ["language_model"])],
)
def test_an_arm_trains_its_own_parts(make_run, arm, moving):
    run = make_run(ARMS[arm], 1)
    names = ("visual", "language_model", "bcm", "dac")
    before = {name: part(run, name) for name in names}
    finish(run)
    assert [name for name in names if not same(before[name], part(run, name))] == moving


def test_a_step_is_one_of_adamw_with_clipped_gradients(make_run):
    """The first one in closed form: weight decay, and each weight moved by the rate against its gradient's sign."""
    run = make_run(ARMS["path"], 1, learning_rate=10.0)  # a hundredth of that, as in warm-up
    before = {name: value.detach().clone() for name, value in run.parameters.items()}
    run.advance()
    gradients = {name: value.grad for name, value in run.parameters.items()}
    assert sum(gradient.square().sum() for gradient in gradients.values()).sqrt() == pytest.approx(1.0, rel=1e-4)
    for name, gradient in gradients.items():
        expected = before[name] * (1 - 0.1 * 0.05) - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(run.parameters[name].detach(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_runs_side_by_side_are_runs_alone(make_run):
    arms = [("path", 0), ("path", 1), ("sft", 0)]
    together = [make_run(ARMS[arm], 3, arm, seed) for arm, seed in arms]
    train_side_by_side(together)
    for run, (arm, seed) in zip(together, arms):
        assert same(run.state(), finish(make_run(ARMS[arm], 3, arm, seed)).state())


def test_a_loss_that_is_not_finite_ends_the_training_and_nothing_is_saved(make_run):
    run = make_run(ARMS["path"], 3)
    with torch.no_grad():
        run.network.core.dac.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="an_arm 0.*finite"):
        train_side_by_side([run])
    assert not run.folder.exists() and not run.options.output.exists()


def test_rows_of_a_part_of_the_scenes(make_run):
    run = make_run(replace(ARMS["path"], share_of_scenes=1 / 2), 9, scenes=8)
    assert run.order.unique().tolist() == [0, 1, 2, 3]
    assert run.result()["rows"] == 4 * run.rows_a_line


def test_every_row_comes_once_before_any_comes_again():
    order = row_order(10, steps=8, batch=4, seed=3)
    assert order.shape == (8, 4)
    epochs = order.flatten().split(10)
    assert [sorted(epoch.tolist()) for epoch in epochs[:3]] == 3 * [list(range(10))]
    assert len(epochs[3].unique()) == 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(order, row_order(10, 8, 4, 3)) and not torch.equal(order, row_order(10, 8, 4, 4))


def test_learning_rates_rise_and_then_fall_to_a_twentieth():
    rates = learning_rates(1000, 2e-3)
    assert rates[0] == pytest.approx(2e-3 / 100, rel=1e-4)
    assert (rates[:100].diff() > 0).all() and (rates[99:].diff() < 0).all()
    assert rates[500] == pytest.approx(2e-3 * (0.05 + 0.95 / 2))
    assert rates[-1] == pytest.approx(0.05 * 2e-3, rel=1e-3)


COMMAND = "--steps 3 --batch 2 --learning_rate 1e-3 --scenes 8 --test_scenes 6 --device cpu --arms path names"


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    command = [*COMMAND.split(), "--output", str(tmp_path / "results"), "--checkpoints", str(tmp_path / "states")]
    main(command)
    files = {arm: tmp_path / "results" / f"{arm}_seed0.json" for arm in ("path", "names")}
    assert sorted(files.values()) == sorted((tmp_path / "results").iterdir())
    results = {arm: json.loads(file.read_text()) for arm, file in files.items()}
    for arm, result in results.items():
        assert set(result) == {
            *("arm", "seed", "options", "rows", "steps_done", "seconds_beside_other_arms", "made_with", "losses"),
            *("scenes", "results"),
        }
        assert (result["arm"], result["seed"], result["steps_done"], result["scenes"]) == (arm, 0, 3, 6)
        assert result["options"].pop("arm")["title"] == ARMS[arm].title
        assert result["options"] == {"steps": 3, "batch": 2, "learning_rate": 1e-3, "scenes": 8}
        assert set(result["losses"]) == {"step", *LOGGED} and result["losses"]["step"] == [1, 2, 3]
        assert all(len(values) == 3 for values in result["losses"].values())
        assert set(result["made_with"]) == {"torch", "transformers", "vreflection", "python", "machine", "date"}
    counts = results["path"]["results"]["tokens of a right answer"]
    assert set(counts) == {"attribute", "relation", "kinship", "spatial"}
    assert set(counts["kinship"]) <= set("01234") and "4" in counts["kinship"] and "3" in counts["spatial"]
    assert set(results["names"]["results"]) == {"tokens of a right answer", "text"}
    assert set(results["path"]["results"]) == {"tokens of a right answer", "dac"}
    path = results["path"]["results"]["dac"]
    assert set(path) == {"accuracy", "begins a reflection", "replaced", "inside the box by step", "tolerance"}
    assert set(path["replaced"]) == {"zeroed", "noise", "shuffled", "first_look", "reversed"}
    assert len(path["inside the box by step"]) == 8 and set(path["tolerance"]) == {"0.02", "0.05", "0.1", "0.2", "0.4"}
    for figures in (path["accuracy"], *path["replaced"].values(), *path["inside the box by step"]):
        totals = {kind: {hops: total for hops, (_, total) in of.items()} for kind, of in figures.items()}
        assert totals == {kind: {hops: total for hops, (_, total) in of.items()} for kind, of in counts.items()}
    weights = {arm: (tmp_path / "states" / f"{arm}_seed0" / "weights.safetensors").exists() for arm in files}
    assert weights == {"path": True, "names": True}

    kept = {arm: file.read_bytes() for arm, file in files.items()}
    capsys.readouterr()
    main(command)  # nothing is left to do
    assert "All results are in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="path_seed0.json holds results of other options.*--output"):
        main([*command, "--steps", "4"])
    files["names"].unlink()
    main(command)  # evaluates the trained arm again, and leaves the other
    assert files["path"].read_bytes() == kept["path"]
    again = json.loads(files["names"].read_text())
    assert again == json.loads(kept["names"])
