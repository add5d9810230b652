"""The study's table: which arms there are, and what each changes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS


ARMS = Path(__file__).with_name("arms.yaml")
# The evaluation that every arm has: decoding as the checkpoint says.
PLAIN = "plain"
# The one that arms have which don't reflect by themselves.
REFLECTING = "reflecting"


@dataclass(frozen=True)
class Form:
    """How large the study is.

    Args:
        name (`str`): Its name.
        base_steps (`int`): Optimiser steps of the base.
        part_steps (`int`): Optimiser steps of a part of an arm.
        scenes (`int`): Scenes of the test set.
        seeds (`dict[str, list[int]]`): Seeds of groups by name, and those of the `"others"`.
    """

    name: str
    base_steps: int
    part_steps: int
    scenes: int
    seeds: dict[str, list[int]]

    def seeds_of(self, group: "Group") -> list[int]:
        """The seeds of a group's arms."""
        return self.seeds.get(group.name, self.seeds["others"])


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        name (`str`): Its name.
        parts (`list[dict]`): For each part, options of the recipe that differ.
        model_options (`dict`): Fields of the configuration that the base's copy gets.
        evaluate (`dict[str, dict]`): By name, options of `evaluate_glyphsearch`.
    """

    name: str
    parts: list[dict]
    model_options: dict = field(default_factory=dict)
    evaluate: dict[str, dict] = field(default_factory=dict)

    @property
    def part_names(self) -> list[str]:
        """For each part a folder's name: arms that begin alike share the folders of their first parts."""
        names = []
        for index, part in enumerate(self.parts):
            told = part | (self.model_options if index == 0 else {})
            names.append(",".join(f"{key}={value}" for key, value in sorted(told.items())))
        return names


@dataclass(frozen=True)
class Group:
    """Arms that answer one question.

    Args:
        name (`str`): Its name.
        title (`str`): Its title.
        expectation (`str`): What was expected before it was run.
        arms (`list[Arm]`): Its arms.
        compare (`list[str]`): Arms of other groups that belong into its table.
    """

    name: str
    title: str
    expectation: str
    arms: list[Arm]
    compare: list[str]


@dataclass(frozen=True)
class Study:
    """The whole table."""

    groups: list[Group]
    forms: dict[str, Form]

    def units(self, form: Form) -> Iterator[tuple[Arm, int]]:
        """Each arm with each of its seeds, in the order in which they are run; what isn't trained has one."""
        for group in self.groups:
            seeds = form.seeds_of(group)
            for seed in seeds:
                for arm in group.arms:
                    if arm.parts or seed == seeds[0]:
                        yield arm, seed

    @property
    def arms(self) -> dict[str, Arm]:
        """All arms by name."""
        return {arm.name: arm for group in self.groups for arm in group.arms}


def read_study(path: Path = ARMS) -> Study:
    """Reads the table.

    Raises:
        ValueError: A name that is used twice or not known.
    """
    table = yaml.safe_load(path.read_text())
    named = table["parts"]
    groups = []
    for name, group in table["groups"].items():
        arms = [read_arm(arm, told, named) for arm, told in group["arms"].items()]
        groups.append(Group(name, group["title"], group["expectation"], arms, group.get("compare", [])))
    names = [arm.name for group in groups for arm in group.arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: two arms are called {twice[0]}.")
    for group in groups:
        if unknown := sorted(set(group.compare) - set(names)):
            raise ValueError(f"{path.name}: {group.name} is compared with {unknown[0]}, which is no arm.")
    return Study(groups, {name: Form(name, **form) for name, form in table["forms"].items()})


def read_arm(name: str, told: dict, named: dict[str, dict]) -> Arm:
    """Reads an arm: `interventions: true` adds them to the plain evaluation."""
    told = dict(told)
    parts = [dict(named[part]) if isinstance(part, str) else dict(part) for part in told.pop("parts")]
    plain = {"interventions": list(INTERVENTIONS) if told.pop("interventions", False) else []}
    ways = {way: {"interventions": []} | options for way, options in told.pop("evaluate", {}).items()}
    return Arm(name, parts, evaluate={PLAIN: plain} | ways, **told)
