"""Equal budgets: lengthen or shorten a stage of training so that it costs what every other run's does.

All counts of a stage scale together (its phases, warm-up, the discriminator's start), so a run keeps its proportions.
Operations are counted on real training steps, backward pass, loss networks and discriminator included.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from latelier.preflight import Trial, try_denoiser, try_tokenizer
from latelier.recipe import Count, Recipe, Section, TrainedTokenizer, Training, build_recipe

COUNTS = ("images", "warmup")


class Spending(Section):
    """What one stage of every run may cost: exactly one of the three."""

    images: Count | None = Field(None, description="images seen")
    minutes: float | None = Field(None, gt=0, description="of training on this machine, from a few timed steps")
    flops: float | None = Field(None, gt=0, description="operations of training, 2 for a multiply-add")

    @model_validator(mode="after")
    def _one(self) -> Spending:
        given = [name for name in ("images", "minutes", "flops") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("one of images, minutes or flops")
        return self

    @property
    def unit(self) -> str:
        """Which of the three is given."""
        return next(name for name in ("images", "minutes", "flops") if getattr(self, name))

    def __str__(self) -> str:
        value = getattr(self, self.unit)
        return f"{value:,} images" if self.unit == "images" else f"{value:.3g} {self.unit}"


class Budget(Section):
    """What each stage of every run may cost; a stage without an entry keeps its recipe's length."""

    tokenizer: Spending | None = None
    denoiser: Spending | None = None


def spend(recipe: Recipe, budget: Budget) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, lengthened or shortened to the budget.

    Returns:
        The recipe, and what each stage costs over all its phases: `{stage: {"images", "flops", "flops_per_image",
        "seconds_per_image"}}`.
    """
    tree, facts = recipe.model_dump(), {}
    stages = {"tokenizer": (budget.tokenizer, try_tokenizer), "denoiser": (budget.denoiser, try_denoiser)}
    for name, (spending, trials) in stages.items():
        section = getattr(recipe, name)
        if not isinstance(section, Training):
            continue
        rows = list(trials(recipe, count=True))
        if spending is not None:
            _scale(tree[name], section, getattr(spending, spending.unit) / _price(rows, spending.unit))
        facts[name] = {
            "flops_per_image": _mean(rows, "flops_per_image"),
            "seconds_per_image": _mean(rows, "seconds_per_image"),
        }
    spent = build_recipe(tree)
    for name, fact in facts.items():
        fact["images"] = length(getattr(spent, name))
        fact["flops"] = fact["images"] * fact["flops_per_image"]
    return spent, facts


def length(section: Training) -> int:
    """Images seen over all phases."""
    phases = section.phases if isinstance(section, TrainedTokenizer) else []
    return section.images + sum(section.phase(i + 1)[1].images for i in range(len(phases)))  # type: ignore[attr-defined]


def _price(rows: list[Trial], unit: str) -> float:
    """What the recipe's own length costs."""
    price = {"images": lambda row: 1.0, "minutes": lambda row: row.seconds_per_image / 60}
    return sum(row.images * price.get(unit, lambda row: row.flops_per_image)(row) for row in rows)


def _mean(rows: list[Trial], what: str) -> float:
    return sum(row.images * getattr(row, what) for row in rows) / sum(row.images for row in rows)


def _scale(tree: dict[str, Any], section: Training, factor: float) -> None:
    """Scale every count of a stage; cadences are derived anew."""
    for key in ("log_every", "preview_every", "checkpoint_every"):
        tree.pop(key, None)
    parts = [tree]
    for number, phase in enumerate(tree.get("phases", ())):
        whole = section.phase(number + 1)[1].model_dump()  # type: ignore[attr-defined]
        phase.update({key: whole[key] for key in (*COUNTS, "adversarial") if whole.get(key)})
        parts.append(phase)
    for part in parts:
        for key in COUNTS:
            if part.get(key):
                part[key] = max(1, round(part[key] * factor))
        if part.get("adversarial"):
            for key in ("start", "ahead"):
                part["adversarial"] = {**part["adversarial"], key: round(part["adversarial"][key] * factor)}
