"""``eckart schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from eckart.cli.recipe import RECIPES
from eckart.errors import InputError, unknown


def schema(
    verb: Annotated[str, typer.Argument(metavar="[VERB]", help="Verb, such as inspect or plan.")] = "compress",
) -> None:
    """Print the JSON Schema of a verb's recipe file, for editors."""
    if verb not in RECIPES:
        raise InputError(unknown("verb with a recipe", verb, RECIPES))
    print(json.dumps(RECIPES[verb].model_json_schema(), indent=2))
