"""What rounding sees of a codec."""
