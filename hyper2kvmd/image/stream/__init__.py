"""Our own reader of sparse VMDKs: one read of the file gives the converted disk and the file's checksum."""
