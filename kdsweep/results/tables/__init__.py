"""The tables, one module each: HEADING, `make(sweep, options)`, and `applies(sweep, store)` where not all sweeps do."""
