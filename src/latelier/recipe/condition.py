"""The recipe's `denoiser.condition`: a list of sections, each of the class that its conditioner's file defines."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import core_schema

from latelier.conditioning import CONDITIONERS, parse_conditions, section_class
from latelier.errors import LatelierError
from latelier.recipe.problems import first_problem
from latelier.sections import Section


class _ConditionType:
    """Validates a section by its `kind`, whose class is looked up only then: opening a recipe imports no other kind."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda section: section.model_dump(mode="json"))
        return core_schema.no_info_plain_validator_function(_validate, serialization=dump)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        classes = tuple(section_class(kind) for kind in CONDITIONERS)
        return handler(TypeAdapter(Union[classes]).core_schema)  # type: ignore[arg-type]  # noqa: UP007


def _validate(value: Any) -> Section:
    if isinstance(value, Section):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise LatelierError(
            f"denoiser.condition has {value!r}; give a kind ({', '.join(CONDITIONERS)}), or a section with a `kind`."
        )
    model = section_class(value["kind"])
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise LatelierError(first_problem(error, model, "denoiser.condition.")) from None


Conditions = Annotated[list[Annotated[Any, _ConditionType]], BeforeValidator(parse_conditions)]
