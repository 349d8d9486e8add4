"""The host side of a run: command line, loop, files, processes."""
