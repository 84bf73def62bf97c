"""What is on disk: a delta's two files, the names in them, and what ties them to one base checkpoint."""
