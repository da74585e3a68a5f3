"""A package, so that `from tests.ranks import ...` never finds the `tests` that some library has left in site-packages."""
