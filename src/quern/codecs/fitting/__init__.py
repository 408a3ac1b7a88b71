"""Parameters of codecs that are found by more than a formula."""
