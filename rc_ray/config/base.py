"""What all configuration sections share."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

NAME_PATTERN = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")
# Objectives give names to pools and, as `score_<objective>`, to stages; these are others' names there.
RESERVED_NAMES = frozenset({"generation", "before", "after"})


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys forbidden, descriptions taken from the docstrings under the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )
