"""One file per draft method; the file name is its `--spec-method` name."""
