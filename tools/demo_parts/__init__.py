"""What `make demo` makes for itself: corpus, table-to-text set, tables and plot. tools/demo.py puts
it together."""
