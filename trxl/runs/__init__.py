"""Host side of a run: command line, loop, files, processes."""
