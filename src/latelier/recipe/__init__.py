"""A recipe: one experiment from data to report, as a user writes it.

Sections are pydantic models. Those of tokenizers, denoisers and conditions are beside the code that they configure, and
only modules of the kinds that a recipe names are imported. Errors are one sentence with the key, the value and what is
allowed.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from latelier.errors import LatelierError, reading
from latelier.evaluation.metrics import METRICS
from latelier.recipe.data import Data
from latelier.recipe.evaluate import Evaluate, Sample
from latelier.sections import (
    Adversarial,
    ByKind,
    Count,
    Name,
    Prefixes,
    Process,
    Section,
    Seed,
    TrainedTokenizer,
    Training,
    first_problem,
    parse_count,
)

if TYPE_CHECKING:
    from latelier.denoisers.objective import DenoiserSection
    from latelier.sections import Kind

    Tokenizer = TrainedTokenizer | Kind
    Denoiser = DenoiserSection
else:
    Tokenizer = Annotated[Section, ByKind("latelier.tokenizers:TOKENIZERS")]
    Denoiser = Annotated[Section, ByKind("latelier.denoisers:DENOISERS", default="lightning-dit")]

__all__ = [
    "Adversarial", "Count", "Data", "Evaluate", "Prefixes", "Process", "Recipe", "Sample", "Section",
    "TrainedTokenizer", "Training", "apply_overrides", "as_numbers", "build_recipe", "dump", "find_recipe",
    "first_problem", "load_recipe", "parse_count", "read_yaml", "recipe_files", "schema",
]  # fmt: skip

MOST_VALUES = 100_000  # of a YAML file
# In a wheel recipes are inside the package, in a clone at its root.
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")


class Recipe(Section):
    """One experiment, from data to report."""

    name: Name
    seed: Seed = 0
    runs: str = Field("runs", description="folder in which the run folder is made")
    data: Data
    tokenizer: Tokenizer
    denoiser: Denoiser | None = None
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _check_convergence(self) -> Recipe:
        if "convergence" in self.evaluate.metrics and not (self.denoiser and self.denoiser.snapshots):
            raise LatelierError(
                "evaluate.metrics has convergence, which is measured at snapshots of the denoiser's training; set "
                "denoiser.snapshots to 2 or more."
            )
        followed = [name for name in self.evaluate.metrics if METRICS[name].followed]
        known = " or ".join(name for name, metric in METRICS.items() if metric.followed)
        if self.evaluate.every and not (self.denoiser and followed):
            lacks = f"evaluate.metrics has no {known}" if self.denoiser else "there is no denoiser"
            raise LatelierError(f"evaluate.every measures {known} while the denoiser is trained, but {lacks}.")
        for name in self.evaluate.quality:
            if name not in followed or not (self.evaluate.every or "convergence" in self.evaluate.metrics):
                advice = f"set evaluate.every, and have {known} in evaluate.metrics"
                raise LatelierError(f"evaluate.quality: {name!r} is not followed through the training; {advice}.")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Recipe:
        """Build what `model` changes, on the meta device, so that what a constructor refuses is refused here."""
        section, denoiser = self.tokenizer, self.denoiser
        fresh = isinstance(section, TrainedTokenizer) and not section.init
        rebuilt = denoiser is not None and denoiser.model and not denoiser.init
        if not rebuilt and not (fresh and section.model):  # type: ignore[union-attr]
            return self
        import torch

        from latelier.denoisers import build_denoiser
        from latelier.tokenizers import build_tokenizer, tokenizer_info

        shape: tuple[int, ...] = (4, *[64 * (denoiser.patch if denoiser else 1)] * 2)
        with torch.device("meta"):
            if fresh:
                with reading("The recipe's tokenizer cannot be built", "change tokenizer.model"):
                    info = tokenizer_info(build_tokenizer(section, self.data))
                shape = info.latent_shape(*self.data.image_size)
            if denoiser is not None and rebuilt:
                injected = {condition.kind: getattr(condition, "inject", "") for condition in denoiser.condition}
                tokens = any(injected.get(kind, "vector") != "vector" for kind in ("class", "text", "layout"))
                with reading("The recipe's denoiser cannot be built", "change denoiser.model"):
                    build_denoiser(denoiser, shape, 64 * tokens)
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs) / self.name


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides; an error names the file, key or value that is wrong."""
    given, path = Path(path), find_recipe(path)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise LatelierError(f"{path} must be a YAML mapping with at least `name`, `data` and `tokenizer`.")
    if given.is_dir():  # a run folder, perhaps moved since
        tree |= {"runs": str(given.resolve().parent), "name": given.resolve().name}
    return build_recipe(apply_overrides(tree, overrides))


def read_yaml(source: Path | str, name: str | None = None) -> Any:
    """The content of a YAML file, or of a value on the command line, which has a name for the error."""
    try:
        content = yaml.safe_load(source if isinstance(source, str) else source.read_text(encoding="utf-8"))
        if _count(content, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, since aliases multiply")
        return content
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes that are no text, absurd dates
        reason = "its sections have no end" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise LatelierError(f"{name or source} is not valid YAML: {reason}") from None


def _count(node: Any, known: dict[int, int]) -> int:
    """Values in a tree, each counted as often as aliases repeat it."""
    if isinstance(node, dict | list) and id(node) not in known:
        known[id(node)] = sum(_count(value, known) for value in (node.values() if isinstance(node, dict) else node))
    return known.get(id(node), 1)


def recipe_files() -> dict[str, Path]:
    """The bundled recipes by name, such as `quickstart` and `ldm/scenes`."""
    paths = ((folder, path) for folder in _FOLDERS if folder.is_dir() for path in folder.rglob("*.yaml"))
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for folder, path in paths}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item)))


def find_recipe(name: str | Path) -> Path:
    """A recipe file from its path, a run folder, or the name of a bundled recipe."""
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    for known, candidate in recipe_files().items():
        if str(name) in (candidate.stem, known):
            return candidate
    near = difflib.get_close_matches(path.stem, [c.stem for c in recipe_files().values()], 1, 0.6)
    hint = f"did you mean {near[0]!r}?" if near else "`latelier recipe list` shows those that come along."
    raise LatelierError(f"There is no recipe at {path}; {hint}")


def apply_overrides(tree: dict, overrides: list[str] | tuple[str, ...]) -> dict:
    """Set `a.b=c` in a tree of dicts; `c` is read as YAML."""
    for override in overrides:
        keys, equals, value = override.partition("=")
        if not equals or not keys:
            raise LatelierError(f"Override {override!r} is not of the form key=value, such as tokenizer.lr=1e-4.")
        *parents, last = keys.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise LatelierError(f"Override {override!r}: {key!r} is a value, not a section.")
        node[last] = read_yaml(value, f"The value of {override!r}")
    return tree


def build_recipe(tree: dict) -> Recipe:
    """Validate a tree; the first problem becomes one sentence."""
    try:
        return Recipe.model_validate(as_numbers(tree))
    except ValidationError as error:
        raise LatelierError(first_problem(error)) from None


def schema() -> dict:
    """The JSON schema, for editors."""
    return Recipe.model_json_schema()


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def as_numbers(node: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; strings that look like such numbers become numbers."""
    if isinstance(node, dict):
        return {k: as_numbers(v) for k, v in node.items()}
    if isinstance(node, list):
        return [as_numbers(v) for v in node]
    if isinstance(node, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", node):
        return float(node)
    return node
