"""Tables, graphs and one self-contained HTML page, made from rows of results and from nothing else."""
