"""From a table of queries to the prompts that a model is given."""
