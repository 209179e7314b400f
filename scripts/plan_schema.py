"""Prints the JSON Schema of a plan, made from its classes: docs/plan.schema.json is this output."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from autofit.plan import SCHEMA_VERSION, Plan


def plan_schema() -> dict[str, Any]:
    """Return the schema of what `--json` prints: every field is there, and no other."""
    (reference,), components = msgspec.json.schema_components([Plan], ref_template="#/$defs/{name}")
    for component in components.values():
        component |= {"required": list(component["properties"]), "additionalProperties": False}
    components["Plan"]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"autofit plan, schema_version {SCHEMA_VERSION}",
        **reference,
        "$defs": components,
    }


if __name__ == "__main__":
    print(json.dumps(plan_schema(), indent=2))
