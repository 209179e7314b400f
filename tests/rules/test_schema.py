"""The published schema is the one the classes have, and it refuses what is not a plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from autofit.plan import from_json, to_json

CHECKOUT = Path(__file__).resolve().parents[2]
SCHEMA = CHECKOUT / "docs" / "plan.schema.json"


@pytest.fixture(scope="module")
def schema():
    """Return the published schema."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def test_the_published_schema_is_current():
    """docs/plan.schema.json is what scripts/plan_schema.py prints; scripts/docs.sh writes it."""
    command = [sys.executable, str(CHECKOUT / "scripts" / "plan_schema.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == SCHEMA.read_text(encoding="utf-8")


def test_a_plan_is_valid(plan, schema):
    """What to_json writes satisfies the schema, with every optional figure left out as null."""
    jsonschema.validate(json.loads(to_json(plan)), schema)


def test_a_plan_comes_back_identical(plan):
    """Reading what was written gives an equal plan, and writing it again the same text."""
    assert from_json(to_json(plan)) == plan
    assert to_json(from_json(to_json(plan))) == to_json(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"memory": None},
        {"surprise": 1},
        {"configuration": {"method": "prompt tuning"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_a_plan_is_refused(plan, schema, change):
    """A future version, a missing part, an unknown key and an unknown method are not valid."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(to_json(plan)) | change, schema)
