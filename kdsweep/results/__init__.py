"""What comes out of a sweep: tables, effects, costs, figures and the report."""
