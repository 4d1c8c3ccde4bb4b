import json

import jsonschema
import pytest
from pydantic import BaseModel

from dora_mm.config.descriptions import descriptions_of, json_schema, sections_of
from dora_mm.config.paths import packaged_configs
from dora_mm.config.pipelines import SCHEMAS
from dora_mm.preview.drafts import SCHEMA
from dora_mm.utils import yaml12
from tests.documented import keys

VALIDATOR = jsonschema.Draft202012Validator(json_schema())
SECTIONS = {section for schema in SCHEMAS.values() for section in sections_of(schema)}


def test_the_file_in_the_wheel_is_the_schema():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "dora-mm schema --output " + str(SCHEMA)


def test_the_page_of_keys_is_that_of_the_schema():
    assert keys.PAGE.read_text(encoding="utf-8") == keys.page(), "python -m tests.documented.keys"


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("file", packaged_configs().values(), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_packaged_configs_are_valid(file):
    VALIDATOR.validate(yaml12.read(file.read_text(encoding="utf-8")).value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline": "train"}, "'train' is not one of"),
        ({}, "'pipeline' is a required property"),
        ({"pipeline": "train_vl", "trian": {}}, "'trian' was unexpected"),
        ({"pipeline": "tune", "steps": "many"}, "'steps' was unexpected"),
    ],
)
def test_wrong_configs_are_not(values, message):
    assert any(message in error.message for error in VALIDATOR.iter_errors(values))


def test_every_key_is_described():
    missing = {
        section.__name__: [
            key
            for key, field in section.model_fields.items()
            if key not in descriptions_of(section) and not inner_sections(field.annotation)
        ]
        for section in SECTIONS
    }
    assert {name: keys for name, keys in missing.items() if keys and set(keys) != {"pipeline"}} == {}


def inner_sections(annotation):
    text = repr(annotation)
    return any(section.__name__ in text for section in SECTIONS if issubclass(section, BaseModel))


def test_descriptions_are_those_of_the_comments():
    train = json_schema()["$defs"]["VLTrainConfig"]["properties"]
    assert train["batch_size"]["description"] == "examples per micro-batch and process"
    assert train["gradient_accumulation_steps"]["default"] == 1
