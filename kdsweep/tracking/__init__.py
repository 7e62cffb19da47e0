"""All of MLflow: where it lies, what is written there, and what keeps it equal to the folders."""
