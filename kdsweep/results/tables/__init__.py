"""The tables, one module each: HEADING, `make(sweep, options)`, and `applies(sweep, store)` where not all sweeps do."""

import pkgutil

TABLES = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "command")
