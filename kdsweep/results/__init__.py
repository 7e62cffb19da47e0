"""Results of a sweep: tables, effects, costs, figures and the report."""
