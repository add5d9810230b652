"""The study's arms as `arms.yaml` lists them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml


ARMS_FILE = Path(__file__).with_name("arms.yaml")
# The evaluation that every arm has: decoding as the checkpoint says.
PLAIN = "plain"
# The interventions that its results were measured with.
INTERVENED = ("zeroed", "noise", "shuffled", "other_picture", "filler")
# The one that arms have which don't reflect by themselves.
REFLECTING = "reflecting"


@dataclass(frozen=True)
class Form:
    """How large the study is: optimiser steps of the base and of a part, test scenes, and seeds by group or for `"others"`."""

    name: str
    base_steps: int
    part_steps: int
    scenes: int
    seeds: dict[str, list[int]]


@dataclass(frozen=True)
class StudyArm:
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
        """A folder's name for each part: arms that begin alike share the folders of their first parts."""
        options = [part | (self.model_options if index == 0 else {}) for index, part in enumerate(self.parts)]
        return [",".join(f"{key}={value}" for key, value in sorted(part.items())) for part in options]


@dataclass(frozen=True)
class Group:
    """Arms that answer one question, what was expected, and the arms of other groups that belong into its table."""

    name: str
    title: str
    expectation: str
    arms: list[StudyArm]
    compare: list[str]


@dataclass(frozen=True)
class Study:
    """All groups and forms."""

    groups: list[Group]
    forms: dict[str, Form]

    @property
    def arms(self) -> dict[str, StudyArm]:
        """All arms by name."""
        return {arm.name: arm for group in self.groups for arm in group.arms}

    def runs(self, form: Form) -> Iterator[tuple[StudyArm, int]]:
        """Each arm with each of its seeds, in the order in which they are run; what isn't trained has one."""
        for group in self.groups:
            seeds = form.seeds.get(group.name, form.seeds["others"])
            for seed in seeds:
                yield from ((arm, seed) for arm in group.arms if arm.parts or seed == seeds[0])


def read_study(path: Path = ARMS_FILE) -> Study:
    """Reads the arms.

    Raises:
        ValueError: A name that is used twice or not known.
    """
    table = yaml.safe_load(path.read_text())
    groups = [
        Group(
            name,
            group["title"],
            group["expectation"].strip(),
            [read_arm(arm, entry, table["parts"]) for arm, entry in group["arms"].items()],
            group.get("compare", []),
        )
        for name, group in table["groups"].items()
    ]
    names = [arm.name for group in groups for arm in group.arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path.name}: two arms are called {twice[0]}.")
    for group in groups:
        if unknown := sorted(set(group.compare) - set(names)):
            raise ValueError(f"{path.name}: {group.name} is compared with {unknown[0]}, which is no arm.")
    return Study(groups, {name: Form(name, **form) for name, form in table["forms"].items()})


def read_arm(name: str, entry: dict, parts: dict[str, dict]) -> StudyArm:
    """Reads an arm: `interventions: true` adds them to the plain evaluation."""
    plain = {"interventions": list(INTERVENED) if entry.get("interventions") else []}
    ways = {way: {"interventions": []} | options for way, options in entry.get("evaluate", {}).items()}
    return StudyArm(
        name,
        [dict(parts[part]) if isinstance(part, str) else part for part in entry["parts"]],
        entry.get("model_options", {}),
        {PLAIN: plain} | ways,
    )
