"""The chart's README has what values.yaml says."""

import json

import yaml

from k8s.chart_readme import readme, rows
from tests.k8s.chart import CHART

VALUES = (CHART / "values.yaml").read_text()


def test_the_table_is_fresh() -> None:
    text = (CHART / "README.md").read_text()
    assert text == readme(text, VALUES), "run: python k8s/chart_readme.py"


def test_every_value_has_a_row() -> None:
    told = {path for path, _, _ in rows(VALUES)}
    tree = yaml.safe_load(VALUES)

    def leaves(node: object, path: str) -> set[str]:
        if path in told or not isinstance(node, dict):
            return {path}
        return {leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))}

    assert leaves(tree, "") == told


def test_the_schema_knows_what_values_has_and_nothing_else() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def same(values: object, known: dict, path: str) -> None:
        if "properties" in known and isinstance(values, dict) and values:
            assert known["additionalProperties"] is False, path
            missing = known["properties"].keys() - values.keys() - {"global"}
            assert not missing or not path, (path, missing)
            for key, value in values.items():
                same(value, known["properties"][key], f"{path}.{key}")

    same(yaml.safe_load(VALUES), schema, "")
