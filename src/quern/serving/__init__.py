"""A server: requests of many people on one model, over the protocols that their clients speak."""
