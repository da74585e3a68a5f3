"""Renders a checkpoint's Jinja template by Hugging Face's conventions, in a sandbox with bounded time and memory."""

import datetime
import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer


class TemplateRefused(Exception):
    """The template cannot be rendered with these values. The message may be shown to the client."""


class _Bounds:
    def __init__(self, *, seconds: float, chars: int) -> None:
        self._end, self._chars = time.monotonic() + seconds, chars

    def check_time(self) -> str:
        if time.monotonic() > self._end:
            raise TemplateRefused("the chat template takes too long for these messages")
        return ""

    def check_chars(self, chars: int) -> None:
        if chars > self._chars:
            raise TemplateRefused(f"the chat template writes more than {self._chars} characters")


_bounds: ContextVar[_Bounds] = ContextVar("_bounds")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def check_time(self) -> str:
        """Called in every iteration of every loop; renders as nothing."""
        return _bounds.get().check_time()

    def join(self, *parts: Any) -> str:
        """The operator ``~``."""
        texts = [str(part) for part in parts]
        _bounds.get().check_chars(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _bounds.get().check_chars(len(left) + len(right))
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            length, times = (right, left) if isinstance(left, int) else (left, right)
            _bounds.get().check_chars(len(length) * int(times))
        elif operator == "**" and max(abs(left), abs(right)) > 1_000:
            raise TemplateRefused("the chat template computes with numbers that are too large")
        return super().call_binop(context, operator, left, right)


class _Bounded(NodeTransformer):
    """Inserts `_Environment.check_time` into every loop and macro, and replaces ``~`` by `_Environment.join`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (jinja calls it so)
        return self._with_check(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802  (jinja calls it so)
        return self._with_check(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (jinja calls it so)
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join"), node.nodes, [], None, None, lineno=node.lineno)

    def _with_check(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.Output([check], lineno=node.lineno))
        return node


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model is trained on; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012  (the library's own type)

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _raise_exception(message: str) -> None:
    raise TemplateRefused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Replaces Jinja's own filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class SandboxedTemplate:
    """Compiled once, rendered by many requests."""

    def __init__(self, source: str) -> None:
        """
        Raises:
            ValueError: ``source`` is not a Jinja template.
        """
        environment = _environment()
        try:
            tree = _Bounded().visit(environment.parse(source))
            self._template = environment.template_class.from_code(environment, environment.compile(tree), environment.globals)
        except jinja2.TemplateError as error:
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise ValueError(f"it is not a Jinja template: {error.message}{line}") from error

    def render(self, values: Mapping[str, Any], *, seconds: float, chars: int) -> str:
        """Render the template within bounds of time and length.

        Raises:
            TemplateRefused: the template raises an exception of its own, fails on these values, or exceeds a limit.
        """
        bounds = _Bounds(seconds=seconds, chars=chars)
        token = _bounds.set(bounds)
        try:
            return self._render(values, bounds)
        except TemplateRefused:
            raise
        except Exception as error:
            raise TemplateRefused("the model's chat template fails on these messages") from error
        finally:
            _bounds.reset(token)

    def _render(self, values: Mapping[str, Any], bounds: _Bounds) -> str:
        parts, length = [], 0
        for part in self._template.generate(values):
            length += len(part)
            bounds.check_chars(length)
            bounds.check_time()
            parts.append(part)
        return "".join(parts)
