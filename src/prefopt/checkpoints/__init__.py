"""What a checkpoint holds and how it stays whole: states without pickle, checksums, folders."""
