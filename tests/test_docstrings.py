"""Names that docstrings and comments mention exist: errors in ``Raises:`` blocks, and whatever is in single backticks.

Values and the names of other projects go into double backticks. Files are read as text, not imported, so that this takes a second.
"""

import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("parallel", "model", "engine", "cluster", "serve", "benchmarks", "tests")
FILES = sorted(
    file
    for folder in (*PACKAGES, "client", "k8s")
    for file in (ROOT / folder).rglob("*.py")
    if not {"_generated", "_sync", "build"} & set(file.relative_to(ROOT).parts) and file != Path(__file__)
)
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
COMMENT = re.compile(r"#.*")
RAISES = re.compile(r"^( *)Raises:\n((?:\1 +\S.*\n?)+)", re.MULTILINE)
ERRORS = re.compile(r" *([A-Z]\w+(?:(?:, | or | and )[A-Z]\w+)*)(?::|$)")
IN_BACKTICKS = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`(?!`)")
CLASS = re.compile(r"^class (\w+).*\n((?: {4}.*\n|\n)+)", re.MULTILINE)
FIELD = re.compile(r"^ {4}(\w+): (\w+)", re.MULTILINE)


@cache
def sources() -> dict[str, str]:
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text() for file in FILES}


@cache
def words(module: str) -> frozenset[str]:
    """All words of a module's code, also those in its strings."""
    return frozenset(re.findall(r"\w+", COMMENT.sub("", DOCSTRING.sub("", sources()[module]))))


@cache
def all_words() -> frozenset[str]:
    paths = {part for file in FILES for part in (*file.relative_to(ROOT).with_suffix("").parts, "py")}
    return frozenset(dir(builtins)).union(paths, *(words(module) for module in sources()))


@cache
def settings() -> frozenset[str]:
    """Every ``section.field`` of `serve.config.ServeConfig`."""
    fields = {match[1]: FIELD.findall(match[2]) for source in sources().values() for match in CLASS.finditer(source)}
    return frozenset(f"{section}.{field}" for section, kind in fields["ServeConfig"] for field, _ in fields.get(kind, ()))


def exists(name: str) -> bool:
    """Whether a name in backticks is something in the code.

    One that begins with a package is a setting, a module, or something in a module. Of any other every part must occur somewhere.
    """
    parts = name.split(".")
    if len(parts) == 1 or parts[0] not in PACKAGES:
        return all_words().issuperset(parts)
    if name in settings() or any(module.startswith(f"{name}.") for module in sources()):
        return True
    for length in range(len(parts), 0, -1):
        if (module := ".".join(parts[:length])) in sources():
            return words(module).issuperset(parts[length:])
    return False


def said() -> Iterator[tuple[str, str]]:
    """(place, text) of all docstrings and comments."""
    for module, source in sources().items():
        for kind in (DOCSTRING, COMMENT):
            for match in kind.finditer(source):
                yield f"{module}, line {source.count(chr(10), 0, match.start()) + 1}", match[0]


def test_which_names_exist() -> None:
    for name in ("engine.kv", "engine.plan", "engine.plan.StepPlan.step", "engine.max_running", "StepPlan.step", "num_computed"):
        assert exists(name), name
    for name in ("engine.no_such_name", "engine.plan.NoSuchName", "engine.plan.StepPlan.no_such_name", "NoSuchName"):
        assert not exists(name), name


def test_errors_in_raises_blocks_exist() -> None:
    entries = [(where, line) for where, text in said() for block in RAISES.finditer(text) for line in block[2].splitlines()]
    errors = [(where, error) for where, line in entries if (match := ERRORS.match(line)) for error in re.split(r", | or | and ", match[1])]
    assert len(errors) > 100
    assert [(where, error) for where, error in errors if error not in all_words()] == []


def test_names_in_backticks_exist() -> None:
    names = [(where, match[1]) for where, text in said() for match in IN_BACKTICKS.finditer(text)]
    assert len(names) > 500
    assert [(where, name) for where, name in names if not exists(name)] == []
