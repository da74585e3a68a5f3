"""Generate the table of values in the chart's README from the comments in values.yaml: `python k8s/chart_readme.py`. A test compares."""

import re
from collections.abc import Iterator
from pathlib import Path

CHART = Path(__file__).parent / "chart"
LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?: (?P<value>.*?))??(?:  # -- (?P<says>.*))?$")
BEGIN, END = "<!-- values: written by python k8s/chart_readme.py -->\n", "<!-- end of values -->\n"


def rows(values: str) -> Iterator[tuple[str, str, str]]:
    """(path, default, description) of every line with a comment.

    Raises:
        ValueError: a value has no comment.
    """
    path: list[str] = []
    for number, line in enumerate(values.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.match(line)
        if match is None:
            raise ValueError(f"values.yaml:{number}: one setting in a line, so that the table can be made: {line!r}")
        path[len(match["indent"]) // 2 :] = [match["key"]]
        if match["says"]:
            yield ".".join(path), (match["value"] or "").strip(), match["says"]
        elif match["value"]:
            raise ValueError(f"values.yaml:{number}: say after `# --` what {'.'.join(path)} is")


def readme(text: str, values: str) -> str:
    """``text`` with its table regenerated."""
    before, _, rest = text.partition(BEGIN)
    table = "".join(f"| `{path}` | `{default}` | {says} |\n" for path, default, says in rows(values))
    return f"{before}{BEGIN}| Value | Default | What it is |\n|---|---|---|\n{table}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    file = CHART / "README.md"
    file.write_text(readme(file.read_text(), (CHART / "values.yaml").read_text()))
