"""The command line: it parses into the same configs, which go to the same trainers."""
