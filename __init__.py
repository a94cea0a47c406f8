"""Shoal: a Ray-based distributed serving cluster for large language models, with an engine of its own."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("shoal")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0.0.0+source"
