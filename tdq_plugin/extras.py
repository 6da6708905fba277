"""How an extra of this package is installed, as messages say it."""

__all__ = ["INSTALL"]

# This package is not on PyPI.
INSTALL = "From a checkout of tdq-plugin: pip install -c constraints.txt -e '.[{}]'"
