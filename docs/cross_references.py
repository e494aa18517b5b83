"""What the reference pages need from the source beyond mkdocstrings: roles as links, doctests as code, functions before
files.

A name that leads nowhere fails the strict build.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

LINKED = re.compile(r":(?:func|class|meth|data|attr):`([^`]+)`")
NAMED = re.compile(r":(?:mod|doc|file):(`[^`]+`)")
"""Modules inside of a room have no pages."""
EXAMPLE = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.M)
"""A doctest at the margin, up to the next empty line."""


class CrossReferences(griffe.Extension):
    """Runs while mkdocstrings reads the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """A name in backticks after ``:func:`` and the like becomes a link, a doctest a block of code."""
        if obj.docstring:
            linked = NAMED.sub(r"\1", LINKED.sub(r"[`\1`][\1]", obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", linked)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Where a file is named after its function, the package's member is the function, as in Python."""
        hidden = [
            (module, name)
            for module in _modules(pkg)
            for name, target in module.imports.items()
            if target == f"{module.path}.{name}.{name}" and not module.members[name].is_alias
        ]
        # Other aliases find their targets by paths that are about to lead to these functions.
        paths = tuple(f"{module.path}.{name}." for module, name in hidden)
        for module in _modules(pkg):
            for member in module.members.values():
                if member.is_alias and member.target_path.startswith(paths):
                    member.resolve_target()
        for module, name in hidden:
            function = module.members[name].members[name]
            module.members[name] = griffe.Alias(name, target=function, parent=module)


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from _modules(member)
