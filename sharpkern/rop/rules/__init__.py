"""One file per family of ops; every module of this package is imported, and so registers its rules."""

from importlib import import_module
from pkgutil import iter_modules

# Found and not listed: a file that was forgotten in a list would send its ops to the fallback without a word.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
