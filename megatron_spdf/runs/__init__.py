"""Run directories, their logs, and grids of runs."""
